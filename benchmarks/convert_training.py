"""How a converted model and the same model with its norms deleted train; ``benchmarks.convert`` runs it for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf, isfinite, log
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.digits import digits
from benchmarks.sweep import build
from normfree.convert import Conversion, conversion_of, convert
from normfree.convert.dataflow import activation_in, is_norm
from normfree.optim import warmup_cosine

Batches = Callable[[int], tuple[Tensor, Tensor]]
Optimizing = Callable[[list[nn.Parameter], float], Optimizer]
Run = dict[str, Any]

CLASSES, BATCH, SIZE, WARM_UP, CLIP = 10, 16, 32, 50, 1.0
"""Of the digits; images a step; their height and width; steps of the rate's linear rise; what the norm of the gradient
of all parameters together is clipped to."""

SIZES = {"inception": 96}
"""Heights and widths of models that do not take 32 pixels."""

COLOUR = (1.0, 0.6, 0.3)
"""Gains of the three channels: of grey images, filters of mean zero and one pixel see nothing."""

FIRST_RATE, LAST_RATE, MOST_RATES = 0.4, 6.4, 7
"""Where the search for a learning rate begins, how far it goes up, and how many rates it tries."""

ADAM_RATES = (0.01, 0.003, 0.001, 0.0003, 0.0001)
"""The second recipe's learning rates, in the order they are tried."""


