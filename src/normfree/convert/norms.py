"""What computes a norm, whatever class or function it is written in, and what it computes.

*Modules.* A norm is a module of torch's classes, or one that is a single normalization of its input, or one that is an
affine map of statistics in evaluation mode (:func:`norm_calls`).

*Affine maps.* The recorded operations between a module's input and its output are run again in float64, on 0 and on 1:
of y = scale * x + shift the first gives the shift and the second the sum. That says what any class computes (BatchNorm,
a frozen one of any library, one with another gain than its weight) without reading an attribute by name.

*Normalizations.* An activation x is normalized where it is divided by a statistic of its own size:

    y = f(x) / S(x)        S = root mean square, standard deviation, norm, maximum … of x over some axes

Every activation is related to those it was computed from, its roots: it is an elementwise function of one (layout and
precision aside), or a statistic of one, each with the degree in which it grows with its root (a variance has degree
2, its reciprocal root -1). A product with a statistic of negative degree, or a quotient by one of positive degree, of
the same root is a normalization. A statistic that does not measure size (a mean, a sum of what has signs) is none:
dividing by it is a softmax or a mean over a mask. What a layer, a sigmoid or a softmax makes of a statistic is a
statistic no longer: a gate (squeeze-and-excitation) normalizes nothing. Weights depend on no input and so never appear;
an activation that is used as the weight of a convolution is not counted either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfree.common.torch_compat import written_positions
from normfree.convert.dataflow import (
    Call,
    Dataflow,
    Step,
    activation_in,
    is_layer,
    is_norm,
    is_removable,
    passes_unchanged,
)
from normfree.convert.record import Kept
from normfree.nn.fold import attached_to
from normfree.trace import operations as op
from normfree.trace.graph import Node

LOOKED_FOR = "modules of torch, and operations that divide an activation by its own variance, norm or maximum"
"""What a model is searched for, for messages."""


NOT_FOLLOWED = "no recorded operation leads from the input to it"
"""Why a norm stays in a model whose forward copies its input piece by piece, as detectors do."""


def why_not_followed(calls: Iterable[Call]) -> str:
    """Why it is not known where a norm stands; "" where it is."""
    followed = [call.input is not None and call.output is not None for call in calls]
    if all(followed):
        return ""
    if not any(followed):
        return NOT_FOLLOWED
    return f"it runs {len(followed)} times, and not each time on what comes from the input, as a first state does not"


def norms_that_give_more(norms: Mapping[str, Iterable[Call]]) -> dict[str, str]:
    """The norms whose results the model takes apart, by name, and the reason why they stay."""
    reason = "its forward gives more than the normalized tensor, which its callers take apart"
    return {name: reason for name, calls in norms.items() if any(call.gives_more for call in calls)}


def norm_calls(flow: Dataflow, normalizations: Normalizations) -> tuple[dict[str, list[Call]], dict[str, AffineMap]]:
    """The modules that are norms by what they compute, with their calls in running order, and the constants of those.

    A norm is a module of torch's normalization classes; any other that is one normalization of its input; and any that
    is an affine map of statistics in evaluation mode, unless no layer comes before it: then it prepares the input.
    """
    by_name: dict[str, list[Call]] = flow.calls_by_module(lambda module: not is_layer(module))
    norms, constants = {}, {}
    for name, calls in by_name.items():
        known = is_norm(calls[0].module)
        if not known and any(call.input is None or call.output is None for call in calls):
            continue
        found = affine_map(flow, calls) if known or calls[0].module._buffers else None
        frozen = found is not None and has_statistics(calls[0].module, len(found.scale))
        if found is not None and (known or frozen):
            constants[name] = found
        if known or (frozen and _has_layer_before(flow, calls)) or all(map(normalizations.is_norm, calls)):
            norms[name] = calls
    return norms, constants


def _has_layer_before(flow: Dataflow, calls: list[Call]) -> bool:
    inputs = [call.input for call in calls if call.input is not None]
    return any(
        e.step.weighted for node in inputs for e in flow.backwards(node, stop=lambda each: each.step.weighted > 0)
    )


def has_statistics(module: nn.Module, channels: int) -> bool:
    """Whether a module has buffers with a number for each channel: statistics, which distinguish a norm from a scale.

    A map of parameters alone (a layer scale, an affine layer) normalizes nothing, also not in training.
    """
    buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
    return any(buffer.is_floating_point() and buffer.numel() == channels for buffer in buffers)


_ACTIVATIONS = op.NONLINEAR - {"pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "clamp", "clamp_min", "maximum"}


_LAYOUT = op.VIEW | op.PARTIAL | {"cat"}


_SCALE_OR_SHIFT = op.SCALING | op.ADDITION | {"addcmul"}


def why_unknown(flow: Dataflow, call: Call) -> str:
    """Why it is not known what a norm's module does; "" where it normalizes, and runs its own activation at most."""
    if attached := attached_to(call.module):
        return f"it has {attached}"
    if isinstance(call.module, nn.LocalResponseNorm):
        return "it divides by its neighbouring channels, each position by itself: it keeps no statistics"
    if not is_removable(call.module):
        return "what it does beside normalizing is not known"
    weighted = next((name for name, part in activation_in(call.module) if _has_weights(part)), "")
    if weighted:
        return f"its {weighted} has weights, and what it does beside normalizing is not known"
    more = _beside_normalizing(flow, call)
    return f"its forward does more than normalize ({more})" if more else ""


