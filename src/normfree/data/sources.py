"""Data sources by the string that names one: an image folder, parquet files, WebDataset shards, a Hugging Face name.

Everything is read by Hugging Face ``datasets``; images stay encoded until a worker decodes them.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import glob
import hashlib
import itertools
import os
import re
import tarfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, Self

from normfree.common.checks import invalid, require, suggestion
from normfree.common.files import bounded_loader, check_file, folders_in, kind_of, read_bytes, refused, walk
from normfree.common.text import all_lines, first_line, quoted
from normfree.data.config import DataConfig

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
"""Formats that are decoded, an MPO as the JPEG it is, and the endings of their files: none of Pillow's that starts
another program (PostScript)."""

SUFFIXES = frozenset(itertools.chain.from_iterable(FORMATS.values()))

MOST_PATTERNS, MOST_BRACES = 100_000, 32
"""Names that a source's braces stand for, and pairs of braces, at most."""

SMALL = 2**30
"""Bytes of parquet that are read into memory as they are."""


MOST_COLUMNS = 2_000
"""Columns of a parquet file, each part of a nested one counted: ``datasets`` takes time in the square of them."""

MOST_UNPACKED, MOST_REPEATED = 2**28, 16
"""Bytes in memory of a parquet file of any size, and for each of its bytes: encoded images are not compressed again."""


class Namer(Protocol):
    """What error messages call a row."""

    def __call__(self, number: int, path: str | None, shard: int | None = None) -> str:
        """Name row ``number`` of a shard, or of the whole split, whose image has ``path`` (or None)."""
        ...


class Source(Protocol):
    """Where rows come from."""

    splits: tuple[str, ...]
    """What it is divided into."""
    streams: bool
    """Whether it is better read in order than copied."""

    def rows(self, split: str, *, streaming: bool) -> Any:
        """Return the rows of a split, as a Hugging Face data set with images left encoded (or an iterable one)."""
        ...

    def labels(self, split: str, column: str) -> list[Any] | None:
        """Return the labels of a split, read without its images; None where that takes reading everything."""
        ...

    def count(self, split: str) -> tuple[int | None, int | None]:
        """Return examples and classes of a split, each None where only reading everything would tell."""
        ...

    def namer(self, split: str) -> Namer:
        """Return what names a row."""
        ...

    def files(self, split: str) -> dict[str, str]:
        """Return the files of a split, paths or addresses, by the names they have within it; none of the hub's."""
        ...


def find_source(config: DataConfig) -> Source:
    """Return the source a config names.

    Raises:
        ValueError: if there is none of that name, or nothing in it.
        ImportError: ``datasets`` is not installed, with which all of them are read.
    """
    require("datasets", "a data source")
    name = config.source
    if name.startswith("hub:"):
        return HubSource(config)
    if kind_of(name) == "a folder":
        if files := parquet_in(Path(name)):
            return FileSource("parquet", group_by_split(files), config)
        return FolderSource(Path(name))
    files = [name] if kind_of(name) == "file" else _matching(expand_braces(name))
    if not files:
        rule = "there is no such folder or file"
        raise invalid("source", name, rule, "pass digits, a folder, *.parquet or *.tar files, or hub:OWNER/NAME")
    for suffix, kind in ((".parquet", "parquet"), (".tar", "webdataset")):
        if all(file.endswith(suffix) for file in files):
            return FileSource(kind, group_by_split(files), config)
    raise invalid("source", name, "files must all be .parquet or all be .tar", "pass a folder to read image files")


def parquet_in(folder: Path, argument: str = "source") -> list[str]:
    """Return the parquet files in a folder and in the folders below it.

    Args:
        folder: where to look.
        argument: what named it, for messages.

    Raises:
        ValueError: folders in it hold image files as well, so that either could be meant.
    """
    files, image = [], None
    for file in walk(folder, argument):
        if file.suffix == ".parquet":
            files.append(str(file))
        elif file.suffix.lower() in SUFFIXES and file.parent != folder:
            image = file
    if files and image:
        rule = f"holds parquet files ({quoted(files[0])}) and folders of images ({quoted(str(image))})"
        raise refused(argument, folder, rule, "name the parquet files by a pattern, or move them elsewhere")
    return sorted(files)


