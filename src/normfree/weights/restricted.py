"""Pickles read as data: nothing in the file is ever imported, looked up or called.

The official weights are dill pickles, and unpickling calls whatever the file names. There are three barriers, one
behind another: only the opcodes that numpy arrays in plain containers need may occur; every name the file mentions
is looked up in a table of stand-ins, never imported; the stand-ins are inert objects of this file, which turn bytes
and shapes into arrays themselves.

Source: the formats are those of Python's pickle (PEP 307, 3154, 574), numpy's ``ndarray.__reduce__`` and dill.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from normfree.common.checks import invalid
from normfree.common.files import check_file
from normfree.common.text import printable, quoted

# What Pickler writes, at protocols 2 to 5, for arrays in dicts, lists and tuples. Absent: INST, OBJ, NEWOBJ and
# NEWOBJ_EX, which make instances; EXT*, whose cached objects come without a look-up; persistent ids; sets;
# out-of-band buffers; and protocol 0.
_OPCODES = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE"),
        *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    ]
)
_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_DEPTH = 16
_LETTERS = 160
_REMEDY = "pass a file the authors published, or a mapping {module path: {name: array}}"


class _Refused(Exception):
    """Something in the file is none of what it may hold."""


class _StandIn:
    """What the file gets for a name it mentions; ``call`` says what calling it with positional arguments makes."""

    __slots__ = ("_call", "_name")

    def __init__(self, name: str, call: Callable[..., Any] | None = None) -> None:
        self._name = name
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise _Refused(f"calls {self._name}")
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"sets the state of {self._name}")


class _DType:
    """A dtype as it is pickled: its code, then its byte order by BUILD."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if code not in _DTYPES:
            raise _Refused(f"has an array of dtype {quoted(code)}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        plain = isinstance(state, tuple) and len(state) == 8 and state[0] == 3 and state[1] in ("<", ">", "|", "=")
        if not plain or state[2:] != (None, None, None, -1, -1, 0):
            raise _Refused("has a dtype with fields, a subarray, flags or metadata")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array as it is pickled: empty, then its content by BUILD."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
            raise _Refused("has an array whose state is not (1, shape, dtype, order, bytes)")
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        """Take ``data`` as the content, once it is certain that it is exactly that."""
        if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
            raise _Refused("has an array of objects, or of a dtype or order that is none")
        if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise _Refused(f"has an array of shape {quoted(shape)}")
        claimed = math.prod(shape) * dtype.dtype.itemsize
        if claimed != len(data):
            raise _Refused(f"claims an array of shape {shape!r}, which is {claimed} bytes, and brings {len(data)}")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
        return self


class _Module:
    """A module as dill pickles it: its name."""

    __slots__ = ("name",)

    def __init__(self, name: Any, safe: Any = False) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"sets the state of the module {self.name}")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("reconstructs something that is not a numpy array")
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> _Array:
    return _Array().fill(data, dtype, shape, order)


def _create_array(function: Any, arguments: Any, state: Any, attributes: Any = None) -> _Array:
    if function is not _RECONSTRUCT or not isinstance(arguments, tuple) or attributes:
        raise _Refused("creates an array in a way numpy does not")
    array = _reconstruct(*arguments)
    array.__setstate__(state)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("encodes something else than bytes")
    return text.encode("latin1")


def _mapping(content: Any = None) -> dict[Any, Any]:
    if not isinstance(content, (dict, type(None))):
        raise _Refused("makes a mapping of something that is none")
    return dict(content or {})


def _get_attribute(module: Any, name: Any) -> _StandIn:
    if not isinstance(module, _Module):
        raise _Refused("takes an attribute of something that is no module")
    return _find(module.name, name)


_NDARRAY = _StandIn("numpy.ndarray")
_RECONSTRUCT = _StandIn("numpy _reconstruct", _reconstruct)
_SCALAR = _StandIn("numpy scalar", lambda dtype, data: _Array().fill(data, dtype, (), "C"))
_FROMBUFFER = _StandIn("numpy _frombuffer", _frombuffer)
_MAPPING = _StandIn("a mapping", _mapping)

