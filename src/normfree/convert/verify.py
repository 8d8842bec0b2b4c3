"""A converted model runs before it is given back: it is compared with the original, and searched for leaks.

A leak is a dependence of an example's output on the other examples of its batch, in training mode.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from normfree.common.text import one_line
from normfree.convert.dataflow import (
    Dataflow,
    Step,
    Trains,
    class_name,
    is_batch_norm,
    prepare_run,
    record,
    run_prepared,
)
from normfree.convert.norms import Normalization, Normalizations, reduced_axes
from normfree.convert.outputs import difference
from normfree.convert.record import AFFINE, Conversion, Kept
from normfree.trace import operations as op
from normfree.trace.graph import Node
from normfree.trace.inputs import (
    Batch,
    call,
    examples_in,
    of_this_thread,
    tensors_in,
    tensors_of,
    values_of,
    with_values,
)
from normfree.trace.preserve import Writes

LEAST_ERROR = (1e-2, 0.1)
"""Relative error that is no rounding: TensorFloat-32 makes 1e-3, a norm that was misunderstood 0.1 and more; in half
precision one that has to be looked into."""

LEAST_LEAK = (1e-4, 1e-2)
"""Relative change of an example's output that the other examples make; in half precision."""

JITTER, HALF_JITTER = 1e-6, 2**-8
"""Relative change of the input that tells how much a model makes of rounding; in bfloat16."""

SAMPLE = 4096
"""Values compared of each activation."""

OTHER_INPUTS = ((10.0, 0.0), (0.1, 0.0), (1.0, 2.0), (1.0, -2.0))
"""Factors of an example, and its shifts in standard deviations, on which a model might go another way."""

PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""What whole models can be compared in; half precision rounds too much from layer to layer."""

Pair = tuple[Tensor, Tensor]


@contextmanager
def explain_failures(
    conversion: Conversion, original: nn.Module, converted: nn.Module, replaced: set[nn.Module]
) -> Iterator[None]:
    """While a converted model runs: its forward must take what was exchanged, and not call what was there before.

    Raises:
        ValueError: it fails, or it calls one of the ``replaced`` modules, or one of the original's.
    """
    called: list[nn.Module] = []
    is_here = of_this_thread()
    others = set(original.modules()) - set(converted.modules())

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if (module in replaced or module in others) and is_here():
            called.append(module)

    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    except ValueError:
        if not called:
            raise
    except Exception as error:
        raise ValueError(
            f"model: {conversion.model} does not run once converted ({one_line(error)}); its forward "
            "asks for something of a module that was exchanged: have it ask something else"
        ) from error
    finally:
        handle.remove()
    if called and called[0] in others:
        raise ValueError(
            f"model: once converted, {conversion.model} still calls a {class_name(called[0])} of the original, for a "
            "function put on a module holds the original's modules; write it as a method of the class"
        )
    if called:
        raise ValueError(
            f"model: the forward of {conversion.model} calls a {class_name(called[0])} that it also holds in a plain "
            "list or dict, so that exchanging the submodule has no effect; hold it in an nn.ModuleList alone"
        )


def norm_asked_for(failure: ValueError, converted: nn.Module, norms: Container[str]) -> dict[str, str]:
    """The exchanged norm of which a forward asks for what it no longer has, such as its weight, and why it stays.

    Args:
        failure: of :func:`explain_failures`.
        converted: the model that was run.
        norms: names of those that may stay.

    Returns:
        Nothing if the failure is another one.
    """
    cause = failure.__cause__
    if not isinstance(cause, AttributeError):
        return {}
    name = next((name for name, module in converted.named_modules() if module is cause.obj), None)
    return {name: f"the model's forward asks for its {cause.name}"} if name is not None and name in norms else {}


def first_mismatching_norm(
    original: nn.Module,
    converted: nn.Module,
    replaced: set[nn.Module],
    conversion: Conversion,
    batch: Batch,
    *,
    trains: Trains,
    sizes: bool = True,
) -> tuple[str | None, float]:
    """Compare a converted model with the original, place by place, in evaluation mode.

    Args:
        original: the model.
        converted: its conversion.
        replaced: the modules of the copy in whose place others stand now.
        conversion: the record.
        batch: the example.
        trains: the modules in training mode.
        sizes: the shapes of the outputs do not depend on values, which rounding changes.

    Returns:
        The first norm in whose place the same input gives another output than in the original, by more than rounding,
        None for none; and the largest difference of the model's outputs, over the largest of their values.

    Raises:
        ValueError: every norm's place gives the same, and yet the model does not, or in another form; it fails or calls
            what is gone.
    """
    places = {
        change.name: change.into or change.name
        for change in conversion.changes
        if change.into is not None or change.now == AFFINE
    }
    wanted, returned = _sample(original, places, batch, trains=trains)
    with explain_failures(conversion, original, converted, replaced):
        found, returned_now = _sample(converted, places, batch, trains=trains)
    outputs, now = tensors_in(returned), tensors_in(returned_now)
    suspects = []
    for name, pair in wanted.items():
        other = found.get(name)
        if other is None or _differs(other[0], pair[0]):
            continue  # another way through the model, or a place whose input another one has changed
        if _differs(other[1], pair[1]):
            suspects.append(name)
    if not suspects:
        check_form(conversion, returned, returned_now, sizes=sizes)
    if all(_is_precise(tensor) for tensor in [*outputs, *(tensor for pair in wanted.values() for tensor in pair)]):
        if not suspects:
            _check_outputs(original, conversion, now, outputs, batch, trains=trains)
    elif suspects:
        again = {name: places[name] for name in suspects}
        moved, _ = _sample(original, again, _jitter(batch, HALF_JITTER), trains=trains)
        by_rounding = {name: _relative(moved[name][1], wanted[name][1]) for name in suspects if name in moved}
        suspects = [n for n in suspects if not _relative(found[n][1], wanted[n][1]) <= 3 * by_rounding.get(n, 0.0)]
    return (suspects[0] if suspects else None), _largest(now, outputs)


def check_form(conversion: Conversion, was: Any, now: Any, *, sizes: bool) -> None:
    """Raise ``ValueError`` where a converted model returns something of another form than the original did."""
    __tracebackhide__ = True
    if other := difference(was, now, sizes=sizes):
        raise ValueError(
            f"model: {conversion.model} gives something else once converted: {other}; its forward asks what a module "
            "is that was exchanged, or goes another way for other weights: have it ask something else, or convert a "
            "part of the model without that"
        )


def check_form_of_outputs(
    original: nn.Module,
    converted: nn.Module,
    replaced: set[nn.Module],
    conversion: Conversion,
    batch: Batch,
    *,
    trains: Trains,
) -> None:
    """Run both models, and refuse a converted one whose outputs have not the form of the original's.

    Raises:
        ValueError: it is such a model; it fails or calls what is gone.
    """
    __tracebackhide__ = True
    _, was = _sample(original, {}, batch, trains=trains)
    with explain_failures(conversion, original, converted, replaced):
        _, now = _sample(converted, {}, batch, trains=trains)
    check_form(conversion, was, now, sizes=True)


def _check_outputs(
    original: nn.Module,
    conversion: Conversion,
    now: list[Tensor],
    outputs: list[Tensor],
    batch: Batch,
    *,
    trains: Trains,
) -> None:
    """Raise ``ValueError`` where a model's outputs are not the original's, by more than rounding makes of them."""
    error = _largest(now, outputs)
    if error <= LEAST_ERROR[0]:
        return
    _, moved = _sample(original, {}, _jitter(batch, JITTER), trains=trains)
    if error > 10 * _largest(tensors_in(moved), outputs):
        raise ValueError(
            f"model: {conversion.model} gives other outputs once converted (relative error {error:.1g}), for something "
            'beside the layers uses what was folded; convert a part of the model without it, or choose start="fresh"'
        )


def norms_left_out(model: nn.Module, conversion: Conversion, batch: Batch, *, trains: Trains) -> dict[str, str]:
    """Norms that fold into a layer which runs without them on other inputs, and why they stay.

    What a forward does may depend on the values that it is given. The original runs on the example scaled and shifted;
    a norm's constants belong into its layer if each runs as often as the other. Inputs on which it fails tell nothing.
    """
    folded = {change.name: change.into for change in conversion.changes if change.into is not None}
    if not folded or not any(tensor.is_floating_point() for tensor in tensors_of(batch)):
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    runs = Counter[nn.Module]()
    watched = {modules[name] for pair in folded.items() for name in pair}
    hooks = [(module, lambda module, inputs, named: runs.update([module])) for module in watched]
    uneven = list[set[str]]()
    with prepare_run(model, batch, trains=trains, before=hooks) as (keeper, given), Writes(keeper):
        for scale, shift in ((1.0, 0.0), *OTHER_INPUTS):  # as it is, too: a layer may run by its weight alone
            runs.clear()
            try:
                call(model, _moved(given, scale, shift))
            except Exception:  # of any kind: the forward is the user's
                uneven.append(set())
            else:
                uneven.append({norm for norm, layer in folded.items() if runs[modules[norm]] != runs[modules[layer]]})
    names = set().union(*uneven[1:]) - uneven[0]
    said = "on other inputs, such as the example scaled or shifted, {} does not run as often as it"
    return {name: said.format(folded[name]) for name in folded if name in names}


@torch.no_grad()
def _moved(batch: Batch, scale: float, shift: float) -> Batch:
    """A batch whose numbers are scaled, and shifted by so many of their standard deviations."""

    def moved(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            return tensor
        return tensor * scale + shift * tensor.std(correction=0)

    return tree_map(moved, batch)


@dataclass(frozen=True)
class BatchStatistics:
    """A batch norm's running statistics beside those of its input, in a run that normalizes by the batch.

    Attributes:
        name: of the norm.
        ratio: mean over the channels of the input's mean square about the running mean, over the running variance's;
            near 1 for data like those that the statistics are of.
        trained: whether the statistics have taken in any batch.
    """

    name: str
    ratio: float
    trained: bool


def statistics_of_batch(model: nn.Module, batch: Batch) -> list[BatchStatistics]:
    """Compare the running statistics of each batch norm with its input in training mode, at its first run.

    There the norms before it normalize by the batch, so a difference is reported where it begins, not again after it.

    Args:
        model: the model; left as it is.
        batch: what it takes.
    """
    found: dict[str, BatchStatistics] = {}

    def before(name: str, mean: Tensor, variance: Tensor, trained: bool) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next((leaf for leaf in tree_leaves((inputs, named)) if isinstance(leaf, Tensor)), None)
            if x is None or name in found:
                return
            channels = x.detach().double().transpose(0, 1).flatten(1) if x.dim() > 1 else x.detach().double()[:, None]
            about = (channels - mean.double().to(x.device)[:, None]).square().mean()
            ratio = float(about / variance.double().mean().clamp_min(1e-300))
            if math.isfinite(ratio) and ratio > 0:
                found[name] = BatchStatistics(name, ratio, trained)

        return look

    hooks = []
    for name, module in model.named_modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if is_batch_norm(module) and isinstance(mean, Tensor) and isinstance(variance, Tensor):
            batches = getattr(module, "num_batches_tracked", None)
            new = bool((mean == 0).all() and (variance == 1).all())
            trained = not new or (isinstance(batches, Tensor) and int(batches) > 0)
            hooks.append((module, before(name, mean.clone(), variance.clone(), trained)))
    run_prepared(model, batch, mode="train", before=hooks)
    return list(found.values())


def change_by_others(model: nn.Module, batch: Batch) -> float | None:
    """The relative change of the first example's output in training mode when the others become copies of it.

    Integers beside them (the edges of a graph) that do not agree on the number of examples stay as they are.

    Returns:
        The change; None where it is no more than rounding makes, or where it is not known: the inputs do not agree
        on a number of examples, or training wants something else, such as targets.
    """
    tensors = [tensor for tensor in tensors_of(batch) if tensor.dim()]
    if examples_in(batch) is None:
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1 or (examples := sizes.pop()) < 2:
        return None

    def alone(tensor: Any) -> Any:
        alike = any(tensor is each for each in tensors) and tensor.layout == torch.strided
        return tensor[:1].expand_as(tensor).clone() if alike else tensor

    outputs = []
    for each in (batch, tree_map(alone, batch)):
        try:
            made = run_prepared(model, each, mode="train")
            outputs.append([t[:1].clone() for t in made if t.dim() and len(t) == examples])
        except Exception:  # of any kind: the forward is the user's
            return None
    pairs = [(a, b) for a, b in zip(*outputs, strict=False) if a.shape == b.shape]
    changes = [_relative(a, b) for a, b in pairs if _differs(a, b, LEAST_LEAK)]
    return max(changes) if changes else None


def _sample(model: nn.Module, places: dict[str, str], batch: Batch, *, trains: Trains) -> tuple[dict[str, Pair], Any]:
    """A sample of what each norm's place took and gave in its first run that had values; and what the model returns."""
    modules = dict(model.named_modules(remove_duplicate=False))
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        return lambda module, inputs, named: _keep(given, name, (inputs, named))

    def after(name: str) -> Any:
        return lambda module, inputs, named, output: _keep(made, name, output)

    hooks = [(modules[place], before(name)) for name, place in places.items()]
    ends = [(modules[name], after(name)) for name in places]
    with prepare_run(model, batch, trains=trains, before=hooks, after=ends) as (keeper, taken), Writes(keeper):
        returned = call(model, taken)
    return {name: (given[name], made[name]) for name in places if name in given and name in made}, returned


