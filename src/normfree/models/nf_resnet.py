"""Normalizer-free ResNets, without a scalar multiplication of any feature map.

    x_{l+1} = x_l + alpha * s * f_l(act(x_l) / beta_l)

alpha   factor of the branches, 0.2: the variance grows by alpha^2 per block
s       skip gain, learnable, one per block, starts at 0
beta    expected standard deviation of x_l, from the variance plan
gamma   1 / sqrt(Var[act(z)]): makes an activation variance preserving

gamma and beta are in the weights of the convolutions that follow them, alpha * s is in those of the branch's
last convolution (or in the squeeze-excite gate). The final activation's gamma, which no convolution follows,
is on the pooled features.

Source: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in unnormalized
ResNets*, ICLR 2021.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_choice, check_flag, check_number
from normfree.models.registry import ConvolutionName, Stem, register
from normfree.models.scaffold import BlockPlace, NFBackbone, NFStyle, block_places, stage_channels
from normfree.nn import (
    Activation,
    MaxPool2d,
    PaddingStyle,
    ScaledConv2d,
    ScaledWSConv2d,
    SqueezeExcite,
    StochasticDepth,
)

RESNET_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}
CONVOLUTIONS: dict[ConvolutionName, type[ScaledConv2d]] = {"scaled_ws": ScaledWSConv2d, "scaled": ScaledConv2d}


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
        convolution = CONVOLUTIONS[conv]
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
