"""Where the batches of an epoch come from: memory, a table or a stream, from any step on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

from normfree.data.config import DataConfig
from normfree.data.crops import TrainingCrop
from normfree.data.loading import Decoded, Decoder, Example, loader
from normfree.data.memory import Pixels
from normfree.data.opened import Opened
from normfree.data.order import Share
from normfree.data.stream import Place, Shards, Stream


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
