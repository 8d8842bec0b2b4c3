"""What happens to a batch on the device: RandAugment, crop, flip, standardization, mixing.

Draws are made on the CPU from (seed, rank, step), so that every device sees the same ones and a resumed step
repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from normfree.common.checks import check_integer, invalid
from normfree.data.config import AugmentationConfig
from normfree.data.crops import rand_augment, seed_of
from normfree.data.mixing import mix
from normfree.data.order import MIX, check_rank, generator


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
            images = self._each_varied(images, step)
        if config.crop == "inception":
            images = zoomed(images, *boxes(images, config, draws))
        elif config.crop == "shift" and config.shift:
            offsets = draws.integers(0, 2 * config.shift + 1, (2, len(images)))
            images = shifted(images, torch.from_numpy(offsets), config.shift)
        if config.flip:
            images = flipped(images, torch.from_numpy(draws.random(len(images)) < 0.5))
        images = self.standardization(images)
        if not (config.mixup or config.cutmix):
            return images, targets
        soft = functional.one_hot(targets, self.num_classes).to(images.dtype)
        return mix(images, soft, mixup_beta=config.mixup, cutmix_beta=config.cutmix, draws=draws)

    def _each_varied(self, images: Tensor, step: int) -> Tensor:
        """RandAugment image by image: each takes operations of its own. It draws from torch's global generator."""
        assert self.randaugment is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(MIX, self.seed, self.rank, step, 1))
            varied = torch.stack([self.randaugment(image) for image in images])
        return varied.contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor, offsets: Tensor, most: int) -> Tensor:
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
    return _gathered(padded, rows, columns)


def flipped(images: Tensor, which: Tensor) -> Tensor:
    """Mirror the images that ``which`` [N] says, left to right."""
    chosen = which.nonzero().squeeze(1).to(images.device)
    images = images.clone()
    images[chosen] = images[chosen].flip(3)
    return images


def _gathered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[n, :, rows[n, i], columns[n, j]] for all n, i, j; reads whole pixels of channels-last images."""
    count, _, height, width = images.shape
    start = torch.arange(count, device=images.device)[:, None, None] * (height * width)
    index = start + rows[:, :, None] * width + columns[:, None, :]
    pixels = images.permute(0, 2, 3, 1).reshape(count * height * width, -1)
    return pixels[index].permute(0, 3, 1, 2)


def boxes(images: Tensor, config: AugmentationConfig, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Inception crops of a batch: their centres and their sizes, each [N, 2] (x, y) as shares of the image.

    Area and aspect are drawn as in torchvision's RandomResizedCrop; a box that does not fit is narrowed to the
    image, where torchvision draws anew.
    """
    count, (height, width) = len(images), images.shape[2:]
    area = draws.uniform(config.area[0], config.area[1], count)
    aspect = np.exp(draws.uniform(np.log(config.aspect[0]), np.log(config.aspect[1]), count))
    size = np.minimum(np.stack([np.sqrt(area * aspect * height / width), np.sqrt(area / aspect * width / height)]), 1)
    centre = size / 2 + draws.random((2, count)) * (1 - size)
    return torch.from_numpy(centre.T).float(), torch.from_numpy(size.T).float()


def zoomed(images: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """Each image's box, resized to the whole by bilinear interpolation (it only grows, so nothing aliases).

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