def _matching(patterns: Sequence[str]) -> list[str]:
    """The files of each pattern, by name; a file that is called as a pattern is that file. Addresses stay."""
    files = []
    for pattern in patterns:
        _check_depth(pattern)
        known = "://" in pattern or kind_of(pattern) == "file"
        folder = pattern.partition("**")[0]
        if not known and folder != pattern and os.path.isdir(folder or "."):
            for _ in walk(folder or ".", "source"):  # raises where ``glob`` passes over a folder that cannot be read
                pass
        files += [pattern] if known else sorted(glob.glob(pattern, recursive=True))
    return files


def _check_depth(pattern: str) -> None:
    """Refuse a pattern that walks the same folders again and again, or all of a disk.

    Raises:
        ValueError: it has ``**`` twice, ``..`` after it, or no folder before it but the root's.
    """
    parts = PurePosixPath(pattern).parts
    if "**" not in parts or "://" in pattern:
        return
    first = parts.index("**")
    if parts.count("**") > 1 or ".." in parts[first:] or parts[:first] == ("/",):
        rule = "** stands for all folders below one, once, and not below the root"
        raise invalid("source", pattern, rule, "name the folder that the files lie in")


def expand_braces(pattern: str) -> list[str]:
    """Return a pattern with its braces written out: ``a-{08..10}`` is a-08, a-09, a-10, and ``{x,y}`` is x, y.

    Raises:
        ValueError: they stand for too many names.
    """
    few = pattern.count("{") <= MOST_BRACES
    names = list(itertools.islice(_without_braces(pattern), MOST_PATTERNS + 1)) if few else []
    if not few or len(names) > MOST_PATTERNS:
        rule = f"its braces stand for more than {MOST_PATTERNS:,} names"
        raise invalid("source", pattern, rule, "name the shards by a pattern such as train-*.tar")
    return names


def _without_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is not None:
        parts: Iterable[str] = words.split(",")
    else:
        parts = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for part in parts:
        yield from _without_braces(f"{head}{part}{tail}")


class FolderSource:
    """Class folders of images, or split folders with class folders in them; nothing is copied.

    Args:
        folder: the folder.

    Raises:
        ValueError: if it holds no class folder, or no image.
    """

    streams = False

    def __init__(self, folder: Path) -> None:
        inside = folders_in(folder, "source")
        named = {path.name: path for path in inside if split_of(path.name) is not None}
        whole = len(named) == len(inside) > 0
        self.folders = named if whole else {"train": folder}
        self.splits = tuple(self.folders)
        classes = {path.name for part in self.folders.values() for path in folders_in(part, "source")}
        self.class_names = tuple(sorted(classes))
        if not self.class_names:
            remedy = "put the images of each class in a folder of its name"
            raise invalid("source", str(folder), "the folder holds no class folders", remedy)

    def rows(self, split: str, *, streaming: bool) -> Any:
        rows = self._table(split)
        return rows.to_iterable_dataset(num_shards=min(len(rows), 64)) if streaming else rows

    @functools.cache  # noqa: B019 (a source lives as long as its data)
    def _table(self, split: str) -> Any:
        datasets = require("datasets", "a data source")

        folder = self.folders[split]
        labels, paths, empty = [], [], []
        for number, name in enumerate(self.class_names):
            is_here = (folder / name).is_dir()
            found = walk(folder / name, "source") if is_here else ()
            files = sorted(str(file) for file in found if file.suffix.lower() in SUFFIXES)
            for file in (name, *files):
                if not file.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in file):
                    raise invalid("source", file, f"in {quoted(str(folder))}, is no name in UTF-8", "rename it")
            paths += files
            labels += [number] * len(files)
            empty += [name] if is_here and not files else []
        if not paths:
            rule = f"its class folders hold no image ({', '.join(sorted(SUFFIXES))})"
            raise invalid("source", str(folder), rule, "pass a folder of images")
        if empty:
            rule = f"no image is in {len(empty)} of its class folders: {', '.join(map(quoted, empty[:3]))}"
            raise invalid("source", str(folder), rule, "remove them, or put images in")
        features = datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(self.class_names))}
        )
        return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)

    def labels(self, split: str, column: str) -> list[Any] | None:
        return self.rows(split, streaming=False)[column]

    def count(self, split: str) -> tuple[int | None, int | None]:
        return len(self._table(split)), len(self.class_names)

    def namer(self, split: str) -> Namer:
        return _name_by_path

    def files(self, split: str) -> dict[str, str]:
        paths = self._table(split).data.column("image").combine_chunks().field("path").to_pylist()
        folder = str(self.folders[split])
        start = 0 if folder == "." else len(os.path.join(folder, ""))  # Path(".") / "cat" is "cat"
        return {path[start:]: path for path in paths}


