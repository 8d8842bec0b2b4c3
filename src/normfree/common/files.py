"""Files that are either whole or not there, and what is read from them in bounded time: JSON, YAML, safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from normfree.common.checks import invalid, require
from normfree.common.text import LONGEST, all_lines, first_line, quoted, shortened

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file so that no reader, and no crash, ever sees half of it.

    The content goes to a temporary file in the same folder, is flushed to disk and renamed. A symbolic link stays, and
    the file it leads to is replaced. Temporary files that killed processes have left beside it are removed.

    Args:
        path: where to write; missing parent folders are made.
        content: text (UTF-8) or bytes.

    Returns:
        The path.

    Raises:
        OSError: naming the path, such as of a full disk.
        ValueError: the path is that of a folder, a device or a named pipe.
    """
    target = Path(os.path.realpath(path))
    if (kind := kind_of(target)) not in ("file", "nothing"):
        raise refused("path", path, f"is {kind}, no file", "give another path")
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content  # of half a character
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent, target.name)
        try:
            with open(temporary, "xb") as file:  # of the permissions that the process's umask leaves
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise file_error(error, path) from error
    return Path(path)


def check_place(argument: str, path: str | Path, *, folder: bool = False) -> None:
    """Refuse a file or folder that could not be written, before any work is done; nothing is made yet.

    Args:
        argument: that names it.
        path: of the file, or of the folder.
        folder: whether it is a folder.

    Raises:
        ValueError: naming the path, and what stands in the way: no folder, a device, no permission, no such name.
    """
    __tracebackhide__ = True
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
        place = Path(os.path.abspath(path))
        if not folder and (kind := kind_of(os.path.realpath(place))) not in ("file", "nothing"):
            raise refused(argument, path, f"is {kind}, no file", "give another path")
        place = place if folder else Path(os.path.realpath(place)).parent
        existing = next(one for one in (place, *place.parents) if os.path.lexists(one))
    except OSError as error:  # a name that is too long, a working folder that was removed
        raise refused(argument, path, f"is no place ({error.strerror})", "give another") from error
    if not existing.is_dir():
        what = "no folder" if not existing.is_file() else "a file" if folder else "a file, not a folder"
        raise refused(
            argument, path, f"{str(existing)!r} is {what}", "give a folder" if folder else "give another place"
        )
    if existing.is_relative_to("/proc") or not os.access(existing, os.W_OK | os.X_OK):
        raise refused(argument, path, f"{str(existing)!r} cannot be written to", "give another place")


def file_error(error: OSError, path: str | Path) -> OSError:
    """Return an error of writing as one that names the file that was to be written, in place of a part of it."""
    rule = "could not be written: "
    return type(error)(error.errno, rule + (error.strerror or first_line(error)).removeprefix(rule), str(path))


