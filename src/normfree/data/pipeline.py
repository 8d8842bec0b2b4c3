"""Batches to train on: an endless order of epochs that can be left and taken up again at any step."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normfree.common.checks import invalid
from normfree.common.packages import required
from normfree.data.augmentation import Augmentation, CentreCrop, Crop, Standardization, TrainingCrop
from normfree.data.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from normfree.data.decode import DamagedImage, decode
from normfree.data.order import Place, Shards, Share, Stream, check_rank, evaluation_indices
from normfree.data.records import Opened, Record, Table, check_classes, open_split, resolved
from normfree.data.sources import chosen_split


class TrainingData:
    """Batches of one rank, epoch after epoch.

    Iterating gives the rest of the current epoch, ``(images, targets)``: uint8 [N, C, H, W], channels last in
    memory, and int64 [N], both on the CPU; :meth:`augmentation` takes them further. Then the next epoch begins.
    Order and augmentation depend on (seed, epoch, number of the example) alone: neither the number of workers
    nor a restart changes a bit.

    Args:
        feed: where batches come from.
        share: this rank's part.
        config: resolved.
        class_names: of the targets.
    """

    def __init__(self, feed: Feed, share: Share, config: DataConfig, class_names: tuple[str, ...]) -> None:
        self.feed, self.share, self.config, self.class_names = feed, share, config, class_names
        self.epoch, self.step = 0, 0
        self.bad_images: dict[str, str] = {}
        """Reason by name of each damaged image met so far."""
        self._place: Any = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """1 or 3."""
        return self.config.channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.config.channels, self.config.size, self.config.size

    @property
    def examples(self) -> int:
        """Examples of an epoch before the incomplete last step is dropped, over all ranks."""
        return self.share.examples

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same for each rank."""
        return self.share.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, place in self.feed.batches(self.epoch, self.step, self._place):
            check_failures(batch, self.config)
            self.bad_images.update(batch.failures)
            if not len(batch.images):
                rule = f"none of the {len(batch.failures)} images of a batch decodes, {batch.failures[0][0]} first"
                raise invalid("source", self.config.source, rule, "mend the files")
            self.step, self._place = self.step + 1, place
            yield batch.images, batch.targets
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.step, self._place = epoch, 0, None

    def augmentation(self) -> Augmentation:
        """What is left to do to a batch, on any device."""
        config, (mean, std) = self.config.augmentation, self.config.statistics
        if not isinstance(self.feed, MemoryFeed):  # the workers have done their part
            config = replace(config, crop="none" if config.crop == "inception" else config.crop, randaugment_layers=0)
        return Augmentation(
            config,
            mean=mean,
            std=std,
            num_classes=self.num_classes,
            seed=self.config.seed,
            rank=self.share.rank,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, after the last one that was given out."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "place": self._place,
            "share": asdict(self.share),
            "bad_images": dict(self.bad_images),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a :meth:`state_dict` was taken, with any number of workers.

        Raises:
            ValueError: if examples, batch size, seed or ranks are others than they were.
        """
        for name, value in asdict(self.share).items():
            own = name != "rank" or state["place"] is not None  # a place in a stream is its rank's alone
            if own and state["share"][name] != value:
                rule = f"the saved run had {state['share'][name]!r}, and its order cannot go on with another"
                raise invalid(name, value, rule, f"pass {name}={state['share'][name]!r}, or start anew")
        self.epoch, self.step, self._place = state["epoch"], state["step"], state["place"]
        self.bad_images = dict(state["bad_images"])


def open_training(config: DataConfig, *, rank: int = 0, world_size: int = 1) -> TrainingData:
    """Open the training split of a config's source.

    Args:
        config: what to open.
        rank: of this process.
        world_size: number of processes; each gets as many batches as every other.

    Raises:
        ValueError: if there is no such source, split or column; if labels are missing; if the examples do not
            fill one batch of each rank; or naming the first damaged image of a set that is held in memory.
    """
    check_rank(rank, world_size)
    if config.source == "digits":
        pixels = digits(training=True)
        return _in_memory(pixels, with_digits(config), rank, world_size)
    opened = open_split(config, training=True)
    config = resolved(config, opened)
    if config.in_memory:
        pixels = decoded(opened.records() if opened.streamed else opened.table(), opened.class_names, config)
        return _in_memory(pixels, config, rank, world_size)
    if opened.examples is None:
        raise invalid("examples", None, "the streamed data do not say how many there are", "pass it")
    config = with_statistics(config, None)
    share = _share(opened.examples, config, rank, world_size)
    feed = (StreamFeed if opened.streamed else TableFeed)(opened, share, config)
    return TrainingData(feed, share, config, opened.class_names)


def with_digits(config: DataConfig) -> DataConfig:
    """The config with what the digits are; a ValueError where it asks for something else."""
    for name, value in (("image_size", 8), ("in_channels", 1), ("num_classes", 10)):
        if getattr(config, name) not in (None, value):
            raise invalid(name, getattr(config, name), f"the digits have {value}", "leave it out")
    return replace(config, image_size=8, in_channels=1, num_classes=10, in_memory=True)


def with_statistics(config: DataConfig, pixels: Pixels | None) -> DataConfig:
    """The config with means and deviations: given, of the pixels, or ImageNet's (its averages for grey)."""
    if config.mean is not None:
        return config
    if pixels is not None:
        mean, std = pixels.statistics()
    elif config.in_channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
    return replace(config, mean=mean, std=std)


def _in_memory(pixels: Pixels, config: DataConfig, rank: int, world_size: int) -> TrainingData:
    config = with_statistics(config, pixels)
    share = _share(len(pixels), config, rank, world_size)
    data = TrainingData(MemoryFeed(pixels, share), share, config, pixels.class_names)
    data.bad_images.update(pixels.failures)
    return data


def _share(examples: int, config: DataConfig, rank: int, world_size: int) -> Share:
    return Share(examples=examples, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size)


# MERGED from data/pipeline.py: Batches to evaluate on: every example once, over all ranks, in the order of the data.


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


# MERGED from data/pipeline.py: Where the batches of an epoch come from: memory, a table or a stream, from any step on.


class Fed(NamedTuple):
    """A batch, and where the one after it is taken up."""

    batch: Decoded
    place: Any = None


class Feed(Protocol):
    """Where the batches of an epoch come from."""

    def batches(self, epoch: int, step: int, place: Any) -> Iterator[Fed]:
        """Batches from a step on; ``place`` is what the batch before it came with."""
        ...


class MemoryFeed:
    """Rows of one tensor.

    Args:
        pixels: all examples.
        share: which of them, when.
    """

    def __init__(self, pixels: Pixels, share: Share) -> None:
        self.pixels, self.share = pixels, share

    def batches(self, epoch: int, step: int, place: Any) -> Iterator[Fed]:
        for indices in self.share.indices(epoch, step):
            yield Fed(Decoded(*self.pixels.batch(indices), []))


class TableFeed:
    """Examples by number, decoded by workers.

    Args:
        opened: the split.
        share: which of them, when.
        config: resolved.
    """

    def __init__(self, opened: Opened, share: Share, config: DataConfig) -> None:
        self.asked = _Numbers(share)
        self.loader = loader(_decoder(config, opened), self.asked, config, keep=True)

    def batches(self, epoch: int, step: int, place: Any) -> Iterator[Fed]:
        self.asked.epoch, self.asked.step = epoch, step
        for batch in self.loader:
            yield Fed(batch)


class StreamFeed:
    """A stream read here, decoded by workers.

    Args:
        opened: the split.
        share: how many steps an epoch has.
        config: resolved.
    """

    def __init__(self, opened: Opened, share: Share, config: DataConfig) -> None:
        shards = Shards(opened.rows, opened.reader, share.rank, share.world_size)
        self.asked = _Records(Stream(shards, seed=share.seed, block=config.shuffle_block), share)
        self.loader = loader(_decoder(config, None), self.asked, config, keep=True)

    def batches(self, epoch: int, step: int, place: Any) -> Iterator[Fed]:
        self.asked.begin(epoch, step, None if place is None or step == 0 else Place(**place))
        for batch in self.loader:
            yield Fed(batch, self.asked.places.popleft()._asdict())


# What a loader is to fetch is an object of its own: were it the feed, feed and loader would hold each other, and
# workers that Python's cycle collector ends, in whatever thread it runs, keep it waiting for seconds.


class _Numbers:
    """The examples of a table that a loader is to fetch."""

    def __init__(self, share: Share) -> None:
        self.share, self.epoch, self.step = share, 0, 0

    def __iter__(self) -> Iterator[list[Example]]:
        epoch, seed = self.epoch, self.share.seed
        for indices in self.share.indices(epoch, self.step):
            yield [Example(index, (seed, epoch, index)) for index in indices]


class _Records:
    """The examples of a stream that a loader is to decode, and for each batch ahead where its last one was."""

    def __init__(self, stream: Stream, share: Share) -> None:
        self.stream, self.share = stream, share
        self.begin(0, 0, None)

    def begin(self, epoch: int, step: int, place: Place | None) -> None:
        """Say where the next iteration starts."""
        self.epoch, self.step, self.place = epoch, step, place
        self.places: deque[Place] = deque()

    def __iter__(self) -> Iterator[list[Example]]:
        share, epoch, size, places = self.share, self.epoch, self.share.batch_size, self.places
        records = self.stream.records(epoch, self.step * size, self.place)
        for step in range(self.step, share.steps_per_epoch):
            batch = list(islice(records, size))
            places.append(batch[-1][1])
            key = (share.seed, epoch, share.rank)
            yield [Example(record, (*key, step * size + i)) for i, (record, _) in enumerate(batch)]


def _decoder(config: DataConfig, opened: Opened | None) -> Decoder:
    table = None if opened is None else opened.table()
    return Decoder(table, TrainingCrop(config.size, config.augmentation), config.channels, replace=True)


# MERGED from data/pipeline.py: Decoded batches: what runs in the data workers, and the loader around it.


class Example(NamedTuple):
    """What a worker is asked for."""

    record: Any
    """The :class:`Record`, or its number in the table."""
    key: tuple[int, ...] = ()
    """Where its random draws come from."""


class Decoded(NamedTuple):
    """A batch as a worker returns it; what went wrong is told, for an error raised in a worker loses its line."""

    images: Tensor
    """uint8 [N, C, H, W], channels last in memory."""
    targets: Tensor
    """int64 [N]."""
    failures: list[tuple[str, str]]
    """Name and reason of each image that does not decode."""


class Decoder(Dataset[Any]):
    """Decodes and crops whole batches.

    Args:
        table: to look numbers up in; None where the examples are records.
        crop: to squares.
        channels: 3 for RGB, 1 for grey.
        replace: put the batch's next whole image in the place of a damaged one, so that every batch is full;
            without it the batch is shorter.
    """

    def __init__(self, table: Table | None, crop: Crop, channels: int, *, replace: bool) -> None:
        self.table, self.crop, self.channels, self.replace = table, crop, channels, replace

    def __getitems__(self, examples: list[Example]) -> Decoded:
        """Decode one batch; torch's global generator is left as it was."""
        records: list[Record] = [example.record for example in examples]
        if self.table is not None:
            records = self.table.records([example.record for example in examples])
        pixels = np.zeros((len(records), self.crop.size, self.crop.size, self.channels), np.uint8)
        good, failures = [], []
        with torch.random.fork_rng(devices=[]):
            for place, (record, example) in enumerate(zip(records, examples, strict=True)):
                try:
                    image = self.crop(decode(record.image, self.channels), example.key)
                except DamagedImage as damage:
                    failures.append((record.name, str(damage)))
                    continue
                pixels[place] = np.asarray(image).reshape(pixels.shape[1:])
                good.append(place)
        if failures:
            good = _filled(good, len(records)) if self.replace else good
            pixels = pixels[good]
            records = [records[place] for place in good]
        targets = torch.tensor([record.label for record in records], dtype=torch.int64)
        return Decoded(torch.from_numpy(pixels).permute(0, 3, 1, 2), targets, failures)


def _filled(good: list[int], size: int) -> list[int]:
    """For each place of a batch itself, or the next good place after it, around the end if need be."""
    if not good:
        return []
    return [next((place for place in good if place >= wanted), good[0]) for wanted in range(size)]


def loader(decoder: Decoder, batches: Iterable[list[Example]], config: DataConfig, *, keep: bool) -> Iterable[Decoded]:
    """Decode batches in the order asked for.

    Args:
        decoder: what to do with each.
        batches: the examples of each; iterated anew for each iteration of the result.
        config: number of workers.
        keep: the workers for the next iteration.
    """
    several: dict[str, Any] = {}
    if config.workers:
        several = {"prefetch_factor": config.prefetch, "persistent_workers": keep}
    return _Loader(
        decoder,
        batch_sampler=batches,
        collate_fn=_itself,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader draws its workers' seed from the global one
        **several,
    )


def _itself(batch: Any) -> Any:
    return batch


class _Loader(DataLoader[Any]):
    """A loader whose workers end at once, however it is let go.

    Where Python finds one in a reference cycle (a trainer, an error that was kept), it finalizes the queues before
    the iterator that would send the word to stop through them, and torch then waits five seconds for each worker.
    The iterator is therefore kept out of the cycle, and ended when its owner goes.
    """

    def _get_iterator(self) -> Any:
        batches = super()._get_iterator()
        if not self.num_workers:
            return batches
        owner = self if self.persistent_workers else _Pass(batches)
        weakref.finalize(owner, _end, batches, os.getpid())
        return batches if owner is self else owner


class _Pass:
    """One iteration, of which the workers end with it."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def _end(batches: Any, process: int) -> None:
    if os.getpid() == process:  # a worker that was forked meanwhile has a copy, and no say
        batches._shutdown_workers()


# MERGED from data/pipeline.py: Sets small enough to decode once: all pixels in one tensor, of which a batch is a few rows.


LARGEST = 2**30
"""Bytes that are held in memory without being asked to."""
DIGITS_SPLITS = ("train", "test")
CHUNK = 256
"""Images decoded together."""


@dataclass
class Pixels:
    """Decoded examples.

    Args:
        images: uint8 [N, H, W, C].
        targets: int64 [N].
        class_names: of the targets.
        failures: name and reason of each image left out.
    """

    images: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Examples of those numbers: uint8 [N, C, H, W], channels last in memory, and their targets."""
        chosen = torch.tensor(indices)
        return self.images[chosen].permute(0, 3, 1, 2), self.targets[chosen]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and biased deviation of each channel, of pixels in 0 to 1."""
        means, stds = [], []
        for channel in self.images.unbind(-1):  # exact: sums of integers, from the 256 counts
            counts = torch.bincount(channel.reshape(-1), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64) / 255
            mean = float((counts * values).sum() / counts.sum())
            variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
            means.append(mean)
            stds.append(max(variance, 1e-12) ** 0.5)
        return tuple(means), tuple(stds)


def digits(*, training: bool) -> Pixels:
    """scikit-learn's 1797 grey 8×8 digits, divided once and for all: of each class, every fifth to the test part.

    Args:
        training: the four fifths to train on, or the fifth to test on.
    """
    found: Any = required("sklearn.datasets", "the digits", "scikit-learn").load_digits()
    # Values are 0 to 16; 255 / 16 rounds, and stays invertible.
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    targets = torch.from_numpy(found.target).to(torch.int64)
    rank_in_class = torch.nn.functional.one_hot(targets).cumsum(0).gather(1, targets[:, None]).squeeze(1)
    chosen = (rank_in_class % 5 != 0) if training else (rank_in_class % 5 == 0)
    return Pixels(images[chosen], targets[chosen], tuple(map(str, range(10))))


def decoded(examples: Iterable[Record] | Table, class_names: tuple[str, ...], config: DataConfig) -> Pixels:
    """Decode everything, with the config's workers; images of another size are resized and cropped to the centre.

    Args:
        examples: a table, or records in order.
        class_names: of the targets.
        config: with channels and image size resolved.

    Raises:
        ValueError: naming the first damaged image, unless the config says to skip them, or if none is left.
    """
    table = examples if isinstance(examples, Table) else None
    asked: Iterable[Any] = range(len(examples)) if isinstance(examples, Table) else examples
    decoder = Decoder(table, CentreCrop(config.size), config.channels, replace=False)
    images, targets, failures = [], [], []
    for batch in loader(decoder, _Chunks(asked), config, keep=False):
        check_failures(batch, config)
        images.append(batch.images.permute(0, 2, 3, 1).clone())  # out of the memory shared with the worker
        targets.append(batch.targets.clone())
        failures += batch.failures
    if not sum(map(len, images)):
        raise invalid("source", config.source, "holds no image that decodes", "mend the files")
    return Pixels(torch.cat(images), torch.cat(targets), class_names, failures)


def check_failures(batch: Decoded, config: DataConfig) -> None:
    """Raise the ``ValueError`` that a damaged image is, unless damaged images are to be skipped."""
    if not batch.failures:
        return
    name, reason = batch.failures[0]
    if config.on_bad_image == "error":
        remedy = "remove or replace it, or pass on_bad_image='skip'"
        raise ValueError(f"source: {name} does not decode as an image ({reason}); {remedy}")


class _Chunks:
    """Examples in runs, without draws of their own."""

    def __init__(self, examples: Iterable[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[list[Example]]:
        chunk: list[Example] = []
        for example in self.examples:
            chunk.append(Example(example))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
