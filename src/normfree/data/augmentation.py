"""Augmentation: of a batch on the device, and of one decoded image in a data worker.

On the device: RandAugment, crop, flip, standardization, mixing. Draws are made on the CPU from (seed, rank, step), so
that every device sees the same ones and a resumed step repeats them. In a worker: crop and RandAugment, drawn from the
image's own key (seed, epoch, number), so that neither the number of workers nor a restart changes a bit.

Sources: Cubuk et al., *RandAugment*, 2020; Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018; Yun
et al., *CutMix*, ICCV 2019.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from normfree.common.checks import check_integer, invalid, require
from normfree.data.config import AugmentationConfig
from normfree.data.order import CROP, MIX, check_rank, generator


class Standardization(nn.Module):
    """Pixels to zero mean and unit deviation: (x / 255 − mean) / std for uint8, (x − mean) / std for floats in 0 to 1.

    Args:
        mean: of each channel, of pixels in 0 to 1.
        std: of each channel.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", (1 / stds).float(), persistent=False)
        self.register_buffer("offset", (-means / stds).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scale = self.scale if images.is_floating_point() else self.scale / 255
        return torch.addcmul(self.offset, images.to(self.scale.dtype), scale)


class Augmentation(nn.Module):
    """Vary and standardize a batch of training images.

    Args:
        config: what to do.
        mean: of each channel, of pixels in 0 to 1.
        std: of each channel.
        num_classes: for the soft targets of mixing.
        seed: of all draws.
        rank: of this process: ranks draw differently.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        super().__init__()
        check_rank(rank, rank + 1)
        self.config, self.num_classes = config, check_integer("num_classes", num_classes, 1)
        self.seed, self.rank = check_integer("seed", seed, 0), rank
        self.standardization = Standardization(mean, std)
        self.randaugment = rand_augment(config) if config.randaugment_layers else None

    def forward(self, images: Tensor, targets: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Augment the batch of a step.

        Args:
            images: [N, C, H, W], uint8, or floating point in 0 to 1.
            targets: int64 [N].
            step: counted over the whole run, so that no two steps draw alike.

        Returns:
            Images, float32, standardized, channels last in memory; targets, int64 [N] as they came, or
            probabilities [N, classes] where images are mixed.

        Raises:
            ValueError: if the images are no batch.
        """
        if images.ndim != 4:
            raise invalid("images", tuple(images.shape), "must be a batch [N, C, H, W]", "pass images.unsqueeze(0)")
        config = self.config
        draws = generator(MIX, self.seed, self.rank, step)
        if self.randaugment is not None:
            images = self._rand_augment_each(images, step)
        if config.crop == "inception":
            images = zoom(images, *draw_boxes(images, config, draws))
        elif config.crop == "shift" and config.shift:
            offsets = draws.integers(0, 2 * config.shift + 1, (2, len(images)))
            images = shift(images, torch.from_numpy(offsets), config.shift)
        if config.flip:
            images = flip(images, torch.from_numpy(draws.random(len(images)) < 0.5))
        images = self.standardization(images)
        if not (config.mixup or config.cutmix):
            return images, targets
        soft = functional.one_hot(targets, self.num_classes).to(images.dtype)
        return mix(images, soft, mixup_beta=config.mixup, cutmix_beta=config.cutmix, draws=draws)

    def _rand_augment_each(self, images: Tensor, step: int) -> Tensor:
        """RandAugment image by image: each takes operations of its own. It draws from torch's global generator."""
        assert self.randaugment is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(MIX, self.seed, self.rank, step, 1))
            varied = torch.stack([self.randaugment(image) for image in images])
        return varied.contiguous(memory_format=torch.channels_last)


