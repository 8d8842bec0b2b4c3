"""Inputs to measure a model with: batches of noise or of real images, drawn from one seed.

Photographs are cropped at random (a random area of 30 to 100 % of the image, a random flip) and standardized with the
channel means and deviations of the model's training, ImageNet's where nothing says so. Images of a source that can be
trained on are as training prepares them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from normfree.common.checks import invalid, require
from normfree.common.files import walk
from normfree.common.process import seeded
from normfree.common.text import first_line
from normfree.data.augmentation import Standardization, transforms
from normfree.data.config import IMAGENET_MEAN, IMAGENET_STD, AugmentationConfig, DataConfig
from normfree.data.pipeline import TrainingData, open_training
from normfree.data.records import DamagedImage, decode
from normfree.data.sources import SUFFIXES, parquet_in


class Probe(Protocol):
    """A source of batches."""

    def batches(self, shape: Sequence[int], *, count: int, seed: int) -> Iterator[Tensor]:
        """Draw ``count`` batches.

        Args:
            shape: of a batch, [N, C, H, W] (noise takes any shape).
            count: number of batches.
            seed: of all draws.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the input."""
        ...


class GaussianNoise:
    """Unit Gaussian noise."""

    def batches(self, shape: Sequence[int], *, count: int, seed: int) -> Iterator[Tensor]:
        """Draw batches of the shape."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield torch.randn(*shape, generator=generator)

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the input."""
        return {"kind": "gaussian"}


class Images(ABC):
    """Random crops of some images.

    Attributes:
        mean: channel means that are subtracted, of pixels in 0 to 1.
        std: channel deviations that are divided by.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def standardized(self, mean: Sequence[float], std: Sequence[float]) -> Self:
        """Return the same images, standardized with these channel means and deviations."""
        other = copy(self)
        other.mean, other.std = tuple(mean), tuple(std)
        return other

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the means and deviations for images of 1 or 3 channels; of grey ones the averages over the colours.

        Raises:
            ValueError: there is one of each, and three channels.
        """
        if len(self.mean) == channels:
            return self.mean, self.std
        if channels == 3:
            raise invalid("mean", self.mean, "the model takes 3 channels", "pass three numbers")
        return (sum(self.mean) / len(self.mean),), (sum(self.std) / len(self.std),)

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the input."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @abstractmethod
    def load(self, index: int) -> Any:
        """Image ``index`` as PIL image or uint8 tensor [3, H, W]."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    def batches(self, shape: Sequence[int], *, count: int, seed: int) -> Iterator[Tensor]:
        """Draw batches of crops; the images are taken in a random order, again from the start when used up."""
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise ValueError(
                f"input: images give batches of shape [N, 3, H, W], or [N, 1, H, W] in grey, and the model takes "
                f"{list(shape)}; use --input gaussian"
            )
        v2 = transforms()
        mean, std = self.statistics(shape[1])
        crop = v2.Compose(
            [
                v2.ToImage(),
                v2.Grayscale(shape[1]) if shape[1] == 1 else v2.Identity(),
                v2.RandomResizedCrop(tuple(shape[2:]), scale=(0.3, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )
        with seeded(seed):
            order = torch.randperm(len(self)).tolist()
            state = torch.get_rng_state()
        for number in range(count):
            with seeded(seed):
                torch.set_rng_state(state)
                chosen = [order[(number * shape[0] + i) % len(order)] for i in range(shape[0])]
                batch = torch.stack([crop(self.load(index)) for index in chosen])
                state = torch.get_rng_state()
            yield batch


class Photographs(Images):
    """Random crops of the two photographs that ship with scikit-learn (a temple and a flower).

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        datasets: Any = require("sklearn.datasets", "input=photos")
        self.images = datasets.load_sample_images().images

    def load(self, index: int) -> Tensor:
        """Photograph 0 or 1, uint8 [3, 427, 640]."""
        return torch.from_numpy(self.images[index].copy()).permute(2, 0, 1)

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the input."""
        kind = {"kind": "photos", "images": "scikit-learn's china.jpg and flower.jpg, random crops"}
        return kind | super().describe()


class ImageFolder(Images):
    """Random crops of the images in a folder and the folders below it.

    Args:
        folder: the folder.

    Raises:
        ValueError: if it is no folder, or holds no image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"input: {str(folder)!r} is no folder")
        self.files = sorted(p for p in walk(self.folder, "input") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.files:
            raise ValueError(
                f"input: {str(folder)!r} holds no image ({', '.join(sorted(SUFFIXES))}), nor do the folders below it"
            )

    def load(self, index: int) -> Any:
        """Decode one image as RGB; a ValueError names the file that does not decode."""
        path = self.files[index]
        try:
            return decode(path)
        except DamagedImage as damage:
            raise ValueError(f"input: {path} does not decode as an image ({damage}); remove or replace it") from damage

    def __len__(self) -> int:
        return len(self.files)

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the input."""
        return {"kind": "folder", "folder": self.folder.name, "images": len(self.files)} | super().describe()


class SourceImages:
    """The images a run trains on, prepared as it prepares them but for what augmentation varies.

    Args:
        source: as :class:`DataConfig` takes it.

    Raises:
        ValueError: there is no such source.
        ImportError: what it is read with is not installed.
    """

    def __init__(self, source: str) -> None:
        augmentation = AugmentationConfig(crop="none", flip=False)
        self.config = DataConfig(source=source, augmentation=augmentation, batch_size=1)
        self._opened  # noqa: B018  # now, and not when a model has been built

    @cached_property
    def _opened(self) -> TrainingData:
        return open_training(self.config)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as it is trained on, [C, H, W]."""
        return self._opened.image_shape

    def standardized(self, mean: Sequence[float], std: Sequence[float]) -> SourceImages:
        """Return the same images, standardized with these channel means and deviations."""
        other = copy(self)
        other.config = replace(self.config, mean=tuple(mean), std=tuple(std))
        vars(other).pop("_opened", None)
        return other

    def batches(self, shape: Sequence[int], *, count: int, seed: int) -> Iterator[Tensor]:
        """Draw batches in a random order, again from the start when all images are used up."""
        if len(shape) != 4 or shape[2] != shape[3] or shape[1] not in (1, 3):
            rule = f"gives square images of 1 or 3 channels, and the model takes {list(shape[1:])}"
            raise invalid("input", self.config.source, rule, "use --input gaussian")
        if self.config.source == "digits" and tuple(shape[1:]) != self.shape:
            rule = f"has images {list(self.shape)}, and the model takes {list(shape[1:])}"
            raise invalid("input", self.config.source, rule, "give a model for such images, or use --input gaussian")
        config = replace(self.config, in_channels=shape[1], image_size=shape[2], batch_size=shape[0], seed=seed)
        data = open_training(config)
        standardize = Standardization(*data.config.statistics)
        given = 0
        while given < count:
            for images, _ in data:
                yield standardize(images)
                given += 1
                if given == count:
                    return

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the input: of files the last part of their path alone."""
        source, (mean, std) = self.config.source, (self.config.mean, self.config.std)
        known = {} if mean is None or std is None else {"mean": list(mean), "std": list(std)}
        return {"kind": "training images", "source": source.rstrip("/").rpartition("/")[2]} | known


def probe_named(name: str) -> Probe:
    """Return the probe of that name: "gaussian", "photos", a folder of images, or any other source of training images.

    Raises:
        ValueError: there is no such folder or source, or no image in it.
        ImportError: what images are read with is not installed.
    """
    if name == "gaussian":
        return GaussianNoise()
    transforms()  # now, and not when a model has been built
    if name == "photos":
        return Photographs()
    if Path(name).is_dir() and not parquet_in(Path(name), "input"):
        return ImageFolder(name)
    try:
        return SourceImages(name)
    except ValueError as error:
        reason = first_line(error).removeprefix(f"source={name!r}: ")
        raise ValueError(f"input={name!r}: {reason}; or gaussian, photos") from error
