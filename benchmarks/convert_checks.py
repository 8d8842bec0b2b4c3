"""What is checked of one converted model; ``benchmarks.convert`` runs it for each."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.convert_training import logits
from benchmarks.sweep import build
from normfree.convert import conversion_of, convert
from normfree.convert.dataflow import is_norm
from normfree.data import probe_named
from normfree.signal import spp

LARGEST_TRAINED, MOST_NORMS_LEFT = 150e6, 0.1
"""Parameters of what is trained, and the share of its norms that it may keep."""

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


def checked(name: str) -> dict[str, Any]:
    """One row of the table; or the one-line reason why not."""
    begun = time.perf_counter()
    model = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"model": name, "millions": round(parameters / 1e6, 1)}
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
    """Whether a checked model is trained, too: not too large, without its norms, and not of a fixed size."""
    if "changes" not in row or row["millions"] > LARGEST_TRAINED / 1e6:
        return False
    return row["norms_left"] <= MOST_NORMS_LEFT * row["norms"] and row["image_size"] != FIXED_SIZES["lambda"]


def _errors(model: nn.Module, probe: str, size: int) -> list[str]:
    batch = next(iter(probe_named(probe).batches((4, 3, size, size), count=1, seed=1)))
    return sorted({finding.kind for finding in spp(model, batch).findings if finding.severity == "error"})


def _leak(model: nn.Module, batch: Tensor) -> float:
    """The largest gradient of one example's output with respect to another example, in training mode."""
    inputs = batch.clone().requires_grad_()
    model.train()
    output = logits(model(inputs))[0].sum()
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
    return {"pretrained": float(torch.tensor(errors).max())}  # which keeps a NaN


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
