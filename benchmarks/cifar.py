"""The ``cifar`` recipe on two cores: normalizer-free and BatchNorm twins, each at its best learning rate.

``python -m benchmarks.cifar --data DIR [--quick] [--epochs N] [--threads N] [--out results/cifar]`` writes
``cifar.json`` and ``README.md``. DIR holds CIFAR-10 as parquet. ``--part`` runs the epochs' or the small batches'
half alone, and writes no page.

Three questions, each answered with the recipe's own loop, augmentation and schedule:

1. Accuracy at the same epochs: every network at every learning rate of a grid with one seed; then the best rate of
   each with all seeds. The recipe clips the gradient's norm and slows the classifier, which is for networks without
   normalizers; the BatchNorm twin is better without, so it goes without.
2. Wall time: seconds of training (evaluation left out) of NF over its twin's, and the share of the twin's whole time
   after which NF first reaches the twin's final accuracy; and whether a loss spiked, which is a noted mean loss of
   more than twice the smallest before it.
3. Batch size 2: one pass over the images at batch 2 and at 128, the recipe's rate scaled to the batch.

The runs are kept in DIR_OUT/runs, and one that is finished is not run again: an interruption costs one run's rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from normfree.benchmark import hardware
from normfree.signal import write_atomically

LAYOUT = "depths=(2,2,2,3),widths=(32,64,128,128),stem=cifar,drop_rate=0,stochdepth_rate=0"
"""29 layers: 9 bottleneck blocks of three, the stem and the classifier."""
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "NF": (f"nf_resnet50:{LAYOUT},alpha=0.5,skipinit_gain=1", {}),
    "BN": (f"resnetv2_50:{LAYOUT}", {"clip_norm": None, "classifier_lr_scale": 1.0}),
}
"""Each network, and what of the recipe's optimizer is not its own."""
RATES = (0.2, 0.4, 0.8)
SEEDS = (0, 1, 2)
EPOCHS = 4
BATCHES = (128, 2)
SPIKE = 2.0
TARGET = 0.65


def config(source: str, twin: str, rate: float | None, seed: int, folder: Path, **changes: Any) -> Any:
    """A run of the recipe with another network, rate (None: the recipe's) and seed."""
    from normfree.train import RECIPES

    recipe = RECIPES["cifar"]()
    rate = rate or recipe.optimizer.learning_rate
    model, others = TWINS[twin]
    name = f"{twin}-{rate:g}-{seed}-{changes.get('batch_size', recipe.batch_size)}"
    return dataclasses.replace(
        recipe,
        **{
            "name": name,
            "model": model,
            "data": dataclasses.replace(recipe.data, source=source),
            "optimizer": dataclasses.replace(recipe.optimizer, learning_rate=rate, **others),
            "epochs": EPOCHS,
            "seed": seed,
            "signal_every": 0,
            "out": folder / name,
            **changes,
        },
    )


def run(config: Any) -> dict[str, Any]:
    """Train, or read what a finished run left; its accuracy, seconds, curve and spike."""
    from normfree.train import NonFiniteLossError, train
    from normfree.train.records import read_rows

    try:
        summary = train(config)
    except NonFiniteLossError as error:  # a rate too high for the network is a result
        return {"rate": config.optimizer.learning_rate, "seed": config.seed, "accuracy": 0.0, "failed": str(error)}
    losses = [row["loss"] for row in read_rows(summary.folder / "train.csv") if row["loss"] is not None]
    curve = [(row["seconds"], row["top1"]) for row in read_rows(summary.folder / "eval.csv")]
    return {
        "rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "accuracy": summary.accuracy,
        "seconds": summary.metrics["seconds"],
        "curve": curve,
        "spike": max((loss / min(losses[: i + 1]) for i, loss in enumerate(losses)), default=1.0),
    }


