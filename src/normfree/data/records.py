"""One example before it is decoded, and how it is read from a row of a table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from normfree.common.checks import invalid, suggestion
from normfree.common.text import printable, shortened
from normfree.data.config import DataConfig

LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")


class Record(NamedTuple):
    """An encoded image with its class."""

    image: bytes | str
    """The file's bytes, or its path."""
    label: int
    name: str
    """What an error message calls it: a path, or a file and a row."""


class Columns(NamedTuple):
    """Where a table keeps what we need."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    """As the table declares them."""


def find_columns(features: Any, config: DataConfig) -> Columns:
    """Find the images and labels of a table.

    Args:
        features: of a Hugging Face data set, by column; None where it knows none.
        config: whose ``image_column`` and ``label_column`` go first.

    Raises:
        ValueError: if there is no such column, or more than a guess would be needed.
    """
    from datasets import ClassLabel, Image

    features = features or {}
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images and "image" in features and _holds_bytes(features["image"]):
        images = ["image"]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    classes += [name for name in LABEL_COLUMNS if name in features and name not in classes]
    image = _chosen("image_column", config.image_column, images, features)
    if not _holds_images(features[image]):
        rule = "the column holds no encoded images"
        raise invalid("image_column", image, rule, "name one of bytes, or of {bytes, path} as datasets writes it")
    label = _chosen("label_column", config.label_column, [name for name in classes if name != image], features)
    names = features[label].names if isinstance(features[label], ClassLabel) else None
    return Columns(image, label, tuple(names) if names else None)


def _chosen(argument: str, wanted: str | None, candidates: Sequence[str], features: Any) -> str:
    if wanted is not None and wanted not in features:
        raise invalid(argument, wanted, "the data have no such column", suggestion(wanted, features))
    if wanted is None and not candidates:
        listed = ", ".join(features) or "none"
        kind = "images" if argument == "image_column" else "labels"
        rule = f"no column is seen to hold {kind} (columns: {listed})"
        raise invalid(argument, None, rule, f"pass {argument}, or other data")
    return candidates[0] if wanted is None else wanted


def _holds_images(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image) or _holds_bytes(feature)


def _holds_bytes(feature: Any) -> bool:
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names and how many more there are, as a message has them."""
    more = f", … {len(names)} in all" if len(names) > most else ""
    return printable(", ".join(shortened(name, 30) for name in names[:most]) + more)


class Namer(Protocol):
    """What error messages call a row."""

    def __call__(self, number: int, path: str | None, shard: int | None = None) -> str:
        """Name row ``number`` of a shard, or of the whole split, whose image has ``path`` (or None)."""
        ...


@dataclass(frozen=True)
class RecordReader:
    """Rows to records.

    Args:
        columns: where image and label are.
        class_names: all classes, in the order of their numbers.
        name: what to call a row.
        source: the config's word for where the rows come from.
    """

    columns: Columns
    class_names: tuple[str, ...]
    name: Namer = field(repr=False)
    source: str

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each class, by its name."""
        return {name: number for number, name in enumerate(self.class_names)}

    def __call__(self, row: dict[str, Any], number: int, shard: int | None = None) -> Record:
        """Read a row; a ValueError names the one whose label is missing or none of the classes.

        Args:
            row: the values by column.
            number: of the row in its shard, or in the whole split.
            shard: of the row, where it is known.
        """
        image = row[self.columns.image]
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        name = self.name(number, path, shard)
        label = self._class_number(row[self.columns.label], name)
        return Record(data if data is not None else path or b"", label, name)

    def _class_number(self, value: Any, name: str) -> int:
        column = self.columns.label
        if isinstance(value, str) and value in self.numbers:
            return self.numbers[value]
        if isinstance(value, str):
            rule = (
                f"{shortened(name, 120)} is of none of the {len(self.class_names)} classes ({listed(self.class_names)})"
            )
            raise invalid(column, value, rule, "pass data of these classes")
        if value is None or value == -1 or not isinstance(value, int):
            rule = f"{name} has no class there" if value in (None, -1) else f"{name} has another kind of value there"
            raise invalid(column, value, rule, "pass another label_column, or a split with labels")
        if not 0 <= value < len(self.class_names):
            rule = f"{name} is of none of the {len(self.class_names)} classes"
            raise invalid(column, value, rule, "mend it, or pass a larger num_classes")
        return int(value)


class Table:
    """Examples that can be reached by number.

    Args:
        rows: a Hugging Face data set.
        reader: of its rows.
    """

    def __init__(self, rows: Any, reader: RecordReader) -> None:
        self.rows, self.reader = rows, reader

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""
        return self.reader.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def records(self, indices: Sequence[int]) -> list[Record]:
        """The examples of those numbers."""
        columns = self.rows[list(indices)]
        rows = ({name: values[i] for name, values in columns.items()} for i in range(len(indices)))
        return [self.reader(row, number) for row, number in zip(rows, indices, strict=True)]
