"""Which example comes when: index arithmetic from (seed, epoch), the same for any number of workers.

An epoch is one permutation of all examples. Step k of W ranks with B examples each takes the k-th run of W·B
of them, rank r the r-th B within: the ranks together see what one process with W times the batch would. What
does not fill a last step waits for the next epoch's permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from normfree.common.checks import check_integer, invalid, require
from normfree.data.records import Record, RecordReader
from normfree.data.sources import read_rows

# The first word of each key keeps the streams of draws apart.
ORDER, CROP, MIX, BLOCK, SHARDS = range(5)


def generator(*key: int) -> np.random.Generator:
    """Return the generator of a key of integers in 0 to 2**64 − 1; nearby keys give unrelated draws.

    NumPy takes (0, 1) and (0, 1, 0), or 2**32 and (0, 1), for the same seed: every part is therefore given two
    words, and their number goes first.
    """
    words = [len(key)]
    for part in key:
        words += [part & 0xFFFFFFFF, part >> 32]
    return np.random.default_rng(words)


class TooFewExamples(ValueError):
    """There are fewer examples than a step of all ranks takes.

    Attributes:
        examples: how many there are.
    """

    def __init__(self, message: str, examples: int) -> None:
        super().__init__(message)
        self.examples = examples


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of the examples.

    Args:
        examples: in the whole set.
        batch_size: per rank.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.

    Raises:
        TooFewExamples: if the examples do not fill one step.
        ValueError: if the rank is none of the world's.
    """

    examples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world_size)
        if self.examples < self.batch_size * self.world_size:
            rule = f"{self.world_size} rank(s) of that batch need more than the {self.examples} examples there are"
            error = invalid("batch_size", self.batch_size, rule, "pass a smaller batch_size")
            raise TooFewExamples(str(error), self.examples)

    @property
    def steps_per_epoch(self) -> int:
        """Full steps that the examples give."""
        return self.examples // (self.batch_size * self.world_size)

    def indices(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Yield the indices of each batch of an epoch, from step ``start`` on."""
        order = generator(ORDER, self.seed, epoch).permutation(self.examples)
        for step in range(start, self.steps_per_epoch):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def check_rank(rank: int, world_size: int) -> None:
    """Raise ``ValueError`` unless ``rank`` is one of ``world_size``."""
    __tracebackhide__ = True
    check_integer("world_size", world_size, 1)
    if check_integer("rank", rank, 0) >= world_size:
        raise invalid("rank", rank, f"must be below world_size={world_size}", "pass the process's own rank")


def evaluation_indices(examples: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Yield the indices of each batch of one rank in the order of the data; over all ranks every example comes once."""
    own = range(rank, examples, world_size)
    for first in range(0, len(own), batch_size):
        yield list(own[first : first + batch_size])


# Records in the order of the files, for sets too large to reach into: shards come in a new order each epoch, and their
# records are shuffled in blocks.
#
# Hugging Face's own shuffle buffer cannot be resumed exactly, for its content is lost. Here a block is a list that
# one permutation of (seed, epoch, block number) shuffles, so a place in the stream is the shard's state at the
# start of a block, and resuming reads one block again. A block ends where the rank has read all its shards: every
# example comes once before any comes again.


class Place(NamedTuple):
    """Where a block begins."""

    block: int = 0
    """Number of the block in this epoch."""
    records: int = 0
    """Records of this epoch before it."""
    passes: int = 0
    """How often the rank's shards have been read to the end in this epoch."""
    shard: int = 0
    """Position among the rank's shards of this pass."""
    row: int = 0
    """Rows of the shard before it, as this rank sees it."""
    state: dict[str, Any] | None = None
    """Where in the shard, as ``datasets`` says it."""


class Shards:
    """The shards that one rank reads: whole ones, or its share of each where they do not divide evenly.

    Args:
        rows: an iterable Hugging Face data set.
        reader: of its rows.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, rows: Any, reader: RecordReader, rank: int, world_size: int) -> None:
        self.rows, self.reader, self.rank, self.world_size = rows, reader, rank, world_size
        self.count = rows.num_shards
        self.whole = self.count % world_size == 0

    def own(self, order: list[int]) -> list[int]:
        """Return, of all shards in some order, those this rank reads."""
        return order[self.rank :: self.world_size] if self.whole else order

    def open(self, index: int) -> Any:
        """Return the rows of one shard that this rank reads, as an iterable data set."""
        split_by_node = require("datasets.distributed", "a data source").split_dataset_by_node
        shard = self.rows.shard(num_shards=self.count, index=index)
        if self.whole:
            return shard
        return split_by_node(shard, rank=self.rank, world_size=self.world_size, strategy="examples")

    def records(self, index: int, rows: Any, first: int = 0) -> Iterator[Record]:
        """Yield records of an open shard, of which ``first`` have been read before."""
        for number, row in enumerate(read_rows(rows, self.reader.source), first):
            yield self.reader(row, number if self.whole else number * self.world_size + self.rank, index)


class Stream:
    """One rank's endless stream of an epoch.

    Args:
        shards: of this rank.
        seed: of the order of shards and within blocks.
        block: records that are shuffled together.
    """

    def __init__(self, shards: Shards, *, seed: int, block: int) -> None:
        self.shards, self.seed, self.block = shards, seed, block

    def records(self, epoch: int, start: int = 0, place: Place | None = None) -> Iterator[tuple[Record, Place]]:
        """Yield records from number ``start`` of the epoch on, each with the place its block begins at.

        Args:
            epoch: seeds the order.
            start: records of this epoch already seen.
            place: that came with the last of those; None at the beginning.
        """
        assert (place is None) == (start == 0)
        skipped = start - (place or Place()).records
        for begun, block in read_ahead(self._blocks(epoch, place or Place())):
            order = generator(BLOCK, self.seed, epoch, self.shards.rank, begun.block).permutation(len(block))
            for index in order[skipped:]:
                yield block[index], begun
            skipped = 0

    def _blocks(self, epoch: int, begun: Place) -> Iterator[tuple[Place, list[Record]]]:
        """Blocks from a place on, over as many passes as are asked for."""
        while True:
            at_the_start = begun == Place(begun.block, begun.records, begun.passes)
            block: list[Record] = []
            for block_begun, whole_block in self._blocks_of_a_pass(epoch, begun):
                begun, block = block_begun, whole_block
                yield begun, block
            if at_the_start and not block:
                rule = f"rank {self.shards.rank} gets no example"
                raise invalid("source", self.shards.reader.source, rule, "pass fewer ranks, or more data")
            begun = Place(begun.block + bool(block), begun.records + len(block), begun.passes + 1)

    def _blocks_of_a_pass(self, epoch: int, begun: Place) -> Iterator[tuple[Place, list[Record]]]:
        order = generator(SHARDS, self.seed, epoch, begun.passes).permutation(self.shards.count).tolist()
        own = self.shards.own(order)
        block: list[Record] = []
        first, state = begun.row, begun.state
        for position in range(begun.shard, len(own)):
            rows = self.shards.open(own[position])
            if state is not None:
                rows.load_state_dict(state)
            for row, record in enumerate(self.shards.records(own[position], rows, first), first + 1):
                block.append(record)
                if len(block) == self.block:
                    yield begun, block
                    read = begun.records + len(block)
                    begun = Place(begun.block + 1, read, begun.passes, position, row, rows.state_dict())
                    block = []
            first, state = 0, None
        if block:
            yield begun, block


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the same items, the next one being read in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, items, None)
            yield item
