"""One training run: :func:`train` takes up its folder, a :class:`Trainer` builds, steps, evaluates and saves.

The folder gets ``config.json`` (all that was chosen), ``train.csv``, ``eval.csv`` and ``tensorboard/`` (the curves),
``checkpoints/``, and at the end ``model.safetensors``, ``signal.json``, ``metrics.json`` and ``report.html``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import SGD, Optimizer

from normfree.common.checks import check_integer, check_number, invalid, require
from normfree.common.files import kind_of, notes_of, parse_json, read, write_atomically
from normfree.common.text import first_line, quoted, short_repr
from normfree.common.torch_compat import tree_leaves
from normfree.data import TooFewExamples, TrainingData, list_names, open_evaluation, open_training, with_holdout
from normfree.data.config import Preprocessing
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
from normfree.signal.measure import first_non_finite
from normfree.trace.preserve import Writes, check_finite, preserve_model
from normfree.train.checkpoint import (
    AVERAGED,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    REPORT,
    SIGNAL,
    WEIGHTS,
    WEIGHTS_HASH,
    Checkpoint,
    CheckpointStore,
    MadeBy,
    RunFolder,
    check_conditions,
    check_settings,
    check_weights,
    differences,
    find_folder,
    hash_of,
    made_by,
    read_metrics,
)
from normfree.train.config import STEPS, OptimizerConfig, TrainConfig, to_dict
from normfree.train.distributed import FABRIC_PRECISION, ShardedStates, WholeStates, launch, resolve_precision, shard
from normfree.train.evaluation import Evaluation, evaluate
from normfree.train.networks import NetworkFactory, build_network, compare_units, compile_network
from normfree.train.records import (
    EVALUATION,
    Loggers,
    Progress,
    Records,
    Row,
    check_loggers,
    provenance,
    read_rows,
)
from normfree.weights import save
from normfree.weights.checkpoint import save_trained

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from rich.console import Console

PROBE = 16
"""Images that the signal is recorded with."""

STATE_KEYS = ("step", "skipped", "seconds", "optimizer", "averages", "signal", "data")
"""What a checkpoint's state says."""

Batch = tuple[Tensor, Tensor]
Result = TypeVar("Result")


def train(config: TrainConfig, console: Console | None = None, *, network: NetworkFactory | None = None) -> Summary:
    """Train a network, or go on with a run of the same config where its newest checkpoint left it.

    Where ``config.out`` is None and runs/NAME holds another run, this one has runs/NAME-2, and so on.

    On ``torchrun`` every process calls this; rank 0 writes. SIGTERM makes it write a checkpoint and return.

    Args:
        config: of the run.
        console: to print to; None for silence.
        network: builds the network from the numbers of classes and of channels, where ``config.model`` is none of
            ``normfree models``; it may be random, for the seed is set before.

    Returns:
        What came of it.

    Raises:
        ValueError: if ``config.out`` holds a run of another config, or another process is writing to it; if data,
            network and batch do not fit together; if the loss is no longer finite; if all checkpoints are damaged; if
            the run would go on to other bits, for other settings than its checkpoint was made with, another torch,
            precision, device, number of threads or other images, unless ``config.on_changed`` is "continue".
        OSError: naming a file that could not be written.
        ImportError: a package that training needs is not installed.
    """
    __tracebackhide__ = True
    require("torchmetrics", "training")  # used only after an epoch
    check_loggers(config.log)
    if config.is_foreign and network is None:
        rule = "is none of normfree's own networks, and nothing says how it is built"
        raise invalid(
            "model", config.model, rule, "pass network=, such as lambda classes, channels: MyNetwork(classes)"
        )
    if network is not None and not config.is_foreign:
        rule = "names one of normfree's own networks, and network= builds another"
        remedy = "pass one of the two; a network of your own has a name with a slash, such as model='./mine'"
        raise invalid("model", config.model, rule, remedy)
    if network is not None and not callable(network):
        rule = "must build the network when it is called with the numbers of classes and of channels"
        raise invalid("network", network, rule, "pass a function, such as lambda classes, channels: MyNetwork(classes)")
    fabric = launch(config.accelerator, config.precision, config.strategy)
    stop = StopRequest()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), stop.on_sigterm(), ExitStack() as folder:

        def lock() -> Path:
            return folder.enter_context(RunFolder(config, find_folder(config))).folder

        place = on_rank_zero(fabric, lock)
        console = console if fabric.is_global_zero else None
        return Trainer(config, fabric, console, stop, place, network=network).run()


