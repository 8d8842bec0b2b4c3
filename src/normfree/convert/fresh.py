"""The plan of a fresh start: norms out, standardized layers in, every branch scaled, every input of unit variance.

*Input scales.* A layer fed by an elementwise function of a Gaussian activation of variance β² has input scale γ / β.
Every other input (a pool, a gate's product, a stream that was rectified before) has no closed form and is measured.

*Variances.* The plan knows Gaussian activations: a standardized layer gives variance 1 (alpha² where it ends a branch),
a sum with constant factors the sum of its independent operands, a concatenation the mean over its channels. So inside a
stage the residual stream climbs by alpha² a block and a projection shortcut resets it, as in the variance plan of our
own networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normfree.convert.carriers import Ending, NormPlan, Places, SignalPaths, find_endings, sort_norms, uncarried_norms
from normfree.convert.dataflow import Call, Dataflow, Step, activation_in, class_name, is_batch_norm, passes_unchanged
from normfree.convert.record import BARE, SCALED, UNITS, WITH_ACTIVATION, Beta, Change, Kept
from normfree.convert.structure import Structure, WeightedMap, layers_to_standardize
from normfree.nn import gamma
from normfree.trace import operations as op
from normfree.trace.graph import Node

NEAR_UNIT = 0.25, 4.0
"""Planned variances at a removed norm's place that need nothing to restore 1 there."""


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """The arguments of a fresh start that the ends of branches get."""

    alpha: float
    skip_gain: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fresh start changes and keeps.

    Attributes:
        changes: the modules to be exchanged; input scales to be measured are None.
        kept: what is left alone.
        notes: branches that could not be scaled.
        replaceable: the norms behind aggregations that go, in whose place an affine map could stand.
    """

    changes: list[Change]
    kept: list[Kept]
    notes: list[str]
    replaceable: frozenset[str]


def fresh_plan(
    structure: Structure,
    model: nn.Module,
    *,
    alpha: float,
    skip_gain: float,
    beta: Beta,
    uncarried: Mapping[str, str],
) -> Plan:
    """What to change for a variance-preserving start.

    Args:
        structure: of the model.
        model: the original.
        alpha: factor of the residual branches.
        skip_gain: initial value of their learnable factor.
        beta: "plan" (closed forms where there are any) or "measured".
        uncarried: norms whose variance was measured not to be carried by the layers near them, and how.
    """
    norms = sort_norms(structure)
    chosen, layers_kept = layers_to_standardize(structure, norms.removed)
    removed = set(norms.removed)
    found = find_endings(structure, model, removed, chosen)
    variance = plan_variances(structure, set(chosen), removed, found, alpha)
    restored = _restore_variance(structure, norms, set(chosen), found, variance)
    restored |= {name: _affine_change(structure, name, reason) for name, reason in uncarried.items()}
    scales = input_scales(structure, chosen, removed - set(restored), found, alpha)
    for name in {name for ending in found for name in ending.absorbing}:
        scales[name] = InputScale(None, "measured, for what it reads is scaled by the end of a branch, too")
    if beta == "measured":
        scales = {name: InputScale(None, "measured, as asked for") for name in scales}
    factors = _Factors(alpha=alpha, skip_gain=skip_gain)
    carriers = {name: ending for ending in found for name in ending.modules}
    modules, places = dict(model.named_modules(remove_duplicate=False)), Places(structure.flow, model)
    changes = []
    for name, layers in norms.removed.items():
        if name in carriers:
            changes.append(_scale_change(modules[name], name, carriers[name], factors, carried_by=layers))
        else:
            changes.append(restored.get(name) or _removal(structure, name, layers))
    changes += [_affine_change(structure, name, reason) for name, reason in norms.affine.items()]
    changes += [_layer_change(structure.maps[n], n, scales[n], carriers, factors) for n in chosen]
    for name, ending in carriers.items():
        if name not in scales and name not in norms.removed:
            is_shared = places.calls[name][0].name in places.shared
            within = name.rpartition(".")[0] if is_shared else None
            changes.append(_scale_change(modules[name], name, ending, factors, within=within))
    kept = [Kept(name=n, was=class_name(modules[n]), reason=reason, norm=True) for n, reason in norms.kept.items()]
    kept += [Kept(name=n, was=class_name(modules[n]), reason=reason) for n, reason in layers_kept.items()]
    notes = [
        f"branch added in {e.addition.name or 'the model'} keeps its size: {e.problem}" for e in found if e.problem
    ]
    without = uncarried_norms(structure, norms, {change.name for change in changes if change.name not in removed})
    assert not without, f"nothing carries the variance of {without}"
    passed = {name for ending in found if ending.modules for name in ending.passed}
    replaceable = {
        name
        for name in norms.aggregated - passed - set(restored)
        if len(structure.norms[name]) == 1 and is_batch_norm(structure.norms[name][0].module)
    }
    return Plan(changes=changes, kept=kept, notes=notes, replaceable=frozenset(replaceable))


def _restore_variance(
    structure: Structure, norms: NormPlan, chosen: set[str], found: list[Ending], variance: dict[Node, float]
) -> dict[str, Change]:
    """What stands in the place of a norm where the layers before it do not leave a variance near 1 there.

    Nothing is needed where a standardized layer takes over before anything but homogeneous functions sees it, nor where
    a branch's end before it has been scaled by alpha. Else it is an affine map, or a factor where a norm is by example.
    """
    passed = {name for ending in found if ending.modules for name in ending.passed}
    absorbing = SignalPaths(structure, chosen).absorbing if norms.between - passed else {}
    least, most = NEAR_UNIT
    restored = {}
    for name in norms.between - passed:
        calls = structure.norms[name]
        missing = [
            call
            for call in calls
            if not least <= variance.get(call.input, 0.0) <= most and call.output not in absorbing  # type: ignore[arg-type]
        ]
        if not missing:
            continue
        layers = ", ".join(norms.removed[name])
        if len(calls) == 1 and is_batch_norm(calls[0].module):
            restored[name] = _affine_change(structure, name, f"what lies between it and {layers} changes the variance")
        else:
            restored[name] = Change(
                name=name,
                was=class_name(calls[0].module),
                now=SCALED,
                reason=f"a measured factor: what lies between it and {layers} changes the variance",
                carried_by=(*norms.removed[name], name),
            )
    return restored


def _removal(structure: Structure, name: str, layers: tuple[str, ...]) -> Change:
    norm = structure.norms[name][0].module
    fused = activation_in(norm)
    stays = f"; its {', '.join(class_name(part) for _, part in fused)} stays" if fused else ""
    return Change(
        name=name,
        was=class_name(norm),
        now=WITH_ACTIVATION if fused else BARE,
        reason=f"removed{stays}",
        carried_by=layers,
    )


def _affine_change(structure: Structure, name: str, reason: str) -> Change:
    return Change(
        name=name,
        was=class_name(structure.norms[name][0].module),
        now=UNITS,
        reason=f"an affine map with the example's mean and variance of each channel: {reason}",
        carried_by=(name,),
    )


def _layer_change(
    layer: WeightedMap, name: str, scale: InputScale, carriers: dict[str, Ending], factors: _Factors
) -> Change:
    ends = name in carriers
    correction = carriers[name].modules[name] if ends else 1.0
    place = _place(carriers[name]) + _correction_reason(correction) if ends else ""
    bare = "; one weight a filter leaves nothing to standardize" if layer.fan_in == 1 else ""
    return Change(
        name=name,
        was=class_name(layer.module),
        now=layer.now(fresh=True),
        reason=scale.reason + place + bare,
        input_scale=None if scale.value is None else scale.value * correction,
        alpha=factors.alpha if ends else None,
        skip_gain=_skip_gain(carriers[name], factors) if ends else None,
        correction=correction if correction != 1 else None,
        weight=layer.layout,
    )


def _scale_change(
    module: nn.Module,
    name: str,
    ending: Ending,
    factors: _Factors,
    *,
    carried_by: tuple[str, ...] = (),
    within: str | None = None,
) -> Change:
    correction = ending.modules[name]
    what = "removed" if carried_by else "the gate" if correction != 1 else "the activation"
    return Change(
        name=name,
        was=class_name(module),
        now=SCALED,
        reason=f"{what}{_place(ending)}{_correction_reason(correction)}",
        alpha=factors.alpha,
        skip_gain=_skip_gain(ending, factors),
        correction=correction if correction != 1 else None,
        carried_by=carried_by,
        within=within,
    )


def _skip_gain(ending: Ending, factors: _Factors) -> float | None:
    return None if ending.learned or ending.constant else factors.skip_gain


def _correction_reason(correction: float) -> str:
    """What a factor restores, for a reason; "" for none."""
    if correction == 1:
        return ""
    return f"; {correction:g} for what {'a sigmoid halves' if correction == 2 else 'sigmoids take'}"


def _place(ending: Ending) -> str:
    """Which branch a module ends, for its reason."""
    own = f", whose {ending.learned} stands for the skip gain" if ending.learned else ""
    fixed = ", by alpha alone" if ending.constant and not ending.learned else ""
    return f"; ends the branch added in {ending.addition.name or 'the model'}{own}{fixed}"


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
    variance = plan_variances(structure, set(chosen), removed, list(found), alpha)
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
                self.known[key] = gamma(_replay(steps, base, node))
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


def plan_variances(
    structure: Structure, chosen: set[str], removed: set[str], found: list[Ending], alpha: float
) -> dict[Node, float]:
    """The variance of every activation that is expected to be Gaussian.

    Args:
        structure: of the model.
        chosen: names of the layers to be standardized.
        removed: names of the norms to be passed as if they were not there.
        found: the endings of the branches. A branch of which the plan knows no variance (it ends in a gate or an
            activation) is taken to have what its factor is for, alpha².
        alpha: of the branches.
    """
    carriers = {name for ending in found for name in ending.modules}
    variance: dict[Node, float] = {}
    for name in chosen:
        for call in structure.layers[name]:
            if call.output is not None:
                variance[call.output] = alpha**2 if name in carriers else 1.0
    sums = {ending.addition.output: ending for ending in found if ending.modules}
    for step in structure.flow.steps:
        for node in step.outputs[:1]:
            if node in variance or not step.inputs:
                continue
            if node in sums:
                variance.setdefault(sums[node].addition.branch, alpha**2 * sums[node].square)
            through = structure.is_plain_norm(node, removed) or (step.name in op.NORM and step.module in removed)
            value = _after(step, variance, structure.flow, through=through)
            if value is not None:
                variance[node] = value
    return variance


def _after(step: Step, variance: Mapping[Node, float], flow: Dataflow, *, through: bool) -> float | None:
    """The variance of what an operation makes, or None; ``through`` an operation that is not left in the model."""
    known = [variance[node] for node in step.inputs if node in variance]
    if len(known) < len(step.inputs):
        return None
    if through or passes_unchanged(step):
        return known[0]
    if step.name == "cat":
        sizes = [math.prod(flow.shapes[node]) for node in step.inputs]
        return sum(size * value for size, value in zip(sizes, known, strict=True)) / sum(sizes)
    factors = _factors(step)
    if factors is None or len(factors) != len(step.inputs) or len({flow.shapes[node] for node in step.inputs}) > 1:
        return None
    if len(factors) != len(step.inputs):  # a constant is added, which moves the mean: what follows is measured
        return None
    total = dict.fromkeys(step.inputs, 0.0)  # an activation added to itself is twice as large
    for node, factor in zip(step.inputs, factors, strict=True):
        total[node] += factor
    return sum(variance[node] * factor**2 for node, factor in total.items())


def _factors(step: Step) -> tuple[float, ...] | None:
    """With what factor each activation enters a linear operation; None for any other one."""
    args = step.args
    if len(step.inputs) == 1 and step.name in op.SCALING:
        other = next((each for each in args if not isinstance(each, Node)), None)
        size = _size(other) or 0.0
        divided = step.name == "div" and isinstance(args[0], Node)
        return None if not size else (size,) if step.name == "mul" else (1 / size,) if divided else None
    if step.name in ("add", "sub"):
        return 1.0, float(step.kwargs.get("alpha", 1)) * (1 if step.name == "add" else -1)
    if step.name == "lerp" and args[:2] == step.inputs:
        share = _size(args[2])
        return None if share is None else (1 - share, share)
    if step.name == "addcmul" and isinstance(args[0], Node):
        size = next((_size(each) for each in args[1:] if not isinstance(each, Node)), None)
        return None if size is None else (1.0, size * float(step.kwargs.get("value", 1)))
    return None


def _size(value: object) -> float | None:
    """A number, or the root mean square of a tensor that is no activation."""
    if isinstance(value, Tensor):
        size = float(value.detach().double().square().mean().sqrt())
        return math.copysign(size, float(value)) if value.numel() == 1 else size
    return float(value) if isinstance(value, (int, float)) else None
