"""ResNets of bottleneck blocks: normalizer-free, with batch norm or another normalizer, and with neither.

In every equation x_l is what enters block l, f_l its branch, and shortcut the way beside it: x_l itself, or where the
shape changes a 1x1 convolution, with a norm behind it in version 1, of act(x_l) or pre(x_l) where the branch begins so.

alpha   factor of the branches, 0.2: the variance grows by alpha^2 per block
s       skip gain, learnable, one per block, starts at 0 (FixUp's at 1)
beta    expected standard deviation of x_l, from the variance plan
gamma   1 / sqrt(Var[act(z)]): makes an activation variance preserving
pre     normalizer then activation, or the reverse
b       scalar biases, start at 0

*Normalizer-free*, without a scalar multiplication of any feature map:

    x_{l+1} = shortcut + alpha * s * f_l(act(x_l) / beta_l),   f = conv1x1 . act conv3x3 . act conv1x1

gamma and beta are in the weights of the convolutions that follow them, alpha * s is in those of the branch's last
convolution (or in the squeeze-excite gate). The final activation's gamma, which no convolution follows, is on the
pooled features. Source: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in
unnormalized ResNets*, ICLR 2021, which compares them with the others.

*Batch-normalised, version 1*, post-activation, with the stride in the 3x3 convolution:

    x_{l+1} = act(shortcut + f_l(x_l)),   f = norm conv1x1 . act norm conv3x3 . act norm conv1x1

Source: He et al. 2016 (arXiv 1512.03385).

*Version 2*, pre-activation, of any normalizer or none, in both orders (section 3 of Brock et al. plots them):

    x_{l+1} = shortcut + f_l(x_l),   f = conv1x1 pre . conv3x3 pre . conv1x1 pre

Source: He et al. 2016 (arXiv 1603.05027).

*SkipInit*, pre-activation, with neither a normalizer nor standardized weights:

    x_{l+1} = shortcut + s * f_l(act(x_l)),   f = conv1x1 . act conv3x3 . act conv1x1

Source: De, Smith 2020 (arXiv 2002.10444).

*FixUp*, post-activation, trainable from the initialisation alone: of L blocks, the first two convolutions of a branch
start smaller by L^(-1/4), the last at zero.

    x' = x_l + b0
    x_{l+1} = act(shortcut(x') + s * conv1x1(act(conv3x3(act(conv1x1(x') + b1) + b2) + b3) + b4) + b5)

s of both is in the weights of the branch's last convolution. Source: Zhang, Dauphin, Ma 2019 (arXiv 1901.09321).
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfree.common.checks import check_choice, check_flag, check_number
from normfree.models.registry import ConvolutionName, Norm, Order, Stem, register
from normfree.models.scaffold import Backbone, BlockPlace, NFBackbone, NFStyle, block_places, stage_channels
from normfree.nn import (
    Activation,
    MaxPool2d,
    PaddingStyle,
    ScaledConv2d,
    ScaledWSConv2d,
    SqueezeExcite,
    StochasticDepth,
    build_activation,
)
from normfree.nn.recompute import with_origin

# --- sizes, places of blocks, stems -----------------------------------------------------------------------------------


RESNET_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}


def resnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family of ResNets: every depth under ``<prefix><depth>``."""
    return {f"{prefix}{depth}": {"depths": blocks} for depth, blocks in RESNET_DEPTHS.items()}


def resnet_places(
    depths: Sequence[int],
    width: float,
    widths: Sequence[int] | None,
    in_channels: int,
    padding: PaddingStyle,
    stochdepth_rate: float,
) -> list[list[BlockPlace]]:
    """Return the places of a ResNet's bottleneck blocks, of 64, 128, 256 and 512 channels times the width multiplier.

    Raises:
        ValueError: an argument that breaks its rule.
    """
    channels = stage_channels(depths, (64, 128, 256, 512), width, widths, in_channels, padding, stochdepth_rate)

    def branch(stage: int, index: int, in_channels: int, out_channels: int) -> tuple[int, int]:
        return out_channels // 4, 1

    return block_places(branch, depths, channels, channels[0] // 4, (1, 2, 2, 2), stochdepth_rate)


def resnet_stem(
    stem: Stem,
    convolution: Callable[..., nn.Module],
    in_channels: int,
    places: list[list[BlockPlace]],
    padding: PaddingStyle,
    **layers: nn.Module,
) -> dict[str, Any]:
    """Return a ResNet's stem and its stride, as ``Backbone``'s arguments.

    Args:
        stem: "imagenet" (7x7 of stride 2 and a 3x3 max-pool of stride 2), or "cifar" (3x3 of stride 1), as in the
            CIFAR networks of He et al. 2016: images of 32 pixels would be 8 wide after the former.
        convolution: makes its convolution of channels in and out, kernel size, stride and ``padding``.
        in_channels: channels of the input.
        places: of the blocks, the first of which takes what the stem gives.
        padding: "symmetric" or "same".
        layers: follow the convolution, by name.

    Raises:
        ValueError: another stem.
    """
    large = check_choice("stem", stem, Stem) == "imagenet"
    first = convolution(in_channels, places[0][0].in_channels, *((7, 2) if large else (3, 1)), padding=padding)
    pool = {"pool": MaxPool2d(3, 2, padding=padding)} if large else {}
    return {"stem": nn.Sequential(OrderedDict(conv=first, **layers, **pool)), "stem_stride": 4 if large else 1}


# --- normalizer-free --------------------------------------------------------------------------------------------------


NF_CONVOLUTIONS: dict[ConvolutionName, type[ScaledConv2d]] = {"scaled_ws": ScaledWSConv2d, "scaled": ScaledConv2d}
"""Of normalizer-free networks."""


class NFBlock(nn.Module):
    """A normalizer-free bottleneck block: the equation at the top of this file.

    Args:
        place: channels, stride and stochastic depth.
        beta: expected standard deviation of the block's input.
        style: what it shares with the network's other blocks.

    Source: Brock et al. 2021, section 3.
    """

    def __init__(self, place: BlockPlace, beta: float, style: NFStyle) -> None:
        super().__init__()
        convolution = partial(style.convolution, padding=style.padding)
        inner, out = place.branch_channels, place.out_channels
        before, inside = style.gamma / beta, style.gamma
        self.activation = copy.deepcopy(style.activation)
        self.conv0 = convolution(place.in_channels, inner, 1, input_scale=before)
        self.conv1 = convolution(inner, inner, 3, place.stride, input_scale=inside)
        self.conv2 = convolution(inner, out, 1, input_scale=inside, **style.branch_scale)
        self.shortcut = (
            convolution(place.in_channels, out, 1, place.stride, input_scale=before) if place.projects else None
        )
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.conv1(hidden))
        return self.conv2(hidden)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.stochastic_depth(self.branch(activated))


