"""A split, opened: its classes, size and shape, and how an example is read from a row and decoded."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from normfree.common.checks import invalid, require
from normfree.common.files import kind_of
from normfree.common.text import first_line, printable, shortened
from normfree.data.config import MOST_CLASSES, DataConfig
from normfree.data.holdout import hold_out, is_streamed
from normfree.data.sources import FORMATS, Columns, Namer, Source, choose_split, find_columns, find_source, read_rows

MOST_SCANS = 200
"""Scans of a JPEG at most, those of its previews counted: a progressive one has about ten, each as long to decode."""

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose grey of more than eight bits has sixteen, where Pillow opens it as whole numbers of 32."""

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""TIFF's tags for the bits of a level and for what zero stands for, and the latter's value where that is white."""

OTHER_DEPTHS = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}
"""What Pillow multiplies the levels of a PNG by that has not eight bits, as it reads them to eight."""

ORIENTATION = 0x0112
"""EXIF's tag for how the camera was held."""


class DamagedImage(ValueError):
    """Bytes that are no image, or none that can be trusted; the message is the reason, without a name."""


def decode(source: bytes | str | Path, channels: int = 3) -> Any:
    """Decode a still image of any format in :data:`FORMATS`, in any colour that Pillow reads.

    Sixteen bits are scaled to eight, CMYK and palettes are converted, transparency is laid on white, and a
    photograph is turned as its EXIF data say.

    Args:
        source: an encoded image, or the path of one.
        channels: 3 for RGB, 1 for grey.

    Returns:
        A PIL image of mode RGB or L.

    Raises:
        DamagedImage: if it is empty, truncated, animated, no image, or so large that decoding it is an attack
            (Pillow's limit, 89 million pixels; :data:`MOST_SCANS`).
        ImportError: Pillow is not installed.
    """
    Image = require("PIL.Image", "decoding images")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow mends, such as EXIF data that are cut off
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(source) as image:
                # A photograph with a preview beside it (MPO) also has frames; its first is the picture.
                if getattr(image, "is_animated", False) and image.format != "MPO":
                    raise DamagedImage("it has several frames, of which none is the image")
                _check_scans(image)
                _scale_transparency(image)
                return to_eight_bits(_upright(image), channels)
    except DamagedImage:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise DamagedImage(_reason(source, error)) from error


def header_size(source: bytes | str | Path) -> tuple[int, int] | None:
    """Width and height as an image's header says; None of what is no image, which decoding will tell."""
    require("PIL.Image", "decoding images")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(source) as image:
                return image.size
    except Exception:  # a damaged file makes Pillow raise almost anything
        return None


def _opened(source: bytes | str | Path) -> Any:
    """An image whose header has been read, of one of our formats; a path has to lead to a file."""
    from PIL import Image

    if not isinstance(source, bytes) and (kind := kind_of(source)) != "file":
        raise DamagedImage("there is no such file" if kind == "nothing" else f"it is {kind}, no file")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(FORMATS))


def _check_scans(image: Any) -> None:
    """Raise for a JPEG of so many scans that decoding it is an attack; no other segment begins by these bytes."""
    if image.format in ("JPEG", "MPO"):
        place = image.fp.tell()
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")
        image.fp.seek(place)
        if scans > MOST_SCANS:
            raise DamagedImage(f"it has {scans:,} scans, more than {MOST_SCANS}")


def _scale_transparency(image: Any) -> None:
    """Say a PNG's transparent colour in the eight bits of its pixels as they are read; Pillow leaves it as it is."""
    level = image.info.get("transparency")
    scale = OTHER_DEPTHS.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    if scale is not None and level is not None:
        image.info["transparency"] = (
            tuple(int(one * scale) for one in level) if image.mode == "RGB" else int(level * scale)
        )


def to_eight_bits(image: Any, channels: int = 3) -> Any:
    """Convert a PIL image of any mode to RGB or grey; Pillow's own conversion clips sixteen bits to white."""
    wanted = "RGB" if channels == 3 else "L"
    if image.mode == wanted and "transparency" not in image.info:
        image.load()  # while the file is open
        return image
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range")
    if image.mode == "I" and image.format not in SIXTEEN_BITS:
        raise DamagedImage("whole-number pixels of 32 bits have no known range")
    if image.mode == "P" and image.palette is None:
        raise DamagedImage("its pixels are numbers of a palette that it does not have")
    if image.mode.startswith("I"):
        image = _eight_of_sixteen_bits(image)
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    return image.convert(wanted)


def _eight_of_sixteen_bits(image: Any) -> Any:
    """Grey of eight bits; Pillow has left undone what a TIFF or PNG says of its bits, of zero and of transparency."""
    import numpy as np
    from PIL import Image

    bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
    scale = 255 / (2**bits - 1)
    grey = image.convert("I").point(lambda value: value * scale).convert("L")
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = grey.point(lambda value: 255 - value)
    level = image.info.get("transparency")
    if isinstance(level, int):
        grey.paste(255, mask=Image.fromarray(np.asarray(image) == level))
    return grey


def _on_white(image: Any) -> Any:
    """Lay transparency on white: the colours of transparent pixels are whatever the encoder left there."""
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _reason(source: bytes | str | Path, error: Exception) -> str:
    """One line, without the address of a buffer in it."""
    if not source or (not isinstance(source, bytes) and kind_of(source) == "file" and not os.path.getsize(source)):
        return "it is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"it is no image of a known format: {', '.join(FORMATS)}"
    return first_line(error)


