"""Which layers and residual branches a fresh start plans though no norm answers for them.

A norm gives what follows it unit variance, whatever the layers before it do. Where there is none, variances multiply
from layer to layer, and add up from branch to branch: so every hidden layer is standardized there, and every branch
scaled, by its place and not by what it happens to give.

*A model without norms*: all hidden layers, and all residual branches.

*A model with some*: the residual branches without a norm in them, and of the other layers those of which
:data:`FEWEST_IN_A_ROW` or more stand one after the other with no norm between them. A shorter row is a head, or two
layers tuned to each other. What several signals go through (a head over the levels of a pyramid) stays, and so does
what stands beside attention, whose norms stay.

Layers stay whose initialisation is a choice, or whose weight standardizing would spoil: each has its reason.

*Rows of layers without a shortcut: the bias at which their gradients do not explode.*

A standardized layer with the gamma of the function f before it keeps the variance forward; backward it multiplies the
power of the gradient by

    chi(b) = E[f'(z + b)²] / Var[f(z + b)],   z ~ N(0, 1),

b being the bias of the layer before f: 1.467 for ReLU without one, 2·10⁸ in a row of fifty. No choice of a gain changes
that; a bias does, for f is nearly linear where few values are cut. The offset that it gives all channels alike is
invisible to filters that sum to zero. So in a row of n such functions each layer starts at the least bias for which
chi(b)ⁿ is :data:`MOST_GROWTH` at most; a shorter row starts at 0, as everywhere.

Where no plan can be made, :mod:`normfree.signal.remedies` has lines of Python that give the model a healthy start.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from normfree.convert.carriers import SignalPaths
from normfree.convert.dataflow import Addition, Call, Step, passes_unchanged
from normfree.convert.functions import Function, Functions
from normfree.convert.structure import Structure, WeightedMap, is_fusion, layers_in, norms_in, why_no_map
from normfree.nn import standardization_of
from normfree.nn.scaled_ws import StandardizedFilters
from normfree.trace import operations as op
from normfree.trace.graph import Node

FEWEST_IN_A_ROW = 3
"""As the findings count: two layers may be tuned to each other, three in a row that all grow or fade are systematic."""

FEWEST_WEIGHTS = 9
"""Weights of one output. A filter that sums to zero is blind to one direction of what it reads: of two features it sees
the difference alone; of the nine positions of the smallest kernel in use it loses a ninth."""

ZERO = "it starts with weights of zero, which is a choice"
ROUGHEST = 4.0
"""Gain of a gradient of the roughest function that unit variance suits: tanh(5 x) has 3.3. One of more, such as the
sine of thirty times its input, is made for a smaller signal, and the layers before it for giving that."""

_MODULATING = op.SCALING | op.SUMS
"""Operations by which a broadcast activation (an embedding's scale and shift) acts on another: no row goes on there."""

LAST = "no layer follows it on the way to an output"
STANDARDIZED = "it standardizes its weight already"
GATE = "it only computes a gate"


@dataclass(frozen=True)
class Unnormalized:
    """What is planned without a norm.

    Attributes:
        layers: names of the layers to standardize.
        branches: the sums of the residual branches to scale.
        kept: the other layers, and why they stay.
        out_of_reach: the residual additions in whose branch no layer can be standardized, and why.
        beside_norms: the model has norms.
        scalable: the layers that stay though nothing forbids a constant factor in their weight.
    """

    layers: frozenset[str] = frozenset()
    branches: frozenset[Node] = frozenset()
    kept: Mapping[str, str] = field(default_factory=dict)
    out_of_reach: Mapping[str, str] = field(default_factory=dict)
    beside_norms: bool = False
    scalable: frozenset[str] = frozenset()


def find_unnormalized(structure: Structure, ways: SignalPaths, chosen: Iterable[str]) -> Unnormalized:
    """What of a model no norm answers for.

    Args:
        structure: of the model.
        ways: through it.
        chosen: the layers that are standardized for its norms.
    """
    return _Search(structure, ways, set(chosen)).found()


@dataclass(frozen=True)
class _Ahead:
    """What the values of an activation come to first: layers, by name; another weight, or attention; a norm."""

    layers: frozenset[str] = frozenset()
    weight: bool = False
    attention: bool = False
    norm: bool = False

    def __or__(self, other: _Ahead) -> _Ahead:
        return _Ahead(
            self.layers | other.layers,
            self.weight or other.weight,
            self.attention or other.attention,
            self.norm or other.norm,
        )


class _Search:
    """One search through a model."""

    def __init__(self, structure: Structure, ways: SignalPaths, chosen: set[str]) -> None:
        self.structure, self.flow, self.ways, self.chosen = structure, structure.flow, ways, chosen
        self.normalizing = {each.step for each in structure.normalizations.found if not each.centres}
        self.has_norms = bool(structure.norms or self.normalizing)
        self.ahead: dict[Node, _Ahead] = {}
        for step in reversed(self.flow.steps):
            before = self._before(step)
            modulates = self.has_norms and step.name in _MODULATING
            for node in ways.carried_values(step) if modulates else step.inputs:
                self.ahead[node] = self.ahead.get(node, _Ahead()) | before
        made = {call.output: 1.0 for calls in structure.layers.values() for call in calls if call.output is not None}
        self.functions = Functions(structure, set(), made)
        self.reasons = {name: reason for name in structure.layers if (reason := self._reason_to_stay(name))}
        self.inside = {a: self._layers_inside(a) for a in self.flow.additions if self._is_without_norm(a)}
        self.silent = self._leave_silent_branches()

    def found(self) -> Unnormalized:
        """What is planned, and what is not."""
        able = [n for n in self.structure.layers if n not in self.reasons and n not in self.chosen]
        branches = {a: inside for a, inside in self.inside.items() if not inside.isdisjoint(able)}
        in_branches = {name for name in able if any(name in inside for inside in branches.values())}
        hidden = [name for name in able if name not in in_branches and self._is_hidden(name)]
        layers = in_branches | set(self._in_a_row(hidden) if self.has_norms else hidden)
        kept: dict[str, str] = {}  # beside norms, a layer is kept for no norm asks for it
        if not self.has_norms:
            heads = {name for name in self.structure.layers if name not in layers and not self._is_hidden(name)}
            kept = self.reasons | dict.fromkeys(heads - self._inside_branches(), LAST) | self._other_weights()
        out_of_reach = {
            addition.name: next(f"{n} stays, for {reason}" for n, reason in self.reasons.items() if n in inside)
            for addition, inside in self.inside.items()
            if addition not in branches and inside - self.silent - self.chosen
        }
        sums = frozenset(addition.output for addition in branches)
        scalable = frozenset(n for n in self.structure.layers if n not in layers | self.chosen and self._is_scalable(n))
        return Unnormalized(frozenset(layers), sums, kept, out_of_reach, self.has_norms, scalable)

    def _inside_branches(self) -> set[str]:
        return {name for inside in self.inside.values() for name in inside}

    def _other_weights(self) -> dict[str, str]:
        """The modules that multiply by weights and are no layers, and why not."""
        found = {}
        for name, module in self.flow.foreign.items():
            steps = self.flow.within(name)
            weighted = any(n.step.weighted for s in steps for n in s.outputs if s.name not in op.EMBEDDING)
            if name not in self.structure.layers and weighted:
                recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
                found[name] = "it is recurrent" if recurrent else f"it {why_no_map(self.flow, name)}"
        return found

    def _before(self, step: Step) -> _Ahead:
        """What lies ahead of what an operation reads."""
        if self.structure.norm_of(step) is not None or step in self.normalizing:
            return _Ahead(norm=True)
        if (layer := self.structure.layer_of(step)) is not None:
            return _Ahead(layers=frozenset((layer,)))
        attends = step.number in self.ways.attending
        if attends or step.name in op.RECURRENT or any(node.step.weighted for node in step.outputs):
            return _Ahead(weight=True, attention=attends)
        found = _Ahead()
        for node in step.outputs:
            if node not in self.flow.numbers:
                found |= self.ahead.get(node, _Ahead())
        return found

    # Layers.

    def _reason_to_stay(self, name: str) -> str:
        """Why a layer is not standardized, wherever it stands; "" for no reason."""
        structure, layer, calls = self.structure, self.structure.maps[name], self.structure.layers[name]
        if isinstance(layer.module, StandardizedFilters) or standardization_of(layer.module) is not None:
            return STANDARDIZED
        if reason := structure.why_left(name):
            return reason
        if structure.is_gate_only(name):
            return GATE
        if len(calls) > 1 and self.has_norms:
            return f"it runs {len(calls)} times"
        if len(calls) > 1 and self._is_recurrent(calls):
            return f"it runs {len(calls)} times, on what came of its own output"
        if any(map(self._is_in_attention, calls)):
            return "it stands beside attention"
        if not bool(layer.own_weight().count_nonzero()):
            return ZERO
        rough = next((function for call in calls for function in self._rough_functions(call)), None)
        if rough is not None:
            return f"the {rough} after it is made for a smaller signal than one of unit variance"
        return _too_few(layer) if layer.fan_in < FEWEST_WEIGHTS else ""

    def _is_scalable(self, name: str) -> bool:
        """Whether nothing speaks against unit variance of what a layer gives, and its weight takes a factor."""
        layer, reason = self.structure.maps[name], self.reasons.get(name, "")
        if layer.problem or layer.own_standardization or name in self.structure.shared:
            return False
        return reason in ("", _too_few(layer)) or (layer.fan_in == 1 and reason == self.structure.why_left(name))

    def _rough_functions(self, call: Call) -> Iterator[str]:
        """The names of the functions of what a layer gives alone that are too rough for unit variance."""
        waiting = [call.output] if call.output is not None else []
        seen = set(waiting)
        while waiting:
            for node in {made for step in self.flow.readers(waiting.pop()) for made in step.outputs} - seen:
                function = self.functions.function_before(node)
                if function is not None and function.base is call.output:
                    if (self.functions.gradient_gain(function) or 0.0) > ROUGHEST:
                        yield function.name
                    seen.add(node)
                    waiting.append(node)

    def _is_recurrent(self, calls: list[Call]) -> bool:
        """Whether a layer runs on what came of its own output."""
        made = {call.output for call in calls}
        inputs = [call.input for call in calls if call.input is not None]
        return any(each in made for node in inputs for each in self.flow.backwards(node, stop=made.__contains__))

    def _is_in_attention(self, call: Call) -> bool:
        """Whether a layer stands beside attention; a convolution in a model without norms: directly before it."""
        if self.structure.is_convolution(call) and not self.has_norms:
            return self._ahead_of(call).attention
        return self.ways.is_near_attention(call)

    def _ahead_of(self, call: Call) -> _Ahead:
        return self.ahead.get(call.output, _Ahead()) if call.output is not None else _Ahead()

    def _is_hidden(self, name: str) -> bool:
        ahead = [self._ahead_of(call) for call in self.structure.layers[name]]
        return any(each.layers or each.weight for each in ahead)

    def _in_a_row(self, names: list[str]) -> list[str]:
        """Those of some layers that stand in a row of so many, in the order in which they run."""
        following = {name: [other for other in names if self._follows(name, other)] for name in names}
        after, before = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for name in names:
            for other in following[name]:
                before[other] = max(before[other], before[name] + 1)
        for name in reversed(names):
            after[name] = max((after[other] + 1 for other in following[name]), default=0)
        return [name for name in names if before[name] + 1 + after[name] >= FEWEST_IN_A_ROW]

    def _follows(self, name: str, other: str) -> bool:
        """Whether a layer reads what another made, with no norm between, and no way from maps to single vectors."""
        first, second = self.structure.layers[name][0], self.structure.layers[other][0]
        ahead = self._ahead_of(first)
        if other not in ahead.layers or ahead.norm or first.output is None or second.input is None:
            return False
        return len(self.flow.shapes[first.output]) <= 2 or len(self.flow.shapes[second.input]) > 2

    # Branches.

    def _is_without_norm(self, addition: Addition) -> bool:
        """Whether an addition ends a branch with no norm in it, that something follows or a layer comes before."""
        structure, ahead = self.structure, self.ahead.get(addition.output, _Ahead())
        region = structure.region(addition, addition.branch)
        if norms_in(structure, region) or is_fusion(structure, addition):
            return False
        if any(self.flow.made_by.get(node) in self.normalizing for node in region):
            return False
        if ahead.norm and not (ahead.layers or ahead.weight):
            return False
        return bool(ahead.layers) or ahead.weight or structure.has_layer_before(addition.ancestor)

    def _layers_inside(self, addition: Addition) -> frozenset[str]:
        return frozenset(layers_in(self.structure, self.structure.region(addition, addition.branch)))

    def _leave_silent_branches(self) -> set[str]:
        """Give all layers of a branch that starts at zero a reason to stay; their names."""
        silent = set[str]()
        for name in [name for name, reason in self.reasons.items() if reason == ZERO]:
            around = min((inside for inside in self.inside.values() if name in inside), key=len, default=frozenset())
            silent |= around
            for other in around - self.reasons.keys():
                self.reasons[other] = f"it lies in a branch that starts at zero, for {name} does"
        return silent


def _too_few(layer: WeightedMap) -> str:
    weights = "1 weight" if layer.fan_in == 1 else f"{layer.fan_in} weights"
    return f"it has {weights} a filter, too few to have their mean removed"


# --- rows of layers without a shortcut --------------------------------------------------------------------------------


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
            if (function := self.functions.function_before(node)) is not None:
                layer = self.functions.layer_before(function.base)
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