def shift(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    """Move each image over a border of ``most`` zeros: a crop of the padded image at its own offset.

    Args:
        images: [N, C, H, W].
        offsets: integers [2, N], rows and columns, in 0 to 2 · most; ``most`` leaves an image where it is.
        most: width of the border, in pixels.
    """
    height, width = images.shape[2:]
    padded = functional.pad(images, (most,) * 4)
    rows = (offsets[0][:, None] + torch.arange(height)).to(images.device)
    columns = (offsets[1][:, None] + torch.arange(width)).to(images.device)
    return _gather_pixels(padded, rows, columns)


def flip(images: Tensor, which: Tensor) -> Tensor:
    """Mirror the images that ``which`` [N] says, left to right."""
    chosen = which.nonzero().squeeze(1).to(images.device)
    images = images.clone()
    images[chosen] = images[chosen].flip(3)
    return images


def _gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return images[n, :, rows[n, i], columns[n, j]] for all n, i, j; reads whole pixels of channels-last images."""
    count, _, height, width = images.shape
    start = torch.arange(count, device=images.device)[:, None, None] * (height * width)
    index = start + rows[:, :, None] * width + columns[:, None, :]
    pixels = images.permute(0, 2, 3, 1).reshape(count * height * width, -1)
    return pixels[index].permute(0, 3, 1, 2)


def draw_boxes(images: Tensor, config: AugmentationConfig, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw inception crops of a batch: their centres and their sizes, each [N, 2] (x, y) as shares of the image.

    Area and aspect are drawn as in torchvision's RandomResizedCrop; a box that does not fit is narrowed to the
    image, where torchvision draws anew.
    """
    count, (height, width) = len(images), images.shape[2:]
    area = draws.uniform(config.area[0], config.area[1], count)
    aspect = np.exp(draws.uniform(np.log(config.aspect[0]), np.log(config.aspect[1]), count))
    size = np.minimum(np.stack([np.sqrt(area * aspect * height / width), np.sqrt(area / aspect * width / height)]), 1)
    centre = size / 2 + draws.random((2, count)) * (1 - size)
    return torch.from_numpy(centre.T).float(), torch.from_numpy(size.T).float()


def zoom(images: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """Resize each image's box to the whole by bilinear interpolation (it only grows, so nothing aliases).

    Args:
        images: [N, C, H, W].
        centre: of the boxes, [N, 2] (x, y), as shares of the image.
        size: of the boxes, likewise.
    """
    where = torch.diag_embed(size)
    affine = torch.cat([where, (2 * centre - 1).unsqueeze(2)], dim=2).to(images.device)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    pixels = images.float()
    if not images.is_floating_point():
        pixels = pixels / 255
    found = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.contiguous(memory_format=torch.channels_last)


# Mixing, each pair of a batch by its own draw


def mix(
    images: Tensor, targets: Tensor, *, mixup_beta: float, cutmix_beta: float, draws: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """MixUp on the first half of a batch and CutMix on the second, or the one that is on on all of it.

    Args:
        images: [N, C, H, W], floating point.
        targets: [N, classes], probabilities.
        mixup_beta: parameter of the beta distribution of MixUp's shares; 0 is off.
        cutmix_beta: of CutMix's; 0 is off.
        draws: a generator.
    """
    count = len(images)
    blended = 0 if not mixup_beta else math.ceil(count / 2) if cutmix_beta else count
    shares = draws.beta(mixup_beta or 1, mixup_beta or 1, count), draws.beta(cutmix_beta or 1, cutmix_beta or 1, count)
    centres = draws.random((count, 2))
    to_mix, to_cut, centre = (torch.from_numpy(values).float() for values in (*shares, centres))
    parts = []
    if blended:
        parts.append(mixup(images[:blended], targets[:blended], to_mix[:blended]))
    if blended < count and cutmix_beta:
        parts.append(cutmix(images[blended:], targets[blended:], to_cut[blended:], centre[blended:]))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def partners(count: int) -> Tensor:
    """Return who is mixed with whom: each example with the next, the last with the first."""
    return torch.arange(1, count + 1) % max(count, 1)


def mixup(images: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Blend each image with its partner: share · own + (1 − share) · partner's, and the targets likewise.

    Args:
        images: [N, C, H, W], floating point.
        targets: [N, classes], probabilities.
        share: [N], of the own image, in 0 to 1.
    """
    other = partners(len(images)).to(images.device)
    own = share.to(images).view(-1, 1, 1, 1)
    return torch.lerp(images[other], images, own), torch.lerp(targets[other], targets, own.view(-1, 1).to(targets))


def cutmix(images: Tensor, targets: Tensor, share: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Put a box of each partner into the image; the targets mix by the box's true area.

    Args:
        images: [N, C, H, W].
        targets: [N, classes], probabilities.
        share: [N], the part of the own image that is asked for; the box is clipped at the borders.
        centre: [N, 2], of the box (row, column), in 0 to 1.
    """
    height, width = images.shape[2:]
    other = partners(len(images)).to(images.device)
    side = (1 - share).sqrt()
    box_rows = _inside(centre[:, 0] * height, side * height / 2, height)
    box_columns = _inside(centre[:, 1] * width, side * width / 2, width)
    box = (box_rows[:, :, None] & box_columns[:, None, :]).to(images.device)
    covered = box.float().mean(dim=(1, 2)).to(targets).unsqueeze(1)
    return torch.where(box.unsqueeze(1), images[other], images), torch.lerp(targets, targets[other], covered)


def _inside(centre: Tensor, half: Tensor, size: int) -> Tensor:
    """Tell which of ``size`` pixels lie within half a side of the centre, [N, size]."""
    pixels = torch.arange(size) + 0.5
    return (pixels - centre[:, None]).abs() < half[:, None]


# What a data worker does with one image

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
        side, v2 = round(size / ratio), transforms()
        self.transform = v2.Compose([v2.Resize(side, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])

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
            v2 = transforms()
            steps.append(v2.RandomResizedCrop(size, config.area, config.aspect, v2.InterpolationMode.BICUBIC))
        if config.randaugment_layers:
            steps.append(rand_augment(config))
        self.transform = transforms().Compose(steps) if steps else None

    def __call__(self, image: Any, key: tuple[int, ...]) -> Any:
        if self.centre is not None:
            image = self.centre(image)
        if self.transform is None:
            return image
        torch.default_generator.manual_seed(seed_of(CROP, *key))
        return self.transform(image)


def rand_augment(config: AugmentationConfig) -> Any:
    """Return the RandAugment of torchvision, its magnitude on the paper's scale of 0 to 10."""
    magnitude = 3 * config.randaugment_magnitude
    return transforms().RandAugment(config.randaugment_layers, magnitude, num_magnitude_bins=31, fill=GREY)


def transforms() -> Any:
    """Return ``torchvision.transforms.v2``.

    Raises:
        ImportError: torchvision is not installed.
    """
    return require("torchvision.transforms.v2", "varying and cropping images")


def seed_of(*key: int) -> int:
    """Return a seed for a torch generator, of a key of integers; a hash, for it is drawn for every image."""
    digest = hashlib.blake2b(repr([int(part) for part in key]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