def compared(source: str, folder: Path, epochs: int, limit: int | None) -> dict[str, Any]:
    """Questions 1 and 2; of few steps, with one rate and one seed."""
    rates, draws = (RATES[:1], SEEDS[:1]) if limit else (RATES, SEEDS)
    common = {"epochs": epochs, "limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}
    grid = {twin: [run(config(source, twin, rate, SEEDS[0], folder, **common)) for rate in rates] for twin in TWINS}
    best = {twin: max(runs, key=lambda one: one["accuracy"])["rate"] for twin, runs in grid.items()}
    # Seeds and twins take turns: a drift of the machine hits both.
    seeds: dict[str, list[dict[str, Any]]] = {twin: [] for twin in TWINS}
    for seed in draws:
        for twin in TWINS:
            seeds[twin].append(run(config(source, twin, best[twin], seed, folder, **common)))
    goal = statistics.median(one["accuracy"] for one in seeds["BN"])
    whole = statistics.median(one.get("seconds", float("nan")) for one in seeds["BN"])
    times = []
    for one in seeds["NF"]:
        reached = next((seconds for seconds, accuracy in one.get("curve", []) if accuracy >= goal), None)
        times.append(None if reached is None else reached / whole)
    return {
        "epochs": epochs,
        "rates": rates,
        "draws": draws,
        "grid": grid,
        "best": best,
        "seeds": seeds,
        "goal": goal,
        "time_ratio": times,
    }


def small_batches(source: str, folder: Path, limit: int | None) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Question 3: the same rate for each image, so that the step's rate shrinks with the batch."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {twin: {batch: [] for batch in BATCHES} for twin in TWINS}
    for seed in SEEDS[:1] if limit else SEEDS:
        for batch in BATCHES:
            for twin in TWINS:
                changes = {"batch_size": batch, "limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}
                chosen = config(source, twin, None, seed, folder / "one_epoch", epochs=1, log_every=100, **changes)
                optimizer = dataclasses.replace(chosen.optimizer, warmup_epochs=0.1)
                found[twin][batch].append(run(dataclasses.replace(chosen, optimizer=optimizer)))
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where, main = result["hardware"], result["compared"]
    seeds = ", ".join(map(str, main["draws"]))
    rates = " | ".join(f"rate {rate:g}" for rate in main["rates"])
    lines = [
        "# CIFAR-10 on two cores",
        "",
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, torch {where['torch']}; 29 layers, the `cifar` "
        f"recipe, {main['epochs']} epochs, seeds {seeds}: median (least to most).",
        "",
        f"| network | {rates} | best rate, all seeds | seconds | spike |",
        "|---" * (len(main["rates"]) + 4) + "|",
    ]
    for twin in TWINS:
        runs = main["seeds"][twin]
        cells = ["diverged" if "failed" in one else f"{100 * one['accuracy']:.1f}" for one in main["grid"][twin]]
        cells += [f"{main['best'][twin]:g}: {_shown([100 * one['accuracy'] for one in runs], 2)}"]
        cells += [_shown([one["seconds"] for one in runs if "seconds" in one], 0)]
        cells += [f"{max(one.get('spike', float('inf')) for one in runs):.2f}"]
        lines.append(f"| {twin} | {' | '.join(cells)} |")
    times = ", ".join("not reached" if one is None else f"{one:.2f}" for one in main["time_ratio"])
    whole = statistics.median(
        nf["seconds"] / bn["seconds"] for nf, bn in zip(main["seeds"]["NF"], main["seeds"]["BN"], strict=True)
    )
    lines += [
        "",
        f"Time of NF over BN's, of the same epochs, median of the seeds: {whole:.2f}. Time at which NF reaches BN's "
        f"final accuracy over BN's whole time, a seed each: {times} (target: at most {TARGET}). A spike above "
        f"{SPIKE:g} is one.",
        "",
        "## One epoch, test accuracy in %",
        "",
        "| network | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |",
        "|---" * (len(BATCHES) + 1) + "|",
    ]
    for twin, batches in result["one_epoch"].items():
        cells = [_shown([100 * one["accuracy"] for one in runs], 1) for runs in batches.values()]
        lines.append(f"| {twin} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Run everything, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--quick", action="store_true", help="four steps, one rate, one seed: does it run?")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    parser.add_argument("--part", choices=("epochs", "batches"), help="this half alone; both by default")
    parser.add_argument("--out", type=Path, default=Path("results/cifar"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder, limit = options.out / "runs", 4 if options.quick else None
    parts = {
        "epochs": lambda: compared(options.data, folder, options.epochs, limit),
        "batches": lambda: small_batches(options.data, folder, limit),
    }
    if options.part:
        parts[options.part]()
        return
    result: dict[str, Any] = {"quick": options.quick, "hardware": hardware(), "models": TWINS}
    result |= {"compared": parts["epochs"](), "one_epoch": parts["batches"]()}
    write_atomically(options.out / "cifar.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
