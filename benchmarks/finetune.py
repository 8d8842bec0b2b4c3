"""Fine-tuning a trained BatchNorm network with one image a step: as it is, with its statistics frozen, converted.

``python -m benchmarks.finetune [--quick] [--out results/finetune]`` writes ``finetune.json`` and ``README.md``.

torchvision's ResNet-18 learns scikit-learn's digits (1,437 of 64 pixels; three epochs of batches of 32, rate 0.05), and
is then tuned to mirrored ones: 500 images, one a step, SGD with momentum 0.9 and a constant rate. *BatchNorm* is in
training mode, as it was before; *frozen* has its norms in evaluation mode, what is commonly done in such need;
*converted* is ``normfree.convert(start="pretrained")``. Accuracy is that of 360 test images in evaluation mode; "seen
alone" is that of the network in training mode, one image at a time: what the gradient of a step sees.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.digits import digits
from normfree.benchmark import hardware
from normfree.convert import convert
from normfree.convert.dataflow import is_norm
from normfree.optim import warmup_cosine
from normfree.signal import write_atomically

SIZE, TESTED, BATCH, EPOCHS, RATE = 64, 360, 32, 3, 0.05
RATES, STEPS, SEEDS = (1e-4, 1e-3, 1e-2, 1e-1), 500, (0, 1, 2)


def main() -> None:
    """Tune every way with every rate and seed, and write what came out."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, few steps: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("results/finetune"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates, steps, seeds = (RATES[1:2], 20, SEEDS[:1]) if options.quick else (RATES, STEPS, SEEDS)
    runs = [row for seed in seeds for row in tuned(seed, rates, steps)]
    result = {"quick": options.quick, "hardware": hardware(), "steps": steps, "runs": runs}
    write_atomically(options.out / "finetune.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


def tuned(seed: int, rates: tuple[float, ...], steps: int) -> list[dict[str, Any]]:
    """One seed: a network trained, and every way of tuning it at every rate."""
    torch.manual_seed(seed)
    images, labels = shuffled_digits(seed)
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    train(model, images[TESTED:], labels[TESTED:])
    known = {"source": accuracy(model, images[:TESTED], labels[:TESTED])}
    known["source_alone"] = seen_alone(model.train(), images[:TESTED], labels[:TESTED])
    mirrored = images.flip(3)
    rows = []
    for way, made in WAYS.items():
        for rate in rates:
            network = made(copy.deepcopy(model), mirrored)
            before = accuracy(network, mirrored[:TESTED], labels[:TESTED])
            alone = seen_alone(network, mirrored[:TESTED], labels[:TESTED])
            optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
            for step in range(TESTED, TESTED + steps):
                optimizer.zero_grad()
                F.cross_entropy(network(mirrored[step : step + 1]), labels[step : step + 1]).backward()
                optimizer.step()
            after = accuracy(network, mirrored[:TESTED], labels[:TESTED])
            rows.append(
                {"seed": seed, "way": way, "rate": rate, "before": before, "alone": alone, "after": after} | known
            )
            print(rows[-1], flush=True)
    return rows


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train a BatchNorm network in batches, as one does."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    schedule = warmup_cosine(optimizer, steps=steps, warmup_steps=steps // 10)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def with_batch_norm(model: nn.Module, images: Tensor) -> nn.Module:
    """The network as it is, in training mode."""
    return model.train()


def frozen(model: nn.Module, images: Tensor) -> nn.Module:
    """The network in training mode, its norms in evaluation mode, and held there."""
    model.train()
    for module in model.modules():
        if is_norm(module):
            module.train(False)
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model


def converted(model: nn.Module, images: Tensor) -> nn.Module:
    """The network without norms, the same function."""
    return convert(model.eval(), images[:4], start="pretrained").train()


WAYS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "BatchNorm": with_batch_norm,
    "frozen": frozen,
    "converted": converted,
}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right in evaluation mode; the model's mode stays."""
    mode = model.training
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(64), labels.split(64), strict=True))
    model.train(mode)
    return 100 * right / len(labels)


@torch.no_grad()
def seen_alone(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right in training mode, one image at a time; the running statistics of a copy take the harm."""
    model = copy.deepcopy(model)
    return 100 * sum(int(model(images[i : i + 1]).argmax() == labels[i]) for i in range(len(labels))) / len(labels)


def shuffled_digits(seed: int) -> tuple[Tensor, Tensor]:
    """[1797, 3, 64, 64] images in an order of the seed, and [1797] classes."""
    images, labels = digits(SIZE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return images[order].expand(-1, 3, -1, -1), labels[order]


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where, runs = result["hardware"], result["runs"]
    seeds, rates = sorted({run["seed"] for run in runs}), sorted({run["rate"] for run in runs})

    def cell(way: str, field: str, rate: float) -> str:
        values = [run[field] for run in runs if run["way"] == way and run["rate"] == rate]
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    lines = [
        "# Fine-tuning with one image a step",
        "",
        *(__doc__ or "").strip().splitlines()[2:],
        "",
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores; Python {where['python']}, torch "
        f"{where['torch']}, torchvision {where['torchvision']}; {len(seeds)} seeds, median (range), percent. On the "
        f"digits it was trained on the network has {cell('BatchNorm', 'source', rates[0])}, and "
        f"{cell('BatchNorm', 'source_alone', rates[0])} seen alone.",
        "",
        "| | before | seen alone | "
        + " | ".join(f"after {result['steps']} steps at {rate:g}" for rate in rates)
        + " |",
        "|---|---|---|" + "---|" * len(rates),
    ]
    for way in WAYS:
        cells = [cell(way, "before", rates[0]), cell(way, "alone", rates[0])]
        cells += [cell(way, "after", rate) for rate in rates]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
