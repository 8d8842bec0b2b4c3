"""Rows of layers without a shortcut: the bias at which their gradients do not explode.

A standardized layer with the gamma of the function f before it keeps the variance forward; backward it multiplies the
power of the gradient by

    chi(b) = E[f'(z + b)²] / Var[f(z + b)],   z ~ N(0, 1),

b being the bias of the layer before f: 1.467 for ReLU without one, 2·10⁸ in a row of fifty. No choice of a gain changes
that; a bias does, for f is nearly linear where few values are cut. The offset that it gives all channels alike is
invisible to filters that sum to zero. So in a row of n such functions each layer starts at the least bias for which
chi(b)ⁿ is :data:`MOST_GROWTH` at most; a shorter row starts at 0, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from normfree.convert.dataflow import passes_unchanged
from normfree.convert.functions import Function, Functions
from normfree.convert.structure import Structure
from normfree.trace import operations as op
from normfree.trace.graph import Node

MOST_GROWTH = 1e3
"""Of the power of a gradient along a row: a hundredth of what is a finding. Of biases of 0, 0.5, 0.9 and 1.3, rows of
30 and of 50 convolutions learn digits fastest at 0.5 and at 0.9, where their growth is 790 and 710."""

MOST_BIAS = 2.0
"""Beyond, a ReLU cuts nothing: chi(2) is 1.018 there, and rows of hundreds of layers have what a bias can give."""

STEP = 0.05
"""Of a bias."""

LINEAR = 1 + 1e-4
"""Gains below are of functions that are linear, but for rounding."""


def biases_of_rows(structure: Structure, functions: Functions, chosen: Collection[str]) -> dict[str, float]:
    """The bias that each layer in a long row starts with; layers that start at 0 are not among them.

    Args:
        structure: of the model.
        functions: between its layers.
        chosen: names of the layers to be standardized.
    """
    rows = _Rows(structure, functions, chosen)
    return {name: bias for name in rows.after if (bias := rows.bias_of(name))}


class _Rows:
    """The layers of a model by which of them reads what another made, past a function of it alone.

    Attributes:
        before, after: of each layer, the layers linked to it, and the function between the two.
    """

    def __init__(self, structure: Structure, functions: Functions, chosen: Collection[str]) -> None:
        self.structure, self.functions, self.chosen = structure, functions, set(chosen)
        self.before: dict[str, dict[str, Function]] = {}
        self.after: dict[str, dict[str, Function]] = {}
        once = {name for name, calls in structure.layers.items() if len(calls) == 1}
        for name in structure.layers:
            link = self._link_before(structure.layers[name][0].input) if name in once else None
            if link is not None and link[0] in once & self.chosen:
                self.before.setdefault(name, {})[link[0]] = link[1]
                self.after.setdefault(link[0], {})[name] = link[1]
        self.up = self._growths(structure.layers, self.before)
        self.down = self._growths(reversed(structure.layers), self.after)

    def bias_of(self, name: str) -> float:
        """The bias that a layer starts with."""
        links = self.after[name]
        function = next(iter(links.values()))
        alike = all(other.key == function.key for other in links.values())
        if not alike or not self.chosen.issuperset(links) or not self._is_read_by(name, function):
            return 0.0
        layout = self.structure.maps[name].layout
        if self.structure.maps[name].fan_in == 1 or (layout is not None and not layout.biases):
            return 0.0
        ways = [self.up[name], self._growth(function), max((self.down[other] for other in links), default=(0, 0.0))]
        count, growth = (sum(column) for column in zip(*ways, strict=True))
        if growth <= math.log(MOST_GROWTH):
            return 0.0
        return self._least_bias(function, MOST_GROWTH ** (1 / count))

    def _growths(self, names: Iterable[str], links: Mapping[str, dict[str, Function]]) -> dict[str, tuple[int, float]]:
        """How many functions there are at most along the links from each layer, and the logarithm of their growth."""
        found: dict[str, tuple[int, float]] = {}
        for name in names:
            ways = [(found.get(other, (0, 0.0)), self._growth(each)) for other, each in links.get(name, {}).items()]
            found[name] = max(((a + b, c + d) for (a, c), (b, d) in ways), default=(0, 0.0))
        return found

    def _growth(self, function: Function) -> tuple[int, float]:
        gain = self.functions.gradient_gain(function) or 1.0
        return (1, math.log(gain)) if gain > LINEAR else (0, 0.0)

    def _least_bias(self, function: Function, most: float) -> float:
        """The least bias for which the gradient grows by so much at most; the largest if none does, 0 if none helps."""

        def gain(bias: float) -> float:
            return self.functions.gradient_gain(function, bias) or math.inf

        if gain(MOST_BIAS) >= gain(0.0):
            return 0.0
        steps = round(MOST_BIAS / STEP)
        return next((bias for i in range(steps) if gain(bias := round(i * STEP, 2)) <= most), MOST_BIAS)

    def _link_before(self, node: Node | None) -> tuple[str, Function] | None:
        """The layer that an activation is a function of, pools and layouts apart, and the function."""
        flow = self.structure.flow
        while node is not None:
            if (function := self.functions.feeding(node)) is not None:
                layer = self.functions.layer_behind(function.base)
                is_unit = self.functions.planned[function.base] == 1
                return (layer, function) if layer is not None and is_unit else None
            step = flow.made_by.get(node)
            if step is None or len(step.inputs) != 1 or not (passes_unchanged(step) or step.name in op.POOL):
                return None
            node = step.inputs[0]
        return None

    def _is_read_by(self, name: str, function: Function) -> bool:
        """Whether nothing but a function reads what a layer gives, past norms that go."""
        waiting = [self.structure.layers[name][0].output]
        while waiting:
            node = waiting.pop()
            if node is None or node in self.structure.flow.outputs:
                return False
            for step in self.structure.flow.readers(node):
                if step in function.steps:
                    continue
                if not passes_unchanged(step) and self.structure.norm_of(step) not in self.functions.removed:
                    return False
                waiting += [made for made in step.outputs if self.structure.flow.readers(made)]
        return True
