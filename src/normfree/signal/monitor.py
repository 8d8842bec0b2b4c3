"""Measure a model while it trains: its signal propagation plot every few steps, at a hundredth of the time."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from normfree.common.checks import check_choice, require
from normfree.common.files import parse_dataclass, read_json, refused, write_atomically
from normfree.common.process import seeded
from normfree.common.text import first_line, one_line, quoted, short_repr, shortened
from normfree.common.torch_compat import tree_map
from normfree.signal.measure import Points, spp
from normfree.signal.propagation import SEVERITIES, Curve, Finding, Kind, SignalPropagation
from normfree.signal.remedies import DOCS
from normfree.trace.inputs import Batch, unwrap
from normfree.trace.preserve import Mode

CURVES: tuple[Curve, ...] = ("avg_channel_sq_mean", "avg_channel_var", "residual_avg_channel_var", "avg_sq_gradient")


class SignalMonitor:
    """Records ``spp`` of one fixed batch through training, and leaves the training bit for bit as it is.

    ::

        with SignalMonitor(model, probe) as monitor:  # records step 0
            for images, labels in loader:
                ...
                optimizer.step()
                monitor.step()
        monitor.to_html("signal.html")  # a slider over the steps

    Only rank 0 measures; other ranks wait for it in their next collective. The model may be compiled or wrapped for
    data parallelism: the module inside is measured.

    Args:
        model: the model that is trained.
        batch: what to measure with: a tensor, a tuple of positional or a mapping of keyword arguments, of a few
            examples (8 to 32); it is copied. None for Gaussian noise of the shape the model suggests.
        every: steps between records. None (default) measures as often as ``share`` allows.
        share: without ``every``, the largest part of the time since the start that measuring may take. The records
            of the first and of the last step are made in any case.
        writer: a TensorBoard ``SummaryWriter``, or whatever has its ``add_scalar``.
        tag: first part of the names of the scalars.
        mode, points, gradient, wake, seed, name: as ``spp``'s; ``wake`` is off, for in training the network is
            what its gains make it.

    Attributes:
        history: the records, a ``SignalHistory``: a list of (step, ``SignalPropagation``).
        steps: steps taken.
        failures: (step, message) of measurements that failed after the first, such as for weights that have become
            infinite; each is a warning too, for a monitor does not end a run.

    Raises:
        ValueError: for options that make no sense, and models that one rank cannot run alone (sharded parameters,
            SyncBatchNorm over several ranks); when it starts, as ``spp``.

    Source: the curves are those of Brock, De, Smith, ICLR 2021, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch | None = None,
        *,
        every: int | None = None,
        share: float = 0.01,
        writer: Any = None,
        tag: str = "signal",
        name: str | None = None,
        mode: Mode = "batch-statistics",
        points: Points = "auto",
        gradient: bool = False,
        wake: bool = False,
        seed: int = 0,
    ) -> None:
        __tracebackhide__ = True
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every: {every!r} is no number of steps; give 1 or more, or None to go by the time")
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"share: {share!r} is no part of the time; give a number above 0 and up to 1, as 0.01")
        check_choice("mode", mode, Mode)
        check_choice("points", points, Points)
        self.model = unwrap(model)
        _check_alone(self.model, mode)
        self.every, self.share, self.writer, self.tag = every, share, writer, tag
        self._batch = _copy(batch)
        self._options: dict[str, Any] = {"mode": mode, "points": points, "gradient": gradient, "wake": wake}
        self._options |= {"seed": seed, "name": name}
        self.history = SignalHistory()
        self.failures: list[tuple[int, str]] = []
        self.steps = 0
        self._spent = self._last_cost = self._before = 0.0
        self._began: float | None = None
        self._asked = 0  # the step of the latest attempt to measure
        self._silent: list[str] = []  # gains that silence branches at the start

    def start(self) -> None:
        """Start the clock and record step 0; after a resumption, only the former."""
        if self._began is None:
            if self._is_measuring_rank():
                # The first measurement of a process loads a second or two of Python modules. That is start-up, and
                # taken for the cost of a record it would put off the next one by minutes.
                with seeded(0):  # for the weight that is drawn
                    spp(nn.Linear(1, 1), torch.zeros(2, 1), gradient=self._options["gradient"])
            self._began = perf_counter()
            if self._is_measuring_rank() and not self.history:
                signal = self._measure()
                if any(block.residual_avg_channel_var is None for block in signal.blocks if block.kind == "residual"):
                    woken = self._measure(wake=True, gradient=False).blocks
                    self._silent = sorted({name for block in woken for name in block.woken})
                self._record(signal)

    def step(self, steps: int | None = None) -> SignalPropagation | None:
        """Note that the optimizer has taken a step, and measure if it is time.

        Args:
            steps: steps taken so far, where the loop counts them itself; one more than last time by default.

        Returns:
            The record, if one was made.
        """
        self.start()
        self.steps = self.steps + 1 if steps is None else steps
        return self._try() if self._is_measuring_rank() and self._due() else None

    def stop(self) -> None:
        """Record the last step, unless it has been, and stop the clock."""
        if self._began is None:
            return
        if self._is_measuring_rank() and self._asked != self.steps:
            self._try()
        self._before, self._began = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds between the start and now, or the stop; of resumed runs, all together."""
        return self._before + (0.0 if self._began is None else perf_counter() - self._began)

    @property
    def cost(self) -> float:
        """The part of the time that measuring has taken so far."""
        return self._spent / self.elapsed if self.elapsed else 0.0

    def _is_measuring_rank(self) -> bool:
        grouped = distributed.is_available() and distributed.is_initialized()
        return not grouped or distributed.get_rank() == 0

    def _due(self) -> bool:
        if self.steps == self._asked:
            return False
        if self.every is not None:
            return self.steps // self.every != self._asked // self.every
        return self._spent + self._last_cost <= self.share * self.elapsed

    def _try(self) -> SignalPropagation | None:
        try:
            signal = self._measure()
        except (ValueError, RuntimeError, MemoryError) as error:  # out of memory, too: a monitor does not end a run
            self.failures.append((self.steps, str(error)))
            warnings.warn(f"the signal of step {self.steps} could not be measured: {error}", stacklevel=3)
            return None
        self._record(signal)
        return signal

    def _measure(self, **changes: bool) -> SignalPropagation:
        if any(parameter.device.type not in ("cpu", "meta") for parameter in self.model.parameters()):
            torch.accelerator.synchronize()  # the training step's time is not ours
        began, self._asked = perf_counter(), self.steps
        try:
            return spp(self.model, self._batch, **{**self._options, **changes})
        finally:
            self._last_cost = perf_counter() - began
            self._spent += self._last_cost

    def _record(self, signal: SignalPropagation) -> None:
        if still := self._still_silent():
            signal = replace(signal, findings=(*signal.findings, still))
        self.history.append((self.steps, signal))
        if self.writer is None:
            return
        for curve in CURVES:
            for index, value in enumerate(signal.curve(curve)):
                if value is not None:
                    place = "entry" if index == 0 else f"{index - 1:03d}"
                    self.writer.add_scalar(f"{self.tag}/{curve}/{place}", value, self.steps)
        self.writer.add_scalar(f"{self.tag}/cost", self.cost, self.steps)

    def _still_silent(self) -> Finding | None:
        """The finding on gains that began at zero and have hardly moved; those of exactly zero are the plot's own."""
        if self.steps < PATIENCE or not self._silent:
            return None
        gains = {name: float(self.model.get_parameter(name).detach().abs().max()) for name in self._silent}
        small = [name for name, size in gains.items() if 0 < size < SMALL_GAIN]
        if not small:
            return None
        return Finding(
            kind="silenced_branch",
            severity="warning",
            block=None,
            message=(
                f"{len(small)} of {len(gains)} gains that began at zero are below {SMALL_GAIN} after {self.steps} "
                f"steps, first {small[0]} ({gains[small[0]]:.2g}): their branches add next to nothing."
            ),
            remedy=(
                "Adaptive gradient clipping bounds a step by the parameter's own size: leave gains out of it "
                "(exclude=...), or start them at one (skipinit_gain=1). Without it: train longer, or at a higher rate."
            ),
            docs=f"{DOCS}#silenced_branch",
        )

    def __repr__(self) -> str:
        return short_repr(self, f"at step {self.steps}: {self.history!r}")

    def _repr_html_(self) -> str:
        return self.history._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The history as plain data, see ``SignalHistory.to_dict``."""
        return self.history.to_dict()

    def to_json(self, path: str | Path) -> Path:
        """Write the history, which ``SignalHistory.load`` reads back exactly; returns the path."""
        return self.history.to_json(path)

    def to_html(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write the page with the slider: one file that opens offline; returns the path."""
        return self.history.to_html(path, title=title)

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on after an interruption, as plain data."""
        times = {"elapsed": self.elapsed, "spent": self._spent, "last_cost": self._last_cost}
        counts = {"steps": self.steps, "asked": self._asked, "silent": self._silent}
        return {**counts, **times, "failures": [list(one) for one in self.failures], **self.history.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; the next ``start`` records nothing anew.

        Raises:
            ValueError: if it is something else.
        """
        history = SignalHistory.from_dict(state)
        if missing := {"steps", "asked", "elapsed", "spent", "last_cost", "failures"} - set(state):
            raise ValueError(f"state: it lacks {sorted(missing)}; give what SignalMonitor.state_dict returned")
        self.history, self.steps, self._asked = history, state["steps"], state["asked"]
        self._silent = list(state.get("silent", ()))  # which earlier versions did not keep
        self._before, self._spent, self._last_cost = state["elapsed"], state["spent"], state["last_cost"]
        self.failures = [(step, message) for step, message in state["failures"]]
        self._began = None if self._began is None else perf_counter()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()