@dataclass(frozen=True)
class Summary:
    """The result of a run, as ``metrics.json`` has it.

    Attributes:
        folder: of the run.
        metrics: all of it; "status" is "finished", or "stopped" if the run was asked to stop before its end.
        repeated: whether it had come to its end before, and nothing was trained.
    """

    folder: Path
    metrics: dict[str, Any]
    repeated: bool = False

    def __repr__(self) -> str:
        return short_repr(self, f"of {self.folder}: {self._told}")

    @property
    def _told(self) -> str:
        accuracy = "" if self.accuracy is None else f", top-1 {100 * self.accuracy:.2f} %"
        return f"{self.metrics['status']} at step {self.metrics['step']}{accuracy}"

    def _repr_html_(self) -> str:
        from normfree.report.notebook import table_html

        rows = [
            ["" if row[name] is None else f"{row[name]:.6g}" for name in EVALUATION]
            for row in read_rows(self.folder / "eval.csv")
        ]
        notes = [f"curves, signal and confusion: {self.folder / REPORT}"] if (self.folder / REPORT).exists() else []
        return table_html(f"Training in {self.folder}", self._told, "evaluations", EVALUATION, rows, notes)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.metrics["status"] == "finished"

    @property
    def accuracy(self) -> float | None:
        """Top-1 of the last evaluation, if there was one at the last step."""
        found = self.metrics["evaluation"]
        return None if found is None else found["top1"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a step.

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


class StopRequest:
    """Whether the process was asked to stop (SIGTERM), which it does after the step it is at."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
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


class Trainer:
    """A run on one rank: everything a step changes, which a checkpoint holds and takes up again to the last bit.

    Every random draw of a step comes from (seed, step, rank): there is no random state to keep.

    Args:
        config: of the run.
        fabric: of this process.
        console: to print to; None for silence.
        stop: asks the run to end early.
        folder: of the run; the config's by default.
        network: as of :func:`train`.

    Attributes:
        config: of the run, fitted to its images and its length; ``chosen`` is as it was given.
        data: this rank's training images.
        evaluation_data: this rank's images to evaluate on.
        network: the network itself.
        model: the network as it is trained: moved, wrapped for several processes, compiled.
        compiled: whether it is compiled.
        optimizer: its optimizer.
        centring: moves the input means of centred weights; None for a network without.
        average: of its weights; None without one.
        accumulation: batches of a rank in an optimizer step.
        steps_per_epoch, total_steps: optimizer steps.
        last_step: at which to stop, earlier if steps are limited.
        step: optimizer steps taken.
        skipped: of them, those left out because of a loss or gradient that was not finite.
        seconds: of training so far, evaluation left out.
        evaluation: the last one, if it was at this step.
        monitor: records the signal; None where it is not recorded.
        records: the curves; of rank 0 alone, while it trains.
        progress: shows where the run is.

    Raises:
        ValueError: if data, network and batch do not fit together.
    """

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        console: Console | None = None,
        stop: StopRequest | None = None,
        folder: Path | None = None,
        *,
        network: NetworkFactory | None = None,
    ) -> None:
        self.chosen, self.fabric, self.console, self.stop = config, fabric, console, stop or StopRequest()
        self.folder = folder or config.folder
        self.store = CheckpointStore(self.folder / CHECKPOINTS, config.keep)
        rank, world_size = fabric.global_rank, fabric.world_size

        config, self.data = self._open_data()
        self.config = config
        self.accumulation = config.accumulation(world_size)
        self.augmentation = self.data.augmentation().to(fabric.device)
        self.steps_per_epoch = self.data.steps_per_epoch // self.accumulation
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.limit_train_steps or self.total_steps)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self._notes: list[str] = []

        self.states = ShardedStates() if config.strategy == "fsdp" else WholeStates()
        self.network = build_network(config, self.data, network)
        self.centring = self._build_centring()
        self.average = self._build_average()
        compiled, note = compile_network(self.network, config, self.data, fabric)
        self._notes += [note] if note else []
        if self.centring is not None:
            self.centring.forget()  # what compilation ran with
        self.compiled = compiled is not None
        self.model = fabric.setup_module(self.network if compiled is None else compiled)
        self.optimizer = self._build_optimizer()
        self.criterion: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

        size = config.evaluation_size or self.data.config.image_size
        self.evaluation_data = open_evaluation(
            dataclasses.replace(self.data.config, image_size=size),
            rank=rank,
            world_size=world_size,
            classes=self.data.class_names,
        )
        self.evaluation: Evaluation | None = None
        self.monitor = self._build_monitor()
        self.records: Records | None = None
        self.progress = Progress(None, 0, self.last_step, config.epochs)
        self.start_clock()
        self._start_stretch()

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a shard of the network only."""
        return isinstance(self.states, ShardedStates)

    @property
    def epoch(self) -> int:
        """Passes over the data that are complete."""
        return self.step // self.steps_per_epoch

    @property
    def final_network(self) -> nn.Module:
        """The network to evaluate and to save: the averaged one, if weights are averaged."""
        return self.network if self.average is None else self.average.module

    # Building

    def _open_data(self) -> tuple[TrainConfig, TrainingData]:
        """Open this rank's training images; returns them with the config that they and the run's length allow."""
        config, rank, world_size = self.chosen, self.fabric.global_rank, self.fabric.world_size
        config = dataclasses.replace(config, data=with_holdout(config.data))
        try:
            data = open_training(config.rank_data(world_size), rank=rank, world_size=world_size)
            examples = data.examples
        except TooFewExamples as few:
            data, examples = None, few.examples
        fitted = config.fit_to_data(examples, world_size)
        if data is None or fitted.batch_size != config.batch_size:
            data = open_training(fitted.rank_data(world_size), rank=rank, world_size=world_size)
        if data.num_classes < 2:
            rule = f"has images of one class alone ({list_names(data.class_names)})"
            raise invalid("source", config.data.source, rule, "give images of two classes at least")
        return fitted, data

    def _build_centring(self) -> InputCentring | None:
        if not self.config.model_overrides.get(CENTRED, False):
            return None
        if self.sharded:
            rule = "centred weights are moved whole, and fsdp shards them"
            raise invalid("model", self.config.model, rule, "pass --strategy ddp, or leave out centred=True")
        return InputCentring(self.network, process_group=self._process_group())

    def _process_group(self) -> Any:
        return torch.distributed.group.WORLD if self.fabric.world_size > 1 else None

    def _build_average(self) -> WeightAverage | None:
        if self.config.average_decay is None:
            return None
        average = WeightAverage(self.network, self.config.average_decay)
        average.module.to(self.fabric.device)
        if self.sharded:
            shard(average.module, self.fabric.strategy.device_mesh)  # type: ignore[attr-defined]
        return average

    def _build_optimizer(self) -> Optimizer:
        config: OptimizerConfig = self.config.optimizer
        self.peak = config.peak(self.config.batch_size)
        if config.final_learning_rate > self.peak:
            rule = f"is above the highest learning rate, {self.peak:g}"
            raise invalid("final_learning_rate", config.final_learning_rate, rule, "pass a smaller one")
        if config.rule == "muon":
            groups = muon_groups(
                self.network,
                config.weight_decay,
                sgd_lr_scale=config.sgd_learning_rate / config.learning_rate,
                sgd_weight_decay=config.weight_decay,
                classifier_lr_scale=config.classifier_lr_scale,
            )
            groups = self.states.split_groups(groups)
            optimizer = Muon(groups, self.peak, momentum=config.momentum, process_group=self._process_group())
        else:
            scales = {"classifier_lr_scale": config.classifier_lr_scale, "gain_lr_scale": config.gain_lr_scale}
            groups = parameter_groups(self.network, config.weight_decay, **scales)
            groups = self.states.split_groups(groups)
            optimizer = SGD(groups, lr=self.peak, momentum=config.momentum, nesterov=True, foreach=True)
        if config.clip_factor is None:
            return optimizer
        return AdaptiveGradientClipping(optimizer, self.network, config.clip_factor, config.clip_eps)

    def _build_monitor(self) -> SignalMonitor | None:
        """Build what records the signal of the first images that are evaluated; a sharded network's is not recorded."""
        every = self.config.signal_every
        if every == 0 or self.sharded or not self.fabric.is_global_zero:
            return None
        if (probe := self._probe()) is None:
            raise self.evaluation_data.no_image()
        return SignalMonitor(self.network, probe.to(self.fabric.device), every=every, name=self.config.model)

    def _probe(self) -> Tensor | None:
        """The first images that are evaluated, standardized; None where there is none."""
        images = next((images for images, _ in self.evaluation_data), None)
        return None if images is None else self.evaluation_data.standardization()(images[:PROBE])

    # The run

    def run(self) -> Summary:
        """Train to the end, or to a request to stop; a run that has ended before is only summed up."""
        if self.folder != self.chosen.folder:
            others = list_names(differences(self.chosen, self.chosen.folder))
            self._say(
                f"{self.chosen.folder} holds a run with other settings ({others}): this one's folder is {self.folder}"
            )
        checkpoint = on_rank_zero(self.fabric, lambda: self.store.newest(set_aside=True))
        before = checkpoint if self.config.on_changed == "error" else None
        if before is not None:
            on_rank_zero(self.fabric, lambda: check_settings(before, self.folder, self.made_by))
        metrics = on_rank_zero(self.fabric, lambda: None if checkpoint is None else self._read_metrics(checkpoint.step))
        if metrics is not None:
            return Summary(self.folder, metrics, repeated=True)
        description = on_rank_zero(self.fabric, self.describe)
        if before is not None:
            on_rank_zero(self.fabric, lambda: check_conditions(before, self.folder, description))
        if checkpoint is not None:
            self.resume(checkpoint)
        if not self.fabric.is_global_zero:
            return self._summarize(self.fit(), description)
        write_atomically(self.folder / CONFIG, json.dumps(description, indent=1) + "\n")
        for line in self._opening_lines():
            self._say(line)
        with self.recording(description):
            return self._summarize(self.fit(), description)

    def _read_metrics(self, step: int) -> dict[str, Any] | None:
        """Return the metrics of a run that came to its end before, and whose weights are there.

        Raises:
            ValueError: the weights are another file than the metrics say, or the metrics are damaged.
        """
        weights = self.folder / MODEL
        if step < self.last_step or kind_of(weights) != "file" or notes_of(weights) is None:
            return None  # goes on from its last checkpoint, and writes them again
        metrics = read_metrics(self.folder, step)
        if metrics is not None:
            remedy = f"restore both from a copy, or remove {METRICS}, and the same command writes both again"
            check_weights(self.folder, "out", remedy)
        return metrics

    def describe(self) -> dict[str, Any]:
        """Return what was chosen, what followed from it, and where it ran, as ``config.json`` has it."""
        device = self.fabric.device
        derived = {
            "learning_rate": self.peak,
            "clip_norm": self.config.optimizer.largest_norm(self.config.batch_size),
            "precision": FABRIC_PRECISION[resolve_precision(self.config.precision, device.type)],
            "device": str(device),
            "compiled": self.compiled,
            "ranks": self.fabric.world_size,
            "batch_size": self.config.batch_size,
            "accumulation": self.accumulation,
            "warmup_epochs": self.config.optimizer.warmup_epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.total_steps,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "data": to_dict(self.data.config),
            "classes": list(self.data.class_names),
            "training_data": self.data.identity(),
        }
        return {"config": to_dict(self.chosen), "derived": derived, **provenance()}

    @cached_property
    def made_by(self) -> MadeBy:
        """What makes the bits of the run, for its checkpoints to say."""
        return made_by(self.chosen, self.describe())

    def _opening_lines(self) -> Iterator[str]:
        """Say on what the run trains and evaluates, for how long, and what differs from what was chosen."""
        chosen, config, data = self.chosen, self.config, self.data
        names, evaluated = list_names(data.class_names), self.evaluation_data.examples
        yield f"training on {data.examples:,} images of {data.num_classes:,} classes ({names})"
        if chosen.data.image_size is None and not data.config.in_memory:
            yield f"images are taken at {data.config.size} × {data.config.size} (--data.image-size)"
        if self.evaluation_data.held_out:
            why = "" if chosen.data.holdout else ", for the data have no split to evaluate on"
            yield f"evaluating on {evaluated:,} more, held out by class (--data.holdout {config.data.holdout:g}){why}"
            if absent := self.evaluation_data.absent_classes():
                yield f"no image of {list_names(absent)} is held out: that takes two different ones, in no other class"
        elif evaluated is not None:
            yield f"evaluating on {evaluated:,}"
        if config.batch_size != chosen.batch_size:
            yield f"--batch-size {config.batch_size} instead of {chosen.batch_size}, for there are too few images"
        steps, left_out = divmod(data.examples, config.batch_size)
        if steps < STEPS and left_out:
            several, better = "s" * (steps != 1), 2 ** int(math.log2(max(data.examples // STEPS, 1)))
            yield (
                f"an epoch is {steps} step{several} of {config.batch_size} images and leaves out {left_out}, others "
                f"each time; --batch-size {better} makes it {STEPS} or more"
            )
        yield config.optimizer.describe(config.batch_size)
        if (now := config.optimizer.warmup_epochs) != (before := chosen.optimizer.warmup_epochs):
            yield f"--optimizer.warmup-epochs {now:g} instead of {before:g}, a quarter of the run's {config.epochs}"
        yield from self._notes
        if (images := self._probe()) is not None and (note := compare_units(self.network, images, data.config.source)):
            yield note
        if 0 < self.step < self.last_step:
            yield f"going on from step {self.step} of {self.last_step}"

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def fit(self) -> bool:
        """Train from where the run stands; returns whether the end was reached, and not a request to stop."""
        while self.step < self.last_step:
            if not self.train_epoch():
                self.save_checkpoint()
                return False
            if self.step >= self.last_step or self.epoch % self.config.evaluate_every == 0:
                self.evaluate()
            self.save_checkpoint()
        if self.evaluation is None:
            self.evaluate()
        return True

    def train_epoch(self) -> bool:
        """Train to the end of the epoch or of the run; returns whether no rank was asked to stop."""
        every = self.config.checkpoint_every
        self.evaluation = None
        self.start_clock()
        for batches in self.rest_of_epoch():
            outcome = self.train_step(batches)
            self.log_step(outcome)
            if outcome.stop:
                return False
            if self.step == self.last_step:
                break
            if every and self.step % every == 0 and self.step % self.steps_per_epoch:
                self.save_checkpoint()
                self.start_clock()
        return True

    def rest_of_epoch(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step that is left of this epoch."""
        self.data.set_epoch(self.epoch)
        batches = iter(self.data)
        for _ in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            yield [next(batches) for _ in range(self.accumulation)]

    # A step

    def train_step(self, batches: Sequence[Batch]) -> Outcome:
        """Take one optimizer step: the mean gradient of all batches, of all ranks.

        Args:
            batches: those of this rank.

        Raises:
            NonFiniteLossError: if the loss or the gradient is not finite, unless such steps are to be skipped; it
                names the module where that began, and the weights are as before.
        """
        config, model, fabric, optimizer = self.config, self.model, self.fabric, self.optimizer
        rate = self.learning_rate()
        model.train()
        # A normalizer's running statistics have taken the batch in even if the step is then skipped.
        buffers = [buffer.clone() for buffer in self.network.buffers()] if config.on_nonfinite == "skip" else []
        losses = []
        for number, batch in enumerate(batches):
            images, targets = self.prepare(batch, number)
            with fabric.no_backward_sync(model, enabled=number + 1 < len(batches)):
                loss = self.criterion(model(images), targets) / len(batches)
                fabric.backward(loss)
            losses.append(loss.detach())
        self.states.average_scalar_gradients(self.network)
        outcome = self._reduce(torch.stack(losses).sum(), rate)
        if outcome.finite:
            if (largest := config.optimizer.largest_norm(config.batch_size)) is not None:
                norm = torch.tensor(outcome.gradient_norm, device=fabric.device)
                clip_grads_with_norm_(self.network.parameters(), largest, norm, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            optimizer.step()
            if self.centring is not None:
                self.centring.step()
            if self.average is not None:
                self.average.update()
        elif config.on_nonfinite == "error":
            raise NonFiniteLossError(diagnose_nonfinite(self, batches, outcome.loss), self.step)
        else:
            self.skipped += 1
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if self.centring is not None:
                self.centring.forget()
        optimizer.zero_grad()
        self.step += 1
        return outcome

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        config = self.config.optimizer
        return self.peak * warmup_cosine_factor(
            self.step,
            steps=self.total_steps,
            warmup_steps=round(config.warmup_epochs * self.steps_per_epoch),
            final_fraction=config.final_learning_rate / self.peak,
        )

    def prepare(self, batch: Batch, number: int) -> Batch:
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

    def _reduce(self, loss: Tensor, rate: float) -> Outcome:
        """Make loss, norm and request to stop the same on all ranks; read from the device once, for it waits."""
        norm = self.states.gradient_norm(self.network)
        values = torch.stack([loss.float(), norm.float(), torch.tensor(float(self.stop.asked), device=loss.device)])
        if (world_size := self.fabric.world_size) > 1:
            values = self.fabric.all_reduce(values, reduce_op="sum") / world_size  # type: ignore[operator]
        mean_loss, gradient_norm, stop = values.tolist()
        return Outcome(
            loss=mean_loss,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            images=self.config.batch_size,
            stop=stop > 0,  # of any rank
        )

    # Evaluation and checkpoints

    def evaluate(self) -> None:
        """Evaluate the network, averaged where weights are averaged."""
        limit = self.config.limit_eval_steps
        self.progress.evaluating()
        self.evaluation = evaluate(
            self.final_network, self.evaluation_data, self.fabric, limit=limit, sharded=self.sharded
        )
        if self.records is not None:
            row: Row = {"step": self.step, "epoch": self._fraction_of_epochs(), **self.evaluation.figures()}
            self.records.log_evaluation({**row, "seconds": round(self.seconds, 3)})
            self.progress.say(self._evaluation_line(row))

    def _evaluation_line(self, row: Row) -> str:
        """An evaluation and the stretch of training before it, in words."""
        assert self.records is not None
        last: Mapping[str, Any] = self.records.training.rows[-1] if self.records.training.rows else {}
        loss, speed = last.get("loss"), last.get("images_per_second")
        parts = [f"epoch {row['epoch']:g}/{self.config.epochs}", f"step {row['step']}"]
        parts += [f"accuracy {100 * (row['top1'] or 0):.2f} %", f"test loss {row['loss']:.4f}"]
        parts += [f"training loss {loss:.4f}"] if loss is not None else []
        return "  ".join([*parts, f"{speed:,.0f} images/s"] if speed is not None else parts)

    def save_checkpoint(self) -> None:
        """Write a checkpoint; one with weights that are not finite is refused.

        Raises:
            ValueError: naming the parameter; earlier checkpoints are as they were.
        """
        for name, parameter in self.network.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"step {self.step}: parameter {name!r} is not finite any more, and no checkpoint was written; "
                    "lower the learning rate or clip, and go on from the last one"
                )
        state, weights = self.state_dict(), self.weights()
        if self.fabric.is_global_zero:
            score = None if self.evaluation is None else self.evaluation.top1
            self.store.write(self.step, state, weights, score, self.made_by)
        self.fabric.barrier()

    def state_dict(self) -> dict[str, Any]:
        """Return all but the weights, as tensors and plain values; every rank has to call it."""
        data: list[Any] = [self.data.state_dict()]
        if self.fabric.world_size > 1:
            data = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(data, self.data.state_dict())
        return {
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "optimizer": self.states.gather_optimizer(self.network, self.optimizer),
            "averages": None if self.average is None else self.average.updates,
            "signal": None if self.monitor is None else json.dumps(self.monitor.state_dict()),
            "data": data,
        }

    def weights(self) -> dict[str, Callable[[Path], Any]]:
        """Return for each weights file of a checkpoint what writes it; every rank has to call it."""
        networks = {WEIGHTS: self.network} | ({} if self.average is None else {AVERAGED: self.average.module})
        return {name: partial(self._save, self.states.gather_network(network)) for name, network in networks.items()}

    def _save(self, network: nn.Module, path: Path) -> None:
        metadata = Preprocessing.of(self.evaluation_data.config, self.data.class_names).to_metadata()
        if self.config.is_foreign:
            save_trained(network, path, self.config.model, self.data.num_classes, metadata=metadata)
        else:
            save(network, path, metadata=metadata)

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
            self._load_state(checkpoint, state)
        except Exception as error:  # what a state of another run, or a forged one, makes of PyTorch's loaders
            rule = f"its state is none of this run ({first_line(error)})"
            raise ValueError(f"{where}: {rule}; give the run's own settings, or restore it from a copy") from error

    def _load_state(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        step = check_integer("step", state["step"], 0)
        if step != checkpoint.step or step > self.total_steps:
            raise ValueError(f"step {step} of {self.total_steps} in a checkpoint of step {checkpoint.step}")
        self.step, self.skipped = step, check_integer("skipped", state["skipped"], 0)
        self.seconds = check_number("seconds", state["seconds"], 0)
        self.data.load_state_dict(state["data"][self.fabric.global_rank])
        batches = self.data.epoch * self.steps_per_epoch * self.accumulation + self.data.step
        if batches != step * self.accumulation:
            raise ValueError(f"the images are at batch {batches} instead of {step * self.accumulation}")
        self._load_network(self.network, checkpoint.folder / WEIGHTS)
        self._load_optimizer(state["optimizer"])
        if self.average is not None:
            self._load_network(self.average.module, checkpoint.folder / AVERAGED)
            self.average.updates = check_integer("averages", state["averages"], 0)
            if self.average.updates > step:
                raise ValueError(f"weights were averaged {self.average.updates} times in {step} steps")
        if self.monitor is not None and state["signal"] is not None:
            self.monitor.load_state_dict(parse_json(state["signal"]))

    def _load_network(self, network: nn.Module, path: Path) -> None:
        """Give a network a checkpoint's weights, which are of its precisions and finite, as they were when written."""
        own, tensors = network.state_dict(), read(path).tensors
        if unlike := [name for name, tensor in tensors.items() if name in own and tensor.dtype != own[name].dtype]:
            raise ValueError(f"{unlike[0]} is {tensors[unlike[0]].dtype} instead of {own[unlike[0]].dtype}")
        self.states.load_network(network, tensors)
        check_finite(network)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Give the optimizer its state: momenta of the parameters, and no settings but those of the config.

        Raises:
            ValueError: naming a setting that is another, or a parameter whose state is no finite tensor of its shape.
        """
        if any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in tree_leaves(saved["state"])):
            raise ValueError("the optimizer's state holds integers")
        settings = [dict(group) for group in self.optimizer.param_groups]
        self.states.load_optimizer(self.network, self.optimizer, saved)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            for name in (own.keys() & group.keys()) - {"params", "lr"}:
                if group[name] != own[name]:
                    raise ValueError(f"the optimizer's {name} is {quoted(group[name])} instead of {quoted(own[name])}")
        if self.step > self.skipped and not self.optimizer.state:
            raise ValueError("the optimizer has no momenta")
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                sound = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
                sound = sound and (key != "momentum_buffer" or value.shape == parameter.shape)
                if value is not None and not (sound and bool(torch.isfinite(value).all())):
                    raise ValueError(f"the optimizer's {key} of {name} is no finite tensor of its shape")

    # Records

    @contextmanager
    def recording(self, description: Mapping[str, Any]) -> Iterator[None]:
        """Record and show what happens while the context is open; on rank 0."""
        derived = {name: value for name, value in description["derived"].items() if name not in ("data", "classes")}
        settings = {**description["config"], "derived": derived}
        loggers = Loggers(self.config.log, self.folder, self.step, settings)
        self.records = Records(self.folder, self.step, loggers)
        self.progress = Progress(self.console, self.step, self.last_step, self.config.epochs)
        if self.monitor is not None:
            self.monitor.writer = loggers
        self._start_stretch()
        with self.records, self.progress:
            yield

    def start_clock(self) -> None:
        """Start to count seconds: what comes now is training, and what belongs to it."""
        self._mark = time.perf_counter()
        if self.monitor is not None and self.records is not None:
            self.monitor.start()

    def _start_stretch(self) -> None:
        """Begin the steps that the next row of the curve is about."""
        self._losses: list[float] = []
        self._images, self._began = 0, self.seconds

    def log_step(self, outcome: Outcome) -> None:
        """Count a step's time, and record it, its stretch where that ends, and the signal where it is due."""
        if self.monitor is not None:
            self.monitor.step(self.step)
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        if self.records is None:
            return
        self._losses.append(outcome.loss)
        self._images += outcome.images
        self.progress.advance(self.step, min(self.epoch + 1, self.config.epochs), outcome.loss, outcome.images)
        if self.step % min(self.config.log_every, self.steps_per_epoch) == 0 or self.step == self.last_step:
            finite = [loss for loss in self._losses if math.isfinite(loss)]
            clip_fraction = getattr(self.optimizer, "clip_fraction", None)
            row: Row = {
                "step": self.step,
                "epoch": self._fraction_of_epochs(),
                "loss": sum(finite) / len(finite) if finite else None,
                "learning_rate": outcome.learning_rate,
                "gradient_norm": outcome.gradient_norm,
                "clip_fraction": None if clip_fraction is None else float(clip_fraction),
                "images_per_second": self._images / max(self.seconds - self._began, 1e-9),
                "seconds": round(self.seconds, 3),
            }
            self.records.log_training(row)
            self.progress.show_figures(row["loss"], row["images_per_second"] or 0.0)
            self._start_stretch()

    def _fraction_of_epochs(self) -> float:
        return round(self.step / self.steps_per_epoch, 4)

    def _summarize(self, finished: bool, description: Mapping[str, Any]) -> Summary:
        """Write what came of the run, and return it; every rank has to call it."""
        metrics: dict[str, Any] = {
            "status": "finished" if finished else "stopped",
            "recipe": self.config.name,
            "seed": self.config.seed,
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "seconds": round(self.seconds, 3),
            "skipped_steps": self.skipped,
            "bad_images": {**self.data.bad_images, **self.evaluation_data.bad_images},
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
        }
        network = self.states.gather_network(self.final_network)
        if self.records is not None:
            training, evaluation = self.records.training.rows, self.records.evaluation.rows
            metrics["best_top1"] = max((row["top1"] or 0 for row in evaluation), default=None)
            if finished:
                (self.folder / METRICS).unlink(missing_ok=True)  # an earlier end's, of other weights
                self._save(network, self.folder / MODEL)
                metrics[WEIGHTS_HASH] = hash_of(self.folder / MODEL)
                history = metrics["signal"] = None
                if self.monitor is not None:
                    self.monitor.stop()  # records the last step
                    self.monitor.to_json(self.folder / SIGNAL)
                    history = self.monitor.history
                    metrics["signal"] = {"records": len(history), "share_of_time": round(self.monitor.cost, 5)}
                page = self.folder / REPORT
                write_training_report(page, description, metrics, training, evaluation, history)
            write_atomically(self.folder / METRICS, json.dumps({**metrics, **provenance()}, indent=1) + "\n")
            self.records.loggers.status = metrics["status"]
        self.fabric.barrier()
        return Summary(self.folder, metrics)


def on_rank_zero(fabric: Fabric, call: Callable[[], Result]) -> Result:
    """Return on all ranks what a call returns on rank 0, or raise there what it raises."""
    result: Any = None
    error: Exception | None = None
    if fabric.is_global_zero:
        try:
            result = call()
        except (ValueError, OSError) as raised:
            error = raised
    if fabric.world_size > 1:
        result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return result


# A loss that is not finite


class NonFiniteLossError(ValueError):
    """Training has diverged: a loss or a gradient is not finite.

    Attributes:
        step: optimizer steps taken before.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def diagnose_nonfinite(trainer: Trainer, batches: Sequence[Batch], loss: float) -> str:
    """Run the step's batches again and say where the first value that is not finite came from.

    Args:
        trainer: as it was before the step, gradients aside.
        batches: of the step, on this rank.
        loss: of the step, over all ranks.
    """
    value = "it is not finite" if math.isnan(loss) else f"it is {loss:g}"
    gradients = {name: p.grad for name, p in trainer.network.named_parameters() if p.grad is not None}
    where = f"loss at step {trainer.step} (epoch {trainer.epoch})"
    remedy = (
        "lower the learning rate, lengthen the warm-up or clip (--optimizer.clip-norm 1), with another --out; "
        "--on-nonfinite skip goes on without such steps"
    )
    if trainer.sharded:
        return f"{where}: {value}, in a network whose shards are not searched; {remedy}"
    try:
        check_finite(trainer.network)
    except ValueError as error:
        return f"{where}: {value}: {str(error).partition(';')[0]}; {remedy}"
    for number, batch in enumerate(batches):
        if found := _find_nonfinite(trainer, trainer.prepare(batch, number)):
            return f"{where}: {value}: {found}; {remedy}"
    if names := [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]:
        return f"{where}: it is {loss:g}, but the gradient is not finite, from {names[-1]!r} backwards; {remedy}"
    if trainer.fabric.world_size > 1:
        return f"{where}: {value}, on another rank; {remedy}"
    name, largest = max(((n, float(g.abs().max())) for n, g in gradients.items()), key=lambda one: one[1])
    found = f"it is {loss:g}, and the gradient's norm overflows: it reaches {largest:.3g} in {name!r}"
    return f"{where}: {found}; {remedy}"


def _find_nonfinite(trainer: Trainer, batch: Batch) -> str | None:
    """Return in words the first value between a batch and its loss that is not finite."""
    images, targets = batch
    if bad := int((~torch.isfinite(images)).sum()):
        return f"the images themselves have {bad} values that are not finite"
    network, state = trainer.network, torch.get_rng_state()
    with preserve_model(network, "train") as preserved, torch.no_grad(), trainer.fabric.autocast():
        with Writes(preserved):
            loss = trainer.criterion(network(images), targets)
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
