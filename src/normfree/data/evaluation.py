"""Batches to evaluate on: every example once, over all ranks, in the order of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from normfree.data.augmentation import Standardization
from normfree.data.config import DataConfig
from normfree.data.crops import CentreCrop
from normfree.data.loading import Decoded, Decoder, Example, loader
from normfree.data.memory import DIGITS_SPLITS, Pixels, check_failures, decoded, digits
from normfree.data.opened import check_classes, open_split, resolved
from normfree.data.order import check_rank, evaluation_indices
from normfree.data.splits import chosen_split
from normfree.data.stream import Shards
from normfree.data.training import open_training, with_digits, with_statistics


class EvaluationData:
    """Batches of one rank: ``(images, targets)`` as of :class:`~normfree.data.TrainingData`, the last one shorter.

    Iterating gives all of them, each time. A damaged image is left out where the config says to skip it.

    Args:
        batches: of this rank; iterated anew each time.
        config: resolved.
        class_names: of the targets.
        examples: over all ranks; None where only reading everything would tell.
    """

    def __init__(
        self, batches: Iterable[Decoded], config: DataConfig, class_names: tuple[str, ...], examples: int | None
    ) -> None:
        self.batches, self.config, self.class_names, self.examples = batches, config, class_names, examples
        self.bad_images: dict[str, str] = {}
        """Reason by name of each damaged image met so far."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            check_failures(batch, self.config)
            self.bad_images.update(batch.failures)
            if len(batch.images):
                yield batch.images, batch.targets

    def standardization(self) -> Standardization:
        """What is left to do to a batch, on any device."""
        return Standardization(*self.config.statistics)


class _InMemory:
    """One rank's rows of one tensor."""

    def __init__(self, pixels: Pixels, batch_size: int, rank: int, world_size: int) -> None:
        self.pixels, self.division = pixels, (batch_size, rank, world_size)

    def __iter__(self) -> Iterator[Decoded]:
        for indices in evaluation_indices(len(self.pixels), *self.division):
            yield Decoded(*self.pixels.batch(indices), [])


class _Numbers:
    """What a loader is to fetch from a table."""

    def __init__(self, examples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.division = (examples, batch_size, rank, world_size)

    def __iter__(self) -> Iterator[list[Example]]:
        for indices in evaluation_indices(*self.division):
            yield [Example(index) for index in indices]


class _Records:
    """What a loader is to decode of a stream."""

    def __init__(self, shards: Shards, batch_size: int) -> None:
        self.shards, self.batch_size = shards, batch_size

    def __iter__(self) -> Iterator[list[Example]]:
        batch: list[Example] = []
        for index in self.shards.own(list(range(self.shards.count))):
            for record in self.shards.records(index, self.shards.opened(index)):
                batch.append(Example(record))
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch


def open_evaluation(
    config: DataConfig, *, rank: int = 0, world_size: int = 1, classes: Sequence[str] | None = None
) -> EvaluationData:
    """Open the evaluation split of a config's source.

    Where the config leaves the means and deviations of a set in memory open, they are taken from the training
    split, which is then read too; ``open_training(...).config`` has them.

    Args:
        config: what to open.
        rank: of this process.
        world_size: number of processes.
        classes: of the network to evaluate, by their numbers; labels that are words are numbered so.

    Raises:
        ValueError: as of :func:`~normfree.data.open_training`; the data have other classes.
    """
    check_rank(rank, world_size)
    if config.source == "digits":
        training = chosen_split(DIGITS_SPLITS, config, training=False) == "train"
        config = with_digits(config)
        pixels = digits(training=training)
        check_classes(pixels.class_names, classes, config.source)
        return _from_memory(pixels, with_statistics(config, digits(training=True)), rank, world_size)
    opened = open_split(config, training=False, classes=classes)
    config = resolved(config, opened)
    if config.in_memory:
        pixels = decoded(opened.records() if opened.streamed else opened.table(), opened.class_names, config)
        return _from_memory(pixels, _as_in_training(config), rank, world_size)
    config = with_statistics(config, None)
    crop = CentreCrop(config.size, config.crop_ratio)
    if opened.streamed:
        shards = Shards(opened.rows, opened.reader, rank, world_size)
        decoder = Decoder(None, crop, config.channels, replace=False)
        batches = loader(decoder, _Records(shards, config.batch_size), config, keep=False)
    else:
        assert opened.examples is not None
        numbers = _Numbers(opened.examples, config.batch_size, rank, world_size)
        decoder = Decoder(opened.table(), crop, config.channels, replace=False)
        batches = loader(decoder, numbers, config, keep=False)
    return EvaluationData(batches, config, opened.class_names, opened.examples)


def _from_memory(pixels: Pixels, config: DataConfig, rank: int, world_size: int) -> EvaluationData:
    batches = _InMemory(pixels, config.batch_size, rank, world_size)
    data = EvaluationData(batches, config, pixels.class_names, len(pixels))
    data.bad_images.update(pixels.failures)
    return data


def _as_in_training(config: DataConfig) -> DataConfig:
    if config.mean is not None:
        return config
    training = open_training(replace(config, batch_size=1)).config
    return replace(config, mean=training.mean, std=training.std)