def _copy(batch: Batch | None) -> Batch | None:
    """The batch in memory of its own, so that it stays the same whatever the loop does to it."""
    if batch is None:
        return None
    if not isinstance(batch, (Tensor, tuple, Mapping)):
        raise ValueError(
            f"batch: {type(batch).__name__} is no fixed batch; give a tensor, a tuple of positional or a dict of "
            "keyword arguments, such as the images of next(iter(loader))"
        )
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, plain)


def _check_alone(model: nn.Module, mode: Mode) -> None:
    """Refuse a model whose forward pass rank 0 cannot run without the others: both would wait for ever."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "model: its parameters are sharded, and one rank cannot run it alone; record an unsharded run, or call "
            "normfree.spp on a gathered copy"
        )
    if mode != "eval" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "model: SyncBatchNorm waits for all ranks, and only one measures; choose mode='eval', or give the monitor "
            "the model before its conversion"
        )


# A branch whose gain is below a hundredth adds less than 1e-4 of its variance. Trained without adaptive clipping, gains
# pass it within some tens of steps (tests/signal/test_monitor.py trains both).
SMALL_GAIN, PATIENCE = 0.01, 100

SCHEMA = 1

# Training may shift means, shrink branches and let the signal fade without harm: learnt gains and weights want it
# so, and the thresholds of those findings are of networks at initialisation. These remain faults at any step.
TRAINING_KINDS: tuple[Kind, ...] = (
    "non_finite",
    "explosion",
    "dead_channels",
    "correlation_collapse",
    "silenced_branch",
)

_NUMBER = "$float"  # how JSON writes a number that it has no word for


@dataclass(frozen=True)
class Episode:
    """A finding that lasted over some of the recorded steps.

    Attributes:
        first: step at which it was first seen.
        last: last step at which it was seen.
        ongoing: whether that is the last step recorded.
        finding: as it was when it was at its most severe.
    """

    first: int
    last: int
    ongoing: bool
    finding: Finding

    @property
    def span(self) -> str:
        """The steps, in words."""
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        return f"{steps}, the last record" if self.ongoing else f"{steps}, then gone"


class SignalHistory(list[tuple[int, SignalPropagation]]):
    """A list of (step, signal propagation plot), in the order of the steps."""

    @property
    def steps(self) -> list[int]:
        """The recorded steps."""
        return [step for step, _ in self]

    @property
    def signals(self) -> list[SignalPropagation]:
        """The plots."""
        return [signal for _, signal in self]

    @property
    def extent(self) -> str:
        """How many records there are, and of which steps: "5 records, steps 0 to 40"."""
        if not self:
            return "no record"
        count, steps = len(self), self.steps
        return f"{count} record{'' if count == 1 else 's'}, steps {steps[0]} to {steps[-1]}"

    def __repr__(self) -> str:
        found = ", ".join(f"{one.finding.kind} ({one.span})" for one in self.episodes())
        model = f"of {shortened(self.signals[-1].model, 60)}: " if self else "with "
        return short_repr(self, f"{model}{self.extent}{'; ' if found else ''}{found}")

    def _repr_html_(self) -> str:
        from normfree.report.notebook import history_html

        return history_html(self)

    def episodes(self) -> list[Episode]:
        """The findings that matter in training, see ``TRAINING_KINDS``, and the steps they lasted; the worst first.

        A branch that is silent at step 0 starts so on purpose, and counts from the next record on. Infos, and what
        the plot at initialisation alone tells (mean shift, branch variance, attenuation), are left to the plots.
        """
        found: list[Episode] = []
        for kind in TRAINING_KINDS:
            open_: Episode | None = None
            for step, signal in self:
                finding = next((f for f in signal.findings if f.kind == kind and f.severity != "info"), None)
                if finding is None or (kind == "silenced_branch" and step == 0):
                    open_ = None
                    continue
                if open_ is None:
                    found.append(Episode(step, step, False, finding))
                else:
                    worst = min(open_.finding, finding, key=lambda f: SEVERITIES.index(f.severity))
                    found[-1] = Episode(open_.first, step, False, worst)
                open_ = found[-1]
            if open_ is not None:
                found[-1] = Episode(open_.first, open_.last, True, open_.finding)
        return sorted(found, key=lambda episode: (SEVERITIES.index(episode.finding.severity), episode.first))

    def thinned(self, most: int) -> SignalHistory:
        """At most so many of the records, evenly spread, the first and the last among them."""
        if len(self) <= most:
            return self
        return SignalHistory(self[round(i * (len(self) - 1) / (most - 1))] for i in range(most))

    def to_dict(self) -> dict[str, Any]:
        """Everything, in dicts, lists, strings and numbers that JSON has; :meth:`from_dict` gives the same back."""
        records = [{"step": step, "signal": _encode(asdict(signal))} for step, signal in self]
        return {"schema": SCHEMA, "history": records}

    def to_json(self, path: str | Path) -> Path:
        """Write :meth:`to_dict`; never leaves a half-written file. Returns the path."""
        return write_atomically(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> SignalHistory:
        """Take back what :meth:`to_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        try:
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {quoted(document['schema'])} is not {SCHEMA}")
            records = [parse_dataclass(_Record, _decode(record), finite=False) for record in document["history"]]
            return cls((record.step, record.signal) for record in records)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"document: it is no signal history ({one_line(error)}); give what to_dict returned"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> SignalHistory:
        """Read what :meth:`to_json` wrote, exactly.

        Raises:
            ValueError: if the file is missing or something else.
        """
        document = read_json(path)
        try:
            return cls.from_dict(document)
        except ValueError as error:
            raise refused("path", path, first_line(error), "give a file of to_json") from error

    def figure(self) -> Any:
        """The plots as one plotly figure with a slider over the steps, to embed in a page of one's own."""
        from normfree.report.monitor_page import slider_figure

        return slider_figure(self)

    def to_html(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write the figure, findings and last numbers as one HTML file that opens offline; returns the path."""
        from normfree.report.monitor_page import write_monitor_report

        return write_monitor_report(self, path, title=title)


@dataclass(frozen=True)
class _Record:
    """One plot, as it is written."""

    step: int
    signal: SignalPropagation


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return float(value[_NUMBER]) if set(value) == {_NUMBER} else {key: _decode(v) for key, v in value.items()}
    return [_decode(item) for item in value] if isinstance(value, (list, tuple)) else value


class SignalCallback:
    """Steps a monitor from a loop that calls hooks, as with Fabric's ``fabric.call("on_train_batch_end")``.

    Args:
        monitor: the monitor; build it on the model itself.
    """

    def __init__(self, monitor: SignalMonitor) -> None:
        self.monitor = monitor

    def on_train_start(self, *_: Any, **__: Any) -> None:
        self.monitor.start()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.monitor.step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.monitor.stop()

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict)


CHECKPOINTED = "signal_monitor.json"
"""What a monitor needs to go on, in the checkpoints of Hugging Face's Trainer."""


def transformers_callback(monitor: SignalMonitor) -> Any:
    """Return a ``transformers.TrainerCallback`` that steps a monitor once per optimizer step.

    Each checkpoint has a file of the monitor's, from which ``trainer.train(resume_from_checkpoint=...)`` goes on.

    Args:
        monitor: the monitor; build it on the model that the trainer gets, with a batch such as
            ``{"pixel_values": images}``.

    Raises:
        ImportError: if transformers is not installed.
    """
    TrainerCallback = require("transformers", "transformers_callback").TrainerCallback

    class TransformersSignalCallback(SignalCallback, TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved = _checkpoint(args, state) / CHECKPOINTED
            if state.global_step and saved.is_file():
                self.load_state_dict(read_json(saved, "checkpoint"))
            self.monitor.steps = state.global_step  # also of a checkpoint that was written without a monitor
            self.monitor.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.monitor.step(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                write_atomically(_checkpoint(args, state) / CHECKPOINTED, json.dumps(self.state_dict()) + "\n")

    return TransformersSignalCallback(monitor)


def _checkpoint(args: Any, state: Any) -> Path:
    """Where Hugging Face's Trainer keeps the checkpoint of the step it is at."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def lightning_callback(monitor: SignalMonitor) -> Any:
    """Return a ``lightning.pytorch.Callback`` that steps a monitor once per optimizer step.

    Args:
        monitor: the monitor; build it on the network, or on the LightningModule if its ``forward`` takes the batch.

    Raises:
        ImportError: if lightning is not installed.
    """
    Callback = require("lightning.pytorch", "lightning_callback").Callback

    class LightningSignalCallback(SignalCallback, Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            # Batches that only accumulate leave the count of optimizer steps as it is.
            if trainer.global_step != self.monitor.steps:
                self.monitor.step(trainer.global_step)

    return LightningSignalCallback(monitor)
