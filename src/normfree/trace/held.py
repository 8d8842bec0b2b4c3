"""What a model holds: found by walking from its modules, kept as it is now without a copy of any object, and put back.

A container or an object is kept by what it refers to, in order and by identity; a tensor or an array by its memory, and
by a copy of its numbers. So identities stay: a list that two modules share is still that one list. Put back is only
what has changed, and by the methods of the built-in classes: a ``__setattr__`` of an object's own is not asked.

In the order of this file: tensors, objects and contents as they are kept; the walk; the ways of each class.
"""

from __future__ import annotations

import array
import collections
import functools
import random
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normfree.common.text import quoted
from normfree.common.torch_compat import memory_of

MOST_VALUES = 1_000_000
"""Items of containers and attributes of objects that are looked at, beside the modules' own; the nearest first."""

MOST_BYTES = 2**28
"""Of tensors and arrays that are copied at once, beside parameters and buffers; the smallest first."""


class _Held:
    """A thing, and where it was found: in what (the name of a module, at the beginning), and there by which key.

    A key is the name of an attribute, or a tuple of one: the number or key that a container has it under.
    """

    __slots__ = ("inside", "key", "value")

    def __init__(self, value: Any, inside: _Held | str, key: Any) -> None:
        self.value, self.inside, self.key = value, inside, key

    @property
    def name(self) -> str:
        """The way to it from the model, such as ``blocks.0.cache[1].keys``."""
        keys, place = list[str](), self
        while isinstance(place, _Held):
            key = place.key
            keys.append(f"[{quoted(*key)}]" if isinstance(key, tuple) else f".{key}" if key else "")
            place = place.inside
        return (place + "".join(reversed(keys))).removeprefix(".") or "the model"

    def put_back(self) -> None:
        """Make it what it was."""


class KeptTensor(_Held):
    """A tensor's memory, its place in it, and its gradient; its numbers once :meth:`copy_numbers` has been called.

    Attributes:
        place: where its memory begins; 0 if it has none of its own.
    """

    __slots__ = ("copy", "data", "gradient", "nbytes", "place", "requires_grad", "version")

    def __init__(self, value: Tensor, inside: _Held | str, key: Any = "") -> None:
        super().__init__(value, inside, key)
        self.data = value.data
        self.place, self.nbytes = memory_of(value)
        self.requires_grad = value.requires_grad if value.is_leaf else None
        self.gradient = value.grad if value.is_leaf else None
        self.version = None if value.is_inference() else value._version
        self.copy: Tensor | None = None

    def copy_numbers(self) -> None:
        """Keep the numbers, unless they are kept."""
        if self.copy is None and not self.value.is_meta:
            self.copy = _without_repetition(self.value.detach()).clone()

    def put_back(self) -> None:
        """Restore all of it, and of the numbers what was kept."""
        tensor, data = self.value, self.data
        place, nbytes = memory_of(data)
        moved = self.place and (nbytes < self.nbytes or (nbytes == self.nbytes and place != self.place))
        if self.place and nbytes != self.nbytes:
            data.untyped_storage().resize_(self.nbytes)
        if not _is_at(tensor, data):
            tensor.data = data
        self.write_numbers()
        if self.requires_grad is not None and tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.gradient:
                tensor.grad = self.gradient
        if moved and self.copy is None:  # emptied, which no operation is, and perhaps filled again
            raise ValueError("its memory was given up, and its numbers with it")

    def write_numbers(self) -> None:
        """Restore the numbers alone, if they were kept."""
        if self.copy is None:
            return
        tensor = self.value
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.layout != torch.strided or tensor.is_quantized:  # which cannot be compared
                if self.version is None or tensor._version != self.version:
                    tensor.copy_(self.copy)
                return
            written = _without_repetition(tensor.detach())
            if written.device.type != "cpu" or not _have_equal_bits(written, self.copy):
                written.copy_(self.copy)


