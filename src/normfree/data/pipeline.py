"""Batches to train and to evaluate on: one way from a source to decoded images, for both.

:func:`read_split` opens a split and completes its config. An order then says which examples make each batch: the
endless one of training, which can be left and taken up again at any step, or that of an evaluation, each example
once. Its batches are rows of one tensor where the set was decoded into memory, else they are decoded by workers.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from normfree.common.checks import check_integer, invalid, require
from normfree.common.torch_compat import end_workers
from normfree.data.augmentation import Augmentation, CentreCrop, Crop, Standardization, TrainingCrop
from normfree.data.config import DataConfig, imagenet_statistics
from normfree.data.holdout import HoldoutSource
from normfree.data.order import Place, Shards, Share, Stream, check_rank, evaluation_indices
from normfree.data.records import DamagedImage, OpenSplit, Record, check_classes, decode, open_split, resolve
from normfree.data.sources import choose_split, find_source, fingerprint

DIGITS_SPLITS = ("train", "test")


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
    split = read_split(config, training=True)
    config = split.config
    if split.examples is None:
        raise invalid("examples", None, "the streamed data do not say how many there are", "pass it")
    share = Share(
        examples=split.examples, batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size
    )
    if split.in_order:
        stream = Stream(split.shards(rank, world_size), seed=share.seed, block=config.shuffle_block)
        return TrainingData(split, _TrainingStream(stream, share), share)
    return TrainingData(split, _TrainingNumbers(share), share)


class TrainingData:
    """Batches of one rank, epoch after epoch; made by :func:`open_training`.

    Iterating gives the rest of the current epoch, ``(images, targets)``: uint8 [N, C, H, W], channels last in
    memory, and int64 [N], both on the CPU; :meth:`augmentation` takes them further. Then the next epoch begins.
    Order and augmentation depend on (seed, epoch, number of the example) alone: neither the number of workers
    nor a restart changes a bit.

    Attributes:
        config: resolved.
        class_names: of the targets.
        epoch, step: where the next batch is.
        bad_images: reason by name of each damaged image met so far.
    """

    def __init__(self, split: Split, order: _TrainingNumbers | _TrainingStream, share: Share) -> None:
        self.split, self.share, self.config, self.class_names = split, share, split.config, split.class_names
        self.epoch, self.step = 0, 0
        self.bad_images: dict[str, str] = dict(split.failures)
        self._place: Any = None
        self._order = order
        crop = TrainingCrop(self.config.size, self.config.augmentation)
        self._batches = split.batches(order, crop, replace_damaged=True, keep_workers=True)

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
        self._order.begin(self.epoch, self.step, self._place)
        for batch in self._batches:
            place = self._order.place()
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
        """Return the module that does what is left to do to a batch, on any device."""
        config, (mean, std) = self.config.augmentation, self.config.statistics
        if self.split.pixels is None:  # the workers have done their part
            config = replace(config, crop="none" if config.crop == "inception" else config.crop, randaugment_layers=0)
        return Augmentation(
            config, mean=mean, std=std, num_classes=self.num_classes, seed=self.config.seed, rank=self.share.rank
        )

    def identity(self) -> dict[str, Any]:
        """Return what tells these examples from others: their number, and the names and sizes of their files."""
        return {"examples": self.examples, **self.split.identity()}

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch is, after the last one that was given out."""
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
        epoch, step = (check_integer(name, state[name], 0) for name in ("epoch", "step"))
        if step > self.steps_per_epoch:
            raise invalid("step", step, f"an epoch has {self.steps_per_epoch} batches", "give an undamaged state")
        self.epoch, self.step, self._place = epoch, step, state["place"]
        self.bad_images = {str(name): str(reason) for name, reason in dict(state["bad_images"]).items()}


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
        ValueError: as of :func:`open_training`; the data have other classes.
    """
    check_rank(rank, world_size)
    split = read_split(config, training=False, classes=classes)
    if split.in_order:
        order = partial(_evaluation_records, split.shards(rank, world_size), split.config.batch_size)
    else:
        assert split.examples is not None
        order = partial(_evaluation_numbers, split.examples, split.config.batch_size, rank, world_size)
    return EvaluationData(split, _Repeated(order), alone=world_size == 1)


def identify_training(config: DataConfig) -> dict[str, Any]:
    """Return what tells a config's training images from others, as :meth:`Split.identity` does, without opening them.

    Raises:
        ValueError: if there is no such source or split.
    """
    source = find_source(config)
    return fingerprint(source, choose_split(source.splits, config, training=True))


class EvaluationData:
    """Batches of one rank, as of :class:`TrainingData`, the last one shorter; made by :func:`open_evaluation`.

    Iterating gives all of them, each time. A damaged image is left out where the config says to skip it.

    Attributes:
        config: resolved.
        split: its name, as the source has it.
        class_names: of the targets.
        examples: over all ranks; None where only reading everything would tell.
        opened: their rows; None of the digits.
        bad_images: reason by name of each damaged image met so far.
    """

    def __init__(self, split: Split, order: Iterable[list[Example]], *, alone: bool) -> None:
        self.config, self.class_names, self.examples = split.config, split.class_names, split.examples
        self.split, self.opened = split.name, split.opened
        self.bad_images: dict[str, str] = dict(split.failures)
        self._alone = alone
        crop = CentreCrop(self.config.size, self.config.crop_ratio)
        self._batches = split.batches(order, crop, replace_damaged=False, keep_workers=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        given = 0
        for batch in self._batches:
            check_failures(batch, self.config)
            self.bad_images.update(batch.failures)
            if len(batch.images):
                given += len(batch.images)
                yield batch.images, batch.targets
        if self._alone and not given:
            raise self.no_image()

    @property
    def held_out(self) -> bool:
        """Whether the images were held out of the training split."""
        return self.split == HoldoutSource.name

    def absent_classes(self) -> list[str]:
        """Return the classes that no image is of; of what is not streamed."""
        assert self.opened is not None
        labels = self.opened.rows[self.opened.reader.columns.label]
        present = {label if isinstance(label, str) else self.class_names[label] for label in labels}
        return [name for name in self.class_names if name not in present]

    def no_image(self) -> ValueError:
        """Return (not raise) the error that there is no image to evaluate on."""
        first = next(iter(self.bad_images), None)
        damaged = "" if first is None else f": {len(self.bad_images)} do not decode, {first} first"
        rule = f"holds no image to evaluate on{damaged}"
        return invalid("source", self.config.source, rule, "mend the files, or name another evaluation_split")

    def standardization(self) -> Standardization:
        """Return the module that does what is left to do to a batch, on any device."""
        return Standardization(*self.config.statistics)


# A split, read


@dataclass(frozen=True)
class Split:
    """One split of a source, whose examples are reached by number or come in order.

    Args:
        name: as the source has it.
        config: resolved.
        class_names: in the order of their numbers.
        examples: how many there are; None where only reading everything would tell.
        opened: its rows; None of the digits.
        pixels: all of it, where it was decoded into memory.
    """

    name: str
    config: DataConfig
    class_names: tuple[str, ...]
    examples: int | None
    opened: OpenSplit | None
    pixels: Pixels | None

    @property
    def in_order(self) -> bool:
        """Whether examples come in the order of the files only."""
        return self.pixels is None and self.opened is not None and self.opened.streamed

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Name and reason of each damaged image that was met so far."""
        return [] if self.pixels is None else self.pixels.failures

    def shards(self, rank: int, world_size: int) -> Shards:
        """Return the part of one rank of what comes in order."""
        assert self.opened is not None
        return Shards(self.opened.rows, self.opened.reader, rank, world_size)

    def batches(
        self, order: Iterable[list[Example]], crop: Crop, *, replace_damaged: bool, keep_workers: bool
    ) -> Iterable[Decoded]:
        """Return the batches of an order, which is iterated anew with them.

        Args:
            order: the examples of each batch.
            crop: to squares, of what is not in memory.
            replace_damaged: put another image of the batch in the place of a damaged one.
            keep_workers: for the next iteration.
        """
        if self.pixels is not None:
            return _Repeated(partial(_rows_of, self.pixels, order))
        assert self.opened is not None
        table = None if self.in_order else self.opened
        decoder = Decoder(table, crop, self.config.channels, replace_damaged=replace_damaged)
        return decode_batches(decoder, order, self.config, keep_workers=keep_workers)

    def identity(self) -> dict[str, Any]:
        """Return the number of files, their bytes, and a hash of their names and sizes; nothing of the digits."""
        return {} if self.opened is None else fingerprint(self.opened.source, self.opened.split)


