"""Normalizer-free RegNets, without a multiplication of any activation by a number.

    x_{l+1} = shortcut(a_l) + alpha * s * f_l(a_l),   a_l = act(x_l) / beta_l
    f = conv1x1 . act gate conv3x3 . act conv1x1

alpha   factor of the branches, 0.2: the variance grows by alpha^2 per block
s       skip gain, learnable, one per block, starts at 0
beta    expected standard deviation of x_l, from the variance plan
gamma   1 / sqrt(Var[act(z)]): makes an activation variance preserving
gate    squeeze-excite, 2 * sigmoid(...), in the middle of the branch

The shortcut is x_l, or a 1x1 convolution of a_l where the shape changes, halved first by a 2x2 average pool
where the stride is 2. gamma and beta are in the weights of the convolutions that follow them, alpha * s is in
those of the branch's last convolution. The final activation's gamma, which no convolution follows, is on the
pooled features.

On white noise the average pool cuts the shortcut's variance by four, which the plan does not know; on
photographs, whose neighbouring pixels agree, it hardly does.

Sources: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in unnormalized
ResNets*, ICLR 2021, section 5 and appendix; the grouped blocks are Radosavovic et al. 2020's (arXiv 2003.13678).

*Batch-normalised RegNets*: the graph of the normalizer-free ones, for comparison with them.

    x_{l+1} = shortcut(act(x_l)) + f_l(act(x_l)),   f = norm conv1x1 . act gate norm conv3x3 . act norm conv1x1

A batch norm follows every convolution, the stem's, the shortcuts' and the head's too; there is no weight
standardization, no alpha, beta, gamma or skip gain, and no bias of a convolution. The gate keeps its factor 2.

Source: the comparison of Brock, De, Smith, ICLR 2021; Radosavovic et al. 2020 (arXiv 2003.13678).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from normfree.common.checks import check_flag, check_integer, check_number
from normfree.models.registry import register
from normfree.models.scaffold import (
    Backbone,
    BlockPlace,
    NFBackbone,
    NFStyle,
    block_places,
    grouped_branch,
    stage_channels,
)
from normfree.nn import (
    Activation,
    AveragePool2x2,
    PaddingStyle,
    ScaledConv2d,
    ScaledWSConv2d,
    SqueezeExcite,
    StochasticDepth,
    build_activation,
)

# Widths, to be multiplied by `width`; depths; training and test image size; dropout.
REGNET_SIZES: dict[int, tuple[tuple[int, ...], tuple[int, ...], int, int, float]] = {
    0: ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    1: ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    2: ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    3: ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    4: ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    5: ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    6: ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    7: ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    8: ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
}


def regnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family: every size under ``<prefix><size>``."""
    names = ("base_widths", "depths", "train_size", "test_size", "drop_rate")
    return {f"{prefix}{size}": dict(zip(names, values, strict=True)) for size, values in REGNET_SIZES.items()}


def regnet_gate(use_se: bool, se_ratio: float) -> Callable[[int], nn.Module]:
    """Return a function from channels to the layer in the middle of a RegNet's branch.

    Args:
        use_se: a squeeze-excite gate; otherwise nothing.
        se_ratio: hidden units of the gate per channel.

    Raises:
        ValueError: use_se not a bool; a ratio that is not above 0.
    """
    ratio = check_number("se_ratio", se_ratio, 0.0, exclusive=True)
    return partial(SqueezeExcite, ratio=ratio) if check_flag("use_se", use_se) else lambda channels: nn.Identity()


class NFRegNetBlock(nn.Module):
    """A normalizer-free block with a grouped convolution: the equation at the top of this file.

    Args:
        place: channels, groups, stride and stochastic depth.
        beta: expected standard deviation of the block's input.
        style: what it shares with the network's other blocks.
        gate: makes the layer after the grouped convolution, from its channels.

    Source: Brock et al. 2021, appendix.
    """

    def __init__(self, place: BlockPlace, beta: float, style: NFStyle, gate: Callable[[int], nn.Module]) -> None:
        super().__init__()
        convolution = partial(style.convolution, padding=style.padding)
        inner, out = place.branch_channels, place.out_channels
        before, inside = style.gamma / beta, style.gamma
        self.activation = copy.deepcopy(style.activation)
        self.conv0 = convolution(place.in_channels, inner, 1, input_scale=before)
        self.conv1 = convolution(inner, inner, 3, place.stride, groups=place.groups, input_scale=inside)
        self.squeeze_excite = gate(inner)
        self.conv2 = convolution(inner, out, 1, input_scale=inside, **style.branch_scale)
        self.pool = AveragePool2x2() if place.stride == 2 else nn.Identity()
        self.shortcut = convolution(place.in_channels, out, 1, input_scale=before) if place.projects else None
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def branch(self, activated: Tensor) -> Tensor:
        """Return ``alpha * s * f(activated / beta)``, [N, out_channels, H', W']."""
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.squeeze_excite(self.conv1(hidden)))
        return self.conv2(hidden)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(self.pool(activated))
        return shortcut + self.stochastic_depth(self.branch(activated))


