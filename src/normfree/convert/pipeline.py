"""``convert``: take the normalizers out of someone else's model.

The steps, in their order: the model is run once and its dataflow recorded; a plan says what to change; a copy of the
model is changed so, and what has no closed form is measured on the example; the result runs before it is given back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor, nn

from normfree.common.checks import check_choice, check_integer, check_number, invalid
from normfree.common.process import one_thread_at_a_time
from normfree.common.text import quoted
from normfree.convert.apply import Measured, exchange_modules, is_layer_change, is_rescaled, keep_pace, measure
from normfree.convert.asked import modules_asked_about
from normfree.convert.carriers import SignalPaths, sort_norms
from normfree.convert.dataflow import (
    Call,
    Dataflow,
    Trains,
    activation_in,
    class_name,
    is_layer,
    passes_unchanged,
    record_all,
)
from normfree.convert.fresh import NEAR_UNIT, FreshPlan, fresh_plan
from normfree.convert.norms import LOOKED_FOR, NOT_FOLLOWED, norms_that_give_more, norms_without_module
from normfree.convert.outputs import depends_on_values
from normfree.convert.pretrained import fill_constants, pretrained_plan
from normfree.convert.record import (
    BARE,
    COPY,
    OUT_OF_PLACE,
    OUTPUT_COPY,
    WITH_ACTIVATION,
    Beta,
    Change,
    Conversion,
    Converted,
    Kept,
    Start,
    conversion_of,
    modules_of,
)
from normfree.convert.structure import Structure, directly_followed, training_structure, unseen_norms
from normfree.convert.unnormalized import GATE, LAST, STANDARDIZED
from normfree.convert.verify import (
    check_form_of_outputs,
    explain_failures,
    first_mismatching_norm,
    norm_asked_for,
    norms_left_out,
    note_leak,
)
from normfree.signal import spp
from normfree.signal.measure import architecture_in
from normfree.signal.remedies import by_hand
from normfree.trace import operations as op
from normfree.trace.graph import Node
from normfree.trace.inputs import Batch, check_batch, gaussian_like_input_of, move_to_device_of, tensors_of, unwrap
from normfree.trace.preserve import check_finite, check_present, check_statistics

ALPHA, SKIP_GAIN = 0.2, 1.0
"""Of residual branches, where nothing else is asked for."""


LEAST_SCALE, MOST_SCALE = 0.01, 100.0
"""Input scales beyond them stand for a signal of a variance below 1e-4 or above 1e4: something before it is wrong."""


LEAST_SHARE = 1 / 3
"""Share of the variation within channels, of that and of the variance of their means, below which a removed norm is
missed: the next standardized layer makes the whole 1, and leaves this of it to the examples."""


MOST_SEED = 2**64 - 1
"""Torch's generators take no larger one."""