def read_split(config: DataConfig, *, training: bool, classes: Sequence[str] | None = None) -> Split:
    """Open a split, complete the config by what the data say, and decode what is to be held in memory.

    Args:
        config: what to open.
        training: the split to train on, or the one to evaluate on.
        classes: as of :func:`open_evaluation`.
    """
    opened = pixels = None
    if config.source == "digits":
        config = _complete_digits(config)
        name = "train" if training else choose_split(DIGITS_SPLITS, config, training=False)
        pixels = read_digits(training=name == "train")
        check_classes(pixels.class_names, classes, config.source)
    else:
        opened = open_split(config, training=training, classes=classes)
        config, name = resolve(config, opened), opened.split
        if config.in_memory:
            pixels = decode_all(opened, config, CentreCrop(config.size, 1.0 if training else config.crop_ratio))
    if config.mean is None:
        if pixels is None:
            mean, std = imagenet_statistics(config.channels)
        else:
            mean, std = pixels.statistics() if training else read_split(config, training=True).config.statistics
        config = replace(config, mean=mean, std=std)
    if pixels is not None:
        return Split(name, config, pixels.class_names, len(pixels), opened, pixels)
    assert opened is not None
    return Split(name, config, opened.class_names, opened.examples, opened, None)


def _complete_digits(config: DataConfig) -> DataConfig:
    """Return the config with what the digits are; a ValueError where it has something else."""
    for name, value in (("image_size", 8), ("in_channels", 1), ("num_classes", 10)):
        if getattr(config, name) not in (None, value):
            raise invalid(name, getattr(config, name), f"the digits have {value}", "leave it out")
    if config.holdout:
        raise invalid("holdout", config.holdout, "the digits have a split to test on", "leave it out")
    return replace(config, image_size=8, in_channels=1, num_classes=10, in_memory=True, holdout=0.0)


