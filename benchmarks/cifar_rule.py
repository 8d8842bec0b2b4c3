"""What of the ``cifar`` recipe matters, and how: one thing changed at a time.

``python -m benchmarks.cifar_rule --data DIR [--quick] [--threads N] [--out results/cifar_rule]`` writes
``cifar_rule.json`` and ``README.md``. DIR holds CIFAR-10 as parquet.

The normalizer-free network of ``benchmarks.cifar`` at its best rate, for two epochs of batch 128 with one seed: as it
is, and with another start of the branches, rate, clipping, classifier's rate, centred weights, slower gains, decay or
depth. A difference of less than a point is within what another seed makes. Finished runs are kept in DIR_OUT/runs, and
rows of an earlier table of the same hardware and versions stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar import LAYOUT, run
from normfree.benchmark import hardware
from normfree.signal import write_atomically

EPOCHS, RATE, SEED = 2, 0.2, 0
DEEP = LAYOUT.replace("depths=(2,2,2,3)", "depths=(4,4,4,6)")


@dataclass(frozen=True)
class Change:
    """What is other than in the recipe.

    Attributes:
        name: of the change, as the table has it.
        alpha, skip_gain: start of the branches.
        layout: of the network.
        centred: its weights are centred.
        optimizer: fields of its config.
    """

    name: str
    alpha: float = 0.5
    skip_gain: float = 1.0
    layout: str = LAYOUT
    centred: bool = False
    optimizer: dict[str, Any] = field(default_factory=dict)


UNBOUND = {"clip_norm": None, "classifier_lr_scale": 1.0}
SLOW = {"gain_lr_scale": 0.1}
CHANGES = (
    Change("none"),
    Change("α = 0.2", alpha=0.2),
    Change("α = 1", alpha=1.0),
    Change("α = 0.2, skip gain 0 (the paper's start)", alpha=0.2, skip_gain=0.0),
    Change("no clipping", optimizer={"clip_norm": None}),
    Change("clipped to 0.3", optimizer={"clip_norm": 0.3}),
    Change("classifier as fast as the rest", optimizer={"classifier_lr_scale": 1.0}),
    Change("neither clipping nor slower classifier", optimizer=UNBOUND),
    Change("neither, twice the rate", optimizer=UNBOUND | {"learning_rate": 2 * RATE}),
    Change("twice the rate", optimizer={"learning_rate": 2 * RATE}),
    Change("half the rate", optimizer={"learning_rate": RATE / 2}),
    Change("centred weights", centred=True),
    Change("gains and biases at a tenth of the rate", optimizer=SLOW),
    Change("both", centred=True, optimizer=SLOW),
    Change("both, twice the rate", centred=True, optimizer=SLOW | {"learning_rate": 2 * RATE}),
    Change("both, three times the rate", centred=True, optimizer=SLOW | {"learning_rate": 3 * RATE}),
    Change("no decay", optimizer={"weight_decay": 0.0}),
    Change("four times the decay", optimizer={"weight_decay": 2e-3}),
    Change("56 layers", layout=DEEP),
    Change("56 layers, α = 0.2", layout=DEEP, alpha=0.2),
    Change("56 layers, α = 0.2, skip gain 0", layout=DEEP, alpha=0.2, skip_gain=0.0),
)


def changed(change: Change, source: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Train with one change; its accuracy and spike."""
    from normfree.train import RECIPES

    recipe = RECIPES["cifar"]()
    optimizer = dataclasses.replace(recipe.optimizer, **{"learning_rate": RATE, **change.optimizer})
    config = dataclasses.replace(
        recipe,
        model=f"nf_resnet50:{change.layout},alpha={change.alpha:g},skipinit_gain={change.skip_gain:g}"
        + (",centred=True" if change.centred else ""),
        data=dataclasses.replace(recipe.data, source=source),
        optimizer=optimizer,
        epochs=EPOCHS,
        seed=SEED,
        signal_every=0,
        limit_train_steps=limit,
        limit_eval_steps=1 if limit else None,
        out=folder / "".join(letter if letter.isalnum() else "_" for letter in change.name),
    )
    return {"change": change.name, **run(config)}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = result["hardware"]
    lines = [
        "# What of the cifar recipe matters",
        "",
        *__doc__.strip().splitlines()[5:],
        "",
        f"{where['cpu']}, torch {where['torch']}; 29 layers, bf16, rate {RATE:g}, α = 0.5, skip gain 1, the gradient's "
        f"norm clipped to 1, classifier at 0.3 of the rate, decay 5e-4; seed {SEED}. The spike is the largest noted "
        "loss over the smallest before it.",
        "",
        "| change | test accuracy, % | spike |",
        "|---|---|---|",
    ]
    for one in result["runs"]:
        found = "diverged" if "failed" in one else f"{100 * one['accuracy']:.1f}"
        lines.append(
            f"| {one['change']} | {found} | {one['spike']:.2f} |"
            if "spike" in one
            else f"| {one['change']} | {found} | |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything, and write what came out."""
    parser = argparse.ArgumentParser(description="what of the cifar recipe matters")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--quick", action="store_true", help="four steps each: does it run?")
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    parser.add_argument("--out", type=Path, default=Path("results/cifar_rule"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    file, runs = options.out / "cifar_rule.json", list[dict[str, Any]]()
    earlier: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    alike = earlier.get("quick") == options.quick and earlier.get("hardware") == hardware()
    known = {one["change"]: one for one in earlier["runs"]} if alike else {}
    for change in CHANGES:
        one = known.get(change.name) or changed(
            change, options.data, options.out / "runs", 4 if options.quick else None
        )
        runs.append(one)
        print(runs[-1], flush=True)
        result = {"quick": options.quick, "hardware": hardware(), "runs": runs}
        write_atomically(file, json.dumps(result, indent=1) + "\n")
        write_atomically(options.out / "README.md", table(result))


if __name__ == "__main__":
    main()
