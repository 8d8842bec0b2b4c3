"""Decoded batches: what runs in the data workers, and the loader around it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normfree.data.config import DataConfig
from normfree.data.crops import Crop
from normfree.data.decode import DamagedImage, decode
from normfree.data.records import Record, Table


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