class NFSqueezeExciteBlock(NFBlock):
    """A normalizer-free bottleneck block whose branch ends in a squeeze-excite gate, which carries alpha * s.

    Args:
        place, beta, style: as ``NFBlock``'s.
        se_ratio: hidden units of the gate per output channel.

    Source: Brock et al. 2021, section 3 and appendix.
    """

    def __init__(self, place: BlockPlace, beta: float, style: NFStyle, se_ratio: float) -> None:
        super().__init__(place, beta, style.without_branch_scale())
        self.squeeze_excite = SqueezeExcite(place.out_channels, se_ratio, **style.branch_scale)

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))  # TorchScript has no super().branch(activated)
        hidden = self.activation(self.conv1(hidden))
        return self.squeeze_excite(self.conv2(hidden))


@register(resnet_variants("nf_resnet"))
class NFResNet(NFBackbone):
    """A normalizer-free ResNet.

    Args:
        depths: blocks per stage, four.
        width: multiplies the stages' 64, 128, 256, 512 channels and the stem's 16.
        widths: the stages' channels themselves, instead of ``width``.
        alpha: factor of the branches, at least 0: the variance grows by its square per block.
        activation: a name, or a module, function or factory (its gamma is then integrated).
        use_se: whether branches end in a squeeze-excite gate.
        se_ratio: hidden units of the gate per channel.
        stochdepth_rate: of the last block, nearly; grows linearly from 0. The paper's regularised runs: 0.1.
        drop_rate: dropout before the classifier. The paper's regularised runs: 0.25.
        skipinit_gain: initial value of every skip gain; 0 in the paper, 1 to draw its plots.
        conv: "scaled_ws", or "scaled" for plain LeCun weights with the same gamma and beta (the paper's
            mean-shift figure).
        stem: "imagenet" (7x7 of stride 2 and a max-pool), or "cifar" (3x3 of stride 1) for small images.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021; sizes and constants of the official definition.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        width: float = 4,
        widths: Sequence[int] | None = None,
        alpha: float = 0.2,
        activation: Activation = "relu",
        use_se: bool = False,
        se_ratio: float = 0.25,
        stochdepth_rate: float = 0.1,
        drop_rate: float = 0.25,
        skipinit_gain: float = 0.0,
        conv: ConvolutionName = "scaled_ws",
        stem: Stem = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        places = resnet_places(depths, width, widths, in_channels, padding, stochdepth_rate)
        check_choice("conv", conv, ConvolutionName)
        convolution = NF_CONVOLUTIONS[conv]
        style = NFStyle.of(activation, alpha, skipinit_gain, padding=padding, convolution=convolution)
        gated = partial(NFSqueezeExciteBlock, se_ratio=check_number("se_ratio", se_ratio, 0.0, exclusive=True))
        super().__init__(
            **resnet_stem(stem, convolution, in_channels, places, padding),
            places=places,
            block=gated if check_flag("use_se", use_se) else NFBlock,
            style=style,
            final=copy.deepcopy(style.activation),
            num_features=places[-1][-1].out_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )


# --- with normalizers -------------------------------------------------------------------------------------------------


he_convolution = partial(ScaledConv2d, bias=False, init_scale=math.sqrt(2))
"""A convolution without bias, of He-normal (fan-in) weights."""


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


PREACTIVATION_CONVOLUTIONS: dict[ConvolutionName, Callable[..., nn.Module]] = {
    "scaled": he_convolution,
    "scaled_ws": partial(ScaledWSConv2d, bias=False),
}
"""Of version 2."""


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
        check_choice("conv", conv, ConvolutionName)
        convolution = PREACTIVATION_CONVOLUTIONS[conv]
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
        super().__init__(
            **resnet_stem(stem, he_convolution, in_channels, places, padding),
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
        self.classifier_bias: nn.Module = ScalarBias() if num_classes > 0 else nn.Identity()

    def forward_head(self, pooled: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of pooled features [N, num_features]."""
        return self.classifier(self.classifier_bias(self.dropout(pooled)))
