"""What the residual families share: the variant table, the places of the blocks, and the stem.

A ResNet has four stages of bottleneck blocks (1x1 to a quarter of the width, 3x3 with the stride, 1x1 back),
of 64, 128, 256 and 512 channels times the width multiplier, after a 7x7 convolution of stride 2 to a quarter
of the first stage's channels and a 3x3 max-pool of stride 2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normfree.models.backbone import FeatureInfo
from normfree.nn import PADDING_STYLES, MaxPool2d, StochasticDepth
from normfree.nn.checks import check_choice, check_integer, check_integers, check_number, check_rate, invalid

RESNET_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}

_STAGE_STRIDES = (1, 2, 2, 2)
_STEM_STRIDE = 4
# A quarter of it are 2 channels, the fewest a standardised 1x1 convolution can take: one would be all mean.
_MINIMUM_WIDTH = 8


def resnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family: every depth under ``<prefix><depth>``."""
    return {f"{prefix}{depth}": {"depths": blocks} for depth, blocks in RESNET_DEPTHS.items()}


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


@dataclass(frozen=True)
class ResNetLayout:
    """The checked geometry of a ResNet.

    Args:
        depths: blocks per stage, four positive integers.
        width: channels of the stages are ``width * (64, 128, 256, 512)``.
        widths: channels of the stages themselves, each at least 8, instead of ``width``; None to use it.
        in_channels: channels of the input.
        padding: "symmetric" or "same".
        stochdepth_rate: block i of L is skipped in training with probability ``stochdepth_rate * i / L``.

    Raises:
        ValueError: a value that breaks its rule.
    """

    depths: Sequence[int]
    width: float
    widths: Sequence[int] | None
    in_channels: int
    padding: str
    stochdepth_rate: float

    def __post_init__(self) -> None:
        check_integers("depths", self.depths, 4)
        check_number("width", self.width, 0.0, exclusive=True)
        if self.widths is not None:
            check_integers("widths", self.widths, 4, minimum=_MINIMUM_WIDTH)
        elif self.width * 64 < _MINIMUM_WIDTH:
            rule = f"leaves the first stage fewer than {_MINIMUM_WIDTH} channels"
            raise invalid("width", self.width, rule, "pass width=0.125 or more")
        check_integer("in_channels", self.in_channels, 1)
        check_choice("padding", self.padding, PADDING_STYLES)
        check_rate("stochdepth_rate", self.stochdepth_rate)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of the four stages."""
        return tuple(self.widths or (int(self.width * channels) for channels in (64, 128, 256, 512)))

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem: as many as the first stage's bottleneck, 64 at the usual width 4."""
        return self.stage_channels[0] // 4

    def places(self) -> list[list[BlockPlace]]:
        """Return the places of all blocks, stage by stage."""
        places: list[list[BlockPlace]] = []
        blocks = sum(self.depths)
        channels, index = self.stem_channels, 0
        for stage, depth in enumerate(self.depths):
            places.append([])
            for position in range(depth):
                stride = _STAGE_STRIDES[stage] if position == 0 else 1
                rate = self.stochdepth_rate * index / blocks
                out_channels = self.stage_channels[stage]
                places[-1].append(BlockPlace(stage, index, channels, out_channels, stride, rate))
                channels, index = out_channels, index + 1
        return places

    def stem(self, convolution: nn.Module, **layers: nn.Module) -> nn.Sequential:
        """Return the stem: the convolution, the given layers by name, and the max-pool."""
        pool = MaxPool2d(3, 2, padding=self.padding)
        return nn.Sequential(OrderedDict(conv=convolution, **layers, pool=pool))

    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Return what each stage's map will be."""
        info, stride = [], _STEM_STRIDE
        for stage, channels in enumerate(self.stage_channels):
            stride *= _STAGE_STRIDES[stage]
            info.append(FeatureInfo(f"stages.{stage}", channels, stride))
        return tuple(info)
