"""``spp``: measure a model and give its signal propagation plot; and find where a value first stops being finite."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from normfree.common.checks import check_choice, check_seed
from normfree.common.torch_compat import DispatchMode, tree_leaves
from normfree.signal.architecture import Architecture
from normfree.signal.findings import findings_of
from normfree.signal.gradients import Gradients, sq_gradients
from normfree.signal.points import PassResult, Point, PointRecorder, Recording
from normfree.signal.propagation import BlockSignal, Entry, NonFinite, Position, SignalPropagation
from normfree.trace import operations as op
from normfree.trace.inputs import (
    Batch,
    ModuleStack,
    batches_of,
    check_batch,
    examples_in,
    gaussian_like_input_of,
    move_to_device_of,
    run_once,
    tensors_of,
    unwrap,
    values_of,
)
from normfree.trace.preserve import Mode, Preserved, check_finite, check_present, preserve_model

Points = Literal["auto", "residual", "layers"]
"""What is plotted: residual additions, weighted layers, or (auto) the latter where there are none of the former."""


def spp(
    model: nn.Module,
    batch: Batch | Iterable[Batch] | None = None,
    *,
    name: str | None = None,
    mode: Mode = "batch-statistics",
    points: Points = "auto",
    gradient: bool = True,
    wake: bool = True,
    seed: int = 0,
    expected_var: Sequence[float] | None = None,
    input_description: dict[str, Any] | None = None,
    configuration: dict[str, Any] | None = None,
) -> SignalPropagation:
    """Measure the signal propagation plot of any PyTorch model; the model is given back bit for bit.

    For the activation x [N, C, …] after every residual addition: the average channel squared mean
    ``mean_c (mean_nhw x)²``, the average channel variance ``mean_c var_nhw x`` (biased), and that variance
    of the branch before it was scaled and added. Blocks are found in the recorded dataflow, so the model
    needs no annotation. A model without residual additions gets a point per weighted layer.

    Args:
        model: any module; compiled and data-parallel wrappers are looked through.
        batch: a tensor, a tuple of positional or a mapping of keyword arguments; or an iterable of those
            (a ``DataLoader`` of (inputs, labels) too), whose moments are merged in one pass as if they
            were one batch; or None for unit Gaussian noise of the shape the model suggests.
        name: what to call the model; its class by default.
        mode: "batch-statistics" (default; evaluation mode with normalizers on the statistics of the batch,
            as the first training step computes them, without dropout's noise), "train" or "eval".
        points: "auto", "residual", or "layers" for a point per weighted layer in any case.
        gradient: also take the mean squared gradient at each point, of a random projection of the output
            for the first batch: one forward and one backward pass more. Where that is not possible (no memory,
            ``torch.no_grad`` inside, an operation without derivative) the plot has no gradient, and
            ``configuration["gradient"]`` says why.
        wake: measure branches silenced at initialisation (zero skip gain or layer scale, zero gain of
            the last norm) as if that gain were one. The parameter is put back.
        seed: of the default noise and the random projection; the global generators are not touched.
        expected_var: predicted variance after each block, drawn beside the measured one. By default what
            the model's own ``expected_variances()`` says, if it has that method;
            ``configuration["expected_var"]`` is True, or says why there is none.
        input_description: what to note of the input, for the plot and the JSON.
        configuration: what else to note of how the measurement was made.

    Returns:
        The measurement, with findings.

    Raises:
        ValueError: for an input that the model does not take, that is empty or not finite, for parameters
            that are not finite, and for unknown options; the message names the argument and the remedy.

    Source: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", ICLR 2021, section 3. The input correlation and the gradient are additions.
    """
    __tracebackhide__ = True
    model = unwrap(model)
    check_choice("mode", mode, Mode)
    check_choice("points", points, Points)
    check_seed(seed)
    check_present(model)
    with preserve_model(model, mode) as preserved:
        preserved.seed(seed)
        if batch is None:
            batch = gaussian_like_input_of(model)
            input_description = input_description or {"kind": "gaussian", "shape": list(batch.shape), "seed": seed}
        measurement = Measurement(model, preserved, points=points, wake=wake, seed=seed)
        for one in batches_of(batch):
            measurement.add(move_to_device_of(model, one))
        if measurement.first is None:
            raise ValueError("batch: the iterable gave no batch; give at least one, and a generator only once")
        recording = measurement.recording
        expected, planned = _expected_variances(model, expected_var, recording)
        gradients = Gradients(None)
        if gradient:
            variances = [point.output.avg_channel_var for point in recording.points]
            earlier = measurement.earlier
            refused = earlier.refused if earlier is not None and measurement.points == "residual" else ()
            gradients = sq_gradients(
                model,
                measurement.first,
                preserved,
                points=measurement.points,
                seed=seed,
                variances=variances,
                refused=refused,
            )
        non_finite = None
        if measurement.suspect is not None:
            check_finite(model)  # a reason to look only now: it reads every weight
            non_finite = first_non_finite(model, measurement.suspect, preserved)
    result = SignalPropagation(
        model=name or type(model).__name__,
        mode=mode,
        input={**(input_description or {"kind": "given"}), **_describe(measurement)},
        entry=_entry(recording.entry),
        blocks=_signals(recording.points, gradients.sq_means, expected),
        layers=_signals(recording.layers),
        outputs=_signals(recording.outputs),
        entries=tuple(map(_entry, recording.entries)),
        unmeasured=recording.unmeasured,
        configuration={
            "points": measurement.points,
            "wake": wake,
            "gradient": gradients.note or gradient,
            "expected_var": planned,
            "seed": seed,
            "torch": str(torch.__version__),
            **(configuration or {}),
        },
    )
    return replace(result, findings=findings_of(result, non_finite, recording.architecture))


def architecture_in(model: nn.Module, batch: Batch) -> Architecture:
    """What a model is made of, as one forward pass shows it.

    Args:
        model: the model; it is given back bit for bit.
        batch: one batch.

    Returns:
        What was recorded; nothing of a model that no weighted operation ran in.
    """
    with preserve_model(model, "batch-statistics") as preserved:
        measurement = Measurement(model, preserved, points="auto", wake=False, seed=0)
        try:
            measurement.add(batch)
        except ValueError:  # it has no point to measure
            return Architecture()
        return measurement.recording.architecture


def _entry(point: Point | None) -> Entry:
    assert point is not None, "a recording with points has an entry"
    return Entry(
        name=point.name,
        shape=point.shape,
        channel_axis=point.channel_axis,
        avg_channel_sq_mean=point.output.avg_channel_sq_mean,
        avg_channel_var=point.output.avg_channel_var,
        input_correlation=point.output.correlation,
    )


_POSITION = tuple(field.name for field in fields(Position))


def _signals(
    points: Sequence[Point],
    gradients: Sequence[float | None] | None = None,
    expected: Sequence[float] | None = None,
) -> tuple[BlockSignal, ...]:
    blocks, seen = [], Counter[str]()
    for index, point in enumerate(points):
        seen[point.name] += 1
        number = seen[point.name]
        position = {name: getattr(point, name) for name in _POSITION}
        position["name"] = point.name if number == 1 else f"{point.name}#{number}"
        blocks.append(
            BlockSignal(
                **position,
                index=index,
                avg_channel_sq_mean=point.output.avg_channel_sq_mean,
                avg_channel_var=point.output.avg_channel_var,
                residual_avg_channel_var=None if point.branch is None else point.branch.avg_channel_var,
                expected_var=None if expected is None else expected[index],
                input_correlation=point.output.correlation,
                own_correlation=point.output.own_correlation,
                avg_sq_gradient=None if gradients is None else gradients[index],
                dead_channels=point.output.dead_fraction,
                activated_avg_channel_sq_mean=point.activated.avg_channel_sq_mean if point.activated else None,
                activated_avg_channel_var=point.activated.avg_channel_var if point.activated else None,
            )
        )
    return tuple(blocks)


def _expected_variances(
    model: nn.Module, given: Sequence[float] | None, recording: Recording
) -> tuple[list[float] | None, bool | str]:
    """The predicted variances, if there is one for every point; and True, or why there are none."""
    own = getattr(model, "expected_variances", None)
    predicted: Any = given if given is not None else own() if callable(own) else None
    if predicted is None:
        return None, "it has no plan: no expected_variances(), and none was given as spp(…, expected_var=…)"
    try:
        numbers = [float(value) for value in predicted]
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected_var: {predicted!r} is no sequence of numbers; give one a point") from error
    if len(numbers) == len(recording.points):
        return numbers, True
    if given is not None:
        raise ValueError(
            f"expected_var: {len(numbers)} predictions for {len(recording.points)} measured points; give one a point"
        )
    return None, f"its expected_variances() are {len(numbers)}, and {len(recording.points)} points were measured"


def _describe(measurement: Measurement) -> dict[str, Any]:
    shapes = [list(tensor.shape) for tensor in tensors_of(measurement.first)]
    shape = shapes[0] if len(shapes) == 1 else shapes
    return {"shape": shape, "batches": measurement.batches, "examples": measurement.examples}


class Measurement:
    """Measures batch after batch, and merges what each gives as if they were one.

    Args:
        model: the model, in its measuring mode.
        preserved: keeps its state.
        points: "auto", "residual" or "layers"; "auto" is settled by the first batch.
        wake: measure branches silenced by a zero gain as if it were one.
        seed: of what the model draws, from the first batch on.

    Attributes:
        first: the first batch; None before.
        suspect: the first batch with values that are not finite; None without one.
        earlier: what the first batch showed that the others must know.
        recording: the moments of all batches.
        batches, examples: how many were measured.
    """

    def __init__(self, model: nn.Module, preserved: Preserved, *, points: Points, wake: bool, seed: int) -> None:
        self.model, self.preserved, self.wake, self.seed = model, preserved, wake, seed
        self.points = points
        self.first: Batch | None = None
        self.suspect: Batch | None = None
        self.batches = self.examples = 0
        self.earlier: PassResult | None = None
        self.recording = Recording()

    def add(self, batch: Batch) -> None:
        """Run one batch; the first decides what is measured, and runs again where that was not known beforehand."""
        __tracebackhide__ = True
        check_batch(batch)
        if self.first is None:
            self.preserved.seed(self.seed)
        recording, finite, result = self._record(batch)
        if self.earlier is None:
            if not result.complete:
                self.preserved.undo()
                self._wake(result.woken)
                self.preserved.seed(self.seed)
                self.earlier = result
                recording, finite, _ = self._record(batch)
            self.earlier = result
        if self.points == "auto":
            self.points = "residual" if recording.points else "layers"
            if not recording.points:
                recording.points, recording.layers = recording.layers, []
                recording.entry = next(iter(recording.entries), None)
        if not recording.points:
            raise ValueError(
                f"points: {self.points!r} leaves nothing to plot, for no {_WHAT[self.points]} was recorded in the "
                f"forward pass of {type(self.model).__name__}; {_INSTEAD[self.points]}"
            )
        if self.first is None:
            self.first, self.recording = batch, recording
        else:
            self.recording = _merge(self.recording, recording)
        if self.suspect is None and not (finite and _finite(recording)):
            self.suspect = batch
        self.batches += 1
        self.examples += examples_in(batch) or 0

    def _wake(self, names: Sequence[str]) -> None:
        """Set the zero gains that silence a branch to one; ``preserved`` restores them."""
        # get_parameter takes a dot in a name, which setattr allows, for a path.
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in names:
            gain = parameters[name]
            self.preserved.before_writing(gain)
            gain.detach().fill_(1)

    def _record(self, batch: Batch) -> tuple[Recording, bool, PassResult]:
        """Run one batch under a recorder, without gradients; also whether outputs were finite, and what it found."""
        __tracebackhide__ = True
        stack = ModuleStack(self.model)
        recorder = PointRecorder(
            self.model,
            tensors_of(batch),
            points="layers" if self.points == "layers" else "residual",
            earlier=self.earlier,
            stack=stack,
            before_writing=self.preserved.before_writing,
            examples=examples_in(batch),
            wake=self.wake and self.earlier is None,
        )
        with self.preserved.guarding(tensors_of(batch)):
            with torch.no_grad(), stack.follow_modules(recorder.begin_module), recorder:
                outputs = run_once(self.model, batch, stack)
            finite = all(_is_finite(t) for t in outputs if t.is_floating_point())
            result = recorder.finish(outputs)
        return recorder.recording, finite, result


_WHAT = {"residual": "residual addition", "layers": "weighted operation"}
_INSTEAD = {
    "residual": 'choose points="layers" for a point per weighted layer',
    "layers": "a model needs a convolution, a linear layer or an embedding that its input goes through",
}


def _is_finite(x: Tensor) -> bool:
    """Whether all values are finite: so they are if their sum is, which takes one reading; else each is looked at."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _finite(recording: Recording) -> bool:
    return all(math.isfinite(point.output.avg_channel_var) for point in recording.points)


def _merge(first: Recording, second: Recording) -> Recording:
    """The moments of two batches as if they were one; outputs only where both have the same."""
    for kind in ("points", "layers"):
        names = [[point.name for point in getattr(recording, kind)] for recording in (first, second)]
        if names[0] == names[1]:
            continue
        raise ValueError(
            f"batch: the model took another way through its blocks ({len(names[0])} points in the first batch, "
            f"{len(names[1])} in a later one); average only over batches that take the same way"
        )
    assert first.entry is not None
    assert second.entry is not None
    widths = [[len(point.output.mean) for point in recording.outputs] for recording in (first, second)]
    merged = {
        name: [_merge_points(a, b) for a, b in zip(getattr(first, name), getattr(second, name), strict=True)]
        for name in ("points", "layers", "entries")
    }
    same = widths[0] == widths[1]
    outputs = [_merge_points(a, b) for a, b in zip(first.outputs, second.outputs, strict=True)] if same else []
    entry = _merge_points(first.entry, second.entry)
    return replace(first, entry=entry, outputs=outputs, **merged)


def _merge_points(first: Point, second: Point) -> Point:
    return replace(
        first,
        output=first.output.merge(second.output),
        branch=first.branch.merge(second.branch) if first.branch and second.branch else None,
        activated=first.activated.merge(second.activated) if first.activated and second.activated else None,
        woken=first.woken or second.woken,
    )


# --- where a value first stops being finite ---------------------------------------------------------------------------


_MASKING = frozenset({"masked_fill", "fill", "full", "scalar_tensor", "where", "lift_fresh", "copy"})
"""What writes an infinity on purpose."""


class _Watch(DispatchMode):
    """Follows values that are not finite from the operation that made them.

    An operation is the origin of a NaN if none of its inputs has one, and of an infinity if all of its
    inputs are finite; a masking that softmax turns into zeros has no descendants, and is never reported.
    """

    def __init__(self, stack: ModuleStack, preserved: Preserved) -> None:
        super().__init__()
        self.stack = stack
        self.preserved = preserved
        self.origins: Any = WeakTensorKeyDictionary()
        self.found: list[NonFinite] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for target in op.written_by(func, args, kwargs):
            self.preserved.before_writing(target)
        inputs = _floating((args, kwargs))
        given = [values_of(tensor) for tensor in inputs]
        had_nan = any(bool(t.isnan().any()) for t in given)
        sound = all(bool(torch.isfinite(t).all()) for t in given)
        largest = max((t.abs().nan_to_num(0, 0, 0).max().item() for t in given if t.numel()), default=0.0)
        inherited = min((self.origins[t] for t in inputs if t in self.origins), default=None)
        result = func(*args, **kwargs)
        name = op.name_of(func)
        for tensor in _floating(result) if name not in op.FACTORY and not name.startswith("empty") else ():
            made = values_of(tensor)
            bad = int((~torch.isfinite(made)).sum())
            if not bad:
                self.origins.pop(tensor, None)
            elif sound or (not had_nan and bool(made.isnan().any())):
                self.origins[tensor] = len(self.found)
                self.found.append(NonFinite(self.stack.name, name, bad, tensor.numel(), largest))
            elif inherited is not None:
                self.origins[tensor] = inherited
        return result


def _floating(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def first_non_finite(model: nn.Module, batch: Batch, preserved: Preserved) -> NonFinite | None:
    """Run the batch again and follow every value that is not finite; the origin of those in the output.

    If the output is finite again, the first origin of any. Deliberate infinities (masks for attention) are
    passed over.

    Args:
        model: the model, in its measuring mode.
        batch: one batch.
        preserved: keeps the values of what is about to be written.
    """
    stack = ModuleStack(model)
    watch = _Watch(stack, preserved)
    with preserved.guarding(tensors_of(batch)), torch.no_grad(), stack.follow_modules(), watch:
        outputs = run_once(model, batch, stack)
    origins = sorted(watch.origins[t] for t in outputs if t in watch.origins)
    unmasked = [found for found in watch.found if found.operation not in _MASKING]
    if origins:
        return watch.found[origins[0]]
    return unmasked[0] if unmasked else None
