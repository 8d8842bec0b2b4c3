"""The authors' published weights into our models.

*Pickles are read as data*: nothing in the file is ever imported, looked up or called.

The official weights are dill pickles, and unpickling calls whatever the file names. There are three barriers, one
behind another: only the opcodes that numpy arrays in plain containers need may occur; every name the file mentions
is looked up in a table of stand-ins, never imported; the stand-ins are inert objects of this file, which turn bytes
and shapes into arrays themselves.

Source: the formats are those of Python's pickle (PEP 307, 3154, 574), numpy's ``ndarray.__reduce__`` and dill.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.common.files import check_file, kind_of
from normfree.common.pickles import PlainKeysUnpickler
from normfree.common.text import first_line, printable, quoted
from normfree.models import (
    Backbone,
    BNRegNet,
    FixUpResNet,
    NFNet,
    NFRegNet,
    NFResNet,
    ResNet,
    ResNetV2,
    SkipInitResNet,
)
from normfree.nn import PaddedConv2d, ScaledWSConv2d
from normfree.weights.checkpoint import check_names, check_shapes, copy_in

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


class _Unpickler(PlainKeysUnpickler):
    """Python's unpickler, with every way out closed."""

    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("has a persistent id")

    def refusal(self, rule: str) -> Exception:
        return _Refused(rule)


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


Model = TypeVar("Model", bound=nn.Module)
Tree = Mapping[str, Mapping[str, Any]]

_FORM = "pass {module path: {name: array}}, such as {'NFNet/~/linear': {'w': ..., 'b': ...}}"
_PARTS = ("params", "state")
_NUMBERS = "fiub"


def load_haiku_weights(model: Model, source: str | Path | Tree) -> Model:
    """Copy official weights into a model of the same family and sizes.

    Kernels are turned from [height, width, in, out] to [out, in, height, width], linear layers from [in, out] to
    [out, in]. Every array is used once and every parameter is filled; when anything is wrong, the model is left
    as it was.

    Args:
        model: a model of ``create_model``; the official networks have ``padding="same"``.
        source: a published file (a dill pickle, whatever its name ends in; read as data, nothing in it is run);
            an ``.npz`` that ``np.savez`` wrote, with keys ``params/<module path>/<name>`` and, for running
            statistics, ``state/...`` (other keys are none of ours); or ``{module path: {name: array}}``, also as
            ``{"params": ..., "state": ...}``. Running statistics may be absent: the model's then stay.

    Returns:
        The model.

    Raises:
        ValueError: not a model of ours; a file that is neither, or that holds anything but arrays; arrays that
            are missing, left over, or of another shape.

    Warns:
        UserWarning: the model pads symmetrically, which changes the logits by 0.04 to 0.9.

    Source: the names are those of the authors' public definitions; see below in this file.
    """
    names = haiku_names(model)
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    arrays = _arrays(source, 2 * 8 * numbers + 2**20)  # of float64, with a header each, and others that are left over
    statistics = names.statistics if any(name in arrays for name in names.statistics.values()) else {}
    counters = {ours: name for ours, name in names.counters.items() if name in arrays}
    wanted = {**names.parameters, **statistics, **counters}
    given = [name for name in arrays if name not in names.without_counterpart]
    title = getattr(model, "name", "") or type(model).__name__
    check_names("source", title, wanted.values(), given, "build the model the weights are of, with its overrides")
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {ours: _tensor(name, arrays[name], targets[ours]) for ours, name in wanted.items()}
    remedy = "build the model with the weights' num_classes, in_channels, width and se_ratio"
    check_shapes("source", targets, values, wanted, remedy)
    copy_in(targets, values)
    if any(isinstance(part, PaddedConv2d) and part.padding_style == "symmetric" for part in model.modules()):
        message = "official weights are made for padding='same'; this model pads symmetrically, so its logits differ"
        warnings.warn(message, stacklevel=2)
    return model


def _arrays(source: str | Path | Tree, bound: int) -> dict[str, np.ndarray]:
    """Return the arrays of a file or mapping by their official names, ``<module path>/<name>``.

    Args:
        source: as of :func:`load_haiku_weights`.
        bound: bytes that an archive may have when unpacked.
    """
    if isinstance(source, (str, Path)):
        source = _read_npz(Path(source), bound) if _is_archive(Path(source)) else read_pickle(source)
    if not isinstance(source, Mapping):
        raise invalid("source", type(source).__name__, "is neither a file nor a mapping", _FORM)
    arrays: dict[str, np.ndarray] = {}
    for tree in source.values() if source and set(source) <= set(_PARTS) else (source,):
        for path, tensors in tree.items() if isinstance(tree, Mapping) else [(None, tree)]:
            if not isinstance(path, str) or not isinstance(tensors, Mapping):
                raise invalid("source", path, "is no module path with its arrays", _FORM)
            for name, value in tensors.items():
                if f"{path}/{name}" in arrays:
                    raise invalid("source", f"{path}/{name}", "comes twice", "leave one out")
                arrays[f"{path}/{name}"] = _array(f"{path}/{name}", value)
    return arrays


