"""A source, opened: its classes, its size and shape found, and every field of the config resolved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from normfree.common.checks import invalid
from normfree.data.config import MOST_CLASSES, DataConfig
from normfree.data.decode import header_size
from normfree.data.memory import LARGEST
from normfree.data.records import Columns, Record, RecordReader, Table, find_columns, listed
from normfree.data.sources import Source, readable, source_named
from normfree.data.splits import chosen_split

PROBED = 16
"""Images whose size is looked at."""
USUAL_SIZE = 224

FEW_CLASSES = 1000
"""Classes up to which labels are taken as classes, however few examples each has."""


@dataclass
class Opened:
    """One split of a source.

    Args:
        rows: a Hugging Face data set, or an iterable one.
        reader: of its rows.
        examples: how many there are; None where only reading everything would tell.
        streamed: whether the rows come in order only.
    """

    rows: Any
    reader: RecordReader
    examples: int | None
    streamed: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""
        return self.reader.class_names

    def table(self) -> Table:
        """The examples by number."""
        return Table(self.rows, self.reader)

    def records(self) -> Iterator[Record]:
        """The examples in order, of all ranks."""
        for number, row in enumerate(readable(self.rows, self.reader.source)):
            yield self.reader(row, number)

    def probe(self) -> list[Record]:
        """A few examples: evenly spread ones, or the first of a stream."""
        if self.streamed:
            return list(islice(self.records(), PROBED))
        count = len(self.rows)
        return self.table().records(sorted({count * i // PROBED for i in range(PROBED)}))


def open_split(config: DataConfig, *, training: bool, classes: Sequence[str] | None = None) -> Opened:
    """Open the split to train or to evaluate on.

    Args:
        config: what to open.
        training: which split.
        classes: of the network to evaluate, by their numbers; those of the data must be the same.

    Raises:
        ValueError: if the source, the split or a column is not there, labels are missing, or the classes are others.
    """
    source = source_named(config)
    split = chosen_split(source.splits, config, training=training)
    streamed = source.streams if config.streaming == "auto" else config.streaming
    rows = source.rows(split, streaming=streamed)
    columns = find_columns(rows.features, config)
    first = split if training else _training_split(source, config, split)
    class_names = _class_names(source, first, columns, config, streamed, classes)
    check_classes(class_names, classes, config.source)
    reader = RecordReader(columns, class_names, source.namer(split), config.source)
    given = config.examples if training else config.evaluation_examples
    if streamed:
        return Opened(rows, reader, given or source.counted(split)[0], True)
    if not len(rows):
        raise invalid("source", config.source, f"its split {split!r} holds no example", "pass other data")
    _check_labels(rows, reader)
    return Opened(rows, reader, len(rows), False)


def resolved(config: DataConfig, opened: Opened) -> DataConfig:
    """The config with classes, channels, size and place (memory or not) as the data say."""
    sizes = {size for record in opened.probe() if (size := header_size(record.image)) is not None}
    (width, height) = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    size = config.image_size or (width if width == height else USUAL_SIZE)
    channels = config.in_channels or (len(config.mean) if config.mean else 3)
    in_memory = config.in_memory
    if in_memory == "auto":
        small = opened.examples is not None and opened.examples * size * size * channels <= LARGEST
        in_memory = small and sizes == {(size, size)} and config.streaming is not True
    return replace(
        config,
        num_classes=len(opened.class_names),
        in_channels=1 if channels == 1 else 3,
        image_size=size,
        in_memory=in_memory,
    )


def _training_split(source: Source, config: DataConfig, split: str) -> str:
    """The split whose labels number the classes; the evaluated one itself where there is no other."""
    try:
        return chosen_split(source.splits, config, training=True)
    except ValueError:
        return split


def check_classes(names: Sequence[str], wanted: Sequence[str] | None, source: str) -> None:
    """Raise if a network's classes are known, and the data have others or another order.

    Raises:
        ValueError: naming some of both.
    """
    if wanted is not None and tuple(names) != tuple(wanted):
        rule = f"its classes ({listed(names)}) are not the model's ({listed(wanted)})"
        raise invalid("source", source, rule, "give data with the model's classes")


def _class_names(
    source: Source, split: str, columns: Columns, config: DataConfig, streamed: bool, known: Sequence[str] | None
) -> tuple[str, ...]:
    """Names as declared; else the network's; else the distinct words of the training labels; else their numbers."""
    if columns.class_names is not None:
        if config.num_classes not in (None, len(columns.class_names)):
            rule = f"the data declare {len(columns.class_names)} classes"
            raise invalid("num_classes", config.num_classes, rule, "leave it out")
        return columns.class_names
    if known is not None:
        return tuple(known)
    found = source.labels(split, columns.label) if streamed else source.rows(split, streaming=False)[columns.label]
    if found is None:
        examples, count = source.counted(split) if config.num_classes is None else (None, config.num_classes)
        if count is None:
            raise invalid("num_classes", None, "the streamed data do not say how many classes there are", "pass it")
        _check_count(columns.label, count, count, examples)
        return tuple(map(str, range(count)))
    labels = [label for label in found if label is not None]
    distinct = set(labels) if all(isinstance(label, (str, int)) for label in labels) else set()
    if distinct and all(isinstance(label, str) for label in distinct):
        if config.num_classes not in (None, len(distinct)):
            rule = f"the column {columns.label!r} holds {len(distinct)} names of classes"
            raise invalid("num_classes", config.num_classes, rule, "leave it out")
        _check_count(columns.label, len(distinct), len(distinct), len(labels))
        return tuple(sorted(distinct))
    if config.num_classes is not None:
        return tuple(map(str, range(config.num_classes)))
    if distinct and all(isinstance(label, int) for label in distinct) and max(distinct) >= 0:
        _check_count(columns.label, max(distinct) + 1, len(distinct), len(labels))
        return tuple(map(str, range(max(distinct) + 1)))
    raise invalid("label_column", columns.label, "holds neither numbers nor names of classes", "pass another")


def _check_count(column: str, classes: int, distinct: int, examples: int | None) -> None:
    """Raise where labels are identifiers: more numbers than examples, or hardly one that comes twice.

    Raises:
        ValueError: naming the column.
    """
    identifiers = classes > MOST_CLASSES
    if examples is not None and classes > FEW_CLASSES:
        identifiers |= classes > examples or 2 * distinct > examples
    if identifiers:
        of = "" if examples is None else f" of {examples:,} examples"
        rule = f"its labels{of} number {classes:,} classes, so they are identifiers"
        raise invalid("label_column", column, rule, "name the column of the classes")


def _check_labels(rows: Any, reader: RecordReader) -> None:
    """Read every label now: a missing one is found before the first step, not after the last."""
    labels = list(rows[reader.columns.label])
    count = len(reader.class_names)
    for index, label in enumerate(labels):
        number = isinstance(label, int) and 0 <= label < count
        if not (number or (isinstance(label, str) and label in reader.numbers)):
            reader(rows[index], index)  # raises, with the example's name
