"""The network of a run: drawn from its seed, held against the data, and compiled where that pays."""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.common.text import first_line
from normfree.convert.record import conversion_of
from normfree.data import TrainingData
from normfree.models import create_model
from normfree.trace.preserve import Writes, preserve_model
from normfree.train.config import TrainConfig
from normfree.train.evaluation import check_no_probabilities

if TYPE_CHECKING:
    from lightning.fabric import Fabric

NetworkFactory = Callable[[int, int], nn.Module]
"""Builds a network, given the numbers of classes and of the images' channels."""

COMPILED_ON = ("cuda",)
"""Devices on which a network is compiled by default: kernel launches take longer than the kernels there."""


def build_network(config: TrainConfig, data: TrainingData, factory: NetworkFactory | None) -> nn.Module:
    """Build a run's network, drawn from its seed, for its classes and channels.

    Args:
        config: of the run.
        data: its training images.
        factory: builds a network that is none of ours.

    Raises:
        ValueError: one that is none of ours does not give logits of the classes for images of their shape, or would be
            sharded.
    """
    sharded = config.strategy == "fsdp"
    torch.manual_seed(config.seed)
    if factory is not None and config.is_foreign:
        if sharded:
            rule = "fsdp shards the blocks of normfree's own networks"
            raise invalid("strategy", config.strategy, rule, "pass --strategy ddp")
        network = factory(data.num_classes, data.in_channels)
        _check_logits(network, config.model, data)
    else:
        network = create_model(
            config.model_name, num_classes=data.num_classes, in_channels=data.in_channels, **config.model_overrides
        )
    if config.channels_last and not sharded:  # FSDP shards contiguous parameters only
        # Not those of 1x1: they are alike in both layouts, and DistributedDataParallel warns of their strides.
        for parameter in network.parameters():
            if parameter.ndim == 4 and parameter.shape[2:].numel() > 1:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def _check_logits(network: nn.Module, word: str, data: TrainingData) -> None:
    """Raise unless a network gives logits of the data's classes for images of their shape."""
    with preserve_model(network, "eval") as preserved, torch.no_grad(), Writes(preserved):
        try:
            logits = network(torch.zeros(2, *data.image_shape))
        except Exception as error:  # of the network's own
            rule = f"fails on images {[2, *data.image_shape]} ({first_line(error)})"
            raise invalid("model", word, rule, "pass a network for such images") from error
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != [2, data.num_classes]:
        rule = f"gives {found} for 2 images, and not logits of {data.num_classes} classes, [2, {data.num_classes}]"
        raise invalid("model", word, rule, f"build it for {data.num_classes} classes")
    if logits.is_floating_point():
        check_no_probabilities(logits)


# A first layer that is standardized gives the variance of its input to all that follows. Images of one kind, prepared
# alike, have mean squares within a factor of two; four is another preparation, or another kind.
UNITS_FACTOR = 4.0


def compare_units(network: nn.Module, images: Tensor, source: str) -> str:
    """Return the line that says a converted network was planned for inputs of another size than its images; "" if not.

    Args:
        network: any; one of a fresh conversion holds the mean square of the batch that it was converted on.
        images: it is trained or evaluated on, standardized.
        source: of the images.
    """
    record = conversion_of(network)
    planned = () if record is None or record.start != "fresh" else record.input_mean_squares
    if len(planned) != 1 or not planned[0]:
        return ""
    found = float(images.double().square().mean())
    if 1 / UNITS_FACTOR <= found / planned[0] <= UNITS_FACTOR:
        return ""
    return (
        f"the network was converted on a batch of mean square {planned[0]:.3g}, and these images have {found:.3g}: its "
        f"signal is not of the size that its branches are scaled for; convert it on them, with --input {quote(source)}"
    )


def compile_network(
    network: nn.Module, config: TrainConfig, data: TrainingData, fabric: Fabric
) -> tuple[nn.Module | None, str]:
    """Compile a run's network, if that is asked for or pays.

    One forward and one backward pass run first, for torch compiles at the first call; what they leave in the network's
    gradients and buffers is undone.

    Args:
        network: is moved to the run's device.
        config: of the run.
        data: its training images.
        fabric: of this process.

    Returns:
        The compiled network, None where it is trained as it is; and why it could not be compiled, "" otherwise.

    Raises:
        ValueError: compilation is asked for and fails.
    """
    wanted, device, sharded = config.compile, fabric.device, config.strategy == "fsdp"
    if wanted is False or (wanted == "auto" and (device.type not in COMPILED_ON or sharded)):
        return None, ""
    compiled: Any = torch.compile(network)
    if sharded:
        return compiled, ""
    reason = None
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    shape = (data.config.batch_size, *data.image_shape)
    network.to(device)
    network.train()
    buffers = [buffer.clone() for buffer in network.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with fabric.autocast():
                logits = compiled(torch.rand(shape, device=device).contiguous(memory_format=layout))
            logits.float().square().mean().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, of what it calls, or of the network itself
            reason = first_line(error)
    network.zero_grad()
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    reasons = [reason]
    if fabric.world_size > 1:
        reasons = [reason] * fabric.world_size
        torch.distributed.all_gather_object(reasons, reason)
    if not (failed := [each for each in reasons if each is not None]):
        return compiled, ""
    if wanted is True:
        raise invalid("compile", True, f"the network is not compiled here ({failed[0]})", "pass --compile False")
    return None, f"not compiled, so that steps take longer: {failed[0]}"