@one_thread_at_a_time()
def convert(
    model: nn.Module,
    example_input: Batch | None = None,
    *,
    start: Start = "fresh",
    alpha: float = ALPHA,
    skip_gain: float = SKIP_GAIN,
    beta: Beta = "plan",
    seed: int = 0,
    source: str | None = None,
) -> Converted:
    """Return a copy of a model without its normalizers, guided by its recorded dataflow.

    *fresh*: norms of convolutional networks are removed; the layers they followed become scaled-weight-standardized
    twins with new weights, their input scaled by γ / β; a residual branch f becomes ``alpha * s * f``, folded into
    its last layer. Of a model without norms all hidden layers and branches become so. *pretrained*: each norm's
    constants are folded into the layer before it as gain, bias and a kept per-filter mean, so that the function in
    evaluation mode stays to rounding; where no layer can take them an affine map per channel stays. Both train at any
    batch size, and examples no longer see each other.

    Args:
        model: any module whose forward runs on the example; it is left as it is.
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments; Gaussian noise of the shape
            the model suggests by default. The *fresh* start also measures with it, so give several examples.
        start: "fresh" or "pretrained".
        alpha: factor of the residual branches (*fresh*).
        skip_gain: initial value of their learnable factor s (*fresh*). 0 starts the network as its shortcuts, as the
            paper's own models do; a shallow network then learns slowly until its few gains have left zero.
        beta: "plan" takes γ and β from closed forms where there are any and measures elsewhere; "measured" measures
            every layer on the example (*fresh*).
        seed: of the new weights.
        source: how the command line builds the original, noted in the record for :func:`normfree.load`.

    Returns:
        The converted model, in the original's mode; its ``conversion`` is the record of every change.

    Raises:
        ValueError: nothing to convert, a norm inside a scripted module, a forward that fails on the example, or an
            argument that breaks its rule; the message names the remedy.

    Source: Brock, De, Smith, ICLR 2021, sections 3 and 4; the rules for foreign structures are this project's.
    """
    __tracebackhide__ = True
    model = unwrap(model)
    _check(model, start, alpha, skip_gain, beta, seed)
    if example_input is None:
        example_input = gaussian_like_input_of(model, generator=torch.Generator().manual_seed(seed))
    if isinstance(example_input, list):
        remedy = "give a tensor, a tuple of positional or a dict of keyword arguments"
        raise ValueError(f"example_input: a list is no batch; {remedy}")
    batch = move_to_device_of(model, example_input)
    check_batch(batch, "example_input")
    flow, trains = record_all(model, batch)
    structure = Structure(flow)
    training = training_structure(model, structure, batch)
    staying = norms_that_give_more(structure.norms)
    asked = modules_asked_about(
        model,
        [name for name in structure.norms if name not in staying],
        [name for name, layer in structure.maps.items() if not layer.problem],
        batch,
        trains=trains,
    )
    staying |= {name: reason for name, reason in asked.items() if name in structure.norms}
    structure.keep({name: reason for name, reason in asked.items() if name in structure.maps})
    record = Conversion(
        model=class_name(model),
        start=start,
        alpha=alpha,
        beta=beta,
        seed=seed,
        input_shapes=tuple(tuple(tensor.shape) for tensor in tensors_of(batch)),
        input_mean_squares=tuple(map(_mean_square, tensors_of(batch))),
        source=source,
        original=modules_of(model),
    )
    if start == "fresh":
        converted = _fresh(model, record, structure, training, batch, staying, trains=trains, skip_gain=skip_gain)
    else:
        converted = _pretrained(model, record, structure, training, batch, staying, trains=trains)
    assert isinstance(converted, Converted), "conversion leaves its record"
    converted.conversion = note_leak(converted, converted.conversion, batch)
    return converted


def _mean_square(values: Tensor) -> float | None:
    """Of dense real numbers, where it is finite."""
    if values.layout is not torch.strided or not values.is_floating_point() or not values.numel():
        return None
    found = float(values.detach().double().square().mean())
    return found if isfinite(found) else None


def _check(model: nn.Module, start: Start, alpha: float, skip_gain: float, beta: Beta, seed: int) -> None:
    __tracebackhide__ = True
    check_choice("start", start, Start)
    check_number("alpha", alpha, 0.0)
    check_number("skip_gain", skip_gain)
    check_choice("beta", beta, Beta)
    if check_integer("seed", seed, 0) > MOST_SEED:
        raise invalid("seed", seed, "must be an integer of 64 bits", "pass a smaller one")
    check_present(model)
    check_finite(model)
    if start == "pretrained":
        check_statistics(model)
    if "conversion" in model._modules and conversion_of(model) is None:
        raise ValueError('model: its submodule "conversion" has the name of the record; give it another')
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {name or 'it'} is a scripted {class_name(module)}, whose modules cannot be exchanged; "
                "convert the model first, and script what normfree.fold makes of it"
            )
        if dotted := next((child for child in module._modules if "." in child), None):  # as setattr allows
            rule = f"the name of its submodule {quoted(dotted)} has a dot, and no path leads to it"
            raise invalid("model", class_name(model), rule, "give it another name")


