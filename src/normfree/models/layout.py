"""The geometry of a network of four stages: its widths, where its blocks stand, and the maps its stages make."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from normfree.common.checks import check_choice, check_integer, check_integers, check_number, check_rate, invalid
from normfree.models.backbone import FeatureInfo
from normfree.nn import PADDING_STYLES, StochasticDepth

STAGES = 4
# A quarter of it are 2 channels, the fewest a standardised 1x1 convolution can take: one would be all mean.
MINIMUM_WIDTH = 8


@dataclass(frozen=True)
class BlockPlace:
    """Where a bottleneck block stands.

    Attributes:
        stage: its stage, from 0.
        index: its number over the whole network, from 0.
        in_channels, out_channels: of the block.
        stride: of its 3x3 convolution and its shortcut.
        drop_rate: its probability of being skipped in training.
    """

    stage: int
    index: int
    in_channels: int
    out_channels: int
    stride: int
    drop_rate: float

    @property
    def bottleneck(self) -> int:
        """Channels inside the branch."""
        return self.out_channels // 4

    @property
    def projects(self) -> bool:
        """Whether the shortcut has to be a convolution because the shape changes."""
        return self.stride > 1 or self.in_channels != self.out_channels

    def stochastic_depth(self) -> StochasticDepth:
        """Return the layer that skips the branch at this place's rate."""
        return StochasticDepth(self.drop_rate)


Place = TypeVar("Place", bound=BlockPlace)


@dataclass(frozen=True)
class Layout(ABC, Generic[Place]):
    """The checked geometry of a network of four stages.

    Args:
        depths: blocks per stage, four positive integers.
        base_widths: channels of the stages before the width multiplier, four, each at least 8.
        width: the width multiplier.
        widths: channels of the stages themselves, each at least 8, instead of ``width``; None to use it.
        in_channels: channels of the input.
        padding: "symmetric" or "same".
        stochdepth_rate: block i of L is skipped in training with probability ``stochdepth_rate * i / L``.

    Raises:
        ValueError: a value that breaks its rule.
    """

    stage_strides: ClassVar[tuple[int, ...]]

    depths: Sequence[int]
    base_widths: Sequence[int]
    width: float
    widths: Sequence[int] | None
    in_channels: int
    padding: str
    stochdepth_rate: float

    def __post_init__(self) -> None:
        check_integers("depths", self.depths, STAGES)
        check_integers("base_widths", self.base_widths, STAGES, minimum=MINIMUM_WIDTH)
        check_number("width", self.width, 0.0, exclusive=True)
        if self.widths is not None:
            check_integers("widths", self.widths, STAGES, minimum=MINIMUM_WIDTH)
        elif min(self.stage_channels) < MINIMUM_WIDTH:
            rule = f"leaves a stage fewer than {MINIMUM_WIDTH} channels"
            least = math.ceil(1000 * MINIMUM_WIDTH / min(self.base_widths)) / 1000
            raise invalid("width", self.width, rule, f"pass width={least} or more")
        check_integer("in_channels", self.in_channels, 1)
        check_choice("padding", self.padding, PADDING_STYLES)
        check_rate("stochdepth_rate", self.stochdepth_rate)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of the four stages."""
        return tuple(self.widths or (int(self.width * channels) for channels in self.base_widths))

    @property
    @abstractmethod
    def stem_stride(self) -> int:
        """Pixels of the input per cell after the stem, along each axis."""

    @property
    @abstractmethod
    def stem_channels(self) -> int:
        """Output channels of the stem."""

    @abstractmethod
    def complete(self, place: BlockPlace) -> Place:
        """Return the place of a block with what the family's blocks need beyond it."""

    def places(self) -> list[list[Place]]:
        """Return the places of all blocks, stage by stage."""
        places: list[list[Place]] = []
        blocks = sum(self.depths)
        channels, index = self.stem_channels, 0
        for stage, depth in enumerate(self.depths):
            places.append([])
            out_channels = self.stage_channels[stage]
            for position in range(depth):
                stride = self.stage_strides[stage] if position == 0 else 1
                rate = self.stochdepth_rate * index / blocks
                places[-1].append(self.complete(BlockPlace(stage, index, channels, out_channels, stride, rate)))
                channels, index = out_channels, index + 1
        return places

    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Return what each stage's map will be."""
        info, stride = [], self.stem_stride
        for stage, channels in enumerate(self.stage_channels):
            stride *= self.stage_strides[stage]
            info.append(FeatureInfo(f"stages.{stage}", channels, stride))
        return tuple(info)
