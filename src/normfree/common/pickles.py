"""What a pickle of somebody else would build, found without building it: all that it names has a stand-in.

PyTorch's loader for tensors alone runs nothing, but takes all the time and memory that a few bytes ask for: hashing a
key of tuples that share tuples takes time exponential in their depth, and ``bytearray(n)`` allocates n bytes.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from normfree.common.files import ARCHIVE

DEEPEST = 64
"""Containers in containers in a file of ``torch.save`` at most; an optimizer's state has seven."""

MOST_VALUES = 10**7
"""Values in it at most, counted as often as they are met on the way from the outermost container."""

SMALL_KEY, MOST_LARGE_KEYS = 2**24, 10_000
"""A whole number below the first is no large key, and so many are in a file at most; optimizers of versions before 1.6
have one for each parameter. More could be chosen so that they fall on one place in a dict: n take time in n²."""

_TENSOR = re.compile(r"torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)")
_CALLED = re.compile(
    rf"{_TENSOR.pattern}|torch\._tensor\._rebuild_from_type_v2|torch\.(Size|device)|_codecs\.encode"
    r"|collections\.(OrderedDict|Counter)|argparse\.Namespace"
)
"""What may be called: what makes tensors of stored numbers, and plain containers; none makes more than it is given."""

_PYTHONS: Any = pickle._Unpickler  # type: ignore[attr-defined] - the one written in Python


class PlainKeysUnpickler(_PYTHONS):
    """Python's unpickler, written in Python, which looks at the keys of dicts and sets before they are hashed.

    Args:
        file: to read from.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PYTHONS.dispatch)
    large_keys = 0

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raise for a key that is no text or number, and for too many large numbers."""
        __tracebackhide__ = True
        for key in keys:
            if not isinstance(key, (str, bytes, int, float, type(None))):
                raise self.refusal(f"has a key of type {type(key).__name__.lstrip('_')}")
            if isinstance(key, float) or (isinstance(key, int) and abs(key) >= SMALL_KEY):
                self.large_keys += 1
        if self.large_keys > MOST_LARGE_KEYS:
            raise self.refusal(f"has more than {MOST_LARGE_KEYS:,} large numbers as keys")

    def refusal(self, rule: str) -> Exception:
        """Return (not raise) the error about the file."""
        return ValueError(f"it {rule}")

    def load_setitem(self) -> None:
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        self.check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        self.check_keys(self.stack)
        super().load_frozenset()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset


class _Made:
    """What a call would return, and all that it is given later."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)


class _MadeDict(_Made):
    """The same of a dict: of nothing else are items set, for in a tensor that would write numbers."""

    def __setitem__(self, key: Any, item: Any) -> None:
        self.parts += [key, item]


class _Named:
    """A class or function that the file names; nothing is imported."""

    def __init__(self, name: str, reader: PlainKeysUnpickler) -> None:
        self.name, self.reader = name, reader

    def __call__(self, *arguments: Any) -> _Made:
        if not _CALLED.fullmatch(self.name):
            raise pickle.UnpicklingError(f"it calls GLOBAL {self.name}")  # as torch's own error names it
        if self.name.startswith("collections."):
            for items in arguments:
                self.check_items(items)
            return _MadeDict(list(arguments))
        if self.name == "_codecs.encode" and arguments[1:] != ("latin1",):  # as bytes are; others may take any time
            raise self.reader.refusal("encodes text otherwise than bytes are written")
        if self.name.endswith("_rebuild_from_type_v2"):
            function, _, given = arguments[:3]
            if not (isinstance(function, _Named) and _TENSOR.fullmatch(function.name)):
                raise self.reader.refusal("makes a tensor by what makes none")
            function(*given)
        return _Made(list(arguments))

    def check_items(self, items: Any) -> None:
        """Raise for keys of which a dict is made at once, and which have not been looked at."""
        __tracebackhide__ = True
        if isinstance(items, list) and self.name == "collections.OrderedDict":  # of pairs, as Python 2 wrote it
            self.reader.check_keys(key for key, _ in items)
        elif not isinstance(items, dict):
            raise self.reader.refusal(f"makes {self.name} of no container")


class _OfTensors(PlainKeysUnpickler):
    """Reads what ``torch.save`` writes."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(PlainKeysUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> _Named:
        return _Named(f"{module}.{name}", self)

    def persistent_load(self, pid: Any) -> _Made:
        return _Made([pid])  # the numbers of a tensor, which are beside the pickle

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.append(self.stack.pop()(*arguments))

    dispatch[pickle.NEWOBJ[0]] = load_newobj


def check_torch_file(path: str | Path) -> None:
    """Raise unless a file of ``torch.save`` is of tensors in plain containers, as large as it says and no larger.

    Args:
        path: a regular file.

    Raises:
        pickle.UnpicklingError: it calls something else, which the message names after ``GLOBAL``.
        Exception: it is damaged, of almost any kind.
    """
    __tracebackhide__ = True
    with open(path, "rb") as file:
        block = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        if not block.startswith(ARCHIVE):
            if _is_tar(block):
                raise ValueError("it is a tar archive, which torch.save does not write")
            for _ in range(5):  # of versions before 1.6: four pickles, of which the last is the content, and a fifth
                _check(file)
            return
    reader = torch._C.PyTorchFileReader(str(path))  # torch's own, for another may find other members in the same file
    names = reader.get_all_records()
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in entries):
        raise ValueError("it is a compressed archive, which torch.save does not write")
    if sum(one.file_size for one in entries) > Path(path).stat().st_size:
        raise ValueError("its parts are larger than the archive")
    if sorted(one.filename.partition("/")[2] for one in entries) != sorted(names):
        raise ValueError("its table of contents can be read in two ways")
    if len({name.lower() for name in names}) < len(names):  # torch finds a member by its name in any case
        raise ValueError("it has members whose names differ in nothing but case")
    _check(io.BytesIO(reader.get_record("data.pkl")))


def _is_tar(block: bytes) -> bool:
    """Whether PyTorch would open the file that begins so as an archive of tar, which it tries before a pickle."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _check(file: BinaryIO) -> None:
    _extent(_OfTensors(file).load(), 0, {})


def _extent(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values are met on the way through one, and how deep they lie; raises for too many, and for a circle."""
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, _Made)):
        parts = value.parts if isinstance(value, _Made) else list(value)
    else:
        return 1, 0
    count, height = known.get(id(value), (0, 0))
    if not count:
        known[id(value)] = 1, DEEPEST  # which one in itself is too deep for
        count = 1
        for part in parts if depth < DEEPEST else ():
            one, inner = _extent(part, depth + 1, known)
            count, height = count + one, max(height, inner + 1)
        known[id(value)] = count, height
    if depth + height >= DEEPEST or count > MOST_VALUES:
        raise ValueError(f"it holds containers in containers, more than {DEEPEST} deep or {MOST_VALUES:,} in all")
    return count, height
