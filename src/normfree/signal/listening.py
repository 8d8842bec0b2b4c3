"""Listening to one batch after another, and merging what each gave as if they were one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normfree.common.text import first_line
from normfree.signal.points import Plan, Point, PointRecorder, Recording
from normfree.trace.inputs import Batch, call, check_batch, examples_in, tensors_in, tensors_of
from normfree.trace.modules import ModuleStack
from normfree.trace.preserve import Preserved


class Listener:
    """Hears batch after batch.

    Args:
        model: the model, in its measuring mode.
        preserved: its keeper.
        points: "auto", "residual" or "layers"; "auto" is settled by the first batch.
        wake: measure branches silenced by a zero gain as if it were one.
        seed: of what the model draws, from the first batch on.

    Attributes:
        first: the first batch; None before.
        suspect: the first batch with values that are not finite; None without one.
        plan: what the first batch showed that the others must know.
        recording: the moments of all batches.
        batches, examples: how many were heard.
    """

    def __init__(self, model: nn.Module, preserved: Preserved, *, points: str, wake: bool, seed: int) -> None:
        self.model, self.preserved, self.wake, self.seed = model, preserved, wake, seed
        self.points = points
        self.first: Batch | None = None
        self.suspect: Batch | None = None
        self.batches = self.examples = 0
        self.plan: Plan | None = None
        self.recording = Recording()

    def hear(self, batch: Batch) -> None:
        """Run one batch; the first decides what is measured, and runs again where that was not known beforehand."""
        check_batch(batch)
        if self.first is None:
            self.preserved.seed(self.seed)
        recording, finite, plan = self._record(batch)
        if self.plan is None:
            if not plan.complete:
                self.preserved.undo()
                self._wake(plan.woken)
                self.preserved.seed(self.seed)
                self.plan = plan
                recording, finite, _ = self._record(batch)
            self.plan = plan
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
            self.recording = _merged(self.recording, recording)
        if self.suspect is None and not (finite and _finite(recording)):
            self.suspect = batch
        self.batches += 1
        self.examples += examples_in(batch) or 0

    def _wake(self, names: Sequence[str]) -> None:
        """Set the zero gains that silence a branch to one; the keeper puts them back."""
        for name in names:
            gain = self.model.get_parameter(name)
            self.preserved.before_writing(gain)
            gain.detach().fill_(1)

    def _record(self, batch: Batch) -> tuple[Recording, bool, Plan]:
        """Run one batch under a recorder, without gradients; also whether all outputs were finite, and the plan."""
        stack = ModuleStack(self.model)
        recorder = PointRecorder(
            self.model,
            tensors_of(batch),
            points="layers" if self.points == "layers" else "residual",
            plan=self.plan,
            stack=stack,
            before_writing=self.preserved.before_writing,
            examples=examples_in(batch),
            wake=self.wake and self.plan is None,
        )
        with self.preserved.guarding(tensors_of(batch)):
            with torch.no_grad(), stack.followed(recorder.begin_module), recorder:
                outputs = run(self.model, batch, stack)
            finite = all(_is_finite(t) for t in outputs if t.is_floating_point())
            plan = recorder.finish(outputs)
        return recorder.recording, finite, plan


_WHAT = {"residual": "residual addition", "layers": "weighted operation"}
_INSTEAD = {
    "residual": 'choose points="layers" for a point per weighted layer',
    "layers": "a model needs a convolution, a linear layer or an embedding that its input goes through",
}


def run(model: nn.Module, batch: Batch, stack: ModuleStack) -> list[Tensor]:
    """Call the model; its output tensors, or one line that says where and why it failed."""
    try:
        output = call(model, tree_map(lambda leaf: leaf, batch))  # in containers that a model may write into
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in tensors_of(batch))
        where = f" in {stack.last_running}" if stack.last_running else ""
        reason = first_line(error).rstrip(".")
        remedy = "give a batch that the model's forward takes"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
            remedy = "give a smaller batch or smaller images"
        if "positional argument" in reason and isinstance(batch, tuple) and not batch[-1].is_floating_point():
            remedy = "if the last of them are labels, give the inputs alone"
        if "more than 1 value per channel" in reason:
            remedy = 'give a batch of two examples or more, or choose mode="eval"'
        raise ValueError(
            f"model: {type(model).__name__} failed on an input of shape {shapes}{where}: "
            f"{type(error).__name__}: {reason}; {remedy}"
        ) from error
    tensors = tensors_in(output)
    if not tensors:
        raise ValueError(
            f"model: {type(model).__name__} returned {type(output).__name__}, which holds no tensor; "
            "its forward must return what it computes"
        )
    return tensors


def _is_finite(x: Tensor) -> bool:
    """Whether all values are finite: so they are if their sum is, which takes one reading; else each is looked at."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _finite(recording: Recording) -> bool:
    return all(math.isfinite(point.output.avg_channel_var) for point in recording.points)


def _merged(first: Recording, second: Recording) -> Recording:
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
    return Recording(
        _merged_points(first.entry, second.entry),
        *(
            [_merged_points(a, b) for a, b in zip(getattr(first, name), getattr(second, name), strict=True)]
            if name != "outputs" or widths[0] == widths[1]
            else []
            for name in ("points", "layers", "outputs", "entries")
        ),
    )


def _merged_points(first: Point, second: Point) -> Point:
    return replace(
        first,
        output=first.output.merged(second.output),
        branch=first.branch.merged(second.branch) if first.branch and second.branch else None,
        activated=first.activated.merged(second.activated) if first.activated and second.activated else None,
        woken=first.woken or second.woken,
    )