def _has_weights(part: nn.Module) -> bool:
    """Whether a part of a norm has weights that mix channels, or is a norm itself; an activation may have slopes."""
    mixes = any(parameter.dim() > 1 for parameter in part.parameters())
    return mixes or any(is_norm(module) for module in part.modules())


def _beside_normalizing(flow: Dataflow, call: Call) -> str:
    """An operation of a norm's own forward that has no part in normalizing; "" for none."""
    own = tuple(f"{call.name}.{part}" for part, _ in activation_in(call.module))
    leading = set(flow.backwards(call.output, stop=lambda node: node is call.input)) if call.output else set()
    steps = [
        step
        for step in flow.within(call.name)
        if not step.module.startswith(own) and not leading.isdisjoint(step.outputs)
    ]
    at_once = any(step.name in op.NORM for step in steps)
    for step in steps:
        is_affine = step.name in _SCALE_OR_SHIFT and len(step.inputs) == 1
        if step.name in _ACTIVATIONS or (at_once and not (is_affine or step.name in _LAYOUT | op.NORM)):
            return step.name
    return ""


def norms_without_module(normalizations: Normalizations, modules: Mapping[str, Any]) -> list[Kept]:
    """The normalizations that no exchangeable module stands for, to be recorded: each place once.

    Args:
        normalizations: of the model.
        modules: the norms that are exchanged, or recorded, as modules, by name.
    """
    found: dict[tuple[str, str], list[Normalization]] = {}
    for one in normalizations.found:
        known = any(name in modules for name in _with_ancestors(one.module))
        if not known and not one.centres:
            found.setdefault((one.module, str(one)), []).append(one)
    return [
        Kept(name=module, was=places[0].kind, reason=_reason(module, places), norm=True)
        for (module, _), places in found.items()
    ]


def _reason(module: str, places: list[Normalization]) -> str:
    first, times = places[0], f", {len(places)} times" if len(places) > 1 else ""
    where = module or "the model"
    if first.step.name in _FUNCTIONS:
        return f"{where} normalizes in its own forward, by a function{times}; write it as a module"
    if first.keeps_variance:
        return f"{where} {first} in its own forward{times}; write it as a module that does nothing else"
    return f"{where} {first}{times}: a {first.kind}, which is part of its function"


def _with_ancestors(module: str) -> Iterator[str]:
    """A module's name and those of the modules it lies in, but for the model's own."""
    while module:
        yield module
        module = module.rpartition(".")[0]


_MODE_OF = {
    "batch_norm": 5,
    "native_batch_norm": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit_no_training": None,
    "_batch_norm_no_update": None,
}
"""Where batch normalization is told to use the statistics of the batch; it never does where that is None."""


_AFFINE = frozenset({"mul", "div", "add", "sub", "rsub", "addcmul", "addcdiv", "neg"})