# Which examples make each batch


class Example(NamedTuple):
    """What is to be decoded."""

    record: Any
    """The :class:`Record`, or its number in the table."""
    key: tuple[int, ...] = ()
    """Where its random draws come from."""


# An order is an object of its own: did it hold the loader, the two would hold each other, and workers that Python's
# cycle collector ends, in whatever thread it runs, keep it waiting for seconds.


class _TrainingNumbers:
    """The numbers of one rank's examples, from a step of an epoch on."""

    def __init__(self, share: Share) -> None:
        self.share, self.epoch, self.step = share, 0, 0

    def begin(self, epoch: int, step: int, place: Any) -> None:
        """Say where the next iteration starts."""
        self.epoch, self.step = epoch, step

    def place(self) -> None:
        """Return what a numbered order needs to go on besides the step: nothing."""

    def __iter__(self) -> Iterator[list[Example]]:
        epoch, seed = self.epoch, self.share.seed
        for indices in self.share.indices(epoch, self.step):
            yield [Example(index, (seed, epoch, index)) for index in indices]


class _TrainingStream:
    """The records of one rank's shards, from a step of an epoch on."""

    def __init__(self, stream: Stream, share: Share) -> None:
        self.stream, self.share = stream, share
        self.begin(0, 0, None)

    def begin(self, epoch: int, step: int, place: Any) -> None:
        """Say where the next iteration starts; ``place`` is what the batch before it came with."""
        self.epoch, self.step = epoch, step
        self.start = None if place is None or step == 0 else Place(**place)
        self.places: deque[Place] = deque()  # of the last record of each batch that the workers have ahead

    def place(self) -> dict[str, Any]:
        """Return where the batch after the one that was given out is taken up."""
        return self.places.popleft()._asdict()

    def __iter__(self) -> Iterator[list[Example]]:
        share, epoch, size, places = self.share, self.epoch, self.share.batch_size, self.places
        records = self.stream.records(epoch, self.step * size, self.start)
        for step in range(self.step, share.steps_per_epoch):
            batch = list(islice(records, size))
            places.append(batch[-1][1])
            key = (share.seed, epoch, share.rank)
            yield [Example(record, (*key, step * size + i)) for i, (record, _) in enumerate(batch)]


