"""Images held out of the training split to evaluate on, where the data come without a second one.

Of each class a share is held out, at least one image of two or more, in an order that a hash of (seed, name) gives: it
depends neither on the machine nor on the order of the folder, and an image that is added moves few others. Images of
the same bytes, under whatever names, stay on one side.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from normfree.common.checks import invalid
from normfree.data.config import HOLDOUT, DataConfig
from normfree.data.sources import (
    FolderSource,
    Namer,
    Source,
    choose_split,
    evaluation_splits,
    find_columns,
    find_source,
)


def with_holdout(config: DataConfig) -> DataConfig:
    """Return the config with a tenth held out, if it says nothing of that and the data have no split to evaluate on."""
    if config.source == "digits" or config.holdout is not None or config.evaluation_split is not None:
        return config
    source = find_source(config)
    if evaluation_splits(source.splits) or is_streamed(source, config):
        return config
    return replace(config, holdout=HOLDOUT)


def with_any_split(config: DataConfig) -> DataConfig:
    """Return the config with the only split there is to evaluate on, if it names none and the data have no other."""
    if config.source == "digits" or config.holdout or config.evaluation_split is not None:
        return config
    splits = find_source(config).splits
    return replace(config, evaluation_split=splits[0]) if len(splits) == 1 else config


def is_streamed(source: Source, config: DataConfig) -> bool:
    """Tell whether a source is read in the order of its files."""
    return source.streams if config.streaming == "auto" else config.streaming


def hold_out(source: Source, config: DataConfig) -> HoldoutSource:
    """Return the source with ``config.holdout`` of its training split as a split of its own.

    Raises:
        ValueError: if it is streamed, has a split of that name, or no class with two different images.
    """
    share, split = config.holdout, choose_split(source.splits, config, training=True)
    assert share is not None
    if is_streamed(source, config):
        rule = "images that are read in the order of their files are not reached by number"
        remedy = "pass evaluation_split='train', or streaming=False where the data allow it"
        raise invalid("holdout", share, rule, remedy)
    if HoldoutSource.name in source.splits:
        rule = f"the data have a split {HoldoutSource.name!r} of their own"
        remedy = f"pass evaluation_split={HoldoutSource.name!r} and holdout=0 to evaluate on that"
        raise invalid("holdout", share, rule, remedy)
    rows = source.rows(split, streaming=False)
    columns = find_columns(rows.features, config)
    names = list(source.files(split)) if isinstance(source, FolderSource) else range(len(rows))
    copies = group_copies(rows.data.column(columns.image))
    held = choose(names, list(map(str, rows[columns.label])), copies, share, config.holdout_seed)
    if not held:
        rule = "no class has two different images, of which one could be held out"
        remedy = f"give more, or pass evaluation_split={split!r} to evaluate on all"
        raise invalid("holdout", share, rule, remedy)
    others = sorted(set(range(len(rows))) - set(held))
    return HoldoutSource(source, split, {split: others, HoldoutSource.name: held})


class HoldoutSource:
    """A source of which one split is divided in two.

    Args:
        source: the whole.
        split: its split that is divided.
        numbers: rows of it by the names of the two.
    """

    name = "holdout"
    streams = False

    def __init__(self, source: Source, split: str, numbers: dict[str, list[int]]) -> None:
        self.source, self.split, self.numbers = source, split, numbers
        self.splits = (*source.splits, self.name)

    def rows(self, split: str, *, streaming: bool) -> Any:
        assert not streaming
        if split not in self.numbers:
            return self.source.rows(split, streaming=False)
        return self.source.rows(self.split, streaming=False).select(self.numbers[split], keep_in_memory=True)

    def labels(self, split: str, column: str) -> list[Any] | None:
        return list(self.rows(split, streaming=False)[column])

    def count(self, split: str) -> tuple[int | None, int | None]:
        if split not in self.numbers:
            return self.source.count(split)
        return len(self.numbers[split]), self.source.count(self.split)[1]

    def namer(self, split: str) -> Namer:
        if split not in self.numbers:
            return self.source.namer(split)
        return _PartNamer(self.source.namer(self.split), self.numbers[split])

    def files(self, split: str) -> dict[str, str]:
        """All files of the divided split for both parts, for a change to any may change what is held out."""
        return self.source.files(self.split if split in self.numbers else split)


@dataclass(frozen=True)
class _PartNamer:
    """Names rows of a part as the whole does."""

    whole: Namer
    numbers: list[int]

    def __call__(self, number: int, path: str | None, shard: int | None = None) -> str:
        return self.whole(self.numbers[number], path, shard)


def choose(names: Sequence[object], labels: Sequence[str], copies: Sequence[int], share: float, seed: int) -> list[int]:
    """Return the numbers of the images to hold out, ascending.

    Of a class of n images, ``share * n`` rounded is held out, at least one and at most n - 1; images with copies in
    another class never are.

    Args:
        names: of the images, different from each other.
        labels: their classes.
        copies: for each the number of one of those with the same bytes, the same for all of these.
        share: above 0, below 1.
        seed: of the choice.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(copies):
        groups[group].append(number)
    counts: dict[str, int] = defaultdict(int)
    for label in labels:
        counts[label] += 1
    candidates: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        if len({labels[number] for number in members}) == 1:
            candidates[labels[members[0]]].append(members)
    held: list[int] = []
    for label, of_class in candidates.items():
        of_class.sort(key=lambda members: min(_rank(names[number], seed) for number in members))
        left = min(int(share * counts[label] + 0.5), counts[label] - 1)
        taken: list[int] = []
        for members in of_class:
            if len(members) <= left - len(taken):
                taken += members
        smallest = min(of_class, key=len)
        if not taken and len(smallest) < counts[label]:  # the share rounds to none, or every image has copies
            taken = smallest
        held += taken
    return sorted(held)


