"""Batch-normalised ResNets, post-activation (version 1): one of the paper's comparisons.

    x_{l+1} = act(shortcut(x_l) + f_l(x_l)),   f = norm conv1x1 . act norm conv3x3 . act norm conv1x1

Source: He et al. 2016 (arXiv 1512.03385), with the stride in the 3x3 convolution.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_choice
from normfree.models.registry import register
from normfree.models.scaffold import Backbone, BlockPlace, ResNetLayout, resnet_variants
from normfree.nn import Activation, ScaledConv2d, build_activation


class PostActivationBlock(nn.Module):
    """A bottleneck block with a batch norm after each convolution: the equation at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        activation: copied.
        padding: "symmetric" or "same".

    Source: He et al. 2016.
    """

    def __init__(self, place: BlockPlace, activation: nn.Module, padding: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": padding, "bias": False, "init_scale": math.sqrt(2)}
        inner, out = place.bottleneck, place.out_channels
        self.activation = copy.deepcopy(activation)
        self.conv0 = ScaledConv2d(place.in_channels, inner, 1, **options)
        self.norm0 = nn.BatchNorm2d(inner)
        self.conv1 = ScaledConv2d(inner, inner, 3, place.stride, **options)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = ScaledConv2d(inner, out, 1, **options)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if place.projects:
            projection = ScaledConv2d(place.in_channels, out, 1, place.stride, **options)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(out)))
        self.stochastic_depth = place.stochastic_depth()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.norm0(self.conv0(x)))
        hidden = self.activation(self.norm1(self.conv1(hidden)))
        branch = self.norm2(self.conv2(hidden))
        return self.activation(self.shortcut(x) + self.stochastic_depth(branch))


@register(resnet_variants("resnet"))
class ResNet(Backbone):
    """A batch-normalised ResNet, post-activation, with He-normal (fan-in) convolutions without bias.

    Args:
        depths: blocks per stage, four.
        width: multiplies the stages' 64, 128, 256, 512 channels and the stem's 16.
        widths: the stages' channels themselves, instead of ``width``.
        activation: a name, or a module, function or factory.
        stochdepth_rate, drop_rate: 0, as in the paper's unregularised runs, which batch norm does best in.
        stem: "imagenet" (7x7 of stride 2 and a max-pool), or "cifar" (3x3 of stride 1) for small images.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Raises:
        ValueError: a value that breaks its rule.

    Source: He et al. 2016.
    """

    post_activation = True

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        activation: Activation = "relu",
        stochdepth_rate: float = 0.0,
        drop_rate: float = 0.0,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: str = "symmetric",
    ) -> None:
        layout = ResNetLayout(depths, width, widths, in_channels, padding, stochdepth_rate, stem)
        act, _ = build_activation(activation)
        stem_convolution = partial(ScaledConv2d, bias=False, init_scale=math.sqrt(2))
        super().__init__(
            stem=layout.stem(
                stem_convolution, norm=nn.BatchNorm2d(layout.stem_channels), activation=copy.deepcopy(act)
            ),
            stages=[
                nn.Sequential(*(PostActivationBlock(place, act, padding) for place in places))
                for places in layout.places()
            ],
            final=nn.Identity(),
            feature_info=layout.feature_info(),
            num_features=layout.stage_channels[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )


# MERGED from models/resnets.py
#
#     x_{l+1} = shortcut + f_l(x_l),   f = conv1x1 pre . conv3x3 pre . conv1x1 pre
#
# pre is normalizer then activation, or the reverse; the shortcut is x_l, or a 1x1 convolution of pre(x_l) where
# the shape changes.
#
# Source: He et al. 2016 (arXiv 1603.05027); Brock, De, Smith, ICLR 2021, section 3 (b


def _group_norm(channels: int) -> nn.Module:
    # 32 groups at the paper's widths; narrower variants get the most that divides their channels and 32.
    return nn.GroupNorm(math.gcd(32, channels), channels)


NORMS: dict[str | None, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": _group_norm,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    None: lambda channels: nn.Identity(),
}

ORDERS = ("norm-act", "act-norm")


@dataclass(frozen=True)
class Preactivation:
    """Makes what precedes a convolution: a normalizer and an activation, in either order."""

    norm: str | None
    order: str
    activation: nn.Module

    def __call__(self, channels: int) -> nn.Sequential:
        """Return the two layers for a map of so many channels."""
        norm = ("norm", NORMS[self.norm](channels))
        activation = ("activation", copy.deepcopy(self.activation))
        layers = [norm, activation] if self.order == "norm-act" else [activation, norm]
        return nn.Sequential(OrderedDict(layers))


class PreactivationBlock(nn.Module):
    """A pre-activation bottleneck block: the equation at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        preactivation: makes the layers before each convolution.
        padding: "symmetric" or "same".

    Source: He et al. 2016.
    """

    def __init__(self, place: BlockPlace, preactivation: Preactivation, padding: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": padding, "bias": False, "init_scale": math.sqrt(2)}
        inner, out = place.bottleneck, place.out_channels
        self.pre0 = preactivation(place.in_channels)
        self.conv0 = ScaledConv2d(place.in_channels, inner, 1, **options)
        self.pre1 = preactivation(inner)
        self.conv1 = ScaledConv2d(inner, inner, 3, place.stride, **options)
        self.pre2 = preactivation(inner)
        self.conv2 = ScaledConv2d(inner, out, 1, **options)
        self.shortcut = ScaledConv2d(place.in_channels, out, 1, place.stride, **options) if place.projects else None
        self.stochastic_depth = place.stochastic_depth()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.pre0(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        branch = self.conv2(self.pre2(self.conv1(self.pre1(self.conv0(activated)))))
        return shortcut + self.stochastic_depth(branch)


@register(resnet_variants("resnetv2_"))
class ResNetV2(Backbone):
    """A pre-activation ResNet with He-normal (fan-in) convolutions without bias.

    Args:
        depths: blocks per stage, four.
        width: multiplies the stages' 64, 128, 256, 512 channels and the stem's 16.
        widths: the stages' channels themselves, instead of ``width``.
        activation: a name, or a module, function or factory.
        norm: "batch", "group" (32 groups), "layer" (over channels and space), "instance" (affine) or None.
        order: "norm-act" (BN-ReLU-Conv) or "act-norm" (ReLU-BN-Conv).
        stochdepth_rate, drop_rate: 0, as in the paper's unregularised runs, which batch norm does best in.
        stem: "imagenet" (7x7 of stride 2 and a max-pool), or "cifar" (3x3 of stride 1) for small images.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Raises:
        ValueError: a value that breaks its rule.

    Source: He et al. 2016; Brock et al. 2021.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        activation: Activation = "relu",
        norm: str | None = "batch",
        order: str = "norm-act",
        stochdepth_rate: float = 0.0,
        drop_rate: float = 0.0,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: str = "symmetric",
    ) -> None:
        layout = ResNetLayout(depths, width, widths, in_channels, padding, stochdepth_rate, stem)
        check_choice("norm", norm, tuple(NORMS))
        check_choice("order", order, ORDERS)
        preactivation = Preactivation(norm, order, build_activation(activation)[0])
        stem_convolution = partial(ScaledConv2d, bias=False, init_scale=math.sqrt(2))
        super().__init__(
            stem=layout.stem(stem_convolution),
            stages=[
                nn.Sequential(*(PreactivationBlock(place, preactivation, padding) for place in places))
                for places in layout.places()
            ],
            final=preactivation(layout.stage_channels[-1]),
            feature_info=layout.feature_info(),
            num_features=layout.stage_channels[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )
