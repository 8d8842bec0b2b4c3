"""Which norms and layers a model's forward asks what they are, beside running them.

A forward may ask a norm for its class or for an attribute (feature taps behind each ``BatchNorm2d``, a penalty on its
weight, a block that does something else without a norm), and would do something else with the module that conversion
puts in its place. So a copy of the model runs with modules of another class there, each of which runs the norm that it
stands for. A standardized layer is an instance of the class that it was, and has its attributes, but its class is
another (``type(conv) is nn.Conv2d``): so each layer of the copy is of a subclass. All values are what they were;
whatever else is not comes of such a question: another operation, another output, a failure. Both in evaluation and in
training mode, if the model runs in it. Where all forwards name nothing but what computes, there is nothing to find, and
nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normfree.common.torch_compat import copy_model
from normfree.convert.dataflow import Trains, class_name, prepare_run
from normfree.convert.outputs import difference
from normfree.trace import operations as op
from normfree.trace.inputs import Batch, call
from normfree.trace.preserve import Mode, Writes


def _stand_in(norm: nn.Module) -> nn.Module:
    """An ``nn.Identity``, as what mostly comes in a norm's place, that runs the norm and has none of its attributes."""
    made = nn.Identity()
    made.stands_for = norm
    made.forward = norm.__call__
    return made


@dataclass
class _Run:
    """One run: the names of all operations, what was returned, and how it failed if it did."""

    operations: list[str]
    output: Any = None
    failure: Exception | None = None

    def equals(self, other: _Run) -> bool:
        """Whether the forward has done the same."""
        if self.failure is not None or other.failure is not None or self.operations != other.operations:
            return False
        return not difference(self.output, other.output, numbers=True)