_READ_OUT = frozenset({"_local_scalar_dense", "item"})


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``y_c = scale_c * x_c + shift_c`` for the channels c of an activation [N, C, …]; both are [C], in float64."""

    scale: Tensor
    shift: Tensor

    def equals(self, other: AffineMap) -> bool:
        """Whether it is the same map."""
        pairs = ((self.scale, other.scale), (self.shift, other.shift))
        return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def affine_map(flow: Dataflow, calls: Iterable[Call]) -> AffineMap | None:
    """The map that all calls of a module compute, its own activation apart; None where they compute no such map."""
    maps = [_map_of(flow, call) for call in calls]
    first = maps[0] if maps else None
    return first if first is not None and all(each is not None and first.equals(each) for each in maps) else None


@torch.no_grad()
def _map_of(flow: Dataflow, call: Call) -> AffineMap | None:
    steps = _way(flow, call)
    if not steps:
        return None
    assert call.input is not None
    shape = flow.shapes[call.input]
    if len(shape) < 2:
        return None
    in_layout = all(flow.shapes[step.inputs[0]] == flow.shapes[step.outputs[0]] for step in steps)
    sizes = (1, shape[1], *[1] * (len(shape) - 2)) if in_layout else shape
    ends = []
    for value in (0.0, 1.0):
        x = torch.full(sizes, value, dtype=torch.float64, device="cpu")
        for step in steps:
            x = _repeat(flow, step, x)
        channels = x.transpose(0, 1).flatten(1)
        if x.dim() != len(shape) or len(channels) != shape[1] or not _all_equal(channels):
            return None
        ends.append(channels[:, 0])
    return AffineMap(ends[1] - ends[0], ends[0])


def _way(flow: Dataflow, call: Call) -> list[Step] | None:
    """The operations that lead from a module's input to its output, its own activation apart; None if in no single way.

    An activation that several norms share runs under the name it has in another.
    """
    own = [f"{call.name}.{name}" for name, _ in activation_in(call.module)]
    node, steps = call.output, []
    while node is not None and node is not call.input:
        step = flow.made_by.get(node)
        if step is None or len(step.inputs) != 1:
            return None
        outside = not f"{step.module}.".startswith(f"{call.name}.")
        if not own or not (outside or step.module.startswith(tuple(own))):
            steps.append(step)
        elif steps:
            return None  # what a part does before is none of its activation, as of an embedding before a table is added
        node = step.inputs[0]
    if node is None or not all(map(_is_affine, steps)):
        return None
    numbers = any(
        isinstance(leaf, float) for s in steps if s.name in _AFFINE for leaf in tree_leaves((s.args, s.kwargs))
    )
    if numbers and any(step.name in _READ_OUT for step in flow.within(call.name)):
        return None  # a number that was read out of an activation is no constant
    return steps[::-1]


def _is_affine(step: Step) -> bool:
    """Whether an operation scales and shifts its one input by constants, or only carries it on."""
    if passes_unchanged(step):
        return True
    if step.name in _MODE_OF:
        mode = _MODE_OF[step.name]
        return step.args[3] is not None and (mode is None or not step.args[mode])
    if step.name not in _AFFINE:
        return False
    places = [place for place, value in enumerate(step.args) if isinstance(value, Node)]
    divides = {"div": 1, "addcdiv": 2}.get(step.name)
    return len(places) == 1 and places[0] != divides and not any(isinstance(v, Node) for v in step.kwargs.values())


def _repeat(flow: Dataflow, step: Step, x: Tensor) -> Tensor:
    """What an operation makes of other values, in float64."""
    if passes_unchanged(step):
        return flow.laid_out(step, x)
    if step.name in _MODE_OF:
        weight, bias, mean, variance = (None if each is None else _double(each) for each in step.args[1:5])
        eps = step.args[7 if step.name == "batch_norm" else -1]  # torch's own is not decomposed in inference mode
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, float(eps))
    args, kwargs = tree_map(
        lambda value: x.clone() if isinstance(value, Node) else _double(value), (step.args, step.kwargs)
    )
    return step.function(*args, **kwargs)


def _double(value: Any) -> Any:
    return value.detach().cpu().double() if isinstance(value, Tensor) else value


def _all_equal(rows: Tensor) -> bool:
    """Whether each row holds one number, or what is none."""
    return bool(((rows == rows[:, :1]) | rows.isnan()).all())


_FUNCTIONS = op.NORM | {"instance_norm"}
"""Operations that normalize as a whole."""


_VARIANCES = frozenset({"var", "var_mean"})


_DEVIATIONS = frozenset({"std", "std_mean"})


_NORMS = frozenset({"linalg_vector_norm", "norm", "_foreach_norm"})


_MAXIMA = frozenset({"amax", "amin", "max", "min", "aminmax"})


_SUMS = frozenset({"sum", "nansum"})


_MEANS = frozenset({"mean", "nanmean", "median"})


_LOCAL = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d", "cumsum"})


_POOLED = frozenset({"_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mkldnn_adaptive_avg_pool2d"})


_REDUCING = _VARIANCES | _DEVIATIONS | _NORMS | _MAXIMA | _SUMS | _MEANS | _LOCAL | _POOLED


_SCATTERING = {"index_add": 3, "scatter_add": 3, "scatter_reduce": 3, "index_reduce": 3, "index_put": 2}
"""Sums over groups of rows, and where what they sum is among their arguments."""


_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "abs": 1.0}


_BOUNDS = frozenset({"clamp", "clamp_min", "clamp_max", "nan_to_num"})


_LARGER = frozenset({"maximum", "minimum", "fmax", "fmin"})


_PRODUCTS = frozenset({"mul", "div", "true_divide"})


_SUMMANDS = frozenset({"add", "sub", "rsub", "addcmul", "addcdiv"})


_COPIES = frozenset({"repeat", "repeat_interleave", "tile", "expand", "neg", "constant_pad_nd"})


_GROUPED = op.PARTIAL | {"take", "index"}


_NO_FUNCTION = frozenset({"_softmax", "_log_softmax", "_safe_softmax", "glu", "where", "pow"}) | _BOUNDS | _LARGER


_BENDING = op.NONLINEAR - _NO_FUNCTION - frozenset(_POWERS)


_MOST_ROOTS = 16
"""Roots kept of an activation, the nearest ones: chains of elementwise operations are short."""


RATIO = "ratio of its norms"


@dataclass(frozen=True)
class Statistic:
    """What is taken over some axes of an activation.

    Attributes:
        what: in words, such as "mean square".
        over: what it is taken over: "examples", "channels", "positions", "neighbours".
    """

    what: str
    over: frozenset[str]

    def __str__(self) -> str:
        over = ", ".join(sorted(self.over))
        return f"{self.what} over {over}" if over else self.what


@dataclass(frozen=True)
class Relation:
    """How an activation depends on a root r.

    Attributes:
        degree: it grows with the root as r^degree, constants that are added aside.
        statistic: what it is a statistic of the root in; None for an elementwise function of it.
        magnitude: it is a power or a norm and so measures size.
        centred: a statistic of the root was subtracted from it.
        bent: an activation function was applied: nothing is known of its degree.
    """

    degree: float = 1.0
    statistic: Statistic | None = None
    magnitude: bool = False
    centred: bool = False
    bent: bool = False


Relations = Mapping[Node, Relation]


@dataclass(frozen=True, eq=False)
class Normalization:
    """One place at which an activation is normalized by its own statistics.

    Attributes:
        step: the operation that divides by the statistic, or that normalizes as a whole.
        statistic: what it is divided by; of an operation that only subtracts a mean, that.
        roots: the activations whose statistic it is, equal but for layout, precision and constant factors.
        centres: it subtracts a mean, and divides by nothing.
        bent: an activation function is part of it.
    """

    step: Step
    statistic: Statistic
    roots: frozenset[Node]
    centres: bool = False
    bent: bool = False

    @property
    def module(self) -> str:
        """The innermost module that ran it."""
        return self.step.module

    @property
    def output(self) -> Node:
        """The normalized activation."""
        return self.step.outputs[0]

    def is_of(self, node: Node, among: Normalizations) -> bool:
        """Whether it is an activation, in any layout and precision, that is normalized."""
        return node in self.roots or any(among.is_function_of(root, node) for root in self.roots)

    @property
    def kind(self) -> str:
        """What it is called."""
        if self.step.name in _FUNCTIONS:
            return self.step.name
        known = {
            "mean square": "root mean square norm",
            "variance": "standardization",
            "mean": "centring",
            RATIO: "response normalization",
        }
        other = "normalization over examples" if "examples" in self.statistic.over else "normalization of vectors"
        return known.get(self.statistic.what, other)

    @property
    def is_of_vectors(self) -> bool:
        """Whether it divides by the norm of vectors, which a constant may turn into a root mean square."""
        vectors = self.step.name not in _FUNCTIONS and self.statistic.what == "norm" and not self.bent
        return vectors and not self.statistic.over & {"examples", "neighbours", "nodes"}

    @property
    def keeps_variance(self) -> bool:
        """Whether it does what torch's norms do: divide by a root mean square or a standard deviation, and no more."""
        whole = self.step.name in _FUNCTIONS or self.kind in ("root mean square norm", "standardization")
        return whole and not self.bent and not self.statistic.over & {"neighbours", "nodes"}

    def __str__(self) -> str:
        if self.step.name in _FUNCTIONS:
            return "normalizes by a function"
        if self.centres:
            return f"subtracts the {self.statistic} of an activation"
        if self.statistic.what == RATIO:
            return f"multiplies an activation by the {self.statistic}"
        size = {"mean square": "root mean square", "variance": "standard deviation"}
        what = size.get(self.statistic.what, self.statistic.what)
        return f"divides an activation by its {replace(self.statistic, what=what)}"


