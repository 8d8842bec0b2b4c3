"""What converting a model in half precision costs in accuracy, against the same weights in float32.

``python -m benchmarks.half_precision [--quick] [--out results/half_precision]`` writes ``half_precision.json`` and
``README.md``.

Networks of torchvision, with statistics of five batches of 16 noise images of 64 pixels and gains and biases of their
norms drawn around 1 and 0, are cast to a precision as a whole, and converted with ``start="pretrained"``. The error is
the root mean square of the logits' difference from those of the same weights in float32, over theirs, on 16 images.
*Folded once* is the plain network with each effective weight computed in float32 and rounded.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from normfree import fold
from normfree.benchmark import hardware
from normfree.convert import convert
from normfree.signal import write_atomically

MODELS, PRECISIONS, SEEDS = ("resnet18", "mobilenet_v2"), (torch.bfloat16, torch.float16), (0, 1, 2)
BATCH, SIZE = 16, 64


def main() -> None:
    """Measure every model in every precision, and write what came out."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model and one seed: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("results/half_precision"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    models, seeds = (MODELS[:1], SEEDS[:1]) if options.quick else (MODELS, SEEDS)
    rows = [
        {
            "model": name,
            "precision": str(precision).removeprefix("torch."),
            "seed": seed,
            **errors(name, precision, seed),
        }
        for name in models
        for precision in PRECISIONS
        for seed in seeds
    ]
    result = {"quick": options.quick, "hardware": hardware(), "runs": rows}
    write_atomically(options.out / "half_precision.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


@torch.no_grad()
def errors(name: str, precision: torch.dtype, seed: int) -> dict[str, float]:
    """The relative errors of a model in a precision: as it is, converted, and folded and rounded once."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.2)
    for _ in range(5):
        model(torch.randn(BATCH, 3, SIZE, SIZE))
    half = model.eval().to(precision)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(precision)
    precise = copy.deepcopy(half).float()
    wanted = precise(images.float())
    once = fold(convert(precise, images[:4].float(), start="pretrained")).to(precision)
    networks = {"original": half, "converted": convert(half, images[:4], start="pretrained"), "folded once": once}
    return {what: _relative(network(images), wanted) for what, network in networks.items()}


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def table(result: dict[str, Any]) -> str:
    """The page: medians and ranges over seeds, in percent."""
    assert __doc__ is not None
    ways = ("original", "converted", "folded once")
    seeds = {row["seed"] for row in result["runs"]}
    lines = ["# Conversion in half precision", "", __doc__.split("\n", 2)[2].strip(), ""]
    where = result["hardware"]
    machine = f"{where['cpu']}, {where['threads']} of {where['cores']} cores; Python {where['python']}"
    versions = f"torch {where['torch']}, torchvision {where['torchvision']}"
    lines += [f"{machine}, {versions}; {len(seeds)} seeds, median (range), percent.", ""]
    lines += ["| | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in result["runs"]):
        rows = [row for row in result["runs"] if (row["model"], row["precision"]) == (model, precision)]
        cells = [[100 * row[way] for row in rows] for way in ways]
        shown = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in cells]
        lines.append(f"| {model}, {precision} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