class FileSource:
    """Parquet files or WebDataset shards.

    Args:
        kind: parquet or webdataset, as ``datasets`` calls them.
        files: by split, paths or addresses.
        config: for the cache and what the files do not say.
    """

    def __init__(self, kind: str, files: dict[str, list[str]], config: DataConfig) -> None:
        for file in itertools.chain.from_iterable(files.values()):
            if "://" not in file:
                check_file(file, "source", "give .parquet or .tar files")
        self.kind, self.paths, self.config = kind, files, config
        self.splits = tuple(files)
        self.streams = kind == "webdataset"

    def _is_local(self, split: str) -> bool:
        return not any("://" in file for file in self.paths[split])

    def rows(self, split: str, *, streaming: bool) -> Any:
        files = self.paths[split]
        whole = self.kind == "parquet" and not streaming and self._is_local(split)
        if whole and sum(map(os.path.getsize, files)) <= SMALL:
            return self._read(files)
        self.count(split)  # names the file that is damaged, or the shard that holds more than is stored of it
        chosen = [file if "://" in file else glob.escape(os.path.abspath(file)) for file in files]  # no patterns
        return _load(self.config, self.kind, data_files={"train": chosen}, split="train", streaming=streaming)

    def _read(self, files: list[str]) -> Any:
        """The encoded rows of small parquet files, in memory: ``datasets`` would write a copy of them first."""
        datasets = require("datasets", "a data source")
        from datasets.table import InMemoryTable

        count_rows(files)  # names the file that is damaged
        tables = []
        for file in files:
            with one_line_errors(file):
                tables.append(datasets.Dataset(InMemoryTable(_read_whole(file))))
        with one_line_errors(self.config.source):
            return _leave_encoded(datasets.concatenate_datasets(tables))

    def labels(self, split: str, column: str) -> list[Any] | None:
        from pyarrow import parquet

        if self.kind != "parquet" or not self._is_local(split):
            return None
        count_rows(self.paths[split])
        labels: list[Any] = []
        for file in self.paths[split]:
            with one_line_errors(file):
                labels += parquet.read_table(file, columns=[column]).column(column).to_pylist()
        return labels

    @functools.cache  # noqa: B019 (a source lives as long as its data)
    def count(self, split: str) -> tuple[int | None, int | None]:
        if not self._is_local(split):
            return None, None
        if self.kind == "parquet":
            return sum(count_rows(self.paths[split])), None
        return scan_shards(self.paths[split])

    def namer(self, split: str) -> Namer:
        files = self.paths[split]
        if self.kind != "parquet" or not self._is_local(split):
            return functools.partial(_name_by_path, files=files)
        return ParquetNamer(files, list(itertools.accumulate(count_rows(files))))

    def files(self, split: str) -> dict[str, str]:
        if not self._is_local(split):
            return {file: file for file in self.paths[split]}
        paths = [os.path.abspath(file) for file in self.paths[split]]
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        return {os.path.relpath(path, root): path for path in paths}


