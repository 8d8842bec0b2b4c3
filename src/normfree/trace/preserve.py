"""A model can be measured and given back exactly as it was, also when it fails half-way."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfree.common.checks import check_choice
from normfree.common.torch_compat import TorchDispatchMode, preserve_version_counters
from normfree.trace.operations import written_by

MODES = ("batch-statistics", "train", "eval")
"""The first is evaluation mode with normalizers on the statistics of the batch, as in the first training step."""

_CONTAINERS = (dict, list, set, collections.deque)
_PLAIN = frozenset({bool, int, float, str, tuple, type(None)})


class Preserved:
    """What must be put back.

    Parameters and inputs are copied only when about to be written; buffers, the attributes of all modules and
    the random states at once.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.written: dict[int, tuple[Tensor, Tensor]] = {}
        self.guarded: dict[int, list[Tensor]] = {}
        self.guard(model.parameters())
        self.parameters = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        memo: dict[int, Any] = {}
        self.modules = [(module, _attributes(module, memo)) for module in model.modules()]
        self.devices = sorted(
            {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
        )
        self.torch_state = torch.get_rng_state()
        self.cuda_states = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.python_state = random.getstate()
        self.numpy_state = np.random.get_state()
        self.fast_path = torch.backends.mha.get_fastpath_enabled()

    def guard(self, tensors: Iterable[Tensor]) -> None:
        """Have these tensors copied before their memory is written, whichever view it is written through."""
        for tensor in tensors:
            if place := _place(tensor):
                self.guarded.setdefault(place, []).append(tensor)

    def before_writing(self, tensor: Tensor) -> None:
        """Keep the values of what is guarded in the memory of a tensor that is about to change."""
        for guarded in self.guarded.get(_place(tensor), ()):
            if id(guarded) not in self.written:
                self.written[id(guarded)] = (guarded, guarded.detach().clone())

    @contextmanager
    def guarding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Guard tensors while the context is open, and put them back at its end; those of a batch."""
        self.guard(tensors)
        try:
            yield
        finally:
            for tensor in tensors:
                if id(tensor) in self.written:
                    _write(*self.written.pop(id(tensor)))
                for place in [place for place, guarded in self.guarded.items() if any(g is tensor for g in guarded)]:
                    self.guarded[place] = [one for one in self.guarded[place] if one is not tensor]

    def undo(self) -> None:
        """Put back at once what was written so far."""
        for tensor, value in self.written.values():
            _write(tensor, value)
        self.written.clear()

    def seed(self, seed: int) -> None:
        """Seed every generator the model may draw from, and no other: other devices' states are not kept."""
        torch.default_generator.manual_seed(seed)
        for device in self.devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def put_back(self) -> None:
        """Restore everything, bit for bit."""
        for module, attributes in self.modules:
            _restore_attributes(module, attributes)
        for parameter, data, gradient, requires_grad in self.parameters:
            if _place(parameter) != _place(data) or parameter.shape != data.shape:
                parameter.data = data
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for tensor, value in [*self.written.values(), *self.buffers]:
            _write(tensor, value)
        torch.set_rng_state(self.torch_state)
        for device, state in zip(self.devices, self.cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)
        torch.backends.mha.set_fastpath_enabled(self.fast_path)


class Writes(TorchDispatchMode):
    """Has kept what any code writes to, such as a ``train()`` that merges weights."""

    def __init__(self, preserved: Preserved) -> None:
        super().__init__()
        self.preserved = preserved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for target in written_by(func, args, kwargs):
            self.preserved.before_writing(target)
        return func(*args, **kwargs)


@contextmanager
def untouched(model: nn.Module, mode: str) -> Iterator[Preserved]:
    """Put a model into a measuring mode, and put back all it or its forward pass changed.

    Parameters, buffers (running statistics included), attributes of modules, training flags, hooks, and
    the random states of torch, CUDA, Python and NumPy are the same bits afterwards; so are the version
    counters of all these tensors, so that a backward pass that is still to come goes through.

    Args:
        model: the model.
        mode: one of :data:`MODES`.

    Yields:
        What keeps the state; call its ``before_writing`` with parameters about to be written.
    """
    check_choice("mode", mode, MODES)
    attributes = [value for module in model.modules() for value in vars(module).values()]
    tensors = (*model.parameters(), *model.buffers(), *(a for a in attributes if isinstance(a, Tensor)))
    counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
    preserved = Preserved(model)
    with preserve_version_counters(counted):
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer would hide its additions
            with Writes(preserved):
                model.train(mode == "train")
            if mode == "batch-statistics":
                for module in model.modules():
                    if isinstance(getattr(module, "running_mean", None), Tensor):
                        module.training = True  # not .train(): a fused norm may hold dropout
            yield preserved
        finally:
            preserved.put_back()


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins, whatever view it is; 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.detach().copy_(value)


class _KeptEmpty:
    """An empty container, as most of a module's are (its hooks): what comes into it is thrown out."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def put_back(self) -> None:
        if self.value:
            self.value.clear()


class _KeptGenerator:
    """A random generator that an attribute holds, and where it stood."""

    def __init__(self, value: torch.Generator) -> None:
        self.value = value
        self.state = value.get_state()

    def put_back(self) -> None:
        self.value.set_state(self.state)


class _Kept:
    """A container or tensor that an attribute holds, and what was in it; containers inside are kept as well."""

    def __init__(self, value: Any, memo: dict[int, Any]) -> None:
        self.value = value
        memo[id(value)] = self
        if isinstance(value, Tensor):
            self.content: Any = value.detach().clone()
            self.version = None if value.is_inference() else value._version
            return
        self.content = dict(value) if isinstance(value, dict) else list(value)
        items = self.content.values() if isinstance(value, dict) else self.content
        self.inside = [_kept(item, memo) for item in items if isinstance(item, _CONTAINERS)]

    def put_back(self) -> None:
        if isinstance(self.value, Tensor):
            changed = not self.value.is_inference() and self.value._version != self.version
            if changed or not torch.equal(self.value, self.content):
                _write(self.value, self.content)
            return
        if not _same_items(self.value, self.content):
            self.value.clear()
            (self.value.update if isinstance(self.value, (dict, set)) else self.value.extend)(self.content)
        for kept in self.inside:
            kept.put_back()


_KEPT = (_KeptEmpty, _Kept, _KeptGenerator)


def _kept(value: Any, memo: dict[int, Any]) -> _Kept:
    return memo[id(value)] if id(value) in memo else _Kept(value, memo)


def _attributes(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """The module's attributes, its containers (hooks among them) and plain tensors with what is in them."""
    if isinstance(module, torch.jit.ScriptModule):
        return {"training": module.training}
    return {name: _kept_attribute(value, memo) for name, value in module.__dict__.items()}


def _kept_attribute(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _PLAIN:  # most are; the other checks take longer than a small module's forward
        return value
    if isinstance(value, torch.Generator):
        return _KeptGenerator(value)
    if isinstance(value, _CONTAINERS):
        return _kept(value, memo) if value else _KeptEmpty(value)
    return _kept(value, memo) if isinstance(value, Tensor) else value


def _restore_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        module.train(attributes["training"])
        return
    for name in set(module.__dict__) - set(attributes):
        del module.__dict__[name]
    for name, value in attributes.items():
        original = value.value if isinstance(value, _KEPT) else value
        if module.__dict__.get(name) is not original:
            module.__dict__[name] = original
        if isinstance(value, _KEPT):
            value.put_back()


def _same_items(current: Any, content: Any) -> bool:
    """Whether a container holds the objects it held; by identity, since tensors have no truth value."""
    if isinstance(current, dict):
        return list(current) == list(content) and all(current[key] is content[key] for key in content)
    if isinstance(current, set):
        return {id(item) for item in current} == {id(item) for item in content}
    return len(current) == len(content) and all(a is b for a, b in zip(current, content, strict=True))
