"""What the residual families share: the variant table, the layout of the blocks, and the stem.

A ResNet has four stages of bottleneck blocks (1x1 to a quarter of the width, 3x3 with the stride, 1x1 back),
of 64, 128, 256 and 512 channels times the width multiplier, after a 7x7 convolution of stride 2 to a quarter
of the first stage's channels and a 3x3 max-pool of stride 2. Images of 32 pixels would be 8 wide after that stem:
for them it is a 3x3 convolution of stride 1 and no pool, as in the CIFAR networks of He et al. 2016.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normfree.common.checks import check_choice
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


@dataclass(frozen=True)
class StemShape:
    """The geometry of a stem.

    Attributes:
        kernel_size, stride: of its convolution.
        pools: whether a 3x3 max-pool of stride 2 ends it.
    """

    kernel_size: int
    stride: int
    pools: bool


STEMS = {"imagenet": StemShape(7, 2, pools=True), "cifar": StemShape(3, 1, pools=False)}


def resnet_variants(prefix: str) -> dict[str, Mapping[str, Any]]:
    """Return the registry's entries of a family: every depth under ``<prefix><depth>``."""
    return {f"{prefix}{depth}": {"depths": blocks} for depth, blocks in RESNET_DEPTHS.items()}


@dataclass(frozen=True)
class ResNetLayout(Layout[BlockPlace]):
    """The checked geometry of a ResNet.

    Args: as ``Layout``'s, but ``base_widths``, which are a ResNet's own, and
        stem_style: "imagenet" or "cifar", as at the top of this file.

    Raises:
        ValueError: a value that breaks its rule.
    """

    stage_strides = (1, 2, 2, 2)

    base_widths: Sequence[int] = field(default=(64, 128, 256, 512), init=False)
    stem_style: str = "imagenet"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stem", self.stem_style, tuple(STEMS))

    @property
    def stem_stride(self) -> int:
        """Pixels of the input per cell after the stem."""
        shape = STEMS[self.stem_style]
        return shape.stride * (2 if shape.pools else 1)

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem: as many as the first stage's bottleneck, 64 at the usual width 4."""
        return self.stage_channels[0] // 4

    def complete(self, place: BlockPlace) -> BlockPlace:
        """Return the place as it is: its stage, channels and stride are all a ResNet's block needs."""
        return place

    def stem(self, convolution: Callable[..., nn.Module], **layers: nn.Module) -> nn.Sequential:
        """Return the stem.

        Args:
            convolution: makes its convolution of channels in and out, kernel size, stride and ``padding``.
            layers: follow the convolution, by name; the max-pool, if there is one, comes last.
        """
        shape = STEMS[self.stem_style]
        first = convolution(self.in_channels, self.stem_channels, shape.kernel_size, shape.stride, padding=self.padding)
        pool = {"pool": MaxPool2d(3, 2, padding=self.padding)} if shape.pools else {}
        return nn.Sequential(OrderedDict(conv=first, **layers, **pool))
