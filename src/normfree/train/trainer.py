"""One run in its folder: begun or taken up again, trained, and summed up.

``config.json`` (all that was chosen), ``train.csv`` and ``eval.csv`` and ``tensorboard/`` (the curves),
``checkpoints/``, and at the end ``model.safetensors``, ``metrics.json`` and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import SGD, Optimizer

from normfree.common.checks import check_integer, check_number, invalid
from normfree.common.files import kind_of, parse_json, read_json, refused, write_atomically
from normfree.common.text import first_line, quoted
from normfree.data import EvaluationData, open_evaluation, open_training
from normfree.models import Backbone, create_model
from normfree.models.registry import CENTRED
from normfree.optim import (
    AdaptiveGradientClipping,
    InputCentring,
    Muon,
    WeightAverage,
    muon_groups,
    parameter_groups,
    warmup_cosine_factor,
)
from normfree.report.training_page import write_training_report
from normfree.signal import SignalMonitor
from normfree.signal.nonfinite import check_finite, first_non_finite
from normfree.trace.preserve import untouched
from normfree.train.checkpoint import AVERAGED, WEIGHTS, Checkpoint, CheckpointStore
from normfree.train.config import FREE, OptimizerConfig, TrainConfig, to_dict
from normfree.train.distributed import ShardedStates, States, WholeStates, launch, shard
from normfree.train.evaluation import Evaluation, evaluate
from normfree.train.records import Watcher, provenance
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


# MERGED from train/trainer.py: Everything a step changes: network, optimizer, average, data, and how many steps were taken.


if TYPE_CHECKING:
    from lightning.fabric import Fabric

Batch = tuple[Tensor, Tensor]

STATE_KEYS = ("step", "skipped", "seconds", "optimizer", "averages", "signal", "data")
"""What a checkpoint's state says."""