def _read_whole(file: str) -> Any:
    """The table of a parquet file, unless it is much larger than the file, as one of repeated rows can be.

    Raises:
        ValueError: naming it.
    """
    from pyarrow import Table, parquet

    batches, size, most = [], 0, MOST_UNPACKED + MOST_REPEATED * os.path.getsize(file)
    with parquet.ParquetFile(file) as opened:
        for batch in opened.iter_batches(1024):
            if (size := size + batch.nbytes) > most:
                raise ValueError(f"it unpacks to more than {most / 2**20:,.0f} MiB")
            batches.append(batch)
        return Table.from_batches(batches, opened.schema_arrow)


class ParquetNamer:
    """Names rows by file and row, counted from zero; the row's own path is added where there is one.

    Args:
        files: of the split.
        ends: rows up to the end of each.
    """

    def __init__(self, files: list[str], ends: list[int]) -> None:
        self.files, self.ends = files, ends

    def __call__(self, number: int, path: str | None, shard: int | None = None) -> str:
        file = bisect.bisect_right(self.ends, number) if shard is None else shard
        row = number - (self.ends[file - 1] if file and shard is None else 0)
        return f"{self.files[file]} row {row}" + (f" ({path})" if path else "")


def _name_by_path(number: int, path: str | None, shard: int | None = None, files: Sequence[str] = ()) -> str:
    """A row by its image's path or its number, and by the file it is in where that is known or the only one."""
    if shard is None and len(files) == 1:
        shard = 0
    if shard is None or (path and not files):
        return path or f"example {number}"
    return f"{path or f'example {number}'} of {files[shard] if shard < len(files) else f'shard {shard}'}"


MOST_CARD = 2**20
"""Bytes of a data set's README."""


def _check_card(path: Path) -> None:
    """Refuse the README of a folder laid out like a data set of the hub that would not end to be read, or leads out.

    Raises:
        ValueError: its header is none that :func:`bounded_loader` reads, or names files that do not lie in the folder.
    """
    if kind_of(path) == "nothing":
        return
    yaml, loader = require("yaml", "the card of a data set"), bounded_loader("the card of a data set")
    text = read_bytes(path, "source", most=MOST_CARD).decode(errors="replace")
    header = text.split("---", 2)[1] if text.lstrip().startswith("---") and text.count("---") > 1 else ""
    try:
        document = yaml.load(header, loader)
    except Exception as error:  # PyYAML's own kind, and what its constructors make of a tag's wrong value
        raise refused("source", path, f"has no sound header ({all_lines(error)})", "mend it") from error
    configurations = document.get("configs") if isinstance(document, dict) else None
    for named in _words_in([one.get("data_files") for one in configurations or () if isinstance(one, dict)]):
        parts = PurePosixPath(named).parts
        if "://" in named or parts[:1] == ("/",) or ".." in parts or parts.count("**") > 1:
            raise refused("source", path, f"names files that do not lie in its folder ({quoted(named)})", "mend it")