def _evaluation_numbers(examples: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[Example]]:
    for indices in evaluation_indices(examples, batch_size, rank, world_size):
        yield [Example(index) for index in indices]


def _evaluation_records(shards: Shards, batch_size: int) -> Iterator[list[Example]]:
    own = shards.own(list(range(shards.count)))
    records = (record for index in own for record in shards.records(index, shards.open(index)))
    return _in_batches(map(Example, records), batch_size)


def _in_batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    examples = iter(examples)
    while batch := list(islice(examples, size)):
        yield batch


class _Repeated:
    """What a function iterates, anew each time."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


# Memory: sets small enough to decode once, all pixels in one tensor of which a batch is a few rows


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
        """Return examples of those numbers: uint8 [N, C, H, W], channels last in memory, and their targets."""
        chosen = torch.tensor(indices)
        return self.images[chosen].permute(0, 3, 1, 2), self.targets[chosen]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and biased deviation of each channel, of pixels in 0 to 1."""
        means, stds = [], []
        for channel in self.images.unbind(-1):  # exact: sums of integers, from the 256 counts
            counts = torch.bincount(channel.reshape(-1), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64) / 255
            mean = float((counts * values).sum() / counts.sum())
            variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
            means.append(mean)
            stds.append(max(variance, 1e-12) ** 0.5)
        return tuple(means), tuple(stds)


def _rows_of(pixels: Pixels, order: Iterable[list[Example]]) -> Iterator[Decoded]:
    for examples in order:
        yield Decoded(*pixels.batch([example.record for example in examples]), [])


def read_digits(*, training: bool) -> Pixels:
    """Return scikit-learn's 1797 grey 8×8 digits, divided for good: of each class, every fifth to the test part.

    Args:
        training: the four fifths to train on, or the fifth to test on.
    """
    found: Any = require("sklearn.datasets", "the digits").load_digits()
    # Values are 0 to 16; 255 / 16 rounds, and stays invertible.
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    targets = torch.from_numpy(found.target).to(torch.int64)
    rank_in_class = torch.nn.functional.one_hot(targets).cumsum(0).gather(1, targets[:, None]).squeeze(1)
    chosen = (rank_in_class % 5 != 0) if training else (rank_in_class % 5 == 0)
    return Pixels(images[chosen], targets[chosen], tuple(map(str, range(10))))


def decode_all(opened: OpenSplit, config: DataConfig, crop: Crop, chunk: int = 256) -> Pixels:
    """Decode everything, with the config's workers.

    Args:
        opened: the split.
        config: with channels and image size resolved.
        crop: of images of another size.
        chunk: images decoded together.

    Raises:
        ValueError: naming the first damaged image, unless the config says to skip them, or if none is left.
    """
    table = None if opened.streamed else opened
    examples = map(Example, opened.records() if table is None else range(len(table.rows)))
    decoder = Decoder(table, crop, config.channels, replace_damaged=False)
    images, targets, failures = [], [], []
    for batch in decode_batches(decoder, _in_batches(examples, chunk), config, keep_workers=False):
        check_failures(batch, config)
        images.append(batch.images.permute(0, 2, 3, 1).clone())  # out of the memory shared with the worker
        targets.append(batch.targets.clone())
        failures += batch.failures
    if not sum(map(len, images)):
        raise invalid("source", config.source, "holds no image that decodes", "mend the files")
    return Pixels(torch.cat(images), torch.cat(targets), opened.class_names, failures)


# Decoding, here or in workers


class Decoded(NamedTuple):
    """A batch as a worker returns it; failures are listed, for an error raised in a worker loses its line."""

    images: Tensor
    """uint8 [N, C, H, W], channels last in memory."""
    targets: Tensor
    """int64 [N]."""
    failures: list[tuple[str, str]]
    """Name and reason of each image that does not decode."""


