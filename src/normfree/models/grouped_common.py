"""What the families with grouped convolutions share: the layout of the blocks, and the RegNets' variant table.

A block has a 1x1 convolution, a 3x3 convolution in groups of a fixed size with the stride, and a 1x1
convolution back; its shortcut halves by average pooling. RegNets expand a block's input; NFNets
(``normfree.models.nfnet``) take a share of its output.

Source: Radosavovic et al. 2020 (arXiv 2003.13678); the sizes are those of Brock, De, Smith, ICLR 2021.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from normfree.common.checks import check_flag, check_integer, check_number, invalid
from normfree.models.layout import STAGES, BlockPlace, Layout
from normfree.nn import SqueezeExcite

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


@dataclass(frozen=True)
class GroupedPlace(BlockPlace):
    """Where a block with a grouped 3x3 convolution stands.

    Attributes:
        branch_width: channels the branch asks for, before rounding down to whole groups.
        group_size: channels of a group; a narrower branch is one group.
    """

    branch_width: int
    group_size: int

    @property
    def groups(self) -> int:
        """Groups of the 3x3 convolution."""
        return max(1, self.branch_width // self.group_size)

    @property
    def bottleneck(self) -> int:
        """Channels inside the branch."""
        return self.groups * min(self.group_size, self.branch_width)


@dataclass(frozen=True)
class GroupedLayout(Layout[GroupedPlace]):
    """The checked geometry of a network of four stages of blocks with grouped convolutions.

    Args: as ``Layout``'s, and
        group_size: channels of a group, one value or one per stage.
        expansion: factor of the branches' width, one value or one per stage.

    Raises:
        ValueError: a value that breaks its rule.
    """

    group_size: int | Sequence[int]
    expansion: float | Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in _per_stage("group_size", self.group_size):
            check_integer("group_size", size, 1)
        for factor in _per_stage("expansion", self.expansion):
            check_number("expansion", factor, 0.0, exclusive=True)
        if any(place.bottleneck < 2 for places in self.places() for place in places):
            # One channel would be all mean to the standardised 1x1 convolution that ends the branch.
            raise invalid("expansion", self.expansion, "leaves a branch fewer than 2 channels", "pass a larger one")

    @abstractmethod
    def branch_width(self, place: BlockPlace, expansion: float) -> float:
        """Return the channels that the branch of the block at ``place`` asks for."""

    def complete(self, place: BlockPlace) -> GroupedPlace:
        """Return the place of a block with its branch's width and its group size."""
        expansion = _per_stage("expansion", self.expansion)[place.stage]
        group_size = _per_stage("group_size", self.group_size)[place.stage]
        return GroupedPlace(**vars(place), branch_width=int(self.branch_width(place, expansion)), group_size=group_size)


class RegNetLayout(GroupedLayout):
    """The geometry of a RegNet: every stage halves; a branch is wider than the block's input, except the first.

    Args: as ``GroupedLayout``'s; ``expansion`` is the factor of a block's input channels.
    """

    stage_strides = (2, 2, 2, 2)

    @property
    def stem_stride(self) -> int:
        """Pixels of the input per cell after the stem."""
        return 2

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem."""
        return self.stage_channels[0]

    @property
    def head_channels(self) -> int:
        """Output channels of the convolution after the last stage: 1280 for a last stage of 440."""
        return int(1280 * self.stage_channels[-1] // 440)

    def branch_width(self, place: BlockPlace, expansion: float) -> float:
        """Return the channels that the branch of the block at ``place`` asks for."""
        return place.in_channels * (expansion if place.index > 0 else 1)


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


def _per_stage(argument: str, value: Any) -> tuple[Any, ...]:
    """Return one value per stage of an argument that is one value, or one per stage."""
    if not isinstance(value, (tuple, list)):
        return (value,) * STAGES
    if len(value) != STAGES:
        rule = f"must be one value or one for each of the {STAGES} stages"
        raise invalid(argument, value, rule, f"pass {STAGES} of them, or one")
    return tuple(value)
