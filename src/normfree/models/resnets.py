"""Batch-normalised ResNets, and those with other normalizers: the paper's main comparisons.

Version 1, post-activation:

    x_{l+1} = act(shortcut(x_l) + f_l(x_l)),   f = norm conv1x1 . act norm conv3x3 . act norm conv1x1

Version 2, pre-activation, where pre is normalizer then activation, or the reverse, and the shortcut is x_l, or a 1x1
convolution of pre(x_l) where the shape changes:

    x_{l+1} = shortcut + f_l(x_l),   f = conv1x1 pre . conv3x3 pre . conv1x1 pre

Sources: He et al. 2016 (arXiv 1512.03385), with the stride in the 3x3 convolution; He et al. 2016 (arXiv 1603.05027);
Brock, De, Smith, ICLR 2021, section 3 (both orders are plotted).

*Neither a normalizer nor standardized weights.* SkipInit, pre-activation, with a learnable scalar that starts each
branch at zero:

    x_{l+1} = shortcut + s * f_l(act(x_l)),   f = conv1x1 . act conv3x3 . act conv1x1

s   skip gain, learnable, one per block, starts at 0; it is in the weights of the branch's last convolution

FixUp, post-activation, trainable from the initialisation alone:

    x' = x_l + b0
    x_{l+1} = act(shortcut(x') + s * conv1x1(act(conv3x3(act(conv1x1(x') + b1) + b2) + b3) + b4) + b5)

b   scalar biases, start at 0
s   scalar scale, one per block, starts at 1; it is in the weight of the branch's last convolution
L   number of blocks: the first two convolutions of a branch start smaller by L^(-1/4), the last at zero

Sources: De, Smith 2020 (arXiv 2002.10444); Zhang, Dauphin, Ma 2019 (arXiv 1901.09321); the comparison of Brock, De,
Smith, ICLR 2021.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from normfree.common.checks import check_choice, check_number
from normfree.models.nf_resnet import resnet_places, resnet_stem, resnet_variants
from normfree.models.registry import ConvolutionName, Norm, Order, Stem, register
from normfree.models.scaffold import Backbone, BlockPlace
from normfree.nn import Activation, PaddingStyle, ScaledConv2d, ScaledWSConv2d, StochasticDepth, build_activation
from normfree.nn.recompute import with_origin

he_convolution = partial(ScaledConv2d, bias=False, init_scale=math.sqrt(2))
"""A convolution without bias, of He-normal (fan-in) weights."""
CONVOLUTIONS: dict[ConvolutionName, Callable[..., nn.Module]] = {
    "scaled": he_convolution,
    "scaled_ws": partial(ScaledWSConv2d, bias=False),
}


class PostActivationBlock(nn.Module):
    """A bottleneck block with a batch norm after each convolution: the equations at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        activation: copied.
        padding: "symmetric" or "same".

    Source: He et al. 2016.
    """

    def __init__(self, place: BlockPlace, activation: nn.Module, padding: PaddingStyle) -> None:
        super().__init__()
        convolution = partial(he_convolution, padding=padding)
        inner, out = place.branch_channels, place.out_channels
        self.activation = copy.deepcopy(activation)
        self.conv0 = convolution(place.in_channels, inner, 1)
        self.norm0 = nn.BatchNorm2d(inner)
        self.conv1 = convolution(inner, inner, 3, place.stride)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = convolution(inner, out, 1)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if place.projects:
            projection = convolution(place.in_channels, out, 1, place.stride)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(out)))
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.norm0(self.conv0(x)))
        hidden = self.activation(self.norm1(self.conv1(hidden)))
        branch = self.norm2(self.conv2(hidden))
        return self.activation(self.shortcut(x) + self.stochastic_depth(branch))


@register(resnet_variants("resnet"))
class ResNet(Backbone):
    """A batch-normalised ResNet, post-activation, with He-normal (fan-in) convolutions without bias.

    Args:
        depths, width, widths, activation, stem, in_channels, padding: as ``NFResNet``'s.
        stochdepth_rate, drop_rate: 0, as in the paper's unregularised runs, which batch norm does best in.
        num_classes: outputs of the classifier; 0 for none.

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
        stem: Stem = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        places = resnet_places(depths, width, widths, in_channels, padding, stochdepth_rate)
        act, _ = build_activation(activation)
        norm = nn.BatchNorm2d(places[0][0].in_channels)
        super().__init__(
            **resnet_stem(stem, he_convolution, in_channels, places, padding, norm=norm, activation=copy.deepcopy(act)),
            places=places,
            block=partial(PostActivationBlock, activation=act, padding=padding),
            final=nn.Identity(),
            num_features=places[-1][-1].out_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )


def _group_norm(channels: int) -> nn.Module:
    # 32 groups at the paper's widths. Narrower variants have groups of four channels or more: of a map of one pixel, a
    # group of one channel is a value normalized by itself, which is zero.
    return nn.GroupNorm(32 if channels % 32 == 0 and channels >= 64 else math.gcd(32, max(1, channels // 4)), channels)


NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": _group_norm,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    None: lambda channels: nn.Identity(),
}


@dataclass(frozen=True)
class Preactivation:
    """Makes what precedes a convolution: a normalizer and an activation, in either order."""

    norm: Norm
    order: Order
    activation: nn.Module

    def __call__(self, channels: int) -> nn.Sequential:
        """Return the two layers for a map of so many channels."""
        norm = ("norm", NORMS[self.norm](channels))
        activation = ("activation", copy.deepcopy(self.activation))
        layers = [norm, activation] if self.order == "norm-act" else [activation, norm]
        return nn.Sequential(OrderedDict(layers))


class PreactivationBlock(nn.Module):
    """A pre-activation bottleneck block: the equations at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        preactivation: makes the layers before each convolution.
        convolution: makes a convolution without bias of (in_channels, out_channels, kernel size, stride).

    Source: He et al. 2016.
    """

    def __init__(self, place: BlockPlace, preactivation: Preactivation, convolution: Callable[..., nn.Module]) -> None:
        super().__init__()
        inner, out = place.branch_channels, place.out_channels
        self.pre0 = preactivation(place.in_channels)
        self.conv0 = convolution(place.in_channels, inner, 1)
        self.pre1 = preactivation(inner)
        self.conv1 = convolution(inner, inner, 3, place.stride)
        self.pre2 = preactivation(inner)
        self.conv2 = convolution(inner, out, 1)
        self.shortcut = convolution(place.in_channels, out, 1, place.stride) if place.projects else None
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.pre0(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        branch = self.conv2(self.pre2(self.conv1(self.pre1(self.conv0(activated)))))
        return shortcut + self.stochastic_depth(branch)


@register(resnet_variants("resnetv2_"))
class ResNetV2(Backbone):
    """A pre-activation ResNet whose convolutions have no bias.

    Args:
        depths, width, widths, activation, stem, in_channels, padding: as ``NFResNet``'s.
        norm: "batch", "group" (32 groups), "layer" (over channels and space), "instance" (affine) or None.
        order: "norm-act" (BN-ReLU-Conv) or "act-norm" (ReLU-BN-Conv).
        conv: "scaled" (He-normal, fan-in) or "scaled_ws" (standardized weights beside the normalizer).
        stochdepth_rate, drop_rate: 0, as in the paper's unregularised runs, which batch norm does best in.
        num_classes: outputs of the classifier; 0 for none.

    Raises:
        ValueError: a value that breaks its rule.

    Source: He et al. 2016; Brock et al. 2021; standardized weights beside group norm: Qiao et al. 2019 (arXiv
    1903.10520).
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        activation: Activation = "relu",
        norm: Norm = "batch",
        order: Order = "norm-act",
        conv: ConvolutionName = "scaled",
        stochdepth_rate: float = 0.0,
        drop_rate: float = 0.0,
        stem: Stem = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        places = resnet_places(depths, width, widths, in_channels, padding, stochdepth_rate)
        check_choice("norm", norm, Norm)
        check_choice("order", order, Order)
        convolution = CONVOLUTIONS[check_choice("conv", conv, ConvolutionName)]
        preactivation = Preactivation(norm, order, build_activation(activation)[0])
        super().__init__(
            **resnet_stem(stem, convolution, in_channels, places, padding),
            places=places,
            block=partial(
                PreactivationBlock, preactivation=preactivation, convolution=partial(convolution, padding=padding)
            ),
            final=preactivation(places[-1][-1].out_channels),
            num_features=places[-1][-1].out_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )


# --- SkipInit and FixUp -----------------------------------------------------------------------------------------------


class SkipInitBlock(nn.Module):
    """A bottleneck block with a skip gain: the equations at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        activation: copied.
        skipinit_gain: initial skip gain.
        padding: "symmetric" or "same".

    Source: De, Smith 2020.
    """

    def __init__(self, place: BlockPlace, activation: nn.Module, skipinit_gain: float, padding: PaddingStyle) -> None:
        super().__init__()
        convolution = partial(ScaledConv2d, padding=padding, init_scale=math.sqrt(2))
        inner, out = place.branch_channels, place.out_channels
        self.activation = copy.deepcopy(activation)
        self.conv0 = convolution(place.in_channels, inner, 1)
        self.conv1 = convolution(inner, inner, 3, place.stride)
        self.conv2 = convolution(inner, out, 1, skip_gain=skipinit_gain)
        self.shortcut = convolution(place.in_channels, out, 1, place.stride) if place.projects else None
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.conv1(hidden))
        return shortcut + self.stochastic_depth(self.conv2(hidden))


@register(resnet_variants("skipinit_resnet"))
class SkipInitResNet(Backbone):
    """A SkipInit ResNet with He-normal (fan-in) convolutions; all but the stem's have a bias.

    Args:
        depths, width, widths, activation, stem, in_channels, padding: as ``NFResNet``'s.
        stochdepth_rate: of the last block, nearly; grows linearly from 0. The paper's regularised runs: 0.1.
        drop_rate: dropout before the classifier. The paper's regularised runs: 0.25.
        skipinit_gain: initial value of every skip gain.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.

    Raises:
        ValueError: a value that breaks its rule.

    Source: De, Smith 2020; Brock et al. 2021.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        activation: Activation = "relu",
        stochdepth_rate: float = 0.1,
        drop_rate: float = 0.25,
        skipinit_gain: float = 0.0,
        stem: Stem = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        places = resnet_places(depths, width, widths, in_channels, padding, stochdepth_rate)
        act, _ = build_activation(activation)
        gain = check_number("skipinit_gain", skipinit_gain)
        stem_convolution = partial(ScaledConv2d, bias=False, init_scale=math.sqrt(2))
        super().__init__(
            **resnet_stem(stem, stem_convolution, in_channels, places, padding),
            places=places,
            block=partial(SkipInitBlock, activation=act, skipinit_gain=gain, padding=padding),
            final=copy.deepcopy(act),
            num_features=places[-1][-1].out_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )


class ScalarBias(nn.Module):
    """Add one learnable number, 0 to begin with, to every element."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        shifted = x + self.bias
        if not torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            with_origin(shifted, torch.add, x, self.bias)
        return shifted


def _he_fan_out(convolution: ScaledConv2d, factor: float = 1.0) -> ScaledConv2d:
    """Draw the weight anew with standard deviation ``factor * sqrt(2 / (out_channels * kh * kw))``."""
    fan_out = convolution.weight[:, 0].numel()
    nn.init.normal_(convolution.weight, std=factor * math.sqrt(2 / fan_out))
    return convolution


class FixUpBlock(nn.Module):
    """A FixUp bottleneck block: the equations at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        activation: copied.
        blocks: L, the number of blocks in the network.
        padding: "symmetric" or "same".

    Source: Zhang et al. 2019.
    """

    def __init__(self, place: BlockPlace, activation: nn.Module, blocks: int, padding: PaddingStyle) -> None:
        super().__init__()
        convolution = partial(ScaledConv2d, padding=padding, bias=False)
        inner, out = place.branch_channels, place.out_channels
        shrink = blocks**-0.25
        self.activation = copy.deepcopy(activation)
        self.bias0 = ScalarBias()
        self.conv0 = _he_fan_out(convolution(place.in_channels, inner, 1), shrink)
        self.bias1 = ScalarBias()
        self.bias2 = ScalarBias()
        self.conv1 = _he_fan_out(convolution(inner, inner, 3, place.stride), shrink)
        self.bias3 = ScalarBias()
        self.bias4 = ScalarBias()
        self.conv2 = _he_fan_out(convolution(inner, out, 1, skip_gain=1.0), 0.0)
        self.bias5 = ScalarBias()
        self.shortcut: nn.Module = nn.Identity()
        if place.projects:
            self.shortcut = _he_fan_out(convolution(place.in_channels, out, 1, place.stride))
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bias0(x)
        hidden = self.activation(self.bias1(self.conv0(x)))
        hidden = self.activation(self.bias3(self.conv1(self.bias2(hidden))))
        branch = self.bias5(self.conv2(self.bias4(hidden)))
        return self.activation(self.shortcut(x) + self.stochastic_depth(branch))


@register(resnet_variants("fixup_resnet"))
class FixUpResNet(Backbone):
    """A FixUp ResNet; convolutions without bias, scalar biases, one more of them before the classifier.

    Args:
        depths, width, widths, activation, stem, in_channels, padding: as ``NFResNet``'s.
        stochdepth_rate: of the last block, nearly; grows linearly from 0. The paper's regularised runs: 0.1.
        drop_rate: dropout before the classifier. The paper's regularised runs: 0.25.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.

    Raises:
        ValueError: a value that breaks its rule.

    Source: Zhang et al. 2019; Brock et al. 2021.
    """

    post_activation = True

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        activation: Activation = "relu",
        stochdepth_rate: float = 0.1,
        drop_rate: float = 0.25,
        stem: Stem = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        places = resnet_places(depths, width, widths, in_channels, padding, stochdepth_rate)
        act, _ = build_activation(activation)
        after = {"bias": ScalarBias(), "activation": copy.deepcopy(act)}

        def stem_convolution(*shape: int, padding: PaddingStyle) -> ScaledConv2d:
            return _he_fan_out(ScaledConv2d(*shape, padding=padding, bias=False))  # type: ignore[arg-type]

        super().__init__(
            **resnet_stem(stem, stem_convolution, in_channels, places, padding, **after),
            places=places,
            block=partial(FixUpBlock, activation=act, blocks=sum(depths), padding=padding),
            final=nn.Identity(),
            num_features=places[-1][-1].out_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )
        if num_classes > 0:
            self.classifier_bias = ScalarBias()

    def forward_head(self, pooled: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of pooled features [N, num_features]."""
        return self.classifier(self.classifier_bias(self.dropout(pooled)))
