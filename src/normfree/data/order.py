"""Which example comes when: index arithmetic from (seed, epoch), the same for any number of workers.

An epoch is one permutation of all examples. Step k of W ranks with B examples each takes the k-th run of W·B
of them, rank r the r-th B within: the ranks together see what one process with W times the batch would. What
does not fill a last step waits for the next epoch's permutation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from normfree.common.checks import check_integer, invalid

# The first word of each key keeps the streams of draws apart.
ORDER, CROP, MIX, BLOCK, SHARDS = range(5)


def generator(*key: int) -> np.random.Generator:
    """The generator of a key of integers in 0 to 2**64 − 1; nearby keys give unrelated draws.

    NumPy takes (0, 1) and (0, 1, 0), or 2**32 and (0, 1), for the same seed: every part is therefore given two
    words, and their number goes first.
    """
    words = [len(key)]
    for part in key:
        words += [part & 0xFFFFFFFF, part >> 32]
    return np.random.default_rng(words)


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
        ValueError: if the examples do not fill one step, or the rank is none of the world's.
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
            raise invalid("batch_size", self.batch_size, rule, "pass a smaller batch_size")

    @property
    def steps_per_epoch(self) -> int:
        """Full steps that the examples give."""
        return self.examples // (self.batch_size * self.world_size)

    def indices(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Indices of each batch of an epoch, from step ``start`` on."""
        order = generator(ORDER, self.seed, epoch).permutation(self.examples)
        for step in range(start, self.steps_per_epoch):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def check_rank(rank: int, world_size: int) -> None:
    """Raise ``ValueError`` unless ``rank`` is one of ``world_size``."""
    check_integer("world_size", world_size, 1)
    if check_integer("rank", rank, 0) >= world_size:
        raise invalid("rank", rank, f"must be below world_size={world_size}", "pass the process's own rank")


def evaluation_indices(examples: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Indices of each batch of one rank in the order of the data; over all ranks every example comes once."""
    own = range(rank, examples, world_size)
    for first in range(0, len(own), batch_size):
        yield list(own[first : first + batch_size])