def trained(name: str, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Find a learning rate at which a model with its norms deleted fails and the converted one trains.

    One recipe for both (:func:`run`), on ``device``. If the converted model trains at no rate of SGD, both are trained
    with Adam.

    The model is converted on 32 of the images it is trained on, its scales measured, for padding takes most of maps
    this small.

    Returns:
        ``steps``, ``rate``, and a :func:`run` of ``deleted`` and ``converted`` at that rate; ``rates``, all tried; if
        it came to that, the same with Adam as ``adam``.
    """
    model, batches = (
        classifier(name),
        coloured_digits(next((size for part, size in SIZES.items() if part in name), SIZE)),
    )
    images = torch.cat([batches(step)[0] for step in range(2)])
    converted = convert(model, images, beta="measured")
    deleted = without_norms(model, conversion_of(converted)).to(device)
    converted.to(device)

    def runs_of(twin: nn.Module, optimizing: Optimizing) -> Callable[[float], Run]:
        return lambda rate: run(copy.deepcopy(twin), batches, rate, steps, optimizing)

    found: dict[str, Any] = {"steps": steps} | search(runs_of(deleted, momentum), runs_of(converted, momentum))
    if not _trains(found["converted"]):
        found["adam"] = first_apart(runs_of(deleted, adam), runs_of(converted, adam))
    return found


def momentum(parameters: list[nn.Parameter], rate: float) -> Optimizer:
    """The first recipe's optimizer."""
    return SGD(parameters, lr=rate, momentum=0.9)


def adam(parameters: list[nn.Parameter], rate: float) -> Optimizer:
    """The second recipe's optimizer, which steps as far in layers of large gradients as in those of small ones."""
    return Adam(parameters, lr=rate)


def search(deleted: Callable[[float], Run], converted: Callable[[float], Run]) -> dict[str, Any]:
    """Find a rate that tells the two models apart: one of them trains, and one does not.

    Doubled until the deleted model fails; then bisection, on a logarithmic scale, between a rate at which it trains and
    one at which neither does. Where it has not trained at any yet, the rate is lowered by √2 instead.
    """
    rate, lower, upper = FIRST_RATE, 0.0, inf
    tried = [rate]
    without = deleted(rate)
    while _trains(without) and rate < LAST_RATE:
        lower, rate = rate, 2 * rate
        tried.append(rate)
        without = deleted(rate)
    with_scales = converted(rate)
    while _trains(without) == _trains(with_scales) and len(tried) < MOST_RATES:
        if _trains(without):
            lower = rate
        else:
            upper = rate
        if upper == inf:
            break  # both train at the highest rate
        rate = (lower * upper) ** 0.5 if lower else upper / 2**0.5
        tried.append(rate)
        without, with_scales = deleted(rate), converted(rate)
    rates = sorted({round(each, 5) for each in tried})
    return {"rate": rate, "deleted": without, "converted": with_scales, "rates": rates}


def first_apart(deleted: Callable[[float], Run], converted: Callable[[float], Run]) -> dict[str, Any]:
    """Find the first of Adam's rates at which the converted model trains and the deleted one does not.

    The deleted model is run where the converted one trains, and at the last rate.
    """

    def found(rate: float, without: Run, with_scales: Run) -> dict[str, Any]:
        tried = sorted(each for each in ADAM_RATES if each >= rate)
        return {"rate": rate, "deleted": without, "converted": with_scales, "rates": tried}

    *first, last = ADAM_RATES
    for rate in first:
        with_scales = converted(rate)
        if _trains(with_scales) and not _trains(without := deleted(rate)):
            return found(rate, without, with_scales)
    return found(last, deleted(last), converted(last))


def _trains(run: Run) -> bool:
    return run["outcome"] == "trains"


def classification(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of whatever a model returns."""
    return F.cross_entropy(logits(model(images)), labels)


def run(
    model: nn.Module,
    batches: Callable[[int], tuple[Any, Any]],
    rate: float,
    steps: int,
    optimizing: Optimizing,
    loss_of: Callable[[nn.Module, Any, Any], Tensor] = classification,
) -> Run:
    """Train in place, gradients clipped to a norm of 1; the rate rises in 50 steps and falls as a cosine.

    Args:
        model: on any device, to which batches are moved.
        batches: the input and the target of a step, tensors in tuples and dicts.
        rate: highest learning rate.
        steps: of training.
        optimizing: makes the optimizer.
        loss_of: a model, an input and a target.

    Returns:
        ``outcome``; the mean ``loss`` of the first and the last tenth of the steps and its ``peak``, None for what is
        not finite.
    """
    torch.manual_seed(0)
    model.train()
    parameters = list(model.parameters())
    device = parameters[0].device
    optimizer = optimizing(parameters, rate)
    schedule = warmup_cosine(optimizer, steps=steps, warmup_steps=min(WARM_UP, steps))
    losses: list[float] = []
    for step in range(steps):
        inputs, target = tree_map(lambda each: each.to(device) if isinstance(each, Tensor) else each, batches(step))
        optimizer.zero_grad()
        loss = loss_of(model, inputs, target)
        losses.append(float(loss.detach()))
        if not isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
    tenth = max(1, steps // 10)
    peak = max(losses) if len(losses) == steps else inf
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return {
        "outcome": outcome(first, last, peak),
        "loss": [value if isfinite(value) else None for value in (first, last)],
        "peak": peak if isfinite(peak) else None,
    }


def outcome(first: float, last: float, peak: float) -> str:
    """What became of a loss, in terms of chance, ln 10.

    It "trains" if it ends below half of chance. If not, it "diverges" where it ends above its beginning and chance (by
    5 %), was ever above twice chance and twice its beginning, or ceased to be finite; it "learns nothing" if it
    ends within 5 % of chance, and "little" otherwise.
    """
    chance = log(CLASSES)
    if last < chance / 2 and peak < inf:
        return "trains"
    if not peak < 2 * max(first, chance) or last > 1.05 * max(first, chance):
        return "diverges"
    return "learns little" if last < 0.95 * chance else "learns nothing"


def without_norms(model: nn.Module, conversion: Conversion | None = None) -> nn.Module:
    """A copy whose norms are simply gone, their fused activations kept, and those that a conversion keeps, too."""
    deleted = copy.deepcopy(model)
    kept = {one.name for one in conversion.norms_left} if conversion else set()
    names = {module: name for name, module in deleted.named_modules()}
    for module, path in names.items():
        for name, child in module._modules.items():
            if child is not None and is_norm(child) and names.get(child, f"{path}.{name}") not in kept:
                module._modules[name] = nn.Sequential(*(part for _, part in activation_in(child)))
    for module in deleted.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # it would overwrite what the norm kept apart
    return deleted


def logits(output: Any) -> Tensor:
    """[N, classes] of whatever a model returns: its first tensor, averaged over positions."""
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() > 1)
    return first.flatten(2).mean(2) if first.dim() > 2 else first


class PooledMaps(nn.Module):
    """A classifier over the first feature map of a detector's backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(logits(backbone(torch.zeros(2, 3, SIZE, SIZE))).shape[1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 10] of [N, 3, H, W]."""
        return self.head(logits(self.backbone(images)))


def classifier(name: str) -> nn.Module:
    """A model by its ``library:name`` that tells ten classes apart, at random initialisation."""
    torch.manual_seed(0)
    library, plain = name.split(":")
    if library == "timm":
        import timm

        return timm.create_model(plain, num_classes=CLASSES)
    module = torchvision.models.get_model_builder(plain).__module__
    if ".detection." in module:
        return PooledMaps(build(name))
    options: dict[str, Any] = {"weights_backbone": None} if ".segmentation." in module else {}
    if plain in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(plain, weights=None, num_classes=CLASSES, **options)


def coloured_digits(size: int) -> Batches:
    """Batches of digits, in a colour."""
    grey, labels = digits(size)
    images = grey * torch.tensor(COLOUR)[:, None, None]
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(8)])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = order[BATCH * step : BATCH * step + BATCH]
        return images[chosen], labels[chosen]

    return batch