def regnet_places(
    group_size: int | Sequence[int], expansion: float | Sequence[float], *network: Any
) -> list[list[BlockPlace]]:
    """Return the places of a RegNet's blocks: every stage halves, a branch is wider than its block's input.

    Args:
        group_size: channels of a group, one value or one per stage.
        expansion: channels of a branch per input channel of its block; the network's first block has 1.
        network: as :func:`normfree.models.scaffold.stage_channels`'s.

    Raises:
        ValueError: an argument that breaks its rule.
    """
    channels = stage_channels(*network)

    def branch_width(index: int, in_channels: int, out_channels: int, factor: float) -> float:
        return in_channels * (factor if index > 0 else 1)

    branch = grouped_branch(branch_width, group_size, expansion)
    return block_places(branch, network[0], channels, channels[0], (2, 2, 2, 2), network[-1])


def regnet_head_channels(places: Sequence[Sequence[BlockPlace]]) -> int:
    """Return the output channels of the convolution after the last stage: 1280 for a last stage of 440."""
    return int(1280 * places[-1][-1].out_channels // 440)


@register(regnet_variants("nf_regnet_b"))
class NFRegNet(NFBackbone):
    """A normalizer-free RegNet.

    Args:
        depths: blocks per stage, four.
        base_widths: the stages' channels before the width multiplier, four.
        width: multiplies ``base_widths``.
        widths: the stages' channels themselves, instead of ``width``.
        group_size: channels of a group of the 3x3 convolutions, one value or one per stage; a branch is rounded
            down to whole groups, and a branch narrower than that is one group.
        expansion: channels of a branch per input channel of its block, one value or one per stage; the network's
            first block has 1.
        alpha: factor of the branches, at least 0: the variance grows by its square per block.
        activation: a name, or a module, function or factory (its gamma is then integrated).
        use_se: whether branches have a squeeze-excite gate.
        se_ratio: hidden units of the gate per channel of the branch.
        stochdepth_rate: of the last block, nearly; grows linearly from 0.
        drop_rate: dropout before the classifier.
        skipinit_gain: initial value of every skip gain; 0 in the paper, 1 to draw its plots.
        train_size, test_size: image sizes, in pixels, that the variant is trained and tested at; kept as
            attributes, any size runs.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Attributes:
        image_size: the test size.

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021; sizes and constants of the official definition.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        base_widths: Sequence[int],
        width: float = 0.75,
        widths: Sequence[int] | None = None,
        group_size: int | Sequence[int] = 8,
        expansion: float | Sequence[float] = 2.25,
        alpha: float = 0.2,
        activation: Activation = "silu",
        use_se: bool = True,
        se_ratio: float = 0.5,
        stochdepth_rate: float = 0.1,
        drop_rate: float,
        skipinit_gain: float = 0.0,
        train_size: int,
        test_size: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        network = (depths, base_widths, width, widths, in_channels, padding, stochdepth_rate)
        places = regnet_places(group_size, expansion, *network)
        first, last, head_channels = places[0][0], places[-1][-1], regnet_head_channels(places)
        style = NFStyle.of(activation, alpha, skipinit_gain, padding=padding)
        block = partial(NFRegNetBlock, gate=regnet_gate(use_se, se_ratio))
        # No activation precedes the head's convolution, nor a beta: its input is the last block's sum as it is.
        head = ScaledWSConv2d(last.out_channels, head_channels, 1, padding=padding)
        super().__init__(
            stem=nn.Sequential(OrderedDict(conv=ScaledWSConv2d(in_channels, first.in_channels, 3, 2, padding=padding))),
            stem_stride=2,
            places=places,
            block=block,
            style=style,
            final=nn.Sequential(OrderedDict(conv=head, activation=copy.deepcopy(style.activation))),
            num_features=head_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )
        self.train_size = check_integer("train_size", train_size, 1)
        self.image_size = self.test_size = check_integer("test_size", test_size, 1)


# --- batch-normalised RegNets -----------------------------------------------------------------------------------------


def _convolution_and_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, groups: int = 1, padding: PaddingStyle
) -> nn.Sequential:
    """Return a convolution (LeCun normal, no bias) and the batch norm of its output."""
    convolution = ScaledConv2d(
        in_channels, out_channels, kernel_size, stride, groups=groups, padding=padding, bias=False
    )
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(out_channels)))


class BNRegNetBlock(nn.Module):
    """A block with a grouped convolution and batch norms: the equation at the top of this file.

    Args:
        place: channels, groups, stride and stochastic depth.
        activation: copied.
        gate: makes the layer after the grouped convolution, from its channels.
        padding: "symmetric" or "same".

    Source: Brock et al. 2021, appendix.
    """

    def __init__(
        self, place: BlockPlace, activation: nn.Module, gate: Callable[[int], nn.Module], padding: PaddingStyle
    ) -> None:
        super().__init__()
        inner, out = place.branch_channels, place.out_channels
        self.activation = copy.deepcopy(activation)
        self.conv0 = _convolution_and_norm(place.in_channels, inner, 1, padding=padding)
        self.conv1 = _convolution_and_norm(inner, inner, 3, place.stride, groups=place.groups, padding=padding)
        self.squeeze_excite = gate(inner)
        self.conv2 = _convolution_and_norm(inner, out, 1, padding=padding)
        self.pool = AveragePool2x2() if place.stride == 2 else nn.Identity()
        self.shortcut = _convolution_and_norm(place.in_channels, out, 1, padding=padding) if place.projects else None
        self.stochastic_depth = StochasticDepth(place.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(self.pool(activated))
        hidden = self.activation(self.conv0(activated))
        hidden = self.activation(self.squeeze_excite(self.conv1(hidden)))
        return shortcut + self.stochastic_depth(self.conv2(hidden))


@register(regnet_variants("bn_regnet_b"))
class BNRegNet(Backbone):
    """A batch-normalised RegNet with the graph, the sizes and the regularisation of ``NFRegNet``.

    Args:
        depths, base_widths, width, widths, group_size, expansion, activation, use_se, se_ratio,
            stochdepth_rate, drop_rate, train_size, test_size: as ``NFRegNet``'s.
        num_classes: outputs of the classifier, which starts at zero; 0 for none.
        in_channels: channels of the input.
        padding: "symmetric" or "same".

    Attributes:
        image_size: the test size.

    Raises:
        ValueError: a value that breaks its rule.

    Source: Brock et al. 2021.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        base_widths: Sequence[int],
        width: float = 0.75,
        widths: Sequence[int] | None = None,
        group_size: int | Sequence[int] = 8,
        expansion: float | Sequence[float] = 2.25,
        activation: Activation = "silu",
        use_se: bool = True,
        se_ratio: float = 0.5,
        stochdepth_rate: float = 0.1,
        drop_rate: float,
        train_size: int,
        test_size: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        padding: PaddingStyle = "symmetric",
    ) -> None:
        network = (depths, base_widths, width, widths, in_channels, padding, stochdepth_rate)
        places = regnet_places(group_size, expansion, *network)
        act, _ = build_activation(activation)
        head_channels = regnet_head_channels(places)
        head = _convolution_and_norm(places[-1][-1].out_channels, head_channels, 1, padding=padding)
        super().__init__(
            stem=_convolution_and_norm(in_channels, places[0][0].in_channels, 3, 2, padding=padding),
            stem_stride=2,
            places=places,
            block=partial(BNRegNetBlock, activation=act, gate=regnet_gate(use_se, se_ratio), padding=padding),
            final=nn.Sequential(OrderedDict([*head.named_children(), ("activation", copy.deepcopy(act))])),
            num_features=head_channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
            classifier_std=0.0,
        )
        self.train_size = check_integer("train_size", train_size, 1)
        self.image_size = self.test_size = check_integer("test_size", test_size, 1)
