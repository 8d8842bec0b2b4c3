"""The elementwise function between two layers, however it is written: the recorded operations, run again.

So its gamma is that of what the model computes, of a SiLU as ``x * sigmoid(x)`` as of ``nn.SiLU``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from normfree.convert.dataflow import Step, passes_unchanged
from normfree.convert.structure import Structure
from normfree.nn.activations import gamma, gradient_gain
from normfree.trace import operations as op
from normfree.trace.graph import Node

# Elementwise, with nothing but numbers beside the activation.
_ELEMENTWISE = (
    op.NONLINEAR - {"_softmax", "_log_softmax", "_safe_softmax", "glu"}
    | op.SCALING
    | {"add", "sub", "rsub", "neg", "sgn", "log1p", "expm1"}
)


@dataclass(frozen=True, eq=False)
class Function:
    """An elementwise function of a Gaussian activation.

    Attributes:
        base: the activation.
        steps: the operations, in order.
        name: what they are called.
        key: equal for functions that compute the same.
        apply: the function, of any tensor.
    """

    base: Node
    steps: tuple[Step, ...]
    name: str
    key: Any
    apply: Callable[[Tensor], Tensor]


class Functions:
    """Finds the elementwise function that turned a Gaussian activation into another, and its constants.

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
        self.after_dropout: set[Node] = set()
        """Of these, those because of dropout."""

    def function_before(self, node: Node) -> Function | None:
        """The function that made ``node``; None for none of a single Gaussian activation."""
        found = self._steps_to(node)
        if found is None:
            return None
        base, steps = found
        name = (
            "·".join(dict.fromkeys(op.plain_name(step.name) for step in steps if step.name in op.NONLINEAR))
            or "identity"
        )
        return Function(base, tuple(steps), name, _key(steps, base), _replay(steps, base, node))

    def gamma(self, function: Function, bias: float = 0.0) -> float | None:
        """The gamma of ``f(z + bias)``; None where it has none: it is not elementwise after all, or constant."""
        return self._constant(gamma, function, bias)

    def gradient_gain(self, function: Function, bias: float = 0.0) -> float | None:
        """By how much ``f(z + bias)`` with its gamma multiplies the power of a gradient; None where it has no gamma."""
        return self._constant(gradient_gain, function, bias)

    def _constant(self, of: Callable[..., float], function: Function, bias: float) -> float | None:
        key = of, function.key, bias
        if key not in self.known:
            try:
                self.known[key] = of(lambda x: function.apply(x + bias))
            except ValueError:
                self.known[key] = None
        return self.known[key]

    def layer_before(self, node: Node | None) -> str | None:
        """The layer that made an activation, past norms that go."""
        while node is not None:
            if node in self.structure.layer_at:
                return self.structure.layer_at[node].name
            norm, step = self.structure.norm_at.get(node), self.structure.flow.made_by.get(node)
            if norm is not None and norm.name in self.removed:
                node = norm.input
            elif step is None:
                return None
            elif passes_unchanged(step) or (step.name in op.NORM and step.module in self.removed):
                node = step.inputs[0]
            else:
                return None
        return None

    def _steps_to(self, node: Node) -> tuple[Node, list[Step]] | None:
        """The operations since the one Gaussian activation that ``node`` is a function of, in order."""
        bases, steps, waiting, seen = set[Node](), dict[int, Step](), [node], {node}
        while waiting:
            current = waiting.pop()
            if current in self.planned:
                bases.add(current)
                continue
            step, dropped = self.structure.flow.made_by.get(current), current in self.structure.flow.dropped
            unknown = dropped or current in self.of_none
            if len(bases) > 1 or unknown or step is None or not self._is_elementwise(step, current):
                self.of_none.add(node)
                if dropped or current in self.after_dropout:
                    self.after_dropout.add(node)
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


def _replay(steps: list[Step], base: Node, last: Node) -> Callable[[Tensor], Tensor]:
    """The operations again, as a function of any tensor; layouts and removed norms leave it as it is."""

    def function(x: Tensor) -> Tensor:
        values = {base: x}

        def given(value: Any) -> Any:
            return _argument(value, values)

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


def _argument(value: Any, values: Mapping[Node, Tensor]) -> Any:
    """An argument for the replay: a copy, as the operation may work in place; one number for a constant tensor."""
    if isinstance(value, Node):
        return values[value].clone()
    if isinstance(value, Tensor) and value.is_floating_point():
        if not _is_constant(value):
            raise ValueError("it differs from channel to channel")
        return value.detach().flatten()[:1].to(device="cpu", dtype=torch.float64)
    return value
