"""NFNets, without a multiplication of any activation by a number.

    x_{l+1} = shortcut(a_l) + alpha * s * f_l(a_l),   a_l = act(x_l) / beta_l
    f = gate conv1x1 . act conv3x3 . act conv3x3 . act conv1x1

alpha   factor of the branches, 0.2: the variance grows by alpha^2 per block
s       skip gain, learnable, one per block, starts at 0
beta    expected standard deviation of x_l, from the variance plan
gamma   1 / sqrt(Var[act(z)]): makes an activation variance preserving
gate    squeeze-excite, 2 * sigmoid(...), at the end of the branch

The shortcut is x_l, or a 1x1 convolution of a_l where the shape changes, halved first by a 2x2 average pool
where the stride is 2. gamma and beta are in the weights of the convolutions that follow them, alpha * s is on
the [N, C] gate. The final activation's gamma, which no convolution follows, is on the pooled features.

Source: Brock, De, Smith, Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
2021 (arXiv 2102.06171).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_flag, check_integer, check_number
from normfree.models.registry import register
from normfree.models.scaffold import BlockPlace, NFBackbone, NFStyle, block_places, grouped_branch, stage_channels
from normfree.nn import Activation, AveragePool2x2, PaddingStyle, ScaledWSConv2d, SqueezeExcite, StochasticDepth

# Training and test image size, dropout; F_k has k + 1 times the depths of F0.
NFNET_SIZES: dict[int, tuple[int, int, float]] = {
    0: (192, 256, 0.2),
    1: (224, 320, 0.3),
    2: (256, 352, 0.4),
    3: (320, 416, 0.4),
    4: (384, 512, 0.5),
    5: (416, 544, 0.5),
    6: (448, 576, 0.5),
    7: (480, 608, 0.5),
}
NFNET_DEPTHS = (1, 2, 6, 3)
NFNET_WIDTHS = {"": (256, 512, 1536, 1536), "_plus": (384, 768, 2048, 2048)}


def nfnet_variants() -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries: ``nfnet_f<size>`` and the wider ``nfnet_f<size>_plus``."""
    return {
        f"nfnet_f{size}{suffix}": {
            "base_widths": widths,
            "depths": tuple(depth * (size + 1) for depth in NFNET_DEPTHS),
            "train_size": train_size,
            "test_size": test_size,
            "drop_rate": drop_rate,
        }
        for suffix, widths in NFNET_WIDTHS.items()
        for size, (train_size, test_size, drop_rate) in NFNET_SIZES.items()
    }


class NFNetBlock(nn.Module):
    """A normalizer-free block with two grouped convolutions and no gate: alpha * s is in the last convolution.

    Args:
        place: channels, groups, stride and stochastic depth.
        beta: expected standard deviation of the block's input.
        style: what it shares with the network's other blocks.

    Source: Brock et al. 2021b, section 4.
    """

    def __init__(self, place: BlockPlace, beta: float, style: NFStyle) -> None:
        super().__init__()
        convolution = partial(style.convolution, padding=style.padding)
        inner, out = place.branch_channels, place.out_channels
        before, inside = style.gamma / beta, style.gamma
        self.activation = copy.deepcopy(style.activation)
        self.conv0 = convolution(place.in_channels, inner, 1, input_scale=before)
        self.conv1 = convolution(inner, inner, 3, place.stride, groups=place.groups, input_scale=inside)
        self.conv1b = convolution(inner, inner, 3, groups=place.groups, input_scale=inside)
        self.conv2 = convolution(inner, out, 1, input_scale=inside, **style.branch_scale)
        self.pool = AveragePool2x2() if place.stride == 2 else nn.Identity()
        self.shortcut = convolution(place.in_channels, out, 1, input_scale=before) if place.projects else None
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.conv1(hidden))
        hidden = self.activation(self.conv1b(hidden))
        return self.conv2(hidden)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(self.pool(activated))
        return shortcut + self.stochastic_depth(self.branch(activated))


class NFNetSqueezeExciteBlock(NFNetBlock):
    """An NFNet block: the equation at the top of this file, its gate carries alpha * s.

    Args:
        place, beta, style: as ``NFNetBlock``'s.
        se_ratio: hidden units of the gate per output channel.

    Source: Brock et al. 2021b, section 4.
    """

    def __init__(self, place: BlockPlace, beta: float, style: NFStyle, se_ratio: float) -> None:
        super().__init__(place, beta, style.without_branch_scale())
        self.squeeze_excite = SqueezeExcite(place.out_channels, se_ratio, **style.branch_scale)

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))  # TorchScript has no super().branch(activated)
        hidden = self.activation(self.conv1(hidden))
        hidden = self.activation(self.conv1b(hidden))
        return self.squeeze_excite(self.conv2(hidden))


