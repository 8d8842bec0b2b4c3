"""Everything a step changes: network, optimizer, average, data, and how many steps were taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from normfree.common.checks import check_integer, check_number, invalid
from normfree.common.files import parse_json
from normfree.common.text import first_line, quoted
from normfree.data import open_training
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
from normfree.signal import SignalMonitor
from normfree.train.checkpoint import AVERAGED, WEIGHTS, Checkpoint
from normfree.train.config import OptimizerConfig, TrainConfig
from normfree.train.precision import shard
from normfree.train.sharing import ShardedStates, States, WholeStates
from normfree.weights import save

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
