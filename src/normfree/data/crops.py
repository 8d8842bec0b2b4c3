"""From a decoded image to a square of pixels: what a data worker does with one image.

Every random draw comes from the image's own key (seed, epoch, number), so that neither the number of workers
nor a restart changes a bit.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
from torchvision.transforms import InterpolationMode, v2

from normfree.data.config import AugmentationConfig
from normfree.data.order import CROP

BICUBIC = InterpolationMode.BICUBIC
GREY = 128
"""What RandAugment fills uncovered corners with."""


class Crop(Protocol):
    """A way to a square image."""

    size: int

    def __call__(self, image: Any, key: tuple[int, ...]) -> Any:
        """Take a PIL image to one of ``size`` × ``size``; every draw comes from ``key``."""
        ...


class CentreCrop:
    """The centre of an image, its shorter side resized to ``size / ratio``; one that is of that size already stays.

    Args:
        size: of the result, in pixels.
        ratio: share of the shorter side that is kept (0.875 in the official evaluation at 224).
    """

    def __init__(self, size: int, ratio: float = 1.0) -> None:
        self.size = size
        side = round(size / ratio)
        self.transform = v2.Compose([v2.Resize(side, BICUBIC), v2.CenterCrop(size)])

    def __call__(self, image: Any, key: tuple[int, ...] = ()) -> Any:
        return image if image.size == (self.size, self.size) else self.transform(image)


class TrainingCrop:
    """An inception crop, or the centre where the device does the cropping, then RandAugment.

    Args:
        size: of the result, in pixels.
        config: what to do.
    """

    def __init__(self, size: int, config: AugmentationConfig) -> None:
        self.size = size
        self.centre = None if config.crop == "inception" else CentreCrop(size)
        steps: list[Any] = []
        if self.centre is None:
            steps.append(v2.RandomResizedCrop(size, config.area, config.aspect, BICUBIC))
        if config.randaugment_layers:
            steps.append(rand_augment(config))
        self.transform = v2.Compose(steps) if steps else None

    def __call__(self, image: Any, key: tuple[int, ...]) -> Any:
        if self.centre is not None:
            image = self.centre(image)
        if self.transform is None:
            return image
        torch.default_generator.manual_seed(seed_of(CROP, *key))
        return self.transform(image)


def rand_augment(config: AugmentationConfig) -> v2.RandAugment:
    """The RandAugment of torchvision, its magnitude on the paper's scale of 0 to 10."""
    return v2.RandAugment(config.randaugment_layers, 3 * config.randaugment_magnitude, num_magnitude_bins=31, fill=GREY)


def seed_of(*key: int) -> int:
    """A seed for a torch generator, of a key of integers; a hash, for it is drawn for every image."""
    digest = hashlib.blake2b(repr([int(part) for part in key]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