def _fresh(
    model: nn.Module,
    record: Conversion,
    structure: Structure,
    training: Structure | None,
    batch: Batch,
    staying: dict[str, str],
    *,
    trains: Trains,
    skip_gain: float,
) -> nn.Module:
    """The converted model, what is still open measured.

    Where the measurement shows that after an aggregation little of what a norm's place has is variance within channels
    (nodes have become alike), no layer carries it on: then it is planned again, with an affine map there. Where a
    module runs on its own results, and what it gives grows or fades from run to run, its norms stay.
    """
    uncarried: dict[str, str] = {}
    least, most = NEAR_UNIT
    while True:
        plan = fresh_plan(
            structure,
            model,
            alpha=record.alpha,
            skip_gain=skip_gain,
            beta=record.beta,
            uncarried=uncarried,
            staying=staying,
        )
        _check_reach(model, plan, batch)
        full = _complete(record, model, batch, structure, training, plan.changes, plan.kept, plan.notes)
        converted, replaced = exchange_modules(model, full)
        try:
            with explain_failures(full, model, converted, replaced):
                found = _measure(converted, full, structure, batch, trains=trains, plan=plan)
        except ValueError as failure:
            if not (asked := norm_asked_for(failure, converted, structure.norms.keys() - staying.keys())):
                raise
            staying |= asked
            continue
        off = {name: size for name, size in found.sizes.items() if not least <= size <= most}
        assert not off, f"layers that no norm follows do not give unit variance: {off}"
        more = {
            name: f"without it, {share:.1g} of the variance there is within channels, and the rest between their means"
            for name, share in found.shares.items()
            if name in plan.replaceable and share < LEAST_SHARE
        }
        needed = _needed_in_loops(structure, plan, full, found)
        if not more and not needed:
            break
        uncarried |= more
        staying |= needed
    gone = [change.name for change in full.changes if change.name in structure.norms]
    keep_pace(model, converted, full.changes, directly_followed(structure, gone))
    assert isinstance(converted, Converted), "conversion leaves its record"
    if not depends_on_values(structure.flow):
        check_form_of_outputs(model, converted, replaced, full, batch, trains=trains)
    _note_stream(converted, plan, batch)
    if not plan.unnormalized.beside_norms and (plan.notes or any(one.reason != LAST for one in plan.kept)):
        _check_health(model, converted, plan, batch)
    return converted


def _needed_in_loops(structure: Structure, plan: FreshPlan, record: Conversion, found: Measured) -> dict[str, str]:
    """The removed norms without which what a module makes of its own output leaves its size, and why they stay."""
    least, most = NEAR_UNIT
    scaled = {change.name for change in record.changes if change.alpha is not None}
    carriers = {change.name: change.carried_by for change in record.changes}
    needed: dict[str, str] = {}
    for module, names in plan.loops.items():
        runs = [size for name in names for size in found.runs.get(name, ())]
        ends_branch = any(not scaled.isdisjoint((name, *carriers[name])) for name in names)
        if runs and not least * (record.alpha**2 if ends_branch else 1.0) <= min(runs) <= max(runs) <= most:
            times = len(structure.flow.calls_of[module])
            where = f"{module} runs {times} times on what came of its own output"
            reason = f"{where}, and without it the mean square there goes from {min(runs):.2g} to {max(runs):.2g}"
            needed |= dict.fromkeys(names, reason)
    return needed


def _note_stream(converted: Converted, plan: FreshPlan, batch: Batch) -> None:
    """Note what enters the first residual block where nothing gives it unit variance."""
    if not plan.unscaled:
        return
    entry = spp(converted, batch, gradient=False).entry.avg_channel_var
    least, most = NEAR_UNIT
    if least <= entry <= most:
        return
    record = converted.conversion
    note = (
        f"what enters the first residual block has a variance of {entry:.2g}, given by {', '.join(plan.unscaled[:3])}, "
        f"which takes no factor, so that a branch, of variance {record.alpha**2:.2g}, adds a share of "
        f"{record.alpha**2 / entry:.2g}; scale it there, by its initialization or in the data"
    )
    converted.conversion = replace(record, notes=(*record.notes, note))  # type: ignore[assignment]


def _check_reach(model: nn.Module, plan: FreshPlan, batch: Batch) -> None:
    """Refuse a model without norms none of whose residual branches can be planned.

    Raises:
        ValueError: it is such a model.
    """
    bare = plan.unnormalized
    if bare.beside_norms or not bare.out_of_reach or bare.branches or not bare.layers:
        return
    where, reason = next(iter(bare.out_of_reach.items()))
    branch = f"its branches cannot be planned, such as the one added in {where or 'the model'}: {reason}"
    raise _by_hand(f"model: {class_name(model)} cannot be converted: {branch}", model, batch)


def _check_health(model: nn.Module, converted: nn.Module, plan: FreshPlan, batch: Batch) -> None:
    """Refuse a model without norms whose signal explodes or fades for what conversion has left alone.

    Raises:
        ValueError: it is such a model.
    """
    found = spp(converted, batch, gradient=False).findings
    sick = next((f for f in found if f.severity == "error" and f.kind in ("explosion", "attenuation")), None)
    if sick is None:
        return
    left = next((f"{one.name} ({one.was}): {one.reason}" for one in plan.kept if one.reason != LAST), "")
    cause = left or next(iter(plan.notes), "")
    problem = f"model: {class_name(model)} cannot be converted, for its signal would not be healthy: {cause}"
    raise _by_hand(problem, model, batch)