def temporary_path(path: Path) -> Path:
    """Return a new name beside a path, for a file or folder of this process that will be renamed to it."""
    return path.with_name(f".{_short(path.name)}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_stale(folder: Path, name: str | None = None, *, locked: bool = False) -> None:
    """Remove the temporary files and folders that processes have left in a folder and that are dead.

    Args:
        folder: where to look.
        name: of the file that was to be written; any by default.
        locked: whether the folder is this process's alone, so that all that is there is stale, of other machines too.
    """
    for path in folder.glob(f".{'*' if name is None else glob.escape(_short(name))}.*-*.tmp"):
        match = re.fullmatch(r"\..+\.(\w+)-(\d+)-[0-9a-f]{8}\.tmp", path.name)
        if match is None or not (locked or (match[1] == _machine() and not _is_alive(int(match[2])))):
            continue
        with contextlib.suppress(OSError):
            remove_all(path)


def remove_all(path: Path) -> None:
    """Remove a folder with what it holds, or a file; of a link the link, and not what it leads to.

    Raises:
        OSError: naming it, where it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"could not be removed: {error.strerror or first_line(error)}", str(path)
        ) from error


def _short(name: str) -> str:
    """The beginning of a name, which leaves room for what follows in the 255 bytes of a file's."""
    return os.fsencode(name)[:100].decode(errors="ignore")


def _machine() -> str:
    """What tells the machine, or the container, apart by whose numbers of processes go."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        processes = ""
    return hashlib.blake2b(f"{platform.node()} {processes}".encode(), digest_size=4).hexdigest()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


Dataclass = TypeVar("Dataclass")

JSON_BYTES = 2**28
"""Bytes of JSON that are read at most: a signal history of 1,000 records of 1,000 blocks has about 2**28."""

LARGEST_FLOAT = sys.float_info.max

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def refused(argument: str, path: str | Path, rule: str, remedy: str) -> ValueError:
    """Return (not raise) the error about a file."""
    return ValueError(shortened(f"{argument}={quoted(str(path))}: {rule}; {remedy}"))


def kind_of(path: str | Path) -> str:
    """Return what a path leads to: "file", "nothing", or in words what else."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError, TypeError):  # the latter two: a NUL in the name, no path at all
        return "nothing"
    return "file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def check_file(path: str | Path, argument: str = "path", remedy: str = "give a file") -> Path:
    """Return the path of a regular file; opening anything else could wait for ever.

    Raises:
        ValueError: there is no such file, or it is a folder, named pipe, device or socket.
    """
    __tracebackhide__ = True
    kind = kind_of(path)
    if kind != "file":
        raise refused(argument, path, "is no file" if kind == "nothing" else f"is {kind}, no file", remedy)
    return Path(path)


def walk(folder: str | Path, argument: str = "path") -> Iterator[Path]:
    """Yield the files in a folder and in the folders below it, those that links lead to once; hidden ones are left out.

    Args:
        folder: where to begin.
        argument: what named it, for messages.

    Raises:
        ValueError: naming a folder that cannot be read, or a link to a folder that it lies in.
    """

    def raise_named(error: OSError) -> None:
        raise _unreadable(error, argument) from error

    known: set[str] = set()
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder, onerror=raise_named, followlinks=True):
        real = os.path.realpath(place)
        above = (root, os.path.realpath(os.path.dirname(place)))
        if place != str(folder) and os.path.islink(place) and any(Path(one).is_relative_to(real) for one in above):
            raise refused(argument, place, "is a link to a folder that it lies in", "remove it")
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in known)
        if real not in known:
            known.add(real)
            yield from (Path(place, name) for name in files if not name.startswith("."))


def folders_in(folder: Path, argument: str = "path") -> list[Path]:
    """Return the folders in a folder, by name; hidden ones are left out.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError as error:
        raise _unreadable(error, argument) from error


def _unreadable(error: OSError, argument: str) -> ValueError:
    rule = f"cannot be read ({error.strerror})"
    return refused(argument, str(error.filename), rule, "make it readable, or move it elsewhere")


def read_bytes(path: str | Path, argument: str = "path", *, most: int = JSON_BYTES) -> bytes:
    """Return what is in a regular file.

    The file is opened without waiting and looked at again, for another may have taken its place meanwhile.

    Args:
        path: of the file.
        argument: what named it, for messages.
        most: bytes at most.

    Raises:
        ValueError: no regular file, one that is larger, or one that cannot be read.
    """
    check_file(path, argument)
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise refused(argument, path, "is no file", "give a file")
            if status.st_size > most:
                raise refused(argument, path, f"has {status.st_size:,} bytes, more than {most:,}", "give another file")
            return file.read(most + 1)[:most]
    except OSError as error:
        raise refused(argument, path, f"cannot be read ({first_line(error)})", "give a readable file") from error


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: it is none, has a key twice in one object, or is nested deeper than Python follows.
    """
    try:
        return json.loads(text, object_pairs_hook=_of_different_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _of_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that comes twice, readers take one value or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"it has {quoted(Counter(key for key, _ in pairs).most_common(1)[0][0])} twice")
    return found


