"""What is checked of one converted model; ``benchmarks.convert`` runs it for each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from math import isfinite, log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.sweep import build
from normfree.convert import conversion_of, convert
from normfree.convert.kinds import is_norm
from normfree.data import probe_named
from normfree.signal import spp

LARGEST, LARGEST_TRAINED = 150e6, 30e6
"""Parameters of what is converted and of what is trained."""

FIXED_SIZES = {
    "swin": 224,
    "vit": 224,
    "maxvit": 224,
    "inception_v": 299,
    "inception_resnet": 299,
    "botnet": 256,
    "halonet": 256,
    "lambda": 256,
}
"""Heights and widths of models that do not take any size; all others get 64."""

RATES, WARM_UP, CLIP, CLASSES = (0.03, 0.1, 0.3), 50, 1.0, 10
"""Learning rates tried until the norm-deleted model does not train, steps of linear warm-up, the norm that the
gradient of all parameters together is clipped to, and classes of the digits."""


def checked(name: str) -> dict[str, Any]:
    """One row of the table; or the one-line reason why not."""
    begun = time.perf_counter()
    model = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"model": name, "millions": round(parameters / 1e6, 1)}
    if parameters > LARGEST:
        return row | {"failure": f"not run: {parameters / 1e6:.0f} million parameters"}
    size = image_size(name)
    batch = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(7))
    try:
        converted = convert(model, batch)
    except ValueError as error:
        return row | {"failure": str(error)[:240]}
    conversion = conversion_of(converted)
    assert conversion is not None
    row |= {
        "image_size": size,
        "changes": len(conversion.changes),
        "norms": sum(map(is_norm, model.modules())),
        "norms_left": len(conversion.norms_left),
        "unscaled": len(conversion.notes),
        "gaussian": _errors(converted, "gaussian", size),
        "photos": _errors(converted, "photos", size),
        "leak": _leak(converted, batch[:2]),
        **_kept_function(model, batch),
    }
    return row | {"seconds": round(time.perf_counter() - begun, 1)}


def image_size(name: str) -> int:
    """Height and width of the images a model is checked with."""
    return next((size for part, size in FIXED_SIZES.items() if part in name), 64)


def is_trained(row: dict[str, Any]) -> bool:
    """Whether a checked model is small enough to be trained, too."""
    return "changes" in row and row["millions"] <= LARGEST_TRAINED / 1e6 and row["image_size"] <= 64


def _errors(model: nn.Module, probe: str, size: int) -> list[str]:
    batch = next(iter(probe_named(probe).batches((4, 3, size, size), count=1, seed=1)))
    return sorted({finding.kind for finding in spp(model, batch).findings if finding.severity == "error"})


def _leak(model: nn.Module, batch: Tensor) -> float:
    """The largest gradient of one example's output with respect to another example, in training mode."""
    inputs = batch.clone().requires_grad_()
    model.train()
    output = _logits(model(inputs))[0].sum()
    (gradient,) = torch.autograd.grad(output, inputs)
    return float(gradient[1:].abs().max())


def _kept_function(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """The relative error of the pretrained conversion, with statistics and affine numbers drawn at random."""
    original = copy.deepcopy(model).eval()
    randomise(original)
    try:
        converted = convert(original, batch, start="pretrained")
    except ValueError as error:
        return {
            "pretrained": None,
            "not_pretrained": "no norm with constants" if "constants" in str(error) else str(error),
        }
    with torch.no_grad():
        pairs = list(zip(tree_leaves(original(batch)), tree_leaves(converted(batch)), strict=True))
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs if isinstance(a, Tensor)]
    return {"pretrained": max(errors)}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> None:
    """Draw running statistics, gains and biases of all norms that have statistics, as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if not isinstance(getattr(norm, "running_mean", None), Tensor):
            continue
        for name, offset, scale in (("running_mean", 0.0, 0.3), ("weight", 1.0, 0.3), ("bias", 0.0, 0.2)):
            tensor = getattr(norm, name, None)
            if isinstance(tensor, Tensor):
                tensor.copy_(offset + scale * torch.randn(tensor.shape, generator=generator))
        variance: Any = norm.running_var
        variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))


def trained(name: str, steps: int) -> dict[str, Any]:
    """Train the norm-deleted model at growing rates until it fails, then the converted one at that rate.

    One recipe for both: SGD, momentum 0.9, batches of 8, warm-up, the gradient's global norm clipped to 1. The model is
    converted on 32 of the images it is trained on, its scales measured, for padding takes most of maps this small.

    Returns:
        ``learning_rate`` (the first where the deleted model fails, else the largest), ``deleted`` and ``converted``:
        for each its ``outcome`` and the mean ``loss`` of the first and the last tenth of the steps.
    """
    model, batches = build(name), _digits()
    found: dict[str, Any] = {"steps": steps}
    for rate in RATES:
        found |= {"learning_rate": rate, "deleted": _run(without_norms(model), batches, rate, steps=steps)}
        if found["deleted"]["outcome"] != "trains":
            break
    converted = convert(model, torch.cat([batches(step)[0] for step in range(4)]), beta="measured")
    return found | {"converted": _run(converted, batches, found["learning_rate"], steps=steps)}


def without_norms(model: nn.Module) -> nn.Module:
    """A copy whose norms are simply gone, their fused activations kept."""
    deleted = copy.deepcopy(model)
    for module in list(deleted.modules()):
        for name, child in module._modules.items():
            if child is not None and is_norm(child):
                parts = [getattr(child, part, None) for part in ("drop", "act")]
                module._modules[name] = nn.Sequential(*(part for part in parts if isinstance(part, nn.Module)))
    for module in deleted.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # it would overwrite what the norm kept apart
    return deleted


def _run(
    model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], rate: float, *, steps: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    losses: list[float] = []
    for step in range(steps):
        images, labels = batches(step)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARM_UP)
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(model(images)), labels)
        losses.append(float(loss.detach()))
        if not isfinite(losses[-1]):
            return {"outcome": "diverges", "loss": None}
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    tenth = max(1, steps // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return {"outcome": outcome(first, last), "loss": [first, last]}


def outcome(first: float, last: float) -> str:
    """What became of a loss: chance is ln 10, for anything can learn that there are ten classes."""
    if last >= first:
        return "diverges"
    return "stays at chance" if last >= log(CLASSES) else "trains"


def _logits(output: Any) -> Tensor:
    """[N, classes] of whatever a model returns: its first tensor, averaged over positions."""
    first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim() > 1)
    return first.flatten(2).mean(2) if first.dim() > 2 else first


def _digits() -> Callable[[int], tuple[Tensor, Tensor]]:
    """Batches of 8 of scikit-learn's digits, 32 pixels, three channels, standardized."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = F.interpolate((images - images.mean()) / images.std(), size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(8)])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = order[8 * step : 8 * step + 8]
        return images[chosen], labels[chosen]

    return batch