def _measure(
    converted: nn.Module,
    conversion: Conversion,
    structure: Structure,
    batch: Batch,
    *,
    trains: Trains,
    plan: FreshPlan,
) -> Measured:
    """Set what is still open, and enter it into the record, with notes on what a reader should look at."""
    watched = {name for names in plan.loops.values() for name in names}
    checked = plan.unnormalized.layers
    found = measure(converted, conversion, batch, trains=trains, checked=checked, watched=watched)
    changes = []
    for change in conversion.changes:
        if is_layer_change(change) and change.input_scale is None:
            if change.name not in found.scales:
                raise ValueError(
                    f"example_input: {change.name} does not run on it in the converted model, so its scale cannot be "
                    "measured; give more examples, if what runs depends on them"
                )
            change = replace(change, input_scale=found.scales[change.name])
        elif change.name in found.scales:
            reason = f"measured, for the closed form is off here ({change.reason})"
            change = replace(change, input_scale=found.scales[change.name], reason=reason)
        changes.append(replace(change, correction=found.factors.get(change.name, change.correction)))
    notes = [*conversion.notes, *_notes_on_scales(structure, changes)]
    for name, mean_square in found.lost.items():
        carriers = ", ".join(next(change.carried_by for change in changes if change.name == name))
        notes.append(
            f"at the place of {name} the mean square is {mean_square:.2g}, for what lies between it and {carriers}, "
            'which carry its variance; if few examples are not why, choose beta="measured"'
        )
    for name, same in found.same.items():
        channels, total = same.nonzero().flatten().tolist(), len(same)
        notes.append(
            f"at the place of {name} {len(channels)} of {total} channels are the same throughout the example (first "
            f"{channels[0]}): they have the scale of the others, for their own is not known; if they vary in the data, "
            "give examples in which they do"
        )
    if thawed := [change.name for change in changes if _is_thawed(change, structure, converted)]:
        several = (
            f"{len(thawed)} layers, the first of them {thawed[0]}, were" if len(thawed) > 1 else f"{thawed[0]} was"
        )
        notes.append(f"{several} frozen; drawn anew, they learn: freeze them again where that is not wanted")
    converted.conversion = replace(conversion, changes=tuple(changes), notes=tuple(notes))  # type: ignore[assignment]
    return found


def _is_thawed(change: Change, structure: Structure, converted: nn.Module) -> bool:
    """Whether a layer was frozen, and learns now."""
    if not is_layer_change(change) or is_rescaled(change) or change.within is not None:
        return False
    before, now = structure.layers[change.name][0].module, converted.get_submodule(change.name)
    return not any(p.requires_grad for p in before.parameters()) and any(p.requires_grad for p in now.parameters())


def _notes_on_scales(structure: Structure, changes: list[Change]) -> Iterator[str]:
    """A note on each layer whose input is so large or so small that something before it should be mended."""
    new = {change.name for change in changes}
    for change in changes:
        scale = (change.input_scale or 1.0) / (change.correction or 1.0)
        if not is_layer_change(change) or is_rescaled(change) or LEAST_SCALE <= scale <= MOST_SCALE:
            continue
        node = structure.layers[change.name][0].input
        sources = [] if node is None else structure.nearest_before(node)
        alone = [name for name in sources if name not in new]
        cause = "the input itself" if not sources else f"what comes from {', '.join(sorted(alone or sources)[:3])}"
        stays = ", which conversion left as it is," if alone else ""
        yield (
            f"{change.name} has an input scale of {scale:.4g}: {cause}{stays} reaches it with a mean square of about "
            f"{scale**-2:.2g}; scale it there, by its initialization or in the data"
        )