def _words_in(value: Any) -> Iterator[str]:
    """All text in what YAML holds, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _words_in(each)


class HubSource:
    """A data set of the Hugging Face hub (or a folder laid out like one)."""

    streams = False

    def __init__(self, config: DataConfig) -> None:
        datasets = require("datasets", "a data source")

        _, self.name, *rest = config.source.split(":", 2)
        self.configuration = rest[0] if rest else None
        self.config = config
        if kind_of(self.name) == "a folder":
            if glob.has_magic(os.path.realpath(self.name)):
                raise refused("source", self.name, "is read as a pattern by datasets", "rename it without * ? [ ]")
            _check_card(Path(self.name) / "README.md")
        with quiet_datasets(), one_line_errors(config.source):
            self.splits = tuple(datasets.get_dataset_split_names(self.name, self.configuration))

    def rows(self, split: str, *, streaming: bool) -> Any:
        return _load(self.config, self.name, self.configuration, split=split, streaming=streaming)

    def labels(self, split: str, column: str) -> list[Any] | None:
        return None

    def count(self, split: str) -> tuple[int | None, int | None]:
        info = self.rows(split, streaming=True).info
        known = (info.splits or {}).get(split)
        return (known.num_examples or None) if known else None, None

    def namer(self, split: str) -> Namer:
        return _name_by_path

    def files(self, split: str) -> dict[str, str]:
        return {}


def fingerprint(source: Source, split: str) -> dict[str, Any]:
    """Return the number of a split's files, their bytes in all, and a hash of their names and sizes.

    Sizes of files at addresses are not asked for.
    """
    files = sorted(source.files(split).items())
    parts = [files[first : first + 4096] for first in range(0, len(files), 4096)]

    def size_all(part: list[tuple[str, str]]) -> list[int]:
        return [os.path.getsize(path) if "://" not in path and os.path.exists(path) else 0 for _, path in part]

    with ThreadPoolExecutor(16) as pool:  # a network's file system takes a millisecond for each
        sizes = list(itertools.chain.from_iterable(pool.map(size_all, parts)))
    digest = hashlib.sha256()
    for (name, _), size in zip(files, sizes, strict=True):
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return {"files": len(files), "bytes": sum(sizes), "sha256": digest.hexdigest()}


def _load(config: DataConfig, *words: Any, **options: Any) -> Any:
    """``datasets.load_dataset``, silent, off the network for files, its errors in one line."""
    datasets = require("datasets", "a data source")

    cache = str(config.cache_folder) if config.cache_folder else None
    with quiet_datasets(), one_line_errors(config.source):
        return _leave_encoded(datasets.load_dataset(*words, **options, cache_dir=cache))


def _leave_encoded(rows: Any) -> Any:
    """The same rows, their images left encoded."""
    datasets = require("datasets", "a data source")

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep ``datasets`` from counting downloads over the network, and from drawing bars."""
    datasets = require("datasets", "a data source")
    from datasets import config

    counts, bars = config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.is_progress_bar_enabled()
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Raise what reading a source runs into as a ``ValueError`` of one line that names the source and the file."""
    try:
        yield
    except Exception as error:  # datasets, pyarrow and the hub's client have no common one
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        file = _file_in_hand(cause)
        rule = f"{quoted(file) + ' ' if file else ''}could not be read ({first_line(cause)})"
        raise invalid("source", source, rule, "mend the files or the name") from error


def _file_in_hand(error: BaseException) -> str:
    """The file that a reader of ``datasets`` had open as it raised, which it does not say; "" if there was none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith("datasets.packaged_modules."):
            return str(frame.f_locals.get("file", ""))
    return ""