# numpy's modules before and after version 2, and as dill (which asks a function for its module) sees them.
_CORES = ("numpy.core", "numpy._core")
_MULTIARRAY = tuple(f"{core}.{name}" for core in _CORES for name in ("multiarray", "_multiarray_umath"))
_KNOWN: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn("numpy.dtype", _DType),
    **{(module, "_reconstruct"): _RECONSTRUCT for module in _MULTIARRAY},
    **{(module, "scalar"): _SCALAR for module in _MULTIARRAY},
    **{(f"{core}.numeric", "_frombuffer"): _FROMBUFFER for core in _CORES},
    ("_codecs", "encode"): _StandIn("_codecs.encode", _encode),
    ("collections", "OrderedDict"): _MAPPING,
    **{("haiku._src.data_structures", name): _MAPPING for name in ("FlatMapping", "FlatMap", "frozendict")},
    ("dill._dill", "_import_module"): _StandIn("dill _import_module", _Module),
    ("dill._dill", "_get_attr"): _StandIn("dill _get_attr", _get_attribute),
    ("dill._dill", "_create_array"): _StandIn("dill _create_array", _create_array),
}


def _find(module: Any, name: Any) -> _StandIn:
    if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _KNOWN:
        raise _Refused(f"names {quoted(module)[1:-1]}.{quoted(name)[1:-1]}")
    return _KNOWN[module, name]


_PYTHONS: Any = pickle._Unpickler  # type: ignore[attr-defined] - the one written in Python


class _Unpickler(_PYTHONS):
    """Python's unpickler, written in Python, with every way out closed.

    Keys of dicts are looked at before they are hashed: tuples that share tuples are hashed in time exponential in their
    depth.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PYTHONS.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("has a persistent id")

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if not isinstance(key, (str, bytes, int, float, type(None))):
            raise _Refused(f"has a key of type {type(key).__name__.lstrip('_')}")


def _check_opcodes(content: bytes) -> None:
    """Raise unless the pickle is whole and made of allowed opcodes alone."""
    if content[:1] != b"\x80":
        raise _Refused("is no pickle of protocol 2 to 5")
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        if opcode.name not in _OPCODES:
            raise _Refused(f"has the opcode {opcode.name}")
        if opcode.name == "FRAME" and int(argument or 0) > len(content):
            raise ValueError(f"a frame of {argument} bytes in a file of {len(content)}")
        # The unpickler makes room for as many entries as the highest number given to one.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise _Refused(f"puts entry {argument} into a memo of at most {count}")


def _plain(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """Return the value with arrays for what stands for them; ``done`` keeps shared parts shared."""
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    if value is None or isinstance(value, (str, int, float, bytes, bytearray)):
        return value
    if not isinstance(value, (dict, list, tuple)):
        raise _Refused(f"holds a bare {type(value).__name__.lstrip('_')}")
    if depth == 0:
        raise _Refused(f"is nested deeper than {_DEPTH}")
    if id(value) not in done:
        if isinstance(value, dict):
            entries = {_plain(key, 0, done): _plain(entry, depth - 1, done) for key, entry in value.items()}
        else:
            entries = [_plain(entry, depth - 1, done) for entry in value]
        done[id(value)] = tuple(entries) if isinstance(value, tuple) else entries
    return done[id(value)]


def read_pickle(path: str | Path) -> Any:
    """Read a pickle of numeric numpy arrays in plain containers, whatever its author intended.

    Args:
        path: a pickle or dill file of protocol 2 to 5.

    Returns:
        What the file holds: dicts (Haiku's immutable mappings too), lists, tuples, strings, bytes, numbers, and
        arrays of numbers, which are read-only.

    Raises:
        ValueError: no such file; not such a pickle, damaged, or with anything else in it. Nothing has been
            imported or called then, either.
    """
    path = check_file(path, "source", _REMEDY)
    try:
        content = path.read_bytes()
        _check_opcodes(content)
        return _plain(_Unpickler(io.BytesIO(content)).load(), _DEPTH, {})
    except Exception as error:  # a malformed pickle raises anything at all
        raise invalid("source", str(path), f"refused, because it {_reason(error)}", _REMEDY) from error


def _reason(error: Exception) -> str:
    """Return one printable line; the file may have chosen part of it."""
    text = printable(str(error)[:_LETTERS])
    return text if isinstance(error, _Refused) else f"is no sound pickle ({type(error).__name__}: {text})"