def place_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins, whatever view it is; 0 if it has none of its own."""
    return memory_of(tensor)[0]


def _is_at(tensor: Tensor, data: Tensor) -> bool:
    """Whether a tensor is still where its data were: the same memory, sizes, strides and precision."""
    try:
        return tensor.dtype == data.dtype and tensor.is_set_to(data)
    except (RuntimeError, NotImplementedError):  # as above
        return tensor.shape == data.shape


def _without_repetition(tensor: Tensor) -> Tensor:
    """A tensor without what it only repeats (``expand``), which can neither be copied cheaply nor written to."""
    if tensor.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _have_equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits; what has not been changed may lie in memory that cannot be written to."""
    try:
        bits = _BITS.get(one.itemsize)
        return torch.equal(one, other) if bits is None else torch.equal(one.view(bits), other.view(bits))
    except (RuntimeError, NotImplementedError):  # of a few no view is to be had
        return False


class _Object(_Held):
    """An object's class and attributes, those in slots too."""

    __slots__ = ("attributes", "kind", "slots")

    def __init__(self, value: Any, inside: _Held | str, key: Any) -> None:
        super().__init__(value, inside, key)
        self.kind = type(value)
        self.attributes = dict(_attributes_of(value))
        self.slots = [(slot, _slot_of(value, slot)) for slot in _slots_of(self.kind)]

    def put_back(self) -> None:
        if type(self.value) is not self.kind:  # as a lazy module's, once it knows its sizes
            object.__setattr__(self.value, "__class__", self.kind)
        _restore_mapping(dict, _attributes_of(self.value), self.attributes)
        for slot, value in self.slots:
            if (now := _slot_of(self.value, slot)) is value:
                continue
            if value is not _NOTHING:
                slot.__set__(self.value, value)
            elif now is not _NOTHING:
                slot.__delete__(self.value)


def _slots_of(kind: type) -> list[Any]:
    """The slots of a class and its bases."""
    own = [base.__dict__.values() for base in kind.__mro__ if "__slots__" in base.__dict__]
    return [slot for values in own for slot in values if isinstance(slot, types.MemberDescriptorType)]


_NOTHING = object()