def _is_archive(path: Path) -> bool:
    """Tell a zip file, as ``np.savez`` writes, by its beginning; the published ``.npz`` files are none."""
    if kind_of(path) != "file":
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_npz(path: Path, bound: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the tree in an archive of numpy's of so many bytes at most when unpacked; never unpickles."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                part, _, rest = entry.filename.removesuffix(".npy").partition("/")
                if part in _PARTS:
                    module, _, name = rest.rpartition("/")
                    bound -= entry.file_size
                    if bound < 0:
                        raise ValueError(f"its arrays take {entry.file_size:,} bytes and more, the model's far fewer")
                    tree.setdefault(module, {})[name] = _read_npy(archive, entry)
    except Exception as error:  # zip, zlib and numpy raise ten kinds of their own
        rule = f"is no sound archive of arrays ({first_line(error)})"
        raise invalid("source", str(path), rule, "write it again") from error
    if not tree:
        remedy = "name the arrays params/<module path>/<name>"
        raise invalid("source", str(path), "has no array whose name begins with params/", remedy)
    return tree


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """Return an array whose bytes are as many as its header says: no memory is taken for what is not there.

    Raises:
        ValueError: they are more or fewer, or no numbers.
    """
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} has version {version} of numpy's format")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject or dtype.kind not in _NUMBERS:
            raise ValueError(f"{entry.filename} has dtype {dtype}")
        content = file.read()
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != len(content):
        raise ValueError(f"{entry.filename} claims {claimed:,} bytes and holds {len(content):,}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
        if array.dtype.name == "bfloat16":  # JAX's, which numpy itself does not know as a number
            array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise invalid("source", name, f"is no array but {type(value).__name__}", _FORM) from error
    if array.dtype.kind not in _NUMBERS:
        raise invalid("source", name, f"has dtype {array.dtype}, which is no real number", "pass arrays of numbers")
    return array


def _tensor(name: str, array: np.ndarray, target: Tensor) -> Tensor:
    """Return an array as a tensor in PyTorch's layout, in a type that keeps all the target can take."""
    if array.ndim == 4 and name.endswith("/w"):
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 4 and array.shape[:3] == (1, 1, 1):  # of a norm: one number per channel
        array = array.reshape(-1)
    elif array.ndim == 2:
        array = array.T
    kind = np.float32 if target.is_floating_point() else np.int64
    kind = np.float64 if target.dtype == torch.float64 else kind
    return torch.from_numpy(np.array(array, dtype=kind, order="C"))


# The official names follow. A name is ``<module path>/<name>``. Blocks are numbered over the whole network, without a
# suffix on the first; what a block makes in its constructor is under ``<block>/~/``, what it makes while it runs under
# ``<block>/``. BatchNorm keeps its running statistics apart, as two exponential moving averages. Source: the authors'
# public definitions (deepmind-research, folder nfnets), for the names alone. There is no official BN-RegNet: its names
# here are those its official sisters would give it.

# The network's module, its blocks' and, per block, the learnable factor of the branch; per family.
_FAMILIES: dict[type[Backbone], tuple[str, str, str]] = {
    NFResNet: ("NF_ResNet", "nf_res_block", "skip_gain"),
    NFRegNet: ("NF_RegNet", "nf_block", "skip_gain"),
    NFNet: ("NFNet", "nf_block", "skip_gain"),
    SkipInitResNet: ("SkipInit_ResNet", "nf_res_block", "skip_gain"),
    FixUpResNet: ("FixUp_ResNet", "res_block", "scale"),
    ResNet: ("ResNet", "res_block_v1", ""),
    ResNetV2: ("ResNet", "res_block_v2", ""),
    BNRegNet: ("BN_RegNet", "block", ""),
}

# Our modules outside the blocks, relative to the network.
_OUTSIDE: dict[str, str] = {
    "stem.conv": "~/initial_conv",
    "stem.norm": "~/initial_bn",
    **{f"stem.conv{index}": f"~/stem_conv{index}" for index in range(4)},
    "final.conv": "~/final_conv",
    "final.norm": "~/final_bn",
    "classifier": "~/linear",
}

# Our modules inside a block, relative to it.
_INSIDE: dict[str, str] = {
    **{name: f"~/{name}" for name in ("conv0", "conv1", "conv1b", "conv2")},
    **{f"conv{index}.conv": f"~/conv{index}" for index in range(3)},
    **{f"{norm}{index}{end}": f"~/bn{index}" for norm, end in (("pre", ".norm"), ("norm", "")) for index in range(3)},
    **{f"conv{index}.norm": f"~/bn{index}" for index in range(3)},
    "shortcut": "~/conv_shortcut",
    "shortcut.conv": "~/conv_shortcut",
    "shortcut.norm": "shortcut_bn",
    "squeeze_excite.linear0": "~/squeeze_excite/~/linear",
    "squeeze_excite.linear1": "~/squeeze_excite/~/linear_1",
}

# Scalars, which belong to the block or the network itself; relative to it, our name with its module's.
_SCALARS: dict[str, str] = {
    "bias0.bias": "bias1a",
    "bias1.bias": "bias1b",
    "bias2.bias": "bias2a",
    "bias3.bias": "bias2b",
    "bias4.bias": "bias3a",
    "bias5.bias": "bias3b",
    "stem.bias.bias": "bias1",
    "classifier_bias.bias": "bias2",
}

_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
_STATISTICS = {"running_mean": "~/mean_ema/average", "running_var": "~/var_ema/average"}
_COUNTER = {"num_batches_tracked": "~/mean_ema/counter"}
_WITHOUT_COUNTERPART = ("~/mean_ema/hidden", "~/var_ema/hidden", "~/var_ema/counter")


@dataclass(frozen=True, kw_only=True)
class HaikuNames:
    """Official names by our names.

    Attributes:
        parameters: of every parameter.
        statistics: of the running means and variances.
        counters: of the numbers of batches these have seen.
        without_counterpart: official state that follows from the rest.
    """

    parameters: dict[str, str]
    statistics: dict[str, str]
    counters: dict[str, str]
    without_counterpart: frozenset[str]


def haiku_names(model: nn.Module) -> HaikuNames:
    """Return the official name of each tensor of a model.

    Args:
        model: a model of ``create_model``.

    Raises:
        ValueError: the model is of none of our families, or has a tensor that none of them has.

    Source: as above.
    """
    network, block, factor = _family(model)
    owners = dict(model.named_modules())
    blocks = [name for name in owners if re.fullmatch(r"stages\.\d+\.\d+", name)]
    scopes = {name: f"{network}/~/{block}" + (f"_{index}" if index else "") for index, name in enumerate(blocks)}

    def official(name: str) -> str:
        scope, path, local = network, _OUTSIDE, name
        parts = name.split(".")
        if parts[0] == "stages":
            scope, path, local = scopes[".".join(parts[:3])], _INSIDE, ".".join(parts[3:])
        if local in _SCALARS:
            return f"{scope}/{_SCALARS[local]}"
        module, _, leaf = local.rpartition(".")
        if leaf == "skip_gain":
            return f"{scope}/{factor}"
        owner = owners[name.rpartition(".")[0]]
        if module not in path or leaf not in _leaves(owner):
            raise invalid("model", name, f"{network} has no such tensor", "pass the model as create_model built it")
        return f"{scope}/{path[module]}/{_leaves(owner)[leaf]}"

    buffers = [name for name, _ in model.named_buffers()]
    norms = {official(name).removesuffix(_STATISTICS["running_mean"]) for name in buffers if "running_mean" in name}
    return HaikuNames(
        parameters={name: official(name) for name, _ in model.named_parameters()},
        statistics={name: official(name) for name in buffers if name.rpartition(".")[2] in _STATISTICS},
        counters={name: official(name) for name in buffers if name.rpartition(".")[2] in _COUNTER},
        without_counterpart=frozenset(norm + end for norm in norms for end in _WITHOUT_COUNTERPART),
    )


def _family(model: nn.Module) -> tuple[str, str, str]:
    for kind in type(model).__mro__:
        if kind in _FAMILIES:
            return _FAMILIES[kind]
    families = ", ".join(family.__name__ for family in _FAMILIES)
    raise invalid("model", type(model).__name__, "has no official counterpart", f"pass one of {families}, unwrapped")


def _leaves(owner: nn.Module) -> dict[str, str]:
    """Return the official names of a module's own tensors."""
    if isinstance(owner, _NORMS):
        return {"weight": "scale", "bias": "offset", **_STATISTICS, **_COUNTER}
    if isinstance(owner, ScaledWSConv2d):
        return {"weight": "w", "bias": "bias", "gain": "gain"}
    return {"weight": "w", "bias": "b"}