def read_rows(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows; raises as :func:`one_line_errors`."""
    with one_line_errors(source):
        yield from rows


# How many examples are in files, without reading the images


def count_rows(files: Sequence[str]) -> list[int]:
    """Return the rows of each parquet file, from its footer.

    Raises:
        ValueError: naming the file that is not parquet, or has too many columns.
    """
    from pyarrow import ArrowException, parquet

    counts = []
    for file in files:
        try:
            footer = parquet.read_metadata(file)
        except (ArrowException, OSError) as error:
            raise invalid("source", file, f"is no whole parquet file ({first_line(error)})", "write it anew") from error
        if footer.num_columns > MOST_COLUMNS:
            rule = f"has {footer.num_columns:,} columns, more than {MOST_COLUMNS:,}"
            raise invalid("source", file, rule, "write those of the images and labels alone")
        counts.append(footer.num_rows)
    return counts


LONGEST_NUMBER = 32
"""Characters of a .cls file: it holds one number."""

UNPACKED = frozenset({"gz", "bz2", "xz", "lz4", "zst", "npy", "npz", "cbor", "pth", "pyd", "ten", "tb", "mp", "msg"})
"""Endings of members that ``datasets`` decompresses or decodes into arrays, which may be far larger than the shard."""


MOST_HEADER = 2**16
"""Bytes at most of what stands before a member in a shard: a long name, or its attributes."""

_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_ATTRIBUTE = re.compile(rb"(\d{1,5}) ([^=]{1,300})=")


class _Member(tarfile.TarInfo):
    """A member of a shard, whose headers are looked at before ``tarfile`` reads them, which may never end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:
        _check_header(tarfile.fileobj)
        return super().fromtarfile(tarfile)


def _check_header(shard: Any) -> None:
    """Raise for a header that is damaged, of negative or too large a size, or of a sparse file; the place stays."""
    place = shard.tell()
    block = shard.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):  # the end
        shard.seek(place)
        return
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:  # which ``tarfile`` takes for the end
        raise ValueError(str(error)) from error
    name = quoted(header.name)
    if header.size < 0:
        raise ValueError(f"{name} has {header.size} bytes")
    if header.type == tarfile.GNUTYPE_SPARSE:
        raise ValueError(f"{name} is a sparse file, larger than what is stored of it")
    if header.type in (*_PAX, *_LONG) and header.size > MOST_HEADER:
        raise ValueError(f"{name} is a header of {header.size:,} bytes, more than {MOST_HEADER:,}")
    if header.type in _PAX:
        _check_attributes(shard.read(-(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE), name)
    shard.seek(place)


def _check_attributes(content: bytes, name: str) -> None:
    """Raise for attributes (pax) on which ``tarfile`` takes time in the square of their length, and of sparse files."""
    position = 0
    while found := _ATTRIBUTE.match(content, position):
        if found[2].startswith(b"GNU.sparse"):
            raise ValueError(f"{name} is of a sparse file, larger than what is stored of it")
        if int(found[1]) <= len(found[0]):
            break
        position += int(found[1])
    if content[position:].strip(b"\0") or re.search(rb"\d{100}", content):
        raise ValueError(f"{name} holds no sound attributes")


def scan_shards(files: Sequence[str]) -> tuple[int, int | None]:
    """Return examples of WebDataset shards, and classes (one above the largest number in a .cls file).

    Raises:
        ValueError: naming the shard that is damaged, or if there is no example at all.
    """
    examples, largest = 0, -1
    for file in files:
        keys = set()
        try:
            with tarfile.open(file, "r:", tarinfo=_Member) as shard:  # a compressed one may be a memory's worth
                for member in shard:
                    if member.size < 0:  # as an attribute says
                        raise ValueError(f"{quoted(member.name)} has {member.size} bytes")
                    if member.issparse():
                        raise ValueError(f"{quoted(member.name)} is a sparse file, larger than what is stored of it")
                    path = PurePosixPath(member.name)
                    if not member.isfile() or path.name.startswith("."):
                        continue
                    stem, _, kind = path.name.partition(".")
                    keys.add(str(path.parent / stem))
                    if not UNPACKED.isdisjoint(kind.lower().split(".")):
                        raise ValueError(f"{quoted(member.name)} unpacks to more than is stored of it, and is no image")
                    if kind.lower() == "cls" and (content := shard.extractfile(member)):
                        number = content.read(LONGEST_NUMBER + 1)
                        if len(number) > LONGEST_NUMBER:
                            raise ValueError(
                                f"{quoted(member.name)} is no number of {LONGEST_NUMBER} characters at most"
                            )
                        if not re.fullmatch(rb"\s*-?[0-9]+\s*", number):  # Python reads 0_1 as 1
                            raise ValueError(f"{quoted(member.name)} holds no number")
                        largest = max(largest, int(number))
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            raise invalid("source", file, f"is no whole shard ({first_line(error)})", "write it anew") from error
        examples += len(keys)
    if not examples:
        raise invalid("source", next(iter(files)), "the shards hold no example", "pass shards with images in them")
    return examples, largest + 1 if largest >= 0 else None


# Names of splits: what a folder or file name says, and which split a config means

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
EVALUATION = ("holdout", "validation", "test")
"""Splits to evaluate on where none is named, the first there is."""


def split_of(name: str) -> str | None:
    """Return the split a file or folder name speaks of, or None: ``"cifar-val.parquet"`` is of validation."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words for split, known in WORDS.items() if word in known), None)


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Return files by split; those that speak of none belong to train."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(split_of(re.split(r"[/\\]", name)[-1]) or "train", []).append(name)
    return groups


def evaluation_splits(splits: Sequence[str]) -> list[str]:
    """Return those of the splits that are to evaluate on, the first choice first."""
    return [split for name in EVALUATION for split in splits if name in (split, split_of(split))]


def choose_split(splits: Sequence[str], config: DataConfig, *, training: bool) -> str:
    """Return the split a config asks for, as the source calls it.

    Raises:
        ValueError: if the source has no such split, or none to evaluate on.
    """
    names = ", ".join(splits)
    wanted = config.training_split if training else config.evaluation_split
    if wanted is None:
        found = evaluation_splits(splits)
        if not found:
            rule = f"the data have no split to evaluate on (splits: {names})"
            remedy = f"pass evaluation_split={splits[0]!r} to evaluate on that, or holdout=0.1 to hold some out"
            raise invalid("evaluation_split", None, rule, remedy)
        return found[0]
    if wanted in splits:
        return wanted
    alike = [split for split in splits if split_of(wanted) in (split, split_of(split))]
    if wanted.lower() not in itertools.chain(*WORDS.values()) or not alike:
        argument = "training_split" if training else "evaluation_split"
        raise invalid(argument, wanted, "the data have no such split", f"choose one of {names}")
    return alike[0]


# --- where a table keeps images and labels -------------------------------------------------------------------------


class Columns(NamedTuple):
    """Where a table keeps what we need."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    """As the table declares them; of truth values these are both, False and True."""


LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")


def find_columns(features: Any, config: DataConfig) -> Columns:
    """Find the images and labels of a table.

    Args:
        features: of a Hugging Face data set, by column; None where it knows none.
        config: whose ``image_column`` and ``label_column`` go first.

    Raises:
        ValueError: if there is no such column, or more than a guess would be needed.
    """
    datasets = require("datasets", "a data source")
    features = features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images and "image" in features and _holds_bytes(features["image"]):
        images = ["image"]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    classes += [name for name in LABEL_COLUMNS if name in features and name not in classes]
    image = _choose_column("image_column", config.image_column, images, features)
    if not (isinstance(features[image], datasets.Image) or _holds_bytes(features[image])):
        rule = "the column holds no encoded images"
        raise invalid("image_column", image, rule, "name one of bytes, or of {bytes, path} as datasets writes it")
    label = _choose_column("label_column", config.label_column, [name for name in classes if name != image], features)
    names = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
    if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
        rule = f"the names of its classes are no words ({quoted(names)})"
        raise invalid("label_column", label, rule, "mend the features of the files, or name another column")
    if getattr(features[label], "dtype", None) == "bool":
        names = ("False", "True")  # which are the numbers 0 and 1
    return Columns(image, label, tuple(names) if names else None)


def _choose_column(argument: str, wanted: str | None, candidates: Sequence[str], features: Any) -> str:
    if wanted is not None and wanted not in features:
        raise invalid(argument, wanted, "the data have no such column", suggestion(wanted, features))
    if wanted is None and not candidates:
        known = ", ".join(features) or "none"
        kind = "images" if argument == "image_column" else "labels"
        rule = f"no column is seen to hold {kind} (columns: {known})"
        raise invalid(argument, None, rule, f"pass {argument}, or other data")
    return candidates[0] if wanted is None else wanted


def _holds_bytes(feature: Any) -> bool:
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", None) in ("binary", "large_binary")
