"""One run in its folder: begun or taken up again, trained, and summed up.

``config.json`` (all that was chosen), ``train.csv`` and ``eval.csv`` and ``tensorboard/`` (the curves),
``checkpoints/``, and at the end ``model.safetensors``, ``metrics.json`` and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normfree.common.files import kind_of, read_json, refused, write_atomically
from normfree.data import EvaluationData, open_evaluation
from normfree.report.training_page import write_training_report
from normfree.signal import SignalMonitor
from normfree.train.checkpoint import CheckpointStore
from normfree.train.config import FREE, TrainConfig, to_dict
from normfree.train.loop import Loop, StopRequest
from normfree.train.precision import launch
from normfree.train.provenance import provenance
from normfree.train.session import Session
from normfree.train.watching import Watcher
from normfree.weights import save

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from rich.console import Console

PROBE = 16
"""Images that the network is listened to with."""

CONFIG, METRICS, CHECKPOINTS, MODEL, SIGNAL = (
    "config.json",
    "metrics.json",
    "checkpoints",
    "model.safetensors",
    "signal.json",
)

METRICS_OF_ALL = {"status", "step", "seconds", "skipped_steps", "bad_images", "evaluation"}
"""What every metrics.json says."""


@dataclass(frozen=True)
class Summary:
    """What came of a run, as ``metrics.json`` has it.

    Attributes:
        folder: of the run.
        metrics: all of it; "status" is "finished", or "stopped" if the run was asked to stop before its end.
    """

    folder: Path
    metrics: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.metrics["status"] == "finished"

    @property
    def accuracy(self) -> float | None:
        """Top-1 of the last evaluation, if there was one at the last step."""
        found = self.metrics["evaluation"]
        return None if found is None else found["top1"]


def train(config: TrainConfig, console: Console | None = None) -> Summary:
    """Train a network, or go on with a run of the same config where its newest checkpoint left it.

    On ``torchrun`` every process calls this; rank 0 writes. SIGTERM makes it write a checkpoint and return.

    Args:
        config: of the run.
        console: to tell; None for silence.

    Returns:
        What came of it.

    Raises:
        ValueError: if the folder holds a run of another config; if data, network and batch do not fit together;
            if the loss is no longer finite; if all checkpoints are damaged.
    """
    fabric = launch(config)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _Run(config, fabric, console if fabric.is_global_zero else None).train()


class _Run:
    """A run on one rank."""

    def __init__(self, config: TrainConfig, fabric: Fabric, console: Console | None) -> None:
        self.config, self.fabric, self.console, self.folder = config, fabric, console, config.folder
        self.store = CheckpointStore(self.folder / CHECKPOINTS, config.keep)

    def train(self) -> Summary:
        """Train to the end, or to a request to stop."""
        check_same_run(self.config)
        stop = StopRequest()
        with stop.listening():
            session = Session(self.config, self.fabric)
            data = dataclasses.replace(session.data.config, image_size=self._evaluation_size(session))
            rank, world_size = self.fabric.global_rank, self.fabric.world_size
            evaluated = open_evaluation(data, rank=rank, world_size=world_size, classes=session.data.class_names)
            session.monitor = self._monitor(session, evaluated)
            self._take_up(session)
            if finished := self._finished(session):
                return finished
            watcher = None
            if self.fabric.is_global_zero:
                self._write_config(session)
                watcher = Watcher(session, self.folder, self.console)
            loop = Loop(session, evaluated, self.store, [] if watcher is None else [watcher], stop)
            if watcher is None:
                return self._summed_up(loop, loop.run(), None)
            with watcher.watching():
                return self._summed_up(loop, loop.run(), watcher)

    def _evaluation_size(self, session: Session) -> int | None:
        return self.config.evaluation_size or session.data.config.image_size

    def _monitor(self, session: Session, data: EvaluationData) -> SignalMonitor | None:
        """Who listens to the network, with the first images that it is evaluated on; of a sharded one, nobody."""
        every = self.config.signal_every
        if every == 0 or session.sharded or not self.fabric.is_global_zero:
            return None
        images, _ = next(iter(data))
        probe = data.standardization()(images[:PROBE]).to(self.fabric.device)
        return SignalMonitor(session.network, probe, every=every, name=self.config.model)

    def _take_up(self, session: Session) -> None:
        """Go on from the newest sound checkpoint, if there is one; rank 0 chooses."""
        chosen = self.store.newest(set_aside=True) if self.fabric.is_global_zero else None
        chosen = self.fabric.broadcast(chosen)
        if chosen is None:
            return
        session.resume(chosen)
        if self.console is not None and session.step < session.last_step:
            self.console.print(f"going on from step {session.step} of {session.last_step}", highlight=False)

    def _finished(self, session: Session) -> Summary | None:
        """The summary of a run that came to its end before."""
        path = self.folder / METRICS
        if session.step < session.last_step or kind_of(path) == "nothing":
            return None
        metrics = read_json(path, "run")
        evaluated = isinstance(metrics.get("evaluation"), dict) and metrics.get("step") == session.step
        return Summary(self.folder, metrics) if evaluated and set(metrics) >= METRICS_OF_ALL else None

    def _write_config(self, session: Session) -> None:
        """Keep what was chosen, and what followed from it."""
        fabric = self.fabric
        derived = {
            "learning_rate": session.peak,
            "precision": fabric._precision.precision,
            "device": str(fabric.device),
            "ranks": fabric.world_size,
            "accumulation": session.accumulation,
            "steps_per_epoch": session.steps_per_epoch,
            "steps": session.total_steps,
            "parameters": sum(parameter.numel() for parameter in session.network.parameters()),
            "data": to_dict(session.data.config),
            "classes": list(session.data.class_names),
        }
        text = json.dumps({"config": to_dict(self.config), "derived": derived, **provenance()}, indent=1)
        write_atomically(self.folder / CONFIG, text + "\n")

    def _summed_up(self, loop: Loop, finished: bool, watcher: Watcher | None) -> Summary:
        session = loop.session
        found = loop.evaluation
        metrics: dict[str, Any] = {
            "status": "finished" if finished else "stopped",
            "recipe": self.config.name,
            "seed": self.config.seed,
            "step": session.step,
            "epoch": session.step / session.steps_per_epoch,
            "seconds": round(session.seconds, 3),
            "skipped_steps": session.skipped,
            "bad_images": {**session.data.bad_images, **loop.data.bad_images},
            "evaluation": None if found is None else found.to_dict(),
        }
        network = session.states.network(session.judged)  # type: ignore[arg-type]
        if watcher is not None:
            rows = watcher.records.evaluation.rows
            metrics["best_top1"] = max((row["top1"] or 0 for row in rows), default=None)
            if finished:
                save(network, self.folder / MODEL)
                metrics["signal"] = self._heard(session)
                self._report(session, metrics)
            write_atomically(self.folder / METRICS, json.dumps({**metrics, **provenance()}, indent=1) + "\n")
        self.fabric.barrier()
        return Summary(self.folder, metrics)

    def _heard(self, session: Session) -> dict[str, Any] | None:
        """Record the signal of the last step, write all of them, and say what they cost."""
        monitor = session.monitor
        if monitor is None:
            return None
        monitor.stop()
        monitor.to_json(self.folder / SIGNAL)
        return {"records": len(monitor.history), "share_of_time": round(monitor.cost, 5)}

    def _report(self, session: Session, metrics: dict[str, Any]) -> None:
        """Write the page."""
        monitor = session.monitor
        config = read_json(self.folder / CONFIG, "run")
        write_training_report(self.folder, config, metrics, None if monitor is None else monitor.history)


def check_same_run(config: TrainConfig) -> None:
    """Refuse to go on with another run's folder.

    Raises:
        ValueError: naming the fields that differ.
    """
    path = config.folder / CONFIG
    if kind_of(path) == "nothing":
        return
    before, now = read_json(path, "run").get("config"), json.loads(json.dumps(to_dict(config)))
    if not isinstance(before, dict):
        raise refused("run", path, "does not say how its run was configured", "restore it from a copy")
    changed = [name for name in sorted({*before, *now} - FREE) if before.get(name, ...) != now.get(name, ...)]
    if changed:
        raise ValueError(
            f"out: {str(config.folder)!r} holds a run with another {', '.join(changed)}; pass another --out, or "
            "the run's own settings to go on with it"
        )