UNIT_SIZE = 0.25, 4.0
"""Mean squares of what a norm gives; vectors of unit length have one over their number of values."""


def _gives_unit_size(flow: Dataflow, call: Call) -> bool:
    """Whether a module's operations, run again on noise of two sizes, give a mean square near 1 both times."""
    assert call.input is not None and call.output is not None, "asked of a call that is followed"
    leading = set(flow.backwards(call.output, stop=lambda node: node is call.input))
    steps = [step for step in flow.within(call.name) if not leading.isdisjoint(step.outputs)]
    noise = torch.randn(flow.shapes[call.input], generator=torch.Generator().manual_seed(0))
    least, most = UNIT_SIZE
    for size in (1.0, 8.0):
        made = {call.input: size * noise}
        for step in steps:
            if written_positions(step.function) or any(node not in made for node in step.inputs):
                return False
            args, kwargs = tree_map(partial(_value_of, made), (step.args, step.kwargs))
            try:
                with torch.no_grad():
                    result = step.function(*args, **kwargs)
            except RuntimeError:  # another device or precision than that of the noise
                return False
            made.update(zip(step.outputs, (t for t in tree_leaves(result) if isinstance(t, Tensor)), strict=False))
        if call.output not in made or not least <= float(made[call.output].double().square().mean()) <= most:
            return False
    return True


