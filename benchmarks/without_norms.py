"""Deep networks without norms in their first hundred steps: as they are initialised, and converted.

``python -m benchmarks.without_norms [--quick] [--out results/without_norms]`` writes ``without_norms.json`` and
``README.md``.

Convolutions of 16 channels on scikit-learn's digits (8 pixels; 1,437 of them to learn from, 360 to test), in a row with
a ReLU behind each, or in residual blocks x + conv(relu(conv(relu(x)))); Adam, batches of 32, the norm of the gradient
clipped to 1, at the better of two rates. *Standardized* is what conversion makes, but with biases of zero and the gain
of a ReLU without one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.digits import digits
from normfree import gamma
from normfree.benchmark import hardware
from normfree.convert import convert
from normfree.nn import ScaledWSConv2d
from normfree.signal import write_atomically

CHANNELS, SIZE, TESTED, BATCH = 16, 8, 360, 32
STEPS, RATES, SEEDS = 100, (1e-3, 3e-3), (0, 1, 2)


class Block(nn.Module):
    """``y = x + conv(relu(conv(relu(x))))``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def row(depth: int) -> nn.Module:
    """Convolutions in a row, and a classifier."""
    layers = [nn.Conv2d(CHANNELS if index else 1, CHANNELS, 3, padding=1) for index in range(depth)]
    body = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def blocks(count: int) -> nn.Module:
    """Residual blocks behind a convolution, and a classifier."""
    body = [nn.Conv2d(1, CHANNELS, 3, padding=1), *(Block() for _ in range(count)), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "10 in a row": lambda: row(10),
    "30 in a row": lambda: row(30),
    "50 in a row": lambda: row(50),
    "50 blocks": lambda: blocks(50),
}


def he(model: nn.Module, images: Tensor) -> nn.Module:
    """He's initialisation, biases of zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


def standardized(model: nn.Module, images: Tensor) -> nn.Module:
    """Converted, and every bias of a row taken back."""
    converted = convert(model, images)
    after = False
    for module in converted.modules():
        if isinstance(module, ScaledWSConv2d):
            if after:
                module.input_scale = gamma(torch.relu)
            after = bool(module.bias.any())  # type: ignore[union-attr]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return converted


WAYS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "PyTorch's initialisation": lambda model, images: model,
    "He's": he,
    "standardized": standardized,
    "converted": lambda model, images: convert(model, images),
}


def main() -> None:
    """Train every network in every way, and write what came out."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one network, seed and rate, few steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path("results/without_norms"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    nets, rates, steps, seeds = list(NETS), RATES, STEPS, SEEDS
    if options.quick:
        nets, rates, steps, seeds = nets[:1], rates[:1], 3, seeds[:1]
    runs = [
        {"net": net, "way": way, "rate": rate, "seed": seed, "accuracy": accuracy_after(net, way, rate, seed, steps)}
        for net in nets
        for way in WAYS
        for rate in rates
        for seed in seeds
    ]
    result = {"quick": options.quick, "hardware": hardware(), "steps": steps, "runs": runs}
    write_atomically(options.out / "without_norms.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


def accuracy_after(net: str, way: str, rate: float, seed: int, steps: int) -> float:
    """The accuracy on test images after some steps."""
    torch.manual_seed(seed)
    images, labels = digits(SIZE)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    model = WAYS[way](NETS[net](), images[TESTED:][:64])
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        chosen = torch.randint(TESTED, len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float((model(images[:TESTED]).argmax(1) == labels[:TESTED]).float().mean())


def table(result: dict[str, Any]) -> str:
    """The page: medians and ranges over seeds at the better rate, in percent."""
    assert __doc__ is not None
    nets = dict.fromkeys(row["net"] for row in result["runs"])
    lines = ["# Networks without norms", "", __doc__.split("\n", 2)[2].strip(), ""]
    where = result["hardware"]
    machine = f"{where['cpu']}, {where['threads']} of {where['cores']} cores; torch {where['torch']}"
    seeds = {row["seed"] for row in result["runs"]}
    lines += [f"{machine}; {result['steps']} steps, {len(seeds)} seeds; accuracy, median (range), percent.", ""]
    lines += ["| | " + " | ".join(nets) + " |", "|---|" + "---|" * len(nets)]
    for way in WAYS:
        lines.append(f"| {way} | " + " | ".join(_cell(result["runs"], net, way) for net in nets) + " |")
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict[str, Any]], net: str, way: str) -> str:
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        if (run["net"], run["way"]) == (net, way):
            by_rate.setdefault(run["rate"], []).append(100 * run["accuracy"])
    best = max(by_rate.values(), key=statistics.median)
    return f"{statistics.median(best):.0f} ({min(best):.0f} to {max(best):.0f})"


if __name__ == "__main__":
    main()