def _keep(into: dict[str, Tensor], name: str, value: Any) -> None:
    tensor = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)
    if tensor is not None and tensor.numel() and name not in into:
        flat = values_of(tensor.detach()).flatten()
        into[name] = flat[:: max(1, len(flat) // SAMPLE)].clone()


@torch.no_grad()
def _jitter(batch: Batch, size: float) -> Batch:
    """A batch changed by about as much as rounding of a relative size changes it."""
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return with_values(tensor, added)

    def added(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values)
        return values + size * values.abs().mean() * noise

    return tree_map(moved, batch)


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of outputs of a model; of those that have not the shapes of before, none."""
    return max((_relative(a, b) for a, b in zip(found, wanted, strict=False) if a.shape == b.shape), default=0.0)


def _differs(found: Tensor, wanted: Tensor, least: tuple[float, float] = LEAST_ERROR) -> bool:
    """Whether two tensors differ by more than their precision explains."""
    precise = _is_precise(found) and _is_precise(wanted)
    return not _relative(found, wanted) <= least[0 if precise else 1]


def _is_precise(tensor: Tensor) -> bool:
    return tensor.dtype in PRECISE or not (tensor.is_floating_point() or tensor.is_complex())


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; of integers the share that differs. Infinite for other sizes."""
    if found.shape != wanted.shape:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    if not (found.is_floating_point() or found.is_complex()):
        return float((found != wanted).double().mean())
    exact = torch.complex128 if found.is_complex() or wanted.is_complex() else torch.float64
    found, wanted = found.detach().to(exact), wanted.detach().to(exact)
    size = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / size if size > 0 else float(found.abs().max())


_ROWS = frozenset({"index_select", "gather", "index_add", "scatter_add", "scatter_reduce", "index_reduce", "scatter"})
"""Operations along an axis, their second argument, that read or write rows by their index."""

_STATISTICS = frozenset({"mean", "sum", "var", "var_mean", "std", "std_mean", "amax", "amin", "cumsum"})
_OVER_EXAMPLES = frozenset({"examples", "nodes"})


def note_leak(converted: nn.Module, conversion: Conversion, batch: Batch) -> Conversion:
    """The record with what is seen of a converted model whose examples see each other in training mode.

    A normalization over the examples is a normalizer left. Messages along the first axis, as between the nodes of a
    graph or from one time step to the next, are the model's own design: a note. Of anything else it is recorded what
    was seen, not what it would be. Where a BatchNorm stays nothing is added, for it explains what is seen.
    """
    if any(is_batch_norm(converted.get_submodule(one.name)) for one in conversion.norms_left):
        return conversion
    change = change_by_others(converted, batch)
    if change is None:
        return conversion
    flow = _in_training(converted, batch)
    normalizations = None if flow is None else Normalizations(flow)
    seen = f"an example's output changed when the other examples of its batch did (relative change {change:.2g})"
    if normalizations is not None and (norms := _over_examples(normalizations)):
        known = {one.name for one in conversion.norms_left}
        kept = [
            Kept(name=name, was=norm.kind, reason=f"{seen}: {name or 'the model'} {norm}", norm=True)
            for name, norm in norms.items()
            if name not in known
        ]
        return replace(conversion, kept=(*conversion.kept, *kept))
    step = None if normalizations is None else _along_first_axis(normalizations)
    if step is not None:
        where, what = step.module or "the model", op.plain_name(step.name)
        note = (
            f"{seen}: {where} computes {what} along the first axis, so that its rows see each other: by design where "
            "they are nodes of a graph or time steps; a normalizer over the batch that is not recognised does so too"
        )
        return replace(conversion, notes=(*conversion.notes, note))
    cause = None if normalizations is None else _statistic_of_examples(normalizations)
    name, was = ("", "") if cause is None else (cause.module, cause.name)
    reason = (
        "no normalization that is recognised does so"
        if cause is None
        else f"{name or 'the model'} computes {was} of them"
    )
    kept = Kept(name=name, was=was or "its forward", reason=f"{seen}: {reason}")
    return replace(conversion, kept=(*conversion.kept, kept))


def _in_training(model: nn.Module, batch: Batch) -> Dataflow | None:
    """The dataflow in training mode; None where the model wants something else then, such as targets."""
    try:
        return record(model, batch, mode="train")
    except ValueError:
        return None


def _over_examples(normalizations: Normalizations) -> dict[str, Normalization]:
    """The normalizations, or subtractions of a mean, over the examples: the first of each module, by its name."""
    found: dict[str, Normalization] = {}
    for one in normalizations.found:
        if one.statistic.over & _OVER_EXAMPLES:
            found.setdefault(one.module, one)
    return found


def _along_first_axis(normalizations: Normalizations) -> Step | None:
    """The first operation by which the rows of the first axis see each other, other than a statistic of all."""
    return next((step for step in normalizations.flow.steps if _mixes_rows(normalizations, step)), None)


def _mixes_rows(normalizations: Normalizations, step: Step) -> bool:
    flow, examples = normalizations.flow, normalizations.examples

    def has_rows(value: object) -> bool:
        return isinstance(value, Node) and flow.shapes[value][:1] == (examples,)

    args = step.args
    if step.name in _ROWS:
        return len(args) > 1 and args[1] == 0 and any(map(has_rows, step.inputs))
    if step.name == "index":
        return has_rows(args[0]) and next(iter(args[1]), None) is not None
    if step.name in ("mm", "addmm", "_sparse_mm", "_sparse_addmm"):
        return bool(step.inputs) and isinstance(args[-1], Node) and args[-1] in step.inputs
    if step.name in ("select", "unbind"):  # of one row each, as a loop over time steps takes them
        return has_rows(args[0]) and (args[1] if len(args) > 1 else 0) == 0
    return False


def _statistic_of_examples(normalizations: Normalizations) -> Step | None:
    """The first statistic of all examples that does not normalize."""
    flow = normalizations.flow
    for step in flow.steps:
        if step.name in _STATISTICS and step.inputs and step.name not in op.NORM:
            node = step.inputs[0]
            axes = reduced_axes(step, len(flow.shapes[node]))
            if "examples" in normalizations.kinds_of_axes(node, axes):
                return step
    return None