def _pretrained(
    model: nn.Module,
    record: Conversion,
    structure: Structure,
    training: Structure | None,
    batch: Batch,
    staying: dict[str, str],
    *,
    trains: Trains,
) -> nn.Module:
    """The converted model, in which each norm stays that turns out to do more than its constants say."""
    while True:
        changes, kept = pretrained_plan(model, structure, training, staying)
        full = _complete(record, model, batch, structure, training, changes, kept, [])
        converted, replaced = exchange_modules(model, full)
        fill_constants(model, converted, full.changes, structure.constants)
        try:
            culprit, error = first_mismatching_norm(
                model, converted, replaced, full, batch, trains=trains, sizes=not depends_on_values(structure.flow)
            )
        except ValueError as failure:
            if not (asked := norm_asked_for(failure, converted, structure.norms.keys() - staying.keys())):
                raise
            staying |= asked
            continue
        if culprit is None and (left_out := norms_left_out(model, full, batch, trains=trains)):
            staying |= left_out
            continue
        if culprit is None:
            assert isinstance(converted, Converted), "exchanged modules have their record"
            converted.conversion = replace(full, output_error=error)
            return converted
        staying[culprit] = "what it, or something before it, does is more than its constants say"


BY_HAND = "if its signal is not healthy, set its initialisation by hand: normfree doctor, or this error's note, has how"


NOT_RUN = {
    "fresh": "it did not run on the example input; if it does on another, the layer before it may have changed",
    "pretrained": "it did not run on the example input; on another it does what it did",
}

NO_ROWS = "no row of the example came to it; give an example of which every layer has rows"
"""Why what ran on tensors without values stays, as if it had not run."""


def _complete(
    record: Conversion,
    model: nn.Module,
    batch: Batch,
    structure: Structure,
    training: Structure | None,
    changes: Iterable[Change],
    kept: Iterable[Kept],
    notes: Iterable[str],
) -> Conversion:
    """The record with a plan's changes in the order the modules ran, and everything that was left alone.

    Raises:
        ValueError: nothing was changed; why, and what to do.
    """
    unseen = [  # auxiliary heads in evaluation mode, for instance
        Kept(
            name=name,
            was=class_name(module),
            reason=NO_ROWS if name in structure.flow.without_values else NOT_RUN[record.start],
            norm=True,
        )
        for name, module in unseen_norms(model, structure).items()
    ]
    modules, ran = dict(model.named_modules()), structure.flow.calls_of
    unseen += [
        Kept(name=name, was=class_name(modules[name]), reason=NO_ROWS)
        for name in sorted(structure.flow.without_values - ran.keys())
        if is_layer(modules[name])
    ]
    left = (*kept, *unseen, *norms_without_module(structure.normalizations, structure.norms))
    made = avoid_overwriting(changes, structure, training)
    if not made:
        raise _nothing_to_convert(model, batch, structure, left, record.start)
    order: dict[str, int] = {}
    for number, call in enumerate(structure.flow.calls):
        order.setdefault(call.name, number)
        order.setdefault(call.place, number)
    made.sort(key=lambda change: order.get(change.name, len(order)))
    return replace(record, changes=tuple(made), kept=left, notes=tuple(notes))


def _nothing_to_convert(
    model: nn.Module, batch: Batch, structure: Structure, kept: Iterable[Kept], start: Start
) -> ValueError:
    kept = list(kept)
    norms = [one for one in kept if one.norm]
    if not norms:
        none = f"it has no normalizer that is recognised (looked for: {LOOKED_FOR})"
        if start == "pretrained":
            remedy = 'keep it as it is, or choose start="fresh", which draws weights anew that hold the variance'
            return ValueError(f"model: {class_name(model)} has nothing to convert: {none}; {remedy}")
        stay = [one for one in kept if one.reason != LAST]
        if not stay or {one.reason for one in stay} in ({STANDARDIZED}, {STANDARDIZED, GATE}):
            why = "its layers standardize their weights already" if stay else "no layer that another follows"
            return ValueError(f"model: {class_name(model)} has nothing to convert: {none}, and {why}; keep it as it is")
        first = f"{stay[0].name or 'the model'} ({stay[0].was}) stays, for {stay[0].reason}"
        problem = f"{none}, and none of its layers can be standardized: {first}"
        return _by_hand(f"model: {class_name(model)} cannot be converted: {problem}", model, batch)
    first = norms[0]
    remedy = "keep it as it is"
    if first.reason == NOT_FOLLOWED:
        remedy = "convert the part of it that takes a batch of images, such as detector.backbone"
    elif start == "pretrained" and first.name in structure.norms and first.name not in structure.constants:
        answered = sort_norms(structure, SignalPaths(structure), {}).removed
        remedy = 'choose start="fresh"' if answered else remedy
    stay = f"all {len(norms)} normalizers stay, such as" if len(norms) > 1 else "its normalizer stays,"
    error = ValueError(
        f"model: {class_name(model)} has nothing to convert: {stay} {first.name or 'the model'} ({first.was}): "
        f"{first.reason}; {remedy}"
    )
    for one in norms if len(norms) > 1 else ():  # a traceback shows them all; the message stays one line
        error.add_note(f"{one.name or 'the model'} ({one.was}): {one.reason}")
    return error


