"""Where the time of a training step goes: what a network pays beyond its limit, operation by operation.

``python -m benchmarks.step_profile [--quick] [--out results/step_profile]`` writes ``step_profile.json`` and
``README.md``.

PyTorch's profiler adds up the CPU time that each operation spends itself, over a few training steps of NF-ResNet-50 and
of the CIFAR networks of ``benchmarks.sets``; the operations are put into five classes. The profiler's own cost makes
small operations look dearer than they are: read the shares, and take ratios of whole steps from ``networks``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.sets import CIFAR_26, CIFAR_50, OURS
from normfree.benchmark import Contender, hardware
from normfree.signal import write_atomically

STEPS = 3

CLASSES = {
    "convolutions": ("conv", "mkldnn", "slow_conv", "addmm", "mm"),
    "standardization": ("group_norm", "layer_norm", "batch_norm", "Standardize"),
    "activations and sums": ("relu", "threshold", "add", "max_pool", "mean", "div", "expand"),
    "optimizer": ("_foreach", "Optimizer", "sgd"),
}
"""Parts of the operations' names by class, the first class that fits; all else is "rest": copies, casts, calls."""


@dataclass(frozen=True)
class Case:
    """One training step to profile.

    Attributes:
        name: of the table's row.
        source: of the network.
        batch_size, image_size: of its images.
        precision: float32, or bfloat16 by autocast.
    """

    name: str
    source: str
    batch_size: int
    image_size: int
    precision: torch.dtype


CASES = (
    Case("NF-ResNet-50, fp32, 16 of 224 px", OURS.source, 16, 224, torch.float32),
    Case("NF-ResNet-50, bf16, 16 of 224 px", OURS.source, 16, 224, torch.bfloat16),
    Case("NF-ResNet-50, bf16, 64 of 96 px", OURS.source, 64, 96, torch.bfloat16),
    Case("NF-ResNet-50 for CIFAR, fp32, 8 of 32 px", CIFAR_50, 8, 32, torch.float32),
    Case("NF-ResNet-26 for CIFAR, fp32, 8 of 32 px", CIFAR_26, 8, 32, torch.float32),
)


def class_of(operation: str) -> str:
    """Return the class of an operation by its name."""
    return next((name for name, parts in CLASSES.items() if any(part in operation for part in parts)), "rest")


def profiled(case: Case) -> dict[str, Any]:
    """Return milliseconds a step by class, and the dearest operations of the standardization and of the rest."""
    batch = torch.randn(case.batch_size, 3, case.image_size, case.image_size).to(memory_format=torch.channels_last)
    step = Contender(case.source).training(batch, case.precision, seed=0)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    classes, operations = Counter[str](), Counter[str]()
    for event in found.key_averages():
        milliseconds = event.self_cpu_time_total / 1000 / STEPS
        classes[class_of(event.key)] += milliseconds
        operations[event.key] += milliseconds
    return {"classes": dict(classes), "operations": dict(operations.most_common(20))}


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    where = result["hardware"]
    names = [*CLASSES, "rest"]
    lines = [
        "# Where the time of a training step goes",
        "",
        f"{where['cpu']}, {where['threads']} threads; torch {where['torch']}; {STEPS} steps under PyTorch's profiler, "
        "each operation's own time; made by `python -m benchmarks.step_profile`.",
        "",
        "| training step | milliseconds | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for name, case in result["cases"].items():
        total = sum(case["classes"].values())
        shares = " | ".join(f"{100 * case['classes'].get(each, 0) / total:.1f} %" for each in names)
        lines.append(f"| {name} | {total:.1f} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Profile every case, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest network alone: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("results/step_profile"))
    options = parser.parse_args()
    cases = {case.name: profiled(case) for case in (CASES[-1:] if options.quick else CASES)}
    result = {"hardware": hardware(), "steps": STEPS, "cases": cases}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out / "step_profile.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", page := markdown(result))
    print(page)


if __name__ == "__main__":
    main()
