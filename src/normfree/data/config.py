"""What to train and evaluate on, how images are varied, and what a trained network says of both; checked when made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from normfree.common.checks import (
    check_choices,
    check_flag,
    check_integer,
    check_number,
    check_rate,
    check_seed,
    invalid,
)
from normfree.common.files import PREPROCESSING, parse_dataclass, parse_json, refused
from normfree.common.text import first_line

OnBadImage = Literal["error", "skip"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HOLDOUT = 0.1
"""Share that is held out where none is asked for and the data have no split to evaluate on."""

MOST_CLASSES = 1_000_000
"""Classes a network has at most; labels that number more are identifiers."""

LARGEST_SIZE = 4096
"""Height and width of images at most: of one in float32 that are 0.2 GB."""

MOST_WORKERS = 1024
"""Processes that decode, and batches that each has ready, at most."""

MOST_SHIFT, MOST_LAYERS = 256, 64
"""Pixels of a shift, whose border is memory, and RandAugment's operations, each of which takes time, at most."""

LARGEST_MAGNITUDE = 10
"""RandAugment's scale: 10 is the strongest that torchvision's operations are defined for (its own scale's 30)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How training images are varied.

    The inception crop and RandAugment of images that are decoded on the fly happen in the data workers; shift,
    flip, mixing and standardization happen in batches on the device.
    """

    crop: Literal["inception", "shift", "none"] = "inception"
    """inception: a random area of a random aspect, resized; shift: padded by zeros and moved, as on CIFAR."""
    area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image an inception crop takes."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect of an inception crop."""
    shift: int = 4
    """Largest shift, in pixels."""
    flip: bool = True
    """Mirror half of the images."""
    randaugment_layers: int = 0
    """RandAugment's operations per image; 0 switches it off, the NFNets take 4."""
    randaugment_magnitude: int = 5
    """Their strength, 0 to 10; the NFNets take 5 (F0) and 10 (F1). The official 15 of F2 and up lies outside
    torchvision's range."""
    mixup: float = 0.0
    """Parameter of MixUp's beta distribution; 0 switches it off, the NF-RegNets and NFNets take 0.2."""
    cutmix: float = 0.0
    """Parameter of CutMix's beta distribution; 0 switches it off, 1 cuts areas of every size alike. With both,
    MixUp takes the first half of each batch and CutMix the second."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("area", "aspect"):
            _check_range(name, getattr(self, name))
        if self.area[1] > 1:
            raise invalid("area", self.area, "a crop takes at most the whole image", "pass two shares up to 1")
        check_flag("flip", self.flip)
        for name in ("shift", "randaugment_layers", "randaugment_magnitude"):
            check_integer(name, getattr(self, name), 0)
        if self.randaugment_magnitude > LARGEST_MAGNITUDE:
            rule = f"must be at most {LARGEST_MAGNITUDE}, the end of the scale"
            raise invalid("randaugment_magnitude", self.randaugment_magnitude, rule, "pass 10 or fewer")
        for name, most in (("shift", MOST_SHIFT), ("randaugment_layers", MOST_LAYERS)):
            if getattr(self, name) > most:
                raise invalid(name, getattr(self, name), f"must be at most {most}", "pass fewer")
        for name in ("mixup", "cutmix"):
            check_number(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from, and in what shape they arrive.

    None stands for "as the data say": an opened set's ``config`` has every field resolved.
    """

    source: str = "digits"
    """digits (embedded); a folder of class folders, or of split folders (train, validation, test) with class
    folders; a folder or glob of .parquet files; .tar shards of WebDataset (a glob, or braces as in
    train-{000..127}.tar); hub:OWNER/NAME of a Hugging Face data set, with :CONFIGURATION where it has several."""
    training_split: str = "train"
    """Split to train on."""
    evaluation_split: str | None = None
    """Split to evaluate on; what is held out, if anything is, else validation if there is one, else test."""
    holdout: float | None = None
    """Share of the training images that is held out to evaluate on, of each class, as a split called holdout. By
    default 0.1 in `normfree train` where the data have no split to evaluate on, else none."""
    holdout_seed: int = 0
    """Of the choice of what is held out, which `--seed` does not change."""
    image_column: str | None = None
    """Column of the images; the first that holds images by default."""
    label_column: str | None = None
    """Column of the labels; the first that holds classes, or is called label, by default."""
    num_classes: int | None = None
    """Number of classes, where the source does not say."""
    examples: int | None = None
    """Training images a streamed source holds, where it does not say."""
    evaluation_examples: int | None = None
    """Evaluation images a streamed source holds, where it does not say."""
    in_channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB); 1 for the digits, else 3."""
    image_size: int | None = None
    """Height and width; by default that of the images if they all have one square size, else 224."""
    crop_ratio: float = 0.875
    """Share of the shorter side that the centre crop of an evaluated image takes."""
    mean: tuple[float, ...] | None = None
    """Channel means to subtract, of pixels in 0 to 1; of the training images where they lie in memory, else
    ImageNet's."""
    std: tuple[float, ...] | None = None
    """Channel deviations to divide by, as with the means."""
    batch_size: int = 128
    """Images in a batch of one rank."""
    workers: int = 0
    """Processes that decode, per rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Batches each worker has ready."""
    in_memory: Literal["auto"] | bool = "auto"
    """Decode everything once into one tensor; auto: where all images have the size asked for and fit in 1 GiB."""
    streaming: Literal["auto"] | bool = "auto"
    """Read in the order of the files, shuffled in blocks; auto: .tar shards only."""
    shuffle_block: int = 1024
    """Streamed images that are shuffled together."""
    on_bad_image: OnBadImage = "error"
    """What a damaged image does: stop with an error naming it, or be counted and replaced by another of its batch."""
    cache_folder: Path | None = None
    """Where downloads and converted parquet go; that of Hugging Face datasets (HF_HOME, XDG_CACHE_HOME) by default."""
    seed: int = 0
    """Of the order and of every augmentation."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """How training images are varied."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise invalid("source", self.source, "must name data", "pass digits, a folder or files")
        for name in ("batch_size", "prefetch", "shuffle_block"):
            check_integer(name, getattr(self, name), 1)
        check_integer("workers", self.workers, 0)
        for name in ("workers", "prefetch"):
            if getattr(self, name) > MOST_WORKERS:
                raise invalid(name, getattr(self, name), f"must be at most {MOST_WORKERS:,}", "pass fewer")
        check_seed(self.seed)
        check_integer("holdout_seed", self.holdout_seed, 0)
        if self.holdout is not None:
            check_rate("holdout", self.holdout)
        for name in ("num_classes", "examples", "evaluation_examples", "image_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_image_size("image_size", self.image_size)
        if self.num_classes is not None and self.num_classes > MOST_CLASSES:
            rule = f"must be at most {MOST_CLASSES:,}"
            raise invalid("num_classes", self.num_classes, rule, "pass the number of different labels")
        check_choices(self)
        if not 0 < check_number("crop_ratio", self.crop_ratio) <= 1:
            raise invalid("crop_ratio", self.crop_ratio, "must be above 0 and at most 1", "pass 0.875")
        if (self.image_size or 224) > 2 * LARGEST_SIZE * self.crop_ratio:
            rule = f"images would be resized to more than {2 * LARGEST_SIZE:,} pixels"
            raise invalid("crop_ratio", self.crop_ratio, rule, "pass 0.875")
        if self.in_memory is True and self.streaming is True:
            raise invalid("in_memory", True, "data are streamed or held in memory, not both", "pass streaming=False")
        check_statistics(self.mean, self.std, self.in_channels)

    @property
    def channels(self) -> int:
        """1 or 3; of a resolved config."""
        assert self.in_channels is not None
        return self.in_channels

    @property
    def size(self) -> int:
        """Height and width; of a resolved config."""
        assert self.image_size is not None
        return self.image_size

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations; of a resolved config."""
        assert self.mean is not None and self.std is not None
        return self.mean, self.std


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a trained network takes and answers, as its files say it themselves.

    A run's weights and exported files keep it among their metadata, under the name ``METADATA``, as a JSON object of
    these attributes.

    Attributes:
        image_size: height and width in pixels.
        crop_ratio: share of the shorter side that the centre crop takes, see :class:`DataConfig`.
        mean: of each channel, to subtract from pixels in 0 to 1.
        std: deviations to divide by.
        classes: names of the logits.
    """

    METADATA: ClassVar[str] = PREPROCESSING

    image_size: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(set(self.classes)) == len(self.classes) <= MOST_CLASSES:
            raise ValueError(
                f"Preprocessing.classes: {len(self.classes):,}, of which {len(set(self.classes)):,} differ"
            )
        # whose rules the other values keep
        DataConfig(image_size=self.image_size, crop_ratio=self.crop_ratio, mean=self.mean, std=self.std)

    @classmethod
    def of(cls, config: DataConfig, classes: Sequence[str]) -> Preprocessing:
        """Return that of a resolved config's evaluated images."""
        mean, std = config.statistics
        size, ratio = config.size, config.crop_ratio
        return cls(image_size=size, crop_ratio=ratio, mean=mean, std=std, classes=tuple(classes))

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> Preprocessing | None:
        """Return what a file says.

        Args:
            metadata: of the file.
            path: the file, for messages.

        Returns:
            None where it says nothing.

        Raises:
            ValueError: what it says is damaged.
        """
        if (text := metadata.get(cls.METADATA)) is None:
            return None
        try:
            return parse_dataclass(cls, parse_json(text))
        except ValueError as error:
            rule = f"its metadata {cls.METADATA} are damaged ({first_line(error)})"
            raise refused("model", path, rule, "take an undamaged copy") from error

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations."""
        return self.mean, self.std

    def to_metadata(self) -> dict[str, str]:
        """Return it as ``normfree.save`` and ``normfree.export.to_onnx`` take it."""
        return {self.METADATA: json.dumps(asdict(self))}


def check_image_size(argument: str, size: int | None) -> None:
    """Refuse a height and width that no network takes, and that one image could fill the memory with."""
    __tracebackhide__ = True
    if size is not None and size > LARGEST_SIZE:
        raise invalid(argument, size, f"must be at most {LARGEST_SIZE:,}", "pass a smaller one")


def check_statistics(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int | None = None
) -> None:
    """Refuse means and deviations of channels that are none.

    Args:
        mean: of each channel, of pixels in 0 to 1.
        std: the deviations.
        channels: how many there are; 1 or 3 where that is not known.

    Raises:
        ValueError: one without the other, of another number of channels, not finite, or a deviation that is not
            positive.
    """
    __tracebackhide__ = True
    if (mean is None) != (std is None):
        given = ("mean", mean) if mean is not None else ("std", std)
        raise invalid(*given, "means and deviations belong together", "pass both, or neither")
    if mean is None or std is None:
        return
    wanted = channels or len(mean)
    for name, values, least in (("mean", mean, None), ("std", std, 0.0)):
        if len(values) != wanted or wanted not in (1, 3):
            rule = f"must have one number per channel ({channels or '1 or 3'})"
            raise invalid(name, values, rule, "pass that many")
        for value in values:
            check_number(name, value) if least is None else check_number(name, value, least, exclusive=True)


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's channel means and deviations, of grey images their averages over the colours."""
    if channels == 1:
        return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    return IMAGENET_MEAN, IMAGENET_STD


def preparation(mean: Sequence[float], std: Sequence[float], origin: str = "") -> str:
    """Return the line that says how images were standardized where no run and no option says it.

    Args:
        mean: of each channel, of pixels in 0 to 1.
        std: the deviations.
        origin: of numbers that are not ImageNet's.
    """
    known = (tuple(mean), tuple(std)) == imagenet_statistics(len(mean))
    numbers = [f"{name} {' '.join(f'{one:.4g}' for one in values)}" for name, values in (("mean", mean), ("std", std))]
    said = "ImageNet's mean and deviation" if known else f"{' and '.join(numbers)}, {origin}"
    return f"images standardized with {said}; --mean and --std say otherwise"


def cropping(size: int, ratio: float) -> str:
    """Return the line that says how images of another size were cropped where no run, file or option says it."""
    taken = f"the centre {ratio:.3g} of the shorter side of images of another size than {size} × {size} is taken"
    return f"{taken}; --crop-ratio says otherwise"


def _check_range(name: str, values: Sequence[float]) -> None:
    if len(values) != 2 or not 0 < check_number(name, values[0]) <= check_number(name, values[1]):
        raise invalid(name, values, "must be two numbers, above 0 and ascending", f"pass {name}=(least, most)")
