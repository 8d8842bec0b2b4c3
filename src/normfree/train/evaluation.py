"""How good a network is: loss, top-1, top-5 and confusion over a whole set, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normfree.common.checks import require
from normfree.common.text import first_line

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from normfree.data import EvaluationData


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        examples: that were evaluated, over all ranks.
        loss: mean cross-entropy, without label smoothing, in nats.
        top1: share of examples whose class has the highest logit.
        top5: share whose class is among the five highest; None with fewer than six classes.
        confusion: examples by true class (rows) and predicted class.
    """

    examples: int
    loss: float
    top1: float
    top5: float | None
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it: a loss that is not finite is None."""
        return {**asdict(self), "loss": self.loss if math.isfinite(self.loss) else None}

    def figures(self) -> dict[str, Any]:
        """The numbers without the confusion matrix."""
        return {name: value for name, value in asdict(self).items() if name != "confusion"}


def evaluate(
    network: nn.Module, data: EvaluationData, fabric: Fabric, *, limit: int | None = None, sharded: bool = False
) -> Evaluation:
    """Evaluate a network; it is left in the mode it came in.

    Args:
        network: takes standardized images [N, C, H, W] and returns logits [N, classes], on Fabric's device.
        data: this rank's batches.
        fabric: whose precision and processes to use.
        limit: batches of each rank, at most.
        sharded: ranks must run equally many batches, because they gather the network's weights together.

    Returns:
        The same on all ranks.

    Raises:
        ValueError: no image decodes; or as :func:`logits_of` and :func:`check_no_probabilities`.
    """
    require("torchmetrics", "an evaluation")
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    classes = len(data.class_names)
    metrics = MetricCollection({"confusion": MulticlassConfusionMatrix(classes)}, compute_groups=False)
    if classes > 5:
        metrics["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
    metrics, mean_loss = metrics.to(fabric.device), MeanMetric(nan_strategy="disable").to(fabric.device)
    training, checked = network.training, False
    network.eval()
    batches = _to_device(islice(iter(data), limit), data.standardization().to(fabric.device), fabric)
    try:
        with torch.no_grad():
            for images, targets in _keep_in_step(batches, data, fabric) if sharded else batches:
                with fabric.autocast():
                    logits = logits_of(network, images, classes)
                if len(targets):
                    if not checked:
                        check_no_probabilities(logits)
                        checked = True
                    logits = logits.float()
                    metrics.update(logits, targets)
                    mean_loss.update(functional.cross_entropy(logits, targets, reduction="none"))
    finally:
        network.train(training)
        if sharded:
            _reshard(network)
    found = metrics.compute()
    confusion = found["confusion"]
    examples = int(confusion.sum())
    if not examples:
        raise data.no_image()
    return Evaluation(
        examples=examples,
        loss=float(mean_loss.compute()),
        top1=int(confusion.trace()) / examples,
        top5=float(found["top5"]) if "top5" in found else None,
        confusion=confusion.cpu().tolist(),
    )


def logits_of(network: nn.Module, images: Tensor, classes: int | None) -> Tensor:
    """Return a network's logits [N, classes] of standardized images, which it is given in its own precision.

    Raises:
        ValueError: it does not take such images, or is no classifier of so many classes.
    """
    try:
        logits = network(images.to(precision_of(network)))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = f"it fails on images {list(images.shape)} ({first_line(error)})"
        raise ValueError(f"model: {said}; give images of the size and colours it takes") from error
    check_logits(logits, len(images), classes)
    return logits


def precision_of(network: nn.Module) -> torch.dtype:
    """Return the precision of a network's weights, in which it takes its images; float32 where it has none."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def check_logits(logits: object, examples: int, classes: int | None) -> None:
    """Raise unless a network's output is one number for each example and class.

    Raises:
        ValueError: it is something else.
    """
    __tracebackhide__ = True
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != examples:
        raise ValueError(f"model: it returns {shape} for {examples} images, not a number per class; give a classifier")
    if not logits.is_floating_point():
        rule = f"it returns {str(logits.dtype).removeprefix('torch.')}, as of an argmax, and no logits"
        raise ValueError(f"model: {rule}; give a classifier that ends in its last layer")
    if logits.shape[1] < 2:
        raise ValueError("model: it returns one number for each image, which tells no classes apart; give a classifier")
    if classes is not None and logits.shape[1] != classes:
        rule = f"it tells {logits.shape[1]} classes apart, and the data have {classes}"
        raise ValueError(f"model: {rule}; give data with the model's classes")


def check_no_probabilities(logits: Tensor) -> None:
    """Raise where a classifier's outputs are those of a softmax: none is negative, and each row sums to one.

    Taken for logits they would keep the order of the classes, and give another loss and other percentages.

    Raises:
        ValueError: they are.
    """
    __tracebackhide__ = True
    rounding = max(1e-5, torch.finfo(logits.dtype).eps)
    if bool((logits >= 0).all() & ((logits.double().sum(1) - 1).abs() <= rounding).all()):
        raise ValueError("model: it returns probabilities, as of a softmax, and no logits; give it without its softmax")


def _reshard(network: nn.Module) -> None:
    """Give up what a last forward pass has gathered, which FSDP otherwise does in the backward pass only."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _to_device(
    batches: Iterable[tuple[Tensor, Tensor]], standardization: nn.Module, fabric: Fabric
) -> Iterator[tuple[Tensor, Tensor]]:
    """Standardized images and targets, on the device."""
    for images, targets in batches:
        yield standardization(images.to(fabric.device, non_blocking=True)), targets.to(fabric.device)


def _keep_in_step(
    batches: Iterator[tuple[Tensor, Tensor]], data: EvaluationData, fabric: Fabric
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches, and after the last one image without a target while another rank still has some."""
    channels, size = data.config.channels, data.config.size
    image = torch.zeros(1, channels, size, size, device=fabric.device)
    nothing = image, torch.zeros(0, dtype=torch.int64, device=fabric.device)
    while True:
        batch = next(batches, None)
        having = torch.tensor(float(batch is not None), device=fabric.device)
        if not fabric.all_reduce(having, reduce_op="sum"):
            return
        yield nothing if batch is None else batch