def read_json(path: str | Path, argument: str = "path", *, most: int = JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: as of :func:`read_bytes`, or it is no JSON object.
    """
    content = read_bytes(path, argument, most=most)
    try:
        document = parse_json(content)
    except ValueError as error:
        rule = f"is no sound JSON file ({first_line(error)})"
        raise refused(argument, path, rule, "give an undamaged copy") from error
    if not isinstance(document, dict):
        raise refused(argument, path, f"holds {type(document).__name__}, no JSON object", "give an undamaged copy")
    return document


def parse_dataclass(kind: type[Dataclass], document: Any, *, finite: bool = True) -> Dataclass:
    """Return a dataclass with the values of a JSON object, each of its field's type.

    Nested dataclasses, tuples, mappings, unions, ``Literal`` and paths are followed. Nothing is converted but integers
    to floats, lists to tuples and strings to paths.

    Args:
        kind: the dataclass.
        document: the object.
        finite: whether numbers have to be.

    Raises:
        ValueError: naming the first field that is missing, unknown or of another type.
    """
    return _instance(kind, document, kind.__name__, finite)


def _instance(kind: type[Dataclass], document: Any, place: str, finite: bool) -> Dataclass:
    if not isinstance(document, Mapping):
        raise ValueError(f"{place}: {quoted(document)} is no {kind.__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    if unknown := [str(name) for name in document if name not in fields]:
        raise ValueError(f"{place}: {shortened(unknown[0], 60)} is no field of {kind.__name__}")
    absent = dataclasses.MISSING
    missing = [name for name, one in fields.items() if one.default is absent and one.default_factory is absent]
    if missing := [name for name in missing if name not in document]:
        raise ValueError(f"{place}: {missing[0]} is missing")
    values = {name: _typed(hints[name], value, f"{place}.{name}", finite) for name, value in document.items()}
    return kind(**values)


def _typed(hint: Any, value: Any, place: str, finite: bool) -> Any:
    """The value as its type has it; the first alternative of a union that takes it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            try:
                return _typed(alternative, value, place, finite)
            except ValueError as error:
                if dataclasses.is_dataclass(alternative) and isinstance(value, Mapping):
                    raise ValueError(first_line(error, LONGEST)) from error
    elif hint is Any:
        return value
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif dataclasses.is_dataclass(hint):
        return _instance(hint, value, place, finite)  # type: ignore[arg-type]
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            return tuple(
                _typed(one, item, f"{place}[{i}]", finite)
                for i, (one, item) in enumerate(zip(kinds, value, strict=True))
            )
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _typed(arguments[1], item, f"{place}.{key}", finite) for key, item in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not finite or abs(value) <= LARGEST_FLOAT:
            return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif (hint in (str, bool, int) and type(value) is hint) or (hint in (None, type(None)) and value is None):
        return value
    raise ValueError(f"{shortened(place, 80)}: {quoted(value)} is no {getattr(hint, '__name__', hint)}")


# --- YAML that somebody else wrote, read in time and memory of the order of its length --------------------------------


MOST_NODES, DEEPEST = 100_000, 64
"""Values in a file, and values in values, at most: PyYAML reads some 50,000 a second."""

LONGEST_NUMBER = 18
"""Characters of a whole number at most: the hash of no two such numbers is the same but a few times."""


def bounded_loader(what: str) -> Any:
    """Return a loader of PyYAML for plain values, whose errors are of its kind, or of any kind of a wrong tag's value.

    It refuses aliases, which may grow without bound; more than so many values, and deeper ones; long whole numbers, of
    which many fall on one place in a dict; and a key that comes twice.

    Args:
        what: is read.

    Raises:
        ImportError: PyYAML is not installed.
    """
    yaml: Any = require("yaml", what)

    class Loader(yaml.SafeLoader):
        """As the function says."""

        nodes = depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*name)")
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.nodes > MOST_NODES or self.depth > DEEPEST:
                raise yaml.YAMLError(f"it has more than {MOST_NODES:,} values, or more than {DEEPEST} in each other")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
                raise yaml.YAMLError(f"it has a number of {len(node.value):,} characters")
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep=deep)
            if len(mapping) < len(node.value):
                keys = Counter(self.construct_object(key) for key, _ in node.value)
                raise yaml.YAMLError(f"it has {keys.most_common(1)[0][0]} twice")
            return mapping

    return Loader


# --- one safetensors file as it is read: a model's tensors, and the notes that say how to build it --------------------


PREPROCESSING = "normfree.preprocessing"
"""The note of how images are prepared and what classes are called: ``normfree.data.config.Preprocessing``."""

FOLDED = "normfree.folded"
"""The note of a model that fold has made plain."""