def open_split(config: DataConfig, *, training: bool, classes: Sequence[str] | None = None) -> OpenSplit:
    """Open the split to train or to evaluate on.

    Args:
        config: what to open.
        training: which split.
        classes: of the network to evaluate, by their numbers; those of the data must be the same.

    Raises:
        ValueError: if the source, the split or a column is not there, labels are missing, or the classes are others.
    """
    source = find_source(config)
    if config.holdout:
        source = hold_out(source, config)
    split = choose_split(source.splits, config, training=training)
    streamed = is_streamed(source, config)
    rows = source.rows(split, streaming=streamed)
    columns = find_columns(rows.features, config)
    numbered = split  # the training labels number the classes, or those of the split itself where there are none
    if not training:
        with contextlib.suppress(ValueError):
            numbered = choose_split(source.splits, config, training=True)
    class_names = _find_class_names(source, numbered, columns, config, streamed, classes)
    check_classes(class_names, classes, config.source)
    reader = RecordReader(columns, class_names, source.namer(split), config.source)
    given = config.examples if training else config.evaluation_examples
    if streamed:
        return OpenSplit(source, split, rows, reader, given or source.count(split)[0], True)
    if not len(rows):
        raise invalid("source", config.source, f"its split {split!r} holds no example", "pass other data")
    _check_labels(rows, reader)
    return OpenSplit(source, split, rows, reader, len(rows), False)


@dataclass
class OpenSplit:
    """One split of a source.

    Args:
        source: of which.
        split: its name there.
        rows: a Hugging Face data set, or an iterable one.
        reader: of its rows.
        examples: how many there are; None where only reading everything would tell.
        streamed: whether the rows come in order only.
    """

    source: Source
    split: str
    rows: Any
    reader: RecordReader
    examples: int | None
    streamed: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""
        return self.reader.class_names

    def find(self, indices: Sequence[int]) -> list[Record]:
        """Return the examples of those numbers, of what is not streamed."""
        columns = self.rows[list(indices)]
        rows = ({name: values[i] for name, values in columns.items()} for i in range(len(indices)))
        return [self.reader(row, number) for row, number in zip(rows, indices, strict=True)]

    def records(self) -> Iterator[Record]:
        """Yield the examples in order, of all ranks."""
        for number, row in enumerate(read_rows(self.rows, self.reader.source)):
            yield self.reader(row, number)

    def sample(self) -> list[Record]:
        """Return a few examples: evenly spread ones, or the first of a stream."""
        if self.streamed:
            return list(islice(self.records(), SAMPLED))
        count = len(self.rows)
        return self.find(sorted({count * i // SAMPLED for i in range(SAMPLED)}))


SAMPLED = 16
"""Images whose size is looked at."""
USUAL_SIZE = 224
MEMORY = 2**30
"""Bytes that are held in memory without being asked to."""


def resolve(config: DataConfig, opened: OpenSplit) -> DataConfig:
    """Return the config with classes, channels, size, place (memory or not) and holdout as the data say."""
    sizes = {size for record in opened.sample() if (size := header_size(record.image)) is not None}
    (width, height) = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    size = config.image_size or (width if width == height else USUAL_SIZE)
    channels = config.in_channels or (len(config.mean) if config.mean else 3)
    in_memory = config.in_memory
    if in_memory == "auto":
        small = opened.examples is not None and opened.examples * size * size * channels <= MEMORY
        in_memory = small and sizes == {(size, size)} and config.streaming is not True
    return replace(
        config,
        num_classes=len(opened.class_names),
        in_channels=1 if channels == 1 else 3,
        image_size=size,
        in_memory=in_memory,
        holdout=config.holdout or 0.0,
    )


# Classes

FEW_CLASSES = 1000
"""Classes up to which labels are taken as classes, however few examples each has."""


def check_classes(names: Sequence[str], wanted: Sequence[str] | None, source: str) -> None:
    """Raise if a network's classes are known, and the data have others or another order.

    Raises:
        ValueError: naming some of both.
    """
    __tracebackhide__ = True
    if wanted is not None and tuple(names) != tuple(wanted):
        rule = f"its classes ({list_names(names)}) are not the model's ({list_names(wanted)})"
        raise invalid("source", source, rule, "give data with the model's classes")


def list_names(names: Sequence[str], most: int = 5) -> str:
    """Return the first names and how many more there are, as a message has them."""
    more = f", … {len(names)} in all" if len(names) > most else ""
    return printable(", ".join(shortened(name, 30) for name in names[:most]) + more)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Return names of classes in the order of their text, or of their numbers where all of them are whole numbers."""
    numbers = all(re.fullmatch("0|[1-9][0-9]*", name) for name in names)
    return tuple(sorted(names, key=(lambda name: (len(name), name)) if numbers else None))


def _find_class_names(
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
        examples, count = source.count(split) if config.num_classes is None else (None, config.num_classes)
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
        return in_order(distinct)
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


# Rows


class Record(NamedTuple):
    """An encoded image with its class."""

    image: bytes | str
    """The file's bytes, or its path."""
    label: int
    name: str
    """What an error message calls it: a path, or a file and a row."""


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
            classes = f"{len(self.class_names)} classes ({list_names(self.class_names)})"
            rule = f"{shortened(name, 120)} is of none of the {classes}"
            raise invalid(column, value, rule, "pass data of these classes")
        if value is None or value == -1 or not isinstance(value, int):
            rule = f"{name} has no class there" if value in (None, -1) else f"{name} has another kind of value there"
            raise invalid(column, value, rule, "pass another label_column, or a split with labels")
        if not 0 <= value < len(self.class_names):
            rule = f"{name} is of none of the {len(self.class_names)} classes"
            raise invalid(column, value, rule, "mend it, or pass a larger num_classes")
        return int(value)