def _rank(name: object, seed: int) -> bytes:
    """Where an image stands in the order in which images are held out."""
    text = unicodedata.normalize("NFC", str(name)).replace(os.sep, "/")  # as other systems write the same name
    return hashlib.sha256(f"{seed}\0{text}".encode(errors="surrogateescape")).digest()


TAIL = 4096
"""Bytes at an image's end that tell different images of one size apart, mostly."""


def group_copies(images: Any) -> list[int]:
    """Return for each encoded image the number of the first of the same bytes, its own if there is no other.

    Only images of equal size are read: their ends, and the whole of those whose ends are equal too. One that cannot be
    read has no copies here.

    Args:
        images: a column of a table: binary, or structures of bytes and path.
    """
    import pyarrow.compute

    compute: Any = pyarrow.compute  # whose functions are made when it is imported
    structured = pyarrow.types.is_struct(images.type)
    contents = compute.struct_field(images, "bytes") if structured else images
    paths = [path or "" for path in compute.struct_field(images, "path").to_pylist()] if structured else []

    def size(number: int, known: int | None) -> int | None:
        with contextlib.suppress(OSError):
            return os.path.getsize(paths[number]) if known is None and paths else known
        return None

    def digest(number: int, most: int | None) -> bytes | None:
        with contextlib.suppress(OSError):
            content = contents[number].as_py()
            if content is None:
                with open(paths[number], "rb") as file:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - most) if most else 0)
                    return hashlib.file_digest(file, "sha256").digest()
            return hashlib.sha256(content[-most:] if most else content).digest()
        return None

    numbers = range(len(images))
    with ThreadPoolExecutor(16) as pool:  # a network's file system takes a millisecond for each
        keys: list[int | bytes | None] = list(pool.map(size, numbers, compute.binary_length(contents).to_pylist()))
        for most in (TAIL, None):
            alike = _with_equals(keys)
            found = pool.map(lambda number, most=most: digest(number, most), alike)
            for number, content in zip(alike, found, strict=True):
                keys[number] = content
    first: dict[Any, int] = {}
    return [number if keys[number] is None else first.setdefault(keys[number], number) for number in numbers]


def _with_equals(keys: Sequence[Any]) -> list[int]:
    """The numbers of the keys that come more than once, and are not None."""
    by_key: dict[Any, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        by_key[key].append(number)
    return [number for key, members in by_key.items() if key is not None and len(members) > 1 for number in members]
