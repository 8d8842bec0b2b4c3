"""Where a run computes, and in what: the devices there are, and bf16 where they multiply it natively."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normfree.common.checks import invalid
from normfree.common.packages import required
from normfree.train.config import TrainConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def device_type(accelerator: str) -> str:
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
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def chosen_precision(precision: str, device: str) -> str:
    """Return "bf16" or "fp32" for a choice of ``TrainConfig.precision``."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def launch(config: TrainConfig) -> Fabric:
    """Return Lightning Fabric for a training process, as ``torchrun`` started it or alone.

    Args:
        config: of the run.

    Raises:
        ValueError: for a strategy that needs ``torchrun`` without it.
        ImportError: if lightning is not installed.
    """
    return launched(config.accelerator, config.precision, config.strategy)


def launched(accelerator: str, precision: str, strategy: str = "auto") -> Fabric:
    """Return Lightning Fabric for choices of ``TrainConfig``'s fields of these names; raises as :func:`launch`."""
    required("lightning.fabric", "training")
    from lightning.fabric import Fabric

    device = device_type(accelerator)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 1
    mixed = chosen_precision(precision, device) == "bf16"
    if 1 < local == world:
        _meet(device)
    with _quiet():
        fabric = Fabric(
            accelerator=device,
            devices=local,
            num_nodes=world // local,
            strategy=_strategy(strategy, world),
            precision="bf16-mixed" if mixed else "32-true",
        )
        fabric.launch()
    return fabric


def _meet(device: str) -> None:
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
def _quiet() -> Iterator[None]:
    """Without Fabric's own words on what config.json has anyway."""
    # Which of the two speaks depends on which was imported last.
    loggers = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in ("fabric", "pytorch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _strategy(strategy: str, world_size: int) -> Any:
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

    Scalars, such as skip gains, cannot be sharded: every rank keeps them, and ``ShardedStates.gradient_norm`` averages
    their gradients.
    """
    from torch.distributed.fsdp import fully_shard

    ranks = mesh["data_parallel"]
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for stage in model.stages:  # type: ignore[union-attr]
        for block in stage:  # type: ignore[union-attr]
            fully_shard(block, mesh=ranks, ignored_params=scalars)
    fully_shard(model, mesh=ranks, ignored_params=scalars)
    return model