class _Operations(Writes):
    """Notes the name of every operation."""

    def __init__(self, preserved: Any) -> None:
        super().__init__(preserved)
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(op.name_of(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Disguised:
    """A copy of a model in which others can stand for some of its norms, and layers can be of a subclass.

    Args:
        model: the model; it is left as it is.
        norms, layers: names of those norms and layers.
    """

    @torch.inference_mode(False)  # parameters copied inside of it would be of another kind
    def __init__(self, model: nn.Module, norms: Iterable[str], layers: Iterable[str]) -> None:
        self.model = copy_model(model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self.norms = {name: modules[name] for name in norms}
        self.layers = {name: modules[name] for name in layers}
        self.stands = {name: _stand_in(norm) for name, norm in self.norms.items()}

    def run(self, names: Sequence[str], batch: Batch, mode: Mode, trains: Trains) -> _Run:
        """Run it with others in the places of some norms, and some layers of a subclass."""
        standing = {self.norms[name]: self.stands[name] for name in names if name in self.norms}
        classes = {layer: type(layer) for name, layer in self.layers.items() if name in names}
        places = [
            (parent, attribute, child)
            for parent in self.model.modules()
            for attribute, child in parent._modules.items()
            if child is not None and child in standing
        ]
        for parent, attribute, norm in places:
            parent._modules[attribute] = standing[norm]
        for layer, kind in classes.items():
            layer.__class__ = type(f"Standardized{kind.__name__}", (kind,), {"__module__": __name__})
        try:
            return _run(self.model, batch, mode, trains)
        finally:
            for parent, attribute, norm in places:
                parent._modules[attribute] = norm
            for layer, kind in classes.items():
                layer.__class__ = kind


def _run(model: nn.Module, batch: Batch, mode: Mode, trains: Trains) -> _Run:
    with prepare_run(model, batch, mode=mode, trains=trains) as (keeper, given), _Operations(keeper) as seen:
        try:
            return _Run(seen.names, call(model, given))
        except Exception as failure:  # of any kind: the forward is the user's
            return _Run(seen.names, failure=failure)


_PLAIN = (bool, int, float, str, tuple, torch.Size, torch.dtype, torch.device, type(None))
_BUILTINS = frozenset(
    {"abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min", "range", "reversed"}
    | {"round", "sorted", "sum", "super", "tuple", "zip"}
)


def _may_ask(model: nn.Module) -> bool:
    """Whether the code of any module's forward names what could tell one class of module from another."""
    seen: set[tuple[type, frozenset[str]]] = set()
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return True
        kind = type(module)
        if kind.__module__.startswith("torch.nn.modules."):
            continue
        plain = {name for name, value in vars(module).items() if isinstance(value, _PLAIN)}
        own = frozenset({*plain, *module._modules, *module._parameters, *module._buffers})
        if (kind, own) not in seen and not _computes(kind, "forward", own, set()):
            return True
        seen.add((kind, own))
    return False


def _computes(kind: type, method: str, own: frozenset[str], checked: set[str]) -> bool:
    """Whether a method names only tensors' methods, torch's functions, and what its module has or itself computes."""
    function = getattr(kind, method)
    if not isinstance(function, FunctionType):
        return False
    checked.add(method)
    for name in _names_in(function.__code__):
        if name.startswith("__"):  # a class, a name, a dictionary
            return False
        of_tensors = hasattr(torch.Tensor, name) and name != "type"
        if of_tensors or name in own or name in _BUILTINS or name in checked:
            continue
        found = function.__globals__.get(name)
        if found in (torch, F, nn) or hasattr(F, name) or (hasattr(torch, name) and found is None):
            continue
        if not hasattr(kind, name) or not _computes(kind, name, own, checked):
            return False
    return True


def _names_in(code: CodeType, variables: Iterable[str] = ("__class__",)) -> Iterator[str]:
    """The names that code and what is defined in it look up, without the variables of the code around it."""
    yield from code.co_names
    yield from set(code.co_freevars).difference(variables)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant, (*variables, *code.co_cellvars))


def modules_asked_about(
    model: nn.Module, norms: Iterable[str], layers: Iterable[str], batch: Batch, *, trains: Trains
) -> dict[str, str]:
    """The modules without which, though nothing else changes, a model's forward does something else; and why they stay.

    Args:
        model: the model.
        norms: names of the norms that it runs, in their order.
        layers: names of the layers that it runs and that can be standardized.
        batch: its input.
        trains: the modules in training mode: auxiliary heads run in training alone.
    """
    names = set(norms) - {""}  # the model itself has no place in which another could stand
    outermost = [name for name in norms if name in names and names.isdisjoint(_ancestors(name))]
    layers = [name for name in layers if name and name not in names]
    asked: dict[str, str] = {}
    if not (outermost or layers) or not _may_ask(model):
        return asked
    disguised = _Disguised(model, outermost, layers)
    modes: tuple[tuple[Mode, Trains], ...] = (("eval", trains), ("train", None))
    for mode, training in modes:
        wanted = disguised.run([], batch, mode, training)
        if wanted.failure is not None:  # training wants something else, such as targets
            continue
        left = [name for name in (*outermost, *layers) if name not in asked]
        if disguised.run(left, batch, mode, training).equals(wanted):
            continue
        if disguised.run([], batch, mode, training).equals(wanted):  # else it does not do the same twice
            _, more = _bisect(disguised, wanted, [], left, batch, mode, training)
            asked |= more
    return asked


def _bisect(
    disguised: _Disguised,
    wanted: _Run,
    gone: list[str],
    names: list[str],
    batch: Batch,
    mode: Mode,
    trains: Trains,
) -> tuple[list[str], dict[str, str]]:
    """Sort modules into those that may go, with those that do already, and those that may not, and why; by halves."""
    found = disguised.run([*gone, *names], batch, mode, trains)
    if found.equals(wanted):
        return [*gone, *names], {}
    if len(names) == 1:
        return gone, {names[0]: _reason(disguised, names[0], found)}
    half = len(names) // 2
    gone, first = _bisect(disguised, wanted, gone, names[:half], batch, mode, trains)
    gone, second = _bisect(disguised, wanted, gone, names[half:], batch, mode, trains)
    return gone, first | second


def _reason(disguised: _Disguised, name: str, found: _Run) -> str:
    failure = found.failure
    if name in disguised.layers:
        was = class_name(disguised.layers[name])
        return f"is asked for its class by the model's forward, which does something else where that is not {was}"
    if isinstance(failure, AttributeError) and failure.obj is disguised.stands[name]:
        return f"the model's forward asks for its {failure.name}"
    was = class_name(disguised.norms[name])
    return f"the model's forward asks what it is, and does something else where it is no {was}"


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