def _by_hand(problem: str, model: nn.Module, batch: Batch) -> ValueError:
    """The error of a model without norms that cannot be planned; its note has lines to paste instead."""
    code = by_hand(architecture_in(model, batch)).code
    error = ValueError(f"{problem}; {BY_HAND if code else 'keep it as it is'}")
    if code:
        error.add_note(code)
    return error


def avoid_overwriting(changes: Iterable[Change], structure: Structure, training: Structure | None) -> list[Change]:
    """The changes of a plan, and those by which nothing writes in place into the input of a norm that is removed.

    Hooks, class activation maps and per-example gradients keep what a layer gave; so does autograd of some operations.
    What ran in place on a norm's output would write into the layer's once the norm is gone. An activation module with
    an ``inplace`` flag is set to work out of place, which costs what the norm's own output took and no more; in front
    of any other write (``x += y``, ``F.relu_``) stands a copy. Where the norm alone read the layer's output the copy is
    for such observers only, and :func:`normfree.fold` leaves it out.

    Args:
        changes: the plan.
        structure: of the model in evaluation mode.
        training: of the model in training mode, where it runs in it: dropout writes in place only then.
    """
    structures = [(each, _by_input(each.flow)) for each in (structure, training) if each is not None]
    made: list[Change] = []
    out_of_place: dict[str, tuple[nn.Module, str]] = {}
    for change in changes:
        if change.now not in (BARE, WITH_ACTIVATION, COPY) or change.name not in structure.norms:
            made.append(change)
            continue
        writers: dict[str, nn.Module] = {}
        copied = False
        for each, takers in structures:
            for run in each.norms.get(change.name, ()):
                if not _has_own_activation(each.flow, run):
                    found, others = _writers(each.flow, run, takers)
                    writers |= found
                    copied = copied or others
        if copied:
            inputs = [run.input for run in structure.norms[change.name]]
            alone = all(structure.producing_layer(node, alone=True) is not None for node in inputs)
            reason = f"{change.reason}; what follows writes in place, so it gets a copy"
            made.append(replace(change, now=OUTPUT_COPY if alone else COPY, reason=reason))
        else:
            made.append(change)
            for name, module in writers.items():
                out_of_place.setdefault(name, (module, change.name))
    for name, (module, norm) in out_of_place.items():
        reason = f"inplace=False: it would write into what comes before {norm}, which is gone"
        made.append(Change(name=name, was=class_name(module), now=OUT_OF_PLACE, reason=reason))
    return made


def _has_own_activation(flow: Dataflow, call: Call) -> bool:
    """Whether a norm runs an activation of its own, which stays and gives an output in memory of its own."""
    own = {part for _, part in activation_in(call.module)}
    return bool(own) and any(other.module in own and other.input is not other.output for other in flow.calls)


def _by_input(flow: Dataflow) -> Mapping[Node | None, list[Call]]:
    """The calls that take each activation."""
    found: dict[Node | None, list[Call]] = {}
    for run in flow.calls:
        found.setdefault(run.input, []).append(run)
    return found


def _writers(
    flow: Dataflow, call: Call, by_input: Mapping[Node | None, list[Call]]
) -> tuple[dict[str, nn.Module], bool]:
    """The modules with an ``inplace`` flag that write into a norm's output, and whether anything else does."""
    modules: dict[str, nn.Module] = {}
    others = False
    waiting, seen = [call.output], {call.output}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        takers = by_input.get(node, ())
        flagged = {one.name: one.module for one in takers if getattr(one.module, "inplace", False) is True}
        modules |= flagged
        for step in flow.readers(node):
            places = op.mutated_arguments(step.function)
            written = any(place < len(step.args) and step.args[place] is node for place in places)
            others = others or (written and step.module not in flagged)
            for output in step.outputs if passes_unchanged(step) else ():
                if output not in seen:
                    seen.add(output)
                    waiting.append(output)
    return modules, others
