"""What constant each layer's input needs, so that its output has unit variance: γ / β, or a measured one.

A layer fed by an elementwise function of a Gaussian activation of variance β² has the input scale γ / β. Every other
input (a pool, a gate's product, a stream that was rectified before) has no closed form and is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from normfree.convert.branches import Ending
from normfree.convert.dataflow import Call, Step
from normfree.convert.structure import Structure
from normfree.convert.variances import planned_variances
from normfree.nn import gamma
from normfree.trace import operations as op
from normfree.trace.graph import Node

# Elementwise, with nothing but numbers beside the activation.
_ELEMENTWISE = (
    op.NONLINEAR - {"_softmax", "_log_softmax", "_safe_softmax", "glu"}
    | op.SCALING
    | {"add", "sub", "rsub", "neg", "sgn", "log1p", "expm1"}
)


@dataclass(frozen=True)
class InputScale:
    """The constant factor of one layer's input.

    Attributes:
        value: the factor; None if it has to be measured.
        reason: where it comes from, in words.
    """

    value: float | None
    reason: str


def input_scales(
    structure: Structure, chosen: Iterable[str], removed: set[str], found: Iterable[Ending], alpha: float
) -> dict[str, InputScale]:
    """The input scale of every layer to be standardized."""
    variance = planned_variances(structure, set(chosen), removed, list(found), alpha)
    made_by = structure.flow.made_by  # a multiple of what is Gaussian is a function of it, as any other
    planned = {node: value for node, value in variance.items() if not _is_multiple(made_by.get(node))}
    functions = _Functions(structure, removed, planned)
    scales = {}
    for name in chosen:
        each = [_scale_of(call, planned, functions) for call in structure.layers[name]]
        alike = all(scale.value == each[0].value for scale in each)
        scales[name] = each[0] if alike else InputScale(None, "measured on the first of several signals")
    return scales


def _is_multiple(step: Step | None) -> bool:
    return step is not None and step.name in op.SCALING


def _scale_of(call: Call, planned: Mapping[Node, float], functions: _Functions) -> InputScale:
    if call.input is None:
        return InputScale(None, "measured")
    variance = planned.get(call.input)
    if variance is not None:
        beta = math.sqrt(variance)
        return InputScale(1 / beta, "fed by unit variance" if beta == 1 else f"1/β, β = {beta:.4g} by the plan")
    found = functions.feeding(call.input)
    if found is None:
        return InputScale(None, "measured: no closed form for what feeds it")
    base, name, constant = found
    beta = math.sqrt(planned[base])
    of_beta = "" if beta == 1 else f" / β, β = {beta:.4g} by the plan"
    return InputScale(constant / beta, f"γ = {constant:.4g} of {name}{of_beta}")


class _Functions:
    """Finds the elementwise function that turned a Gaussian activation into another, and its gamma.

    Args:
        structure: of the model.
        removed: names of the norms to be passed as if they were not there.
        planned: the Gaussian activations.
    """

    def __init__(self, structure: Structure, removed: set[str], planned: Mapping[Node, float]) -> None:
        self.structure, self.removed, self.planned = structure, removed, planned
        self.known: dict[Any, float | None] = {}
        self.of_none: set[Node] = set()
        """What was found to be a function of no single Gaussian activation; nothing made of it is."""

    def feeding(self, node: Node) -> tuple[Node, str, float] | None:
        """The Gaussian activation behind ``node``, the function's name, and its gamma."""
        found = self._steps_to(node)
        if found is None:
            return None
        base, steps = found
        name = "·".join(dict.fromkeys(step.name for step in steps if step.name in op.NONLINEAR)) or "identity"
        key = _key(steps, base)
        if key not in self.known:
            try:
                self.known[key] = gamma(_replayed(steps, base, node))
            except ValueError:  # not elementwise after all, or constant: there is no gamma
                self.known[key] = None
        constant = self.known[key]
        return None if constant is None else (base, name, constant)

    def _steps_to(self, node: Node) -> tuple[Node, list[Step]] | None:
        """The operations since the one Gaussian activation that ``node`` is a function of, in order."""
        bases, steps, waiting, seen = set[Node](), dict[int, Step](), [node], {node}
        while waiting:
            current = waiting.pop()
            if current in self.planned:
                bases.add(current)
                continue
            step = self.structure.flow.made_by.get(current)
            if len(bases) > 1 or current in self.of_none or step is None or not self._is_elementwise(step, current):
                self.of_none.add(node)
                return None
            steps[step.number] = step
            for each in step.inputs:
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
        if len(bases) != 1:
            self.of_none.add(node)
            return None
        return bases.pop(), [steps[number] for number in sorted(steps)]

    def _is_elementwise(self, step: Step, node: Node) -> bool:
        if step.name in op.VIEW and len(step.inputs) == 1:
            return True
        if step.name in op.NORM:
            return step.module in self.removed
        if self.structure.is_plain_norm(node, self.removed):
            return False  # a norm written in parts: what it does to a vector is not what is left of it
        return step.name in _ELEMENTWISE


def _key(steps: list[Step], base: Node) -> Any:
    numbers = {base: 0}
    parts = []
    for step in steps:
        given = [*step.args, *(value for item in sorted(step.kwargs.items()) for value in item)]
        parts.append((str(step.function), *(_as_key(value, numbers) for value in given)))
        numbers |= {node: len(numbers) for node in step.outputs}
    return tuple(parts)


def _as_key(value: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return ("activation", numbers.get(value))
    if isinstance(value, Tensor):
        if value.is_floating_point() and not _is_constant(value):
            return "differs"
        return ("tensor", value.dtype, tuple(value.flatten()[: 1 if value.is_floating_point() else None].tolist()))
    return str(value)


def _is_constant(value: Tensor) -> bool:
    return bool((value == value.flatten()[0]).all())


def _replayed(steps: list[Step], base: Node, last: Node) -> Callable[[Tensor], Tensor]:
    """The operations again, as a function of any tensor; layouts and removed norms leave it as it is."""

    def function(x: Tensor) -> Tensor:
        values = {base: x}

        def given(value: Any) -> Any:
            return _given(value, values)

        for step in steps:
            if step.name in op.VIEW or step.name in op.NORM:
                result: Any = values[step.inputs[0]]
            else:
                args, kwargs = tree_map(given, (step.args, step.kwargs))
                result = step.function(*args, **kwargs)
            results = result if isinstance(result, (tuple, list)) else [result]
            values |= dict(zip(step.outputs, results, strict=False))
        return values[last]

    return function


def _given(value: Any, values: Mapping[Node, Tensor]) -> Any:
    """An argument for the replay: a copy, as the operation may work in place; one number for a constant tensor."""
    if isinstance(value, Node):
        return values[value].clone()
    if isinstance(value, Tensor) and value.is_floating_point():
        if not _is_constant(value):
            raise ValueError("it differs from channel to channel")
        return value.detach().flatten()[:1].to(device="cpu", dtype=torch.float64)
    return value