def _value_of(made: Mapping[Node, Tensor], value: Any) -> Any:
    return made[value] if isinstance(value, Node) else value


@dataclass(eq=False)
class Normalizations:
    """The normalizations of a dataflow.

    Attributes:
        flow: the dataflow.
        found: in the order they ran, those of torch's functions among them.
    """

    flow: Dataflow
    found: list[Normalization] = field(default_factory=list)
    relations: dict[Node, Relations] = field(default_factory=dict)
    by_factor: dict[Node, list[tuple[int, Normalization]]] = field(default_factory=dict)
    """Those that multiply or divide by an activation, and the power of it that they multiply by."""

    def __post_init__(self) -> None:
        for step in self.flow.steps:
            self._enter(step)
            if step.name in _PRODUCTS:
                self._take_back(step)
        self.found = [one for one in self.found if not _is_weight(self.flow, one.output)]

    @cached_property
    def examples(self) -> int | None:
        """The number of examples, where all inputs agree on it, or all but those that hold numbers, as edges do."""
        inputs = [node for node in self.flow.shapes if node not in self.flow.made_by and len(node.parents) == 1]
        inputs = [node for node in inputs if node not in self.flow.numbers] or inputs
        sizes = {self.flow.shapes[node][0] for node in inputs if self.flow.shapes[node]}
        return sizes.pop() if len(sizes) == 1 else None

    @cached_property
    def inside(self) -> dict[str, list[Normalization]]:
        """Those that ran inside each module, its parts included, by its name."""
        found: dict[str, list[Normalization]] = {}
        for one in self.found:
            for name in (*_with_ancestors(one.module), ""):
                found.setdefault(name, []).append(one)
        return found

    def related(self, value: Any) -> Relations:
        """The relations of an operand: to itself, and to its roots; none of what does not depend on the input."""
        if not isinstance(value, Node):
            return {}
        return {value: Relation(), **self.relations.get(value, {})}

    def is_function_of(self, node: Node, root: Node) -> bool:
        """Whether an activation is another one scaled and shifted by constants and its own statistics, or is it."""
        relation = self.related(node).get(root)
        return relation is not None and relation.statistic is None and not relation.bent and not relation.magnitude

    def is_norm(self, call: Call) -> bool:
        """Whether a call of a module is one normalization of its input, scaled and shifted by constants at most."""
        given, made = call.input, call.output
        if given is None or made is None or given is made:
            return False
        return any(
            one.is_of(given, self)
            and self.is_function_of(made, one.output)
            and (one.keeps_variance or (one.is_of_vectors and _gives_unit_size(self.flow, call)))
            for one in self.inside.get(call.name, ())
        )

    def _enter(self, step: Step) -> None:
        if step.name in _FUNCTIONS and step.inputs:
            self.found.append(Normalization(step, self._of_function(step), frozenset(step.inputs[:1])))
            return
        for position, node in enumerate(step.outputs):
            if relations := self._after(step, position):
                nearest = sorted(relations, key=lambda root: -root.level)[:_MOST_ROOTS]
                self.relations[node] = {root: relations[root] for root in nearest}

    def _take_back(self, step: Step) -> None:
        """Forget a division by a statistic that is multiplied by again before a layer reads it, as in a quantizer."""
        for index, value in enumerate(step.args[:2]):
            if not isinstance(value, Node):
                continue
            factor, power = self._as_power(value)
            power = -power if index == 1 and step.name != "mul" else power
            other = step.args[1 - index]
            for before, one in self.by_factor.get(factor, ()) if isinstance(other, Node) else ():
                between = self.flow.backwards(other, stop=lambda node: node.step.weighted > 0)
                if one in self.found and power == -before and one.output in between:
                    self.found.remove(one)
            if self.found and self.found[-1].step is step:
                self.by_factor.setdefault(factor, []).append((power, self.found[-1]))

    def _as_power(self, node: Node) -> tuple[Node, int]:
        """The activation that one is, or is the reciprocal of, and the power 1 or -1 of it."""
        power, step = 1, self.flow.made_by.get(node)
        while step is not None and len(step.inputs) == 1 and (step.name in op.VIEW or step.name == "reciprocal"):
            power, node = (-power if step.name == "reciprocal" else power), step.inputs[0]
            step = self.flow.made_by.get(node)
        return node, power

    def _after(self, step: Step, position: int) -> Relations:
        """The relations of what an operation makes, the first or another thing of several."""
        name, args = step.name, step.args
        first = self.related(args[0]) if args else {}
        if name in _REDUCING:
            return self._reduce(step, first, position)
        if name in _SCATTERING:
            source = args[_SCATTERING[name]] if len(args) > _SCATTERING[name] else None
            return self._scatter(self.related(source))
        if name in op.VIEW or name in _COPIES:
            sources = [self.related(node) for node in step.inputs]
            return sources[-1] if sources and (len(step.inputs) == 1 or name == "copy") else {}
        if name in _GROUPED:
            return _statistics_in(first)
        if name in _POWERS:
            return _power(first, _POWERS[name], magnitude=name in ("square", "abs"))
        if name == "pow":
            power = args[1] if len(args) > 1 else None
            if isinstance(power, (int, float)) and len(step.inputs) == 1:
                return _power(first, float(power), magnitude=power % 2 == 0)
            return _bend(first)
        if name in _BOUNDS:
            return {
                r: each if each.statistic or each.magnitude else replace(each, bent=True) for r, each in first.items()
            }
        if name in _PRODUCTS or name in _SUMMANDS or name in _LARGER or name == "where":
            return self._combine(step)
        if name in op.CONVOLUTION | op.LINEAR and len(step.inputs) == 1:
            return _weigh(self.related(step.inputs[0]))
        if name in ("bmm", "matmul") and len(step.inputs) == 2 and self.flow.shapes[step.outputs[0]][-2:] == (1, 1):
            return self._reduce(step, self._product(step, args[0], args[1], divide=False), 0)
        return _bend(first) if name in _BENDING and len(step.inputs) == 1 else {}

    # Statistics.

    def _reduce(self, step: Step, relations: Relations, position: int) -> Relations:
        name, made = step.name, {}
        if name in ("max", "min") and position == 1:  # where it is
            return made
        squared = 2.0 if name in _VARIANCES else 1.0
        over = self._over(step)
        for root, each in relations.items():
            if each.bent:
                continue
            if name in _VARIANCES | _DEVIATIONS and position == 0:
                what, measures = "variance", True
            elif name in _NORMS:
                what, measures = "norm", True
            elif name in _MAXIMA:
                what, measures = "maximum", True
            else:
                plain = "sum" if name in _SUMS or name in ("bmm", "matmul") else "mean"
                what, measures = _named(plain, each), each.magnitude
            if each.statistic is not None:
                what = each.statistic.what if each.magnitude or not measures else what
                over_both = each.statistic.over | over
                measures = measures or each.magnitude
            else:
                over_both = over
            degree = each.degree * (squared if position == 0 else 1.0)
            made[root] = Relation(degree, Statistic(what, over_both), magnitude=measures)
        return made

    def _scatter(self, relations: Relations) -> Relations:
        over = frozenset({"nodes"})
        return {
            root: Relation(each.degree, Statistic(_named("mean", each), over), magnitude=each.magnitude)
            for root, each in relations.items()
            if not each.bent and each.statistic is None
        }

    def _over(self, step: Step) -> frozenset[str]:
        """What a reduction is taken over."""
        if step.name in _LOCAL:
            return frozenset({"neighbours"})
        if step.name in _POOLED:
            return frozenset({"positions"})
        node = step.inputs[0]
        if step.name in ("bmm", "matmul"):
            return frozenset({"channels"})
        return self.kinds_of_axes(node, reduced_axes(step, len(self.flow.shapes[node])))

    def kinds_of_axes(self, node: Node, axes: Iterable[int]) -> frozenset[str]:
        """What axes of an activation hold: "examples", "channels", "positions"; a number where that is not known."""
        shape = self.flow.shapes[node]
        channels = node.note.channel_axis % len(shape) if shape else 0
        known = node.note.axis is not None or len(shape) < 4

        def kind(axis: int) -> str:
            if axis == 0 and shape[:1] == (self.examples,):
                return "examples"
            if not known:
                return f"axis {axis}"
            return "channels" if axis == channels else "positions"

        return frozenset(kind(axis) for axis in axes)

    def _of_function(self, step: Step) -> Statistic:
        """The statistic of torch's own normalizing functions."""
        node = step.inputs[0]
        dimensions = len(self.flow.shapes[node])
        if "layer_norm" in step.name or "rms_norm" in step.name:
            shape = next((a for a in step.args[1:] if isinstance(a, (list, tuple))), (1,))
            axes: Iterable[int] = range(dimensions - len(shape), dimensions)
        elif "group_norm" in step.name:
            axes = range(1, dimensions)
        else:
            axes = [axis for axis in range(dimensions) if axis != 1]
        return Statistic("mean square" if "rms" in step.name else "variance", self.kinds_of_axes(node, axes))

    # Products, quotients and sums.

    def _combine(self, step: Step) -> Relations:
        name, args = step.name, step.args
        if len(args) < 2:
            return {}
        if name == "where":
            return _statistics_in(self._sum(step, args[1], args[2], keep=True)) if len(args) > 2 else {}
        if name in _LARGER:
            return self._sum(step, args[0], args[1], keep=True)
        if name in ("addcmul", "addcdiv"):
            scaled = self._product(step, args[1], args[2], divide=name == "addcdiv")
            return self._sum(step, args[0], scaled)
        if name in _PRODUCTS:
            return self._product(step, args[0], args[1], divide=name != "mul")
        return self._sum(step, args[0], args[1])

    def _product(self, step: Step, left: Any, right: Any, *, divide: bool) -> Relations:
        first, second = self._operand(left), self._operand(right)
        sign, made, by = (-1.0 if divide else 1.0), {}, set[Node]()
        statistic: Statistic | None = None
        bent = False
        for root in sorted({*first, *second}, key=lambda node: node.level):  # the earliest root names the statistic
            a, b = first.get(root), second.get(root)
            if a is None or b is None:
                if (one := self._beside_other(step, a, b, left, right, sign)) is not None:
                    made[root] = one
                continue
            degree = a.degree + sign * b.degree
            if a.statistic is not None and b.statistic is not None:
                ratio = a.magnitude and b.magnitude and degree == 0
                both = Statistic(RATIO if ratio else a.statistic.what, a.statistic.over | b.statistic.over)
                made[root] = Relation(degree, both, magnitude=a.magnitude or b.magnitude)
            elif a.statistic is None and b.statistic is None:
                square = a == b and not divide and not a.bent
                made[root] = Relation(degree, magnitude=square, centred=a.centred, bent=not square)
            else:
                value, other = (a, b) if a.statistic is None else (b, a)
                against = other.degree * (sign if other is b else 1.0)
                divides = against < 0 or other.statistic.what == RATIO  # type: ignore[union-attr]
                if other.magnitude and divides and not value.magnitude and not (divide and other is a):
                    by.add(root)
                    statistic = other.statistic if statistic is None else statistic
                    bent = bent or value.bent or other.bent
                made[root] = replace(value, degree=degree, bent=value.bent or other.bent)
        if statistic is not None:
            self.found.append(Normalization(step, statistic, frozenset(by), bent=bent))
        return made

    def _operand(self, value: Any) -> Relations:
        return value if isinstance(value, dict) else self.related(value)

    def _beside_other(
        self, step: Step, a: Relation | None, b: Relation | None, left: Any, right: Any, sign: float
    ) -> Relation | None:
        """The relation to a root of a product with something that does not depend on that root; None for none."""
        one, other = (a, right) if a is not None else (b, left)
        assert one is not None
        degree = one.degree if a is not None else sign * one.degree
        if not isinstance(other, (Node, dict)):
            bent = one.bent or (one.statistic is None and a is None and sign < 0)
            return replace(one, degree=degree, bent=bent)
        if one.statistic is None:
            return None
        node = left if a is not None else right
        kept = isinstance(node, Node) and self.flow.shapes[node] == self.flow.shapes[step.outputs[0]]
        return replace(one, degree=degree) if kept else None

    def _sum(self, step: Step, left: Any, right: Any, *, keep: bool = False) -> Relations:
        """Of a sum or difference; with ``keep`` of what takes one of two, such as a maximum."""
        first, second = self._operand(left), self._operand(right)
        made: dict[Node, Relation] = {}
        mean: Statistic | None = None
        roots = set[Node]()
        for root in dict.fromkeys((*first, *second)):
            a, b = first.get(root), second.get(root)
            if a is None or b is None:
                one, other = (a, right) if a is not None else (b, left)
                assert one is not None
                if not isinstance(other, (Node, dict)):
                    made[root] = replace(one, bent=one.bent or (keep and not one.statistic and not one.magnitude))
                continue
            if a.statistic is not None and b.statistic is not None:
                wider = a if a.magnitude else b
                what = "variance" if a.magnitude != b.magnitude and a.degree == b.degree == 2 else wider.statistic.what  # type: ignore[union-attr]
                both = Statistic(what, a.statistic.over | b.statistic.over)
                made[root] = Relation(max(a.degree, b.degree), both, magnitude=wider.magnitude)
            elif a.statistic is None and b.statistic is None:
                same = (a.degree, a.magnitude) == (b.degree, b.magnitude) and not (a.bent or b.bent)
                made[root] = replace(a, centred=a.centred or b.centred, bent=not same)
            else:
                value, statistic = (a, b) if a.statistic is None else (b, a)
                if keep:
                    made[root] = replace(statistic, bent=True)
                    continue
                made[root] = replace(value, centred=True)
                if statistic.statistic.what == "mean" and value == Relation() and not statistic.magnitude:  # type: ignore[union-attr]
                    mean = statistic.statistic
                    roots.add(root)
        if mean is not None and step.name in ("sub", "rsub", "add"):
            self.found.append(Normalization(step, mean, frozenset(roots), centres=True))
        return made


