"""What the residual families share: the variant table, the layout of the blocks, and the stem.

A ResNet has four stages of bottleneck blocks (1x1 to a quarter of the width, 3x3 with the stride, 1x1 back),
of 64, 128, 256 and 512 channels times the width multiplier, after a 7x7 convolution of stride 2 to a quarter
of the first stage's channels and a 3x3 max-pool of stride 2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normfree.models.layout import BlockPlace, Layout
from normfree.nn import MaxPool2d

RESNET_DEPTHS: dict[int, tuple[int, int, int, int]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}


def resnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family: every depth under ``<prefix><depth>``."""
    return {f"{prefix}{depth}": {"depths": blocks} for depth, blocks in RESNET_DEPTHS.items()}


@dataclass(frozen=True)
class ResNetLayout(Layout[BlockPlace]):
    """The checked geometry of a ResNet.

    Args: as ``Layout``'s, but ``base_widths``, which are a ResNet's own.
    """

    stem_stride = 4
    stage_strides = (1, 2, 2, 2)

    base_widths: Sequence[int] = field(default=(64, 128, 256, 512), init=False)

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem: as many as the first stage's bottleneck, 64 at the usual width 4."""
        return self.stage_channels[0] // 4

    def complete(self, place: BlockPlace) -> BlockPlace:
        """Return the place as it is: its stage, channels and stride are all a ResNet's block needs."""
        return place

    def stem(self, convolution: nn.Module, **layers: nn.Module) -> nn.Sequential:
        """Return the stem: the convolution, the given layers by name, and the max-pool."""
        pool = MaxPool2d(3, 2, padding=self.padding)
        return nn.Sequential(OrderedDict(conv=convolution, **layers, pool=pool))