class Session:
    """A run's state, which :meth:`state_dict` gives and :meth:`resume` takes up to the last bit.

    Every random draw of a step comes from (seed, step, rank): there is no random state to keep.

    Args:
        config: of the run.
        fabric: of this process.

    Attributes:
        network: the network itself.
        model: the network as it is trained: moved, wrapped for several processes, compiled.
        optimizer: its optimizer.
        centring: moves the input means of centred weights; None for a network without.
        average: of its weights; None without one.
        data: this rank's training images.
        accumulation: batches of a rank in an optimizer step.
        steps_per_epoch: optimizer steps.
        total_steps: of the whole run.
        last_step: at which to stop, earlier if steps are limited.
        step: optimizer steps taken.
        skipped: of them, those left out because of a loss or gradient that was not finite.
        seconds: of training so far, evaluation left out.
        monitor: listens to the network; None where nobody does.

    Raises:
        ValueError: if data, network and batch do not fit together.
    """

    def __init__(self, config: TrainConfig, fabric: Fabric) -> None:
        self.config, self.fabric = config, fabric
        rank, world_size = fabric.global_rank, fabric.world_size
        self.accumulation = config.accumulation(world_size)
        self.data = open_training(config.rank_data(world_size), rank=rank, world_size=world_size)
        self.augmentation = self.data.augmentation().to(fabric.device)
        self.steps_per_epoch = self.data.steps_per_epoch // self.accumulation
        if self.steps_per_epoch < 1:
            rule = f"is more than the {self.data.examples} training images"
            raise invalid("batch_size", config.batch_size, rule, "pass a smaller one")
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.limit_train_steps or self.total_steps)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self.monitor: SignalMonitor | None = None
        self.states: States = ShardedStates() if config.strategy == "fsdp" else WholeStates()
        self.network = self._network()
        self.centring = self._centring()
        self.average = self._average()
        trained: nn.Module = torch.compile(self.network) if config.compile else self.network  # type: ignore[assignment]
        self.model = fabric.setup_module(trained)
        self.optimizer = self._optimizer()
        self.criterion: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def _network(self) -> Backbone:
        """The network, drawn from the seed."""
        torch.manual_seed(self.config.seed)
        network = create_model(
            self.config.model_name,
            num_classes=self.data.num_classes,
            in_channels=self.data.in_channels,
            **self.config.model_overrides,
        )
        if self.config.channels_last and not self.sharded:  # FSDP shards contiguous parameters only
            # Not those of 1x1: they are alike in both layouts, and DistributedDataParallel warns of their strides.
            for parameter in network.parameters():
                if parameter.ndim == 4 and parameter.shape[2:].numel() > 1:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return network

    def _centring(self) -> InputCentring | None:
        """What moves the input means of centred weights; None for a network without."""
        if not self.config.model_overrides.get(CENTRED, False):
            return None
        if self.sharded:
            rule = "centred weights are moved whole, and fsdp shards them"
            raise invalid("model", self.config.model, rule, "pass --strategy ddp, or leave out centred=True")
        ranks = torch.distributed.group.WORLD if self.fabric.world_size > 1 else None
        return InputCentring(self.network, process_group=ranks)

    def _average(self) -> WeightAverage | None:
        if self.config.average_decay is None:
            return None
        average = WeightAverage(self.network, self.config.average_decay)
        average.module.to(self.fabric.device)
        if self.sharded:
            shard(average.module, self.fabric.strategy.device_mesh)  # type: ignore[attr-defined]
        return average

    def _optimizer(self) -> Optimizer:
        config = self.config.optimizer
        self.peak = config.peak(self.config.batch_size)
        if config.final_learning_rate > self.peak:
            rule = f"is above the highest learning rate, {self.peak:g}"
            raise invalid("final_learning_rate", config.final_learning_rate, rule, "pass a smaller one")
        optimizer = self._muon(config) if config.rule == "muon" else self._sgd(config)
        if config.clip_factor is None:
            return optimizer
        return AdaptiveGradientClipping(optimizer, self.network, config.clip_factor, config.clip_eps)

    def _sgd(self, config: OptimizerConfig) -> SGD:
        groups = parameter_groups(self.network, config.weight_decay, classifier_lr_scale=config.classifier_lr_scale)
        return SGD(self.states.groups(groups), lr=self.peak, momentum=config.momentum, nesterov=True, foreach=True)

    def _muon(self, config: OptimizerConfig) -> Muon:
        groups = muon_groups(
            self.network,
            config.weight_decay,
            sgd_lr_scale=config.sgd_learning_rate / config.learning_rate,
            sgd_weight_decay=config.weight_decay,
            classifier_lr_scale=config.classifier_lr_scale,
        )
        ranks = torch.distributed.group.WORLD if self.fabric.world_size > 1 else None
        return Muon(self.states.groups(groups), self.peak, momentum=config.momentum, process_group=ranks)

    @property
    def sharded(self) -> bool:
        """Whether a rank has but a part of the network."""
        return isinstance(self.states, ShardedStates)

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        return self.step // self.steps_per_epoch

    @property
    def judged(self) -> nn.Module:
        """The network to evaluate: the averaged one, if weights are averaged."""
        return self.network if self.average is None else self.average.module

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        config = self.config.optimizer
        return self.peak * warmup_cosine_factor(
            self.step,
            steps=self.total_steps,
            warmup_steps=round(config.warmup_epochs * self.steps_per_epoch),
            final_fraction=config.final_learning_rate / self.peak,
        )

    def rest_of_epoch(self) -> Iterator[list[Batch]]:
        """The batches of each step that is left of this epoch."""
        self.data.set_epoch(self.epoch)
        batches = iter(self.data)
        for _ in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            yield [next(batches) for _ in range(self.accumulation)]

    def prepared(self, batch: Batch, number: int) -> Batch:
        """Move and augment the batch of that number in this step; what is drawn next depends on both alone.

        Args:
            batch: images and targets.
            number: of the batch in the step, from 0.
        """
        images, targets = (tensor.to(self.fabric.device, non_blocking=True) for tensor in batch)
        position = self.step * self.accumulation + number
        images, targets = self.augmentation(images, targets, step=position)
        entropy = np.random.SeedSequence([self.config.seed, position, self.fabric.global_rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout), targets

    def state_dict(self) -> dict[str, Any]:
        """Return all but the weights, as tensors and plain values; every rank has to call it."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "optimizer": self.states.optimizer(self.network, self.optimizer),
            "averages": None if self.average is None else self.average.updates,
            "signal": None if self.monitor is None else json.dumps(self.monitor.state_dict()),
            "data": self._of_all_ranks(self.data.state_dict()),
        }

    def weights(self) -> dict[str, Callable[[Path], Any]]:
        """Return for each weights file of a checkpoint what writes it; every rank has to call it."""
        writers: dict[str, Callable[[Path], Any]] = {WEIGHTS: partial(save, self.states.network(self.network))}
        if self.average is not None:
            writers[AVERAGED] = partial(save, self.states.network(self.average.module))  # type: ignore[arg-type]
        return writers

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint.

        Raises:
            ValueError: if it was written by another number of ranks, or holds no state of this run.
        """
        state = checkpoint.state()
        where, world_size = f"checkpoint {quoted(str(checkpoint.folder))}", self.fabric.world_size
        if missing := set(STATE_KEYS) - set(state):
            raise ValueError(f"{where}: its state lacks {min(missing)}; restore it from a copy")
        if not isinstance(state["data"], list) or len(state["data"]) != world_size:
            left = len(state["data"]) if isinstance(state["data"], list) else "no"
            rule = f"the run was left by {left} rank(s), whose order of images {world_size} cannot take up"
            raise ValueError(f"{where}: {rule}; start as many processes")
        try:
            self._take_up(checkpoint, state)
        except Exception as error:  # what a state of another run, or a forged one, makes of PyTorch's loaders
            rule = f"its state is none of this run ({first_line(error)})"
            raise ValueError(f"{where}: {rule}; give the run's own settings, or restore it from a copy") from error

    def _take_up(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        from safetensors.torch import load_file

        for name, minimum in (("step", 0), ("skipped", 0)):
            check_integer(name, state[name], minimum)
        self.step, self.skipped = state["step"], state["skipped"]
        self.seconds = check_number("seconds", state["seconds"], 0)
        self.data.load_state_dict(state["data"][self.fabric.global_rank])
        self.states.load_network(self.network, load_file(checkpoint.folder / WEIGHTS))
        self.states.load_optimizer(self.network, self.optimizer, state["optimizer"])
        if self.average is not None:
            self.states.load_network(self.average.module, load_file(checkpoint.folder / AVERAGED))  # type: ignore[arg-type]
            self.average.updates = check_integer("averages", state["averages"], 0)
        if self.monitor is not None and state["signal"] is not None:
            self.monitor.load_state_dict(parse_json(state["signal"]))

    def _of_all_ranks(self, value: Mapping[str, Any]) -> list[Any]:
        if self.fabric.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


# MERGED from train/trainer.py: One optimizer step: accumulate the gradient, look whether it is finite, then take the step or refuse it.


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        loss: mean over the batch of all ranks, in nats.
        gradient_norm: Euclidean norm of the whole gradient, before clipping.
        learning_rate: it was taken at.
        images: of the batch, over all ranks.
        stop: whether a rank was asked to stop.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    images: int
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def take_step(session: Session, batches: Sequence[Batch], *, stop: bool = False) -> Outcome:
    """Take one optimizer step: the mean gradient of all batches, of all ranks.

    Args:
        session: what the step changes.
        batches: those of this rank.
        stop: whether this rank was asked to stop; any rank's wish is all ranks'.

    Raises:
        NonFiniteLossError: if the loss or the gradient is not finite, unless such steps are to be skipped; it names the
            module where that began, and the weights are as before.
    """
    model, fabric, optimizer = session.model, session.fabric, session.optimizer
    rate = session.learning_rate()
    model.train()
    # A normalizer's running statistics have heard the batch even if the step is then skipped.
    kept = [buffer.clone() for buffer in session.network.buffers()] if session.config.on_nonfinite == "skip" else []
    losses = []
    for number, batch in enumerate(batches):
        images, targets = session.prepared(batch, number)
        with fabric.no_backward_sync(model, enabled=number + 1 < len(batches)):
            loss = session.criterion(model(images), targets) / len(batches)
            fabric.backward(loss)
        losses.append(loss.detach())
    outcome = _agreed(session, torch.stack(losses).sum(), rate, stop)
    if outcome.finite:
        if (largest := session.config.optimizer.clip_norm) is not None:
            norm = torch.tensor(outcome.gradient_norm, device=fabric.device)
            clip_grads_with_norm_(session.network.parameters(), largest, norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        if session.centring is not None:
            session.centring.step()
        if session.average is not None:
            session.average.update()
    elif session.config.on_nonfinite == "error":
        raise NonFiniteLossError(blamed(session, batches, outcome.loss), session.step)
    else:
        session.skipped += 1
        for buffer, before in zip(session.network.buffers(), kept, strict=True):
            buffer.copy_(before)
    optimizer.zero_grad()
    session.step += 1
    return outcome


def _agreed(session: Session, loss: Tensor, rate: float, stop: bool) -> Outcome:
    """Loss, norm and wish to stop, the same on all ranks: read from the device once, for it waits."""
    norm = session.states.gradient_norm(session.network)
    told = torch.stack([loss.float(), norm.float(), torch.tensor(float(stop), device=loss.device)])
    if (world_size := session.fabric.world_size) > 1:
        told = session.fabric.all_reduce(told, reduce_op="sum") / world_size  # type: ignore[operator]
    mean_loss, norm_value, wishes = told.tolist()
    return Outcome(
        loss=mean_loss,
        gradient_norm=norm_value,
        learning_rate=rate,
        images=session.config.batch_size,
        stop=wishes > 0,
    )


# MERGED from train/trainer.py: The training loop: steps, evaluations and checkpoints, until the end or until asked to stop.


class Observer(Protocol):
    """Is told what happens."""

    def begin(self) -> None:
        """Training starts, or goes on after something else."""
        ...

    def stepped(self, outcome: Outcome) -> None:
        """A step was taken."""
        ...

    def evaluated(self, found: Evaluation) -> None:
        """The network was evaluated."""
        ...


class StopRequest:
    """Whether the process was asked to stop (SIGTERM), which it does after the step it is at."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signal as a request while the context is open; outside the main thread there are no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: Any) -> None:
        self.asked = True


class Loop:
    """One run from where its session stands.

    Args:
        session: what is trained.
        data: this rank's images to evaluate on.
        store: of checkpoints; rank 0 writes.
        observers: of this rank.
        stop: asks the loop to end early.

    Attributes:
        evaluation: the last one, at the session's step; None before.
    """

    def __init__(
        self,
        session: Session,
        data: EvaluationData,
        store: CheckpointStore,
        observers: list[Observer],
        stop: StopRequest,
    ) -> None:
        self.session, self.data, self.store, self.observers, self.stop = session, data, store, observers, stop
        self.evaluation: Evaluation | None = None

    def run(self) -> bool:
        """Train; returns whether the end was reached, and not a request to stop."""
        session, config = self.session, self.session.config
        while session.step < session.last_step:
            if not self._train_epoch():
                self.checkpoint()
                return False
            ended = session.step >= session.last_step
            if ended or session.epoch % config.evaluate_every == 0:
                self.evaluate()
            self.checkpoint()
        if self.evaluation is None:
            self.evaluate()
        return True

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch or of the run; returns whether no rank was asked to stop."""
        session, every = self.session, self.session.config.checkpoint_every
        self._tell(lambda observer: observer.begin())
        self.evaluation = None
        for batches in session.rest_of_epoch():
            outcome = take_step(session, batches, stop=self.stop.asked)
            self._tell(lambda observer, outcome=outcome: observer.stepped(outcome))
            if outcome.stop:
                return False
            if session.step == session.last_step:
                break
            if every and session.step % every == 0 and session.step % session.steps_per_epoch:
                self.checkpoint()
                self._tell(lambda observer: observer.begin())
        return True

    def evaluate(self) -> None:
        """Evaluate the network, averaged where weights are averaged."""
        session = self.session
        limit = session.config.limit_eval_steps
        found = evaluate(session.judged, self.data, session.fabric, limit=limit, sharded=session.sharded)
        self.evaluation = found
        self._tell(lambda observer: observer.evaluated(found))

    def checkpoint(self) -> None:
        """Write a checkpoint; one with weights that are not finite is refused.

        Raises:
            ValueError: naming the parameter; earlier checkpoints are as they were.
        """
        session = self.session
        for name, parameter in session.network.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"step {session.step}: parameter {name!r} is not finite any more, and no checkpoint was written; "
                    "lower the learning rate or clip, and go on from the last one"
                )
        state, weights = session.state_dict(), session.weights()
        if session.fabric.is_global_zero:
            score = None if self.evaluation is None else self.evaluation.top1
            self.store.write(session.step, state, weights, score)
        session.fabric.barrier()

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            what(observer)


# MERGED from train/trainer.py: Where a loss or a gradient that is not finite began.


class NonFiniteLossError(ValueError):
    """Training has diverged: a loss or a gradient is not finite.

    Attributes:
        step: optimizer steps taken before.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


REMEDY = "lower the learning rate, lengthen the warm-up or clip; --on-nonfinite skip goes on without such steps"


def blamed(session: Session, batches: Sequence[Batch], loss: float) -> str:
    """Run the step's batches again and say where the first value that is not finite came from.

    Args:
        session: as it was before the step, gradients aside.
        batches: of the step, on this rank.
        loss: of the step, over all ranks.
    """
    where = f"loss at step {session.step} (epoch {session.epoch})"
    gradients = {name: p.grad for name, p in session.network.named_parameters() if p.grad is not None}
    if session.sharded:
        return f"{where}: {_described(loss)}, in a network whose shards are not searched; {REMEDY}"
    try:
        check_finite(session.network)
    except ValueError as error:
        return f"{where}: {_described(loss)}: {str(error).partition(';')[0]}; {REMEDY}"
    for number, batch in enumerate(batches):
        if told := _of_batch(session, session.prepared(batch, number)):
            return f"{where}: {_described(loss)}: {told}; {REMEDY}"
    if found := _last_non_finite(gradients):
        return f"{where}: it is {loss:g}, but the gradient is not finite, from {found!r} backwards; {REMEDY}"
    if session.fabric.world_size > 1:
        return f"{where}: {_described(loss)}, on another rank; {REMEDY}"
    name, largest = max(((n, float(g.abs().max())) for n, g in gradients.items()), key=lambda one: one[1])
    told = f"it is {loss:g}, and the gradient's norm overflows: it reaches {largest:.3g} in {name!r}"
    return f"{where}: {told}; {REMEDY}"


def _of_batch(session: Session, batch: Batch) -> str | None:
    """What of a batch's way to the loss is not finite, first."""
    images, targets = batch
    if bad := int((~torch.isfinite(images)).sum()):
        return f"the images themselves have {bad} values that are not finite"
    network, state = session.network, torch.get_rng_state()
    with untouched(network, "train") as preserved, torch.no_grad(), session.fabric.autocast():
        loss = session.criterion(network(images), targets)
        if torch.isfinite(loss):
            return None
        torch.set_rng_state(state)
        found = first_non_finite(network, images, preserved)
    if found is None:
        return "all outputs are finite, and the loss of them is not"
    place = f"{found.module!r}" if found.module else "the network itself"
    return (
        f"first in {place} ({found.operation}): {found.count} of {found.total} values, from inputs of at most "
        f"{found.largest:.3g}"
    )


def _last_non_finite(gradients: dict[str, Tensor]) -> str | None:
    """The parameter nearest to the output whose gradient is not finite."""
    names = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    return names[-1] if names else None


def _described(loss: float) -> str:
    return "it is not finite" if loss != loss else f"it is {loss:g}"