MOST_NOTE = 2**26
"""Characters of a note that are read at most: the record of a conversion of 100,000 modules."""


MOST_TENSORS = 200_000
"""Tensors of a file at most: a network of 100,000 layers has as many."""


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the text by name that a file is to keep.

    Raises:
        ValueError: it is something else.
    """
    __tracebackhide__ = True
    for name, text in ({} if metadata is None else metadata).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise invalid("metadata", {name: text}, "must be text by name", "write other values as JSON")
    return dict(metadata or {})


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        path: the file.
        argument: what named it, for messages.
        notes: the file's metadata.
        tensors: by the names of the model's state dict.
    """

    path: Path
    argument: str
    notes: Mapping[str, str]
    tensors: dict[str, Tensor]

    @property
    def folded(self) -> bool:
        """Whether the model was a folded one."""
        return FOLDED in self.notes

    def error(self, rule: str, remedy: str) -> ValueError:
        """Return (not raise) the error that says what is wrong with the file."""
        return invalid(self.argument, str(self.path), rule, remedy)


MODEL_OF_WEIGHTS = (
    "load them into a model of your own, or convert it with them, `normfree convert FILE.py:FACTORY --weights FILE "
    "--start pretrained --out model.safetensors`, and give model.safetensors with --original FILE.py:FACTORY"
)
"""What to do with a state dict where a model is asked for."""


def is_safetensors(path: str | Path) -> bool:
    """Tell whether a file begins as safetensors do: the length of a header, and its brace."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


ARCHIVE, PICKLE = b"PK\x03\x04", b"\x80\x02"
"""How files of ``torch.save`` begin, by which PyTorch tells them apart; ``zipfile`` looks at the end of a file."""


def is_of_torch(path: str | Path) -> bool:
    """Tell whether a file begins as those of ``torch.save`` do: an archive, or of versions before 1.6 a pickle."""
    with open(path, "rb") as file:
        return file.read(4).startswith((ARCHIVE, PICKLE))


def notes_of(path: str | Path) -> Mapping[str, str] | None:
    """Return the notes of a safetensors file, from its header alone; None of any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(check_file(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return None


def read(path: str | Path, argument: str = "path") -> Stored:
    """Read a safetensors file.

    Args:
        path: the file.
        argument: what named it, for messages.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    __tracebackhide__ = True
    from safetensors import SafetensorError, safe_open

    kind = kind_of(path)
    if kind == "a folder":
        remedy = "name a file in it, or read a folder of normfree.save_pretrained with normfree.from_pretrained"
        raise invalid(argument, str(path), "is a folder", remedy)
    path = check_file(path, argument, "give one that normfree.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            if any(len(note) > MOST_NOTE for note in notes.values()):
                raise refused(
                    argument, path, f"has a note of more than {MOST_NOTE:,} characters", "give an undamaged one"
                )
            tensors = {name: file.get_tensor(name) for name in _names_in(file, path, argument)}
            return Stored(path, argument, notes, tensors)
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the latter: a dtype torch does not have
        if is_of_torch(path):
            rule = "is a file of torch.save: weights without the model they belong to"
            raise invalid(argument, str(path), rule, MODEL_OF_WEIGHTS) from error
        rule = f"is no sound safetensors file ({all_lines(error)})"
        raise invalid(argument, str(path), rule, "give an undamaged one that normfree.save wrote") from error


def _names_in(file: Any, path: str | Path, argument: str) -> list[str]:
    """The names of the tensors in an open file, unless they are too many."""
    names = file.keys()
    if len(names) > MOST_TENSORS:
        raise refused(argument, path, f"has {len(names):,} tensors, more than {MOST_TENSORS:,}", "give another")
    return names


def sizes(path: str | Path, argument: str = "path") -> tuple[int, int]:
    """Return how many numbers and how many tensors a safetensors file holds, from its header.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(check_file(path, argument), framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in _names_in(file, path, argument)]
    except (SafetensorError, OSError) as error:
        rule = f"is no sound safetensors file ({all_lines(error)})"
        raise invalid(argument, str(path), rule, "give an undamaged one") from error
    return sum(map(math.prod, shapes)), len(shapes)