def _attributes_of(value: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(value, "__dict__")
    except Exception:  # it has slots alone, or a __dict__ of its own making
        return {}


def _slot_of(value: Any, slot: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _NOTHING


class _Content(_Held):
    """What a container, a variable, an array or a random generator has in it, and how that is put back."""

    __slots__ = ("content", "put")

    def __init__(self, value: Any, inside: _Held | str, key: Any, content: Any, put: Callable[[Any, Any], Any]) -> None:
        super().__init__(value, inside, key)
        self.content, self.put = content, put

    def put_back(self) -> None:
        self.put(self.value, self.content)


# --- the walk -----------------------------------------------------------------------------------------------------


class Held:
    """All that a model holds: its parameters and buffers, and what the attributes of its modules lead to.

    Args:
        model: the model.

    Attributes:
        kept: each thing, as it is now.
        tensors: those of them that are tensors, the model's own first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept: list[_Held] = []
        self.tensors: list[KeptTensor] = []
        self._empty: list[Any] = []
        self._values_left = MOST_VALUES
        self._waiting: collections.deque[tuple[Any, _Held, Any]] = collections.deque()
        self._copies: list[tuple[int, Callable[[], Any]]] = []
        self._ways: dict[type, tuple[_Way, ...]] = {}
        modules = list(model.named_modules())
        self._seen = {id(module) for _, module in modules}
        for name, parameter in model.named_parameters():
            self.add_tensor(KeptTensor(parameter, name, ""))
            self.add_object(_Object(parameter, name, ""))
        for name, buffer in model.named_buffers():
            self.add_tensor(KeptTensor(buffer, name, "")).copy_numbers()
            self.add_object(_Object(buffer, name, ""))
        for name, module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's, and a frozen one has none
                if hasattr(module, "training"):
                    self.kept.append(_Content(module, name, "", module.training, torch.jit.ScriptModule.train))
            else:
                self.add_object(_Object(module, name, ""))
        while self._waiting:
            self._look_at(*self._waiting.popleft())
        bytes_left = MOST_BYTES
        for nbytes, copy in sorted(self._copies, key=lambda one: one[0]):
            if (bytes_left := bytes_left - nbytes) < 0:
                break
            copy()
        self.kept += [*self.tensors, _Content(self._empty, "an empty container", "", None, _clear_all)]
        del self._copies  # which refer to this object

    def _look_at(self, value: Any, inside: _Held, key: Any) -> None:
        """Keep a thing the first time that it is met, in the ways of its class."""
        if id(value) not in self._seen:
            self._seen.add(id(value))
            kind = type(value)
            if kind not in self._ways:
                self._ways[kind] = tuple(_ways_of(kind))
            for way in self._ways[kind]:
                way(self, value, inside, key)

    def enter(self, inside: _Held, keys: Iterable[Any], things: Iterable[Any]) -> None:
        """Have the things that one refers to looked at later, the nearest to the model first."""
        for key, thing in zip(keys, things, strict=True):
            kind = type(thing)
            if kind in _PLAIN:
                continue
            if kind in _OFTEN_EMPTY and not thing:
                self._empty.append(thing)
            else:
                self._waiting.append((thing, inside, key))

    def add_object(self, kept: _Object) -> None:
        """Keep an object, and enter its attributes."""
        self.kept.append(kept)
        self.enter(kept, kept.attributes, kept.attributes.values())
        if kept.slots:
            self.enter(kept, (slot.__name__ for slot, _ in kept.slots), (item for _, item in kept.slots))

    def add_tensor(self, kept: KeptTensor) -> KeptTensor:
        """Keep a tensor, but for its numbers."""
        self._seen.add(id(kept.value))
        self.tensors.append(kept)
        return kept

    def add_container(self, kept: _Held, keys: Iterable[Any], things: Collection[Any]) -> None:
        """Keep a container, and enter its items, if there is room for so many values."""
        if self.has_room(len(things)):
            self.kept.append(kept)
            self.enter(kept, keys, things)

    def has_room(self, values: int) -> bool:
        """Whether so many more values may be looked at, which they then are."""
        if values > self._values_left:
            return False
        self._values_left -= values
        return True

    def add_copy(self, nbytes: int, copy: Callable[[], Any]) -> None:
        """Have the numbers of a thing copied, if there is room for so many bytes."""
        self._copies.append((nbytes, copy))


def _clear_all(containers: list[Any], _: None) -> None:
    for container in containers:
        if container:
            container.clear()


_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size, types.ModuleType}
)
_OFTEN_EMPTY = frozenset({dict, collections.OrderedDict, list, set})

_CLOSED = (
    *("threading", "_thread", "queue", "_queue", "multiprocessing", "concurrent", "asyncio", "subprocess", "socket"),
    *("_io", "io", "tempfile", "logging", "weakref", "_weakrefset", "importlib", "enum", "pathlib"),
    *("lightning", "lightning_fabric", "pytorch_lightning", "wandb"),
    *("torch._dynamo", "torch._inductor", "torch._functorch", "torch._subclasses", "torch.fx", "torch.utils.weak"),
    *("torch.utils.data", "torch.utils.tensorboard", "torch.distributed", "torch.jit"),
)
"""Whose classes, and classes derived from those, are not entered: threads and what they share, processes, files,
loggers, weak references, trainers, compiled code, data sets and loaders. Others work on them while a model runs."""


def _is_closed(module: Any) -> bool:
    return isinstance(module, str) and any(module == name or module.startswith(f"{name}.") for name in _CLOSED)


# --- how things of each class are kept ----------------------------------------------------------------------------

_Way = Callable[[Held, Any, _Held, Any], None]
"""Keeps a thing, found in another under a key."""


def _ways_of(kind: type) -> Iterator[_Way]:
    """How things of a class are kept: their content, their attributes, both or, of what is not entered, neither."""
    content = next((_WAYS[base] for base in kind.__mro__ if base in _WAYS), None)
    if content is not None:
        yield content
    elif not issubclass(kind, nn.Module) and (
        issubclass(kind, (type, Iterator)) or any(_is_closed(base.__module__) for base in kind.__mro__)
    ):
        return
    if kind.__dictoffset__ or _slots_of(kind):
        yield _keep_attributes


def _keep_attributes(held: Held, value: Any, inside: _Held, key: Any) -> None:
    kept = _Object(value, inside, key)
    if held.has_room(len(kept.attributes) + len(kept.slots)):
        held.add_object(kept)


def _keep_nothing(held: Held, value: Any, inside: _Held, key: Any) -> None:
    """Keep nothing: there is no state to be had."""


def _keep_tensor(held: Held, value: Tensor, inside: _Held, key: Any) -> None:
    if is_lazy(value) or value.is_nested:  # there are no numbers yet; there are no sizes
        return
    kept = held.add_tensor(KeptTensor(value, inside, key))
    nbytes = value.numel() * value.itemsize
    held.add_copy(min(nbytes, kept.nbytes) if kept.place else nbytes, kept.copy_numbers)


def _keep_array(held: Held, value: np.ndarray, inside: _Held, key: Any) -> None:
    here = _Content(value, inside, key, None, _restore_array)
    held.enter(here, ("base",), (value.base,))
    if value.dtype == object:
        here.content = value.copy()
        held.add_container(here, zip(range(value.size)), here.content.reshape(-1))
    elif value.flags.writeable:

        def copy() -> None:
            here.content = np.array(value, copy=True, subok=False)
            held.kept.append(here)

        held.add_copy(value.nbytes, copy)


def _restore_array(value: np.ndarray, content: np.ndarray) -> None:
    if not value.flags.writeable:
        value.flags.writeable = True
    if value.size != content.size:
        value.resize(content.shape, refcheck=False)
    elif value.shape != content.shape:
        value.shape = content.shape
    plain = np.asarray(value)
    if plain.dtype == object:
        same = _are_the_same(plain.flat, content.flat)
    elif plain.flags.c_contiguous and content.flags.c_contiguous and not plain.dtype.hasobject:
        same = np.array_equal(plain.reshape(-1).view(np.uint8), content.reshape(-1).view(np.uint8))
    else:
        same = False
    if not same:  # what has not been changed may lie in memory, or a file, that is not to be written to
        np.copyto(plain, content)


def _keeping_numbers(base: Any) -> _Way:
    """The way of a bytearray or an array."""

    def put(value: Any, content: Any) -> None:
        if base.__getitem__(value, slice(None)) != content:
            base.__setitem__(value, slice(None), content)

    def keep(held: Held, value: Any, inside: _Held, key: Any) -> None:
        def copy() -> None:
            held.kept.append(_Content(value, inside, key, base.__getitem__(value, slice(None)), put))

        held.add_copy(memoryview(value).nbytes, copy)

    return keep


def _keeping_mapping(base: type[dict[Any, Any]]) -> _Way:
    """The way of a dict."""
    put = functools.partial(_restore_mapping, base)

    def keep(held: Held, value: Any, inside: _Held, key: Any) -> None:
        content = dict(base.items(value))
        held.add_container(_Content(value, inside, key, content, put), zip(content), content.values())

    return keep


def _restore_mapping(base: type[dict[Any, Any]], value: Any, content: dict[Any, Any]) -> None:
    if _are_the_same(base.__iter__(value), content) and _are_the_same(base.values(value), content.values()):
        return
    for key in [key for key in base.__iter__(value) if key not in content]:
        base.__delitem__(value, key)
    for key, item in content.items():
        if base.get(value, key, _NOTHING) is not item:
            base.__setitem__(value, key, item)
    if not _are_the_same(base.__iter__(value), content):
        base.clear(value)
        for key, item in content.items():
            base.__setitem__(value, key, item)


def _keeping_items(base: Any, put: Callable[[Any, list[Any]], None] | None) -> _Way:
    """The way of a list, set, deque or tuple; of what cannot be changed there is nothing to put back."""

    def keep(held: Held, value: Any, inside: _Held, key: Any) -> None:
        content = list(base.__iter__(value))
        kept = _Held(value, inside, key) if put is None else _Content(value, inside, key, content, put)
        held.add_container(kept, zip(range(len(content))), content)

    return keep


def _restore_list(value: Any, content: list[Any]) -> None:
    if not _are_the_same(list.__iter__(value), content):
        list.__setitem__(value, slice(None), content)


def _restore_set(value: Any, content: list[Any]) -> None:
    if set(map(id, set.__iter__(value))) != set(map(id, content)):
        set.clear(value)
        set.update(value, content)


def _restore_deque(value: Any, content: list[Any]) -> None:
    if not _are_the_same(collections.deque.__iter__(value), content):
        collections.deque.clear(value)
        collections.deque.extend(value, content)


def _are_the_same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two orders hold the same things; by identity, for tensors have no truth value."""
    one, other = list(one), list(other)
    return len(one) == len(other) and all(map(is_, one, other))


def _keep_function(held: Held, value: types.FunctionType, inside: _Held, key: Any) -> None:
    """Enter what a function has from the function around it, and its default arguments; not the module's names."""
    if not _is_closed(value.__module__):
        here = _Held(value, inside, key)
        held.enter(here, value.__code__.co_freevars, value.__closure__ or ())
        held.enter(here, ("__defaults__", "__kwdefaults__"), (value.__defaults__, value.__kwdefaults__))


def _keep_variable(held: Held, value: types.CellType, inside: _Held, key: Any) -> None:
    content = _variable_of(value)
    held.add_container(_Content(value, inside, key, content, _restore_variable), ("",), (content,))


def _variable_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _NOTHING


def _restore_variable(cell: types.CellType, content: Any) -> None:
    if _variable_of(cell) is content:
        return
    if content is _NOTHING:
        del cell.cell_contents
    else:
        cell.cell_contents = content


def _entering(*names: str) -> _Way:
    """The way of what has nothing of its own that changes, but refers to something under these names."""

    def keep(held: Held, value: Any, inside: _Held, key: Any) -> None:
        held.enter(_Held(value, inside, key), names, (getattr(value, name) for name in names))

    return keep


def _keeping_state(get: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> _Way:
    """The way of a random generator."""
    return lambda held, value, inside, key: held.kept.append(_Content(value, inside, key, get(value), put))


_WAYS: dict[type, _Way] = {
    Tensor: _keep_tensor,
    dict: _keeping_mapping(dict),
    collections.OrderedDict: _keeping_mapping(collections.OrderedDict),
    list: _keeping_items(list, _restore_list),
    set: _keeping_items(set, _restore_set),
    collections.deque: _keeping_items(collections.deque, _restore_deque),
    tuple: _keeping_items(tuple, None),
    frozenset: _keeping_items(frozenset, None),
    bytearray: _keeping_numbers(bytearray),
    array.array: _keeping_numbers(array.array),
    np.ndarray: _keep_array,
    types.FunctionType: _keep_function,
    types.CellType: _keep_variable,
    types.MethodType: _entering("__self__", "__func__"),
    types.BuiltinFunctionType: _entering("__self__"),
    functools.partial: _entering("func", "args", "keywords"),
    torch.Generator: _keeping_state(torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: _entering("bit_generator"),
    np.random.BitGenerator: _keeping_state(lambda one: one.state, lambda one, state: setattr(one, "state", state)),
    np.random.RandomState: _keeping_state(lambda one: one.get_state(legacy=False), np.random.RandomState.set_state),
    random.Random: _keeping_state(random.Random.getstate, random.Random.setstate),
    random.SystemRandom: _keep_nothing,
}