def nfnet_stem(in_channels: int, out_channels: int, style: NFStyle) -> nn.Sequential:
    """Return the stem: four 3x3 convolutions to 16, 32, 64 and ``out_channels``, a quarter of the input's size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the first block's input.
        style: convolution, activation, gamma and padding.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, scale = in_channels, 1.0  # no activation precedes the first
    for index, (out, stride) in enumerate(((16, 2), (32, 1), (64, 1), (out_channels, 2))):
        if index > 0:
            layers[f"activation{index - 1}"] = copy.deepcopy(style.activation)
        convolution = style.convolution(channels, out, 3, stride, padding=style.padding, input_scale=scale)
        layers[f"conv{index}"] = convolution
        channels, scale = out, style.gamma
    return nn.Sequential(layers)


def nfnet_branch_width(index: int, in_channels: int, out_channels: int, share: float) -> float:
    """Return the channels that a branch asks for: a share of the block's output."""
    return out_channels * share


@register(nfnet_variants())
class NFNet(NFBackbone):
    """An NFNet.

    Args:
        depths: blocks per stage, four.
        base_widths: the stages' channels before the width multiplier, four.
        width: multiplies ``base_widths``; the stem stays as it is.
        widths: the stages' channels themselves, instead of ``width``; the stem then ends in half the first.
        group_size: channels of a group of the 3x3 convolutions, one value or one per stage; a branch is rounded
            down to whole groups, and a branch narrower than that is one group.
        expansion: channels of a branch per output channel of its block, one value or one per stage.
        alpha: factor of the branches, at least 0: the variance grows by its square per block.
        activation: a name, or a module, function or factory (its gamma is then integrated).
        use_se: whether branches end in a squeeze-excite gate.
        se_ratio: hidden units of the gate per channel.
        stochdepth_rate: of the last block, nearly; grows linearly from 0.
        drop_rate: dropout before the classifier.
        skipinit_gain: initial value of every skip gain; 0 in the paper, 1 to draw a plot.
        train_size, test_size: image sizes, in pixels, that the variant is trained and tested at; kept as
            attributes, any size runs.
        num_classes: outputs of the classifier; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Attributes:
        image_size: the test size.

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021b; sizes and constants of the official definition.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        base_widths: Sequence[int],
        width: float = 1.0,
        widths: Sequence[int] | None = None,
        group_size: int | Sequence[int] = 128,
        expansion: float | Sequence[float] = 0.5,
        alpha: float = 0.2,
        activation: Activation = "gelu",
        use_se: bool = True,
        se_ratio: float = 0.5,
        stochdepth_rate: float = 0.25,
        drop_rate: float,
        skipinit_gain: float = 0.0,
        train_size: int,
        test_size: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        channels = stage_channels(depths, base_widths, width, widths, in_channels, padding, stochdepth_rate)
        stem_channels = (widths or base_widths)[0] // 2  # the width multiplier does not scale it
        branch = grouped_branch(nfnet_branch_width, group_size, expansion)
        places = block_places(branch, depths, channels, stem_channels, (1, 2, 2, 2), stochdepth_rate)
        style = NFStyle.of(activation, alpha, skipinit_gain, padding=padding)
        ratio = check_number("se_ratio", se_ratio, 0.0, exclusive=True)
        gated = partial(NFNetSqueezeExciteBlock, se_ratio=ratio)
        # No activation precedes the head's convolution, nor a beta: its input is the last block's sum as it is.
        head = ScaledWSConv2d(channels[-1], 2 * channels[-1], 1, padding=padding)
        super().__init__(
            stem=nfnet_stem(in_channels, stem_channels, style),
            stem_stride=4,
            places=places,
            block=gated if check_flag("use_se", use_se) else NFNetBlock,
            style=style,
            final=nn.Sequential(OrderedDict(conv=head, activation=copy.deepcopy(style.activation))),
            num_features=2 * channels[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.01,
        )
        self.train_size = check_integer("train_size", train_size, 1)
        self.image_size = self.test_size = check_integer("test_size", test_size, 1)