def check_failures(batch: Decoded, config: DataConfig) -> None:
    """Raise the ``ValueError`` that a damaged image is, unless damaged images are to be skipped."""
    __tracebackhide__ = True
    if batch.failures and config.on_bad_image == "error":
        name, reason = batch.failures[0]
        remedy = "remove or replace it, or pass on_bad_image='skip'"
        raise ValueError(f"source: {name} does not decode as an image ({reason}); {remedy}")


class Decoder(Dataset[Any]):
    """Decodes and crops whole batches.

    Args:
        table: the split to look numbers up in; None where the examples are records.
        crop: to squares.
        channels: 3 for RGB, 1 for grey.
        replace_damaged: put the batch's next whole image in the place of a damaged one, so that every batch is
            full; without it the batch is shorter.
    """

    def __init__(self, table: OpenSplit | None, crop: Crop, channels: int, *, replace_damaged: bool) -> None:
        self.table, self.crop, self.channels, self.replace_damaged = table, crop, channels, replace_damaged

    def __getitems__(self, examples: list[Example]) -> Decoded:
        """Decode one batch; torch's global generator is left as it was."""
        records: list[Record] = [example.record for example in examples]
        if self.table is not None:
            records = self.table.find([example.record for example in examples])
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
            if self.replace_damaged and good:  # by the next good one, around the end if need be
                good = [next((place for place in good if place >= wanted), good[0]) for wanted in range(len(records))]
            pixels = pixels[good]
            records = [records[place] for place in good]
        targets = torch.tensor([record.label for record in records], dtype=torch.int64)
        return Decoded(torch.from_numpy(pixels).permute(0, 3, 1, 2), targets, failures)


def decode_batches(
    decoder: Decoder, order: Iterable[list[Example]], config: DataConfig, *, keep_workers: bool
) -> Iterable[Decoded]:
    """Decode batches in the order asked for.

    Args:
        decoder: what to do with each.
        order: the examples of each batch; iterated anew for each iteration of the result.
        config: number of workers.
        keep_workers: for the next iteration.
    """
    several: dict[str, Any] = {}
    if config.workers:
        several = {"prefetch_factor": config.prefetch, "persistent_workers": keep_workers}
    return _Loader(
        decoder,
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader draws its workers' seed from the global one
        worker_init_fn=_ignore_sigterm,
        **several,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_sigterm(worker: int) -> None:
    """Leave SIGTERM to the training process: one that is sent to all its processes is its request to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Loader(DataLoader[Any]):
    """A loader whose workers end at once when it is no longer used, and not before.

    Where Python finds one in a reference cycle (a trainer, an error that was kept), it finalizes the queues before
    the iterator that would send the word to stop through them, and torch then waits five seconds for each worker.
    The iterator is therefore kept out of the cycle, and ended when its owner goes. One whose first batches cannot be
    read has no owner yet: its workers, which ignore the SIGTERM that Python ends them with, would never end.
    """

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        batches: Any = _MultiProcessingDataLoaderIter.__new__(_MultiProcessingDataLoaderIter)
        try:
            batches.__init__(self)  # starts the workers, then reads ahead
        except BaseException:
            end_workers(batches)
            raise
        return batches

    def __iter__(self) -> Any:
        with _sigterm_blocked():  # until the workers ignore it
            batches = super().__iter__()
        if not self.num_workers:
            return batches
        owner = self if self.persistent_workers else _Pass(batches)
        if batches is not getattr(self, "ended_later", None):  # kept workers are those of the first iteration
            weakref.finalize(owner, _end_workers, batches, os.getpid())
            self.ended_later = batches if owner is self else None
        return batches if owner is self else owner


class _Pass:
    """One iteration, of which the workers end with it."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def _end_workers(batches: Any, process: int) -> None:
    if os.getpid() == process:  # a worker that was forked meanwhile has a copy, whose end means nothing
        end_workers(batches)


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Keep SIGTERM waiting; processes that are started meanwhile inherit that, and keep it."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