def _is_weight(flow: Dataflow, node: Node) -> bool:
    """Whether an activation is used as the weight of a convolution: computed weights are no signal."""
    waiting, seen = [node], {node}
    while waiting:
        for step in flow.readers(waiting.pop()):
            if step.name in op.CONVOLUTION and len(step.args) > 1 and step.args[1] in seen:
                return True
            for made in step.outputs if step.name in op.VIEW and len(step.inputs) == 1 else ():
                if made not in seen:
                    seen.add(made)
                    waiting.append(made)
    return False


def reduced_axes(step: Step, dimensions: int) -> tuple[int, ...]:
    """The axes that a reduction of one activation is taken over."""
    candidates = [step.kwargs["dim"]] if "dim" in step.kwargs else list(step.args[1:])
    if step.name in _NORMS and "dim" not in step.kwargs:  # its first argument is the order of the norm
        candidates = candidates[1:]
    axes = next((a for a in candidates if isinstance(a, (int, list, tuple)) and not isinstance(a, bool)), None)
    if axes is None or axes == [] or dimensions == 0:
        return tuple(range(dimensions))
    axes = axes if isinstance(axes, (list, tuple)) else (axes,)
    return tuple(axis % dimensions for axis in axes)


def _named(reduction: str, each: Relation) -> str:
    """What a mean or a sum of a relation's values is called."""
    if not each.magnitude:
        return reduction
    if reduction == "sum":
        return "norm"
    if each.degree == 1:
        return "mean magnitude"
    return "variance" if each.centred else "mean square"


def _statistics_in(relations: Relations) -> Relations:
    return {root: each for root, each in relations.items() if each.statistic is not None}


def _weigh(relations: Relations) -> Relations:
    """Of what a layer sums of magnitudes, such as the squares by which a divisive normalization divides."""
    over = frozenset({"channels"})
    return {
        root: Relation(each.degree, Statistic("weighted norm", over), magnitude=True)
        for root, each in relations.items()
        if each.magnitude and each.statistic is None and not each.bent
    }


def _bend(relations: Relations) -> Relations:
    return {root: replace(each, bent=True) for root, each in relations.items() if each.statistic is None}


def _power(relations: Relations, power: float, *, magnitude: bool) -> Relations:
    """The relations of a power."""
    return {
        root: replace(
            each,
            degree=each.degree * power,
            magnitude=each.magnitude or (magnitude and each.statistic is None),
            bent=each.bent or (each.statistic is None and power < 1 and not each.magnitude and not magnitude),
        )
        for root, each in relations.items()
    }
