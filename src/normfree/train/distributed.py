"""Where a run computes, in what precision, and how its states are whole although ranks may hold shards of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from normfree.common.checks import invalid, require
from normfree.common.torch_compat import cpu_multiplies_bf16
from normfree.models import Backbone, create_model
from normfree.train.config import Accelerator, Precision, Strategy

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def device_type(accelerator: Accelerator) -> str:
    """Return "cuda" or "cpu" for a choice of ``TrainConfig.accelerator``.

    Raises:
        ValueError: for cuda where there is none.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise invalid("accelerator", accelerator, "PyTorch finds no GPU here", "pass cpu or auto")
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def multiplies_bf16(device: str) -> bool:
    """Tell whether a kind of device multiplies bf16 natively, and not by way of fp32.

    NVIDIA's GPUs do since Ampere; AMD's and Intel's CPUs with AVX512-BF16 or AMX, ARM's with their BF16 extension.

    Args:
        device: "cuda" or "cpu".
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bf16()


def resolve_precision(precision: Precision, device: str) -> str:
    """Return "bf16" or "fp32" for a choice of ``TrainConfig.precision``."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


FABRIC_PRECISION = {"bf16": "bf16-mixed", "fp32": "32-true"}
"""What Fabric calls a precision."""


def launch(accelerator: Accelerator, precision: Precision, strategy: Strategy = "auto") -> Fabric:
    """Return Lightning Fabric for choices of ``TrainConfig``'s fields, as ``torchrun`` started the process or alone.

    Raises:
        ValueError: for a strategy that needs ``torchrun`` without it, for cuda where there is none, and for variables
            of the environment that ``torchrun`` does not set so.
        ImportError: if lightning is not installed.
    """
    require("lightning.fabric", "training")
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" not in os.environ:
        rule = "of the environment, is not set, and LOCAL_WORLD_SIZE is"
        raise invalid("WORLD_SIZE", None, rule, "unset LOCAL_WORLD_SIZE, or start with torchrun")
    from lightning.fabric import Fabric

    device = device_type(accelerator)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 1
    if 1 < local == world:
        _join_ranks(device)
    with _silence_fabric():
        fabric = Fabric(
            accelerator=device,
            devices=local,
            num_nodes=world // local,
            strategy=_fabric_strategy(strategy, world),
            precision=FABRIC_PRECISION[resolve_precision(precision, device)],  # type: ignore[arg-type]
        )
        fabric.launch()
    return fabric


def _join_ranks(device: str) -> None:
    """Join the other ranks of this host, each time ``torchrun`` starts them under a name of its own.

    Its store outlives a restart, and under one name a rank may find the address of one that was killed.
    """
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "nccl" if device == "cuda" else "gloo"
    prefixed = PrefixStore(f"attempt_{attempt}", store)
    distributed.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size)


@contextmanager
def _silence_fabric() -> Iterator[None]:
    """Keep Fabric from printing what config.json has anyway."""
    # Which of the two is used depends on which was imported last.
    loggers = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in ("fabric", "pytorch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _fabric_strategy(strategy: str, world_size: int) -> Any:
    """What Fabric calls a strategy."""
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

    if strategy == "auto" and world_size == 1:
        return "auto"
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise invalid("strategy", strategy, "needs several processes", "start with: torchrun -m normfree train …")
    if strategy == "fsdp":
        return ModelParallelStrategy(shard, data_parallel_size=world_size, tensor_parallel_size=1)
    return DDPStrategy()


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard a network, block by block: one block at a time is gathered whole.

    Scalars, such as skip gains, cannot be sharded: every rank keeps them, and their gradients are averaged by
    ``ShardedStates.average_scalar_gradients``.
    """
    from torch.distributed.fsdp import fully_shard

    ranks = mesh["data_parallel"]
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for stage in model.stages:  # type: ignore[union-attr]
        for block in stage:  # type: ignore[union-attr]
            fully_shard(block, mesh=ranks, ignored_params=scalars)
    fully_shard(model, mesh=ranks, ignored_params=scalars)
    return model


class WholeStates:
    """States where every rank has everything: one process, or DistributedDataParallel.

    What goes out and comes in is whole, so that what a checkpoint keeps does not depend on the number of ranks.
    """

    def gather_network(self, network: nn.Module) -> nn.Module:
        """Return a network with all weights, that ``normfree.save`` takes."""
        return network

    def load_network(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a network the weights it was saved with."""
        network.load_state_dict(dict(tensors))

    def gather_optimizer(self, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state."""
        return optimizer.state_dict()

    def load_optimizer(self, network: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Give an optimizer the state it was saved with."""
        optimizer.load_state_dict(state)

    def split_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return parameter groups whose tensors are of one kind each, as fused updates need them."""
        return groups

    def average_scalar_gradients(self, network: nn.Module) -> None:
        """Average over the ranks those gradients that the strategy does not; here there are none."""

    def gradient_norm(self, network: nn.Module) -> Tensor:
        """Return the Euclidean norm of the whole gradient, 0-d; the gradients are the same on all ranks by then."""
        return get_total_norm([p.grad for p in network.parameters() if p.grad is not None], foreach=True)


class ShardedStates(WholeStates):
    """States where every rank has a shard (FSDP): they are gathered on the CPU of rank 0, and spread again."""

    def gather_network(self, network: nn.Module) -> nn.Module:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(network, options=options)
        assert isinstance(network, Backbone), "fsdp is for networks of create_model"
        whole = create_model(**network.config)
        if tensors:  # on rank 0
            whole.load_state_dict(tensors)
        return whole

    def load_network(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(network, dict(tensors), options=StateDictOptions(full_state_dict=True))

    def gather_optimizer(self, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast("dict[str, Any]", get_optimizer_state_dict(network, _inner(optimizer), options=options))

    def load_optimizer(self, network: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(network, _inner(optimizer), state, options=options)

    def split_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        halves = []
        for group in groups:
            whole = [parameter for parameter in group["params"] if parameter.ndim == 0]
            shards = [parameter for parameter in group["params"] if parameter.ndim > 0]
            named = ((shards, group["name"]), (whole, f"{group['name']} scalars"))
            halves += [{**group, "params": params, "name": name} for params, name in named if params]
        return halves

    def average_scalar_gradients(self, network: nn.Module) -> None:
        """Average the gradients of scalars, which every rank keeps whole and FSDP does not average: one all-reduce."""
        if not (scalars := _gradients(network, scalars=True)):
            return
        mean = torch.stack(scalars)
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
        for gradient, value in zip(scalars, mean.unbind(), strict=True):
            gradient.copy_(value)

    def gradient_norm(self, network: nn.Module) -> Tensor:
        norm = get_total_norm(_gradients(network, scalars=False), foreach=True)
        norm = norm.full_tensor()  # type: ignore[attr-defined]
        scalars = _gradients(network, scalars=True)
        return torch.hypot(norm, torch.stack(scalars).norm()) if scalars else norm


def _gradients(network: nn.Module, *, scalars: bool) -> list[Tensor]:
    """The gradients of a network's scalars, or of all else."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [gradient for gradient in gradients if (gradient.ndim == 0) == scalars]


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer that keeps the state, inside one that clips."""
    return getattr(optimizer, "optimizer", optimizer)
