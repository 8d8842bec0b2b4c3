"""The ``cifar`` recipe on two cores: normalizer-free and BatchNorm twins, each at its best learning rate.

``python -m benchmarks.cifar --data DIR [--quick] [--epochs N] [--out results/cifar]`` writes ``cifar.json`` and
``README.md``. DIR holds CIFAR-10 as parquet.

Three questions, each answered with the recipe's own loop, augmentation and schedule:

1. Accuracy at the same epochs: every network at every learning rate of a grid with one seed; then the best rate of
   each with all seeds.
2. Wall time: the seconds of training (evaluation left out) after which the NF net first reaches the final accuracy of
   its BN twin, over the seconds the twin took in all; and whether a loss spiked, which is a noted mean loss of more
   than twice the smallest before it.
3. Batch size 2, with the rate scaled to it: what each keeps, after the same number of images.

The runs are kept in DIR_OUT/runs, and one that is finished is not run again: an interruption costs one run's rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.benchmark import hardware
from normfree.signal import write_atomically

LAYOUT = "depths=(2,2,2,3),widths=(32,64,128,128),stem=cifar,drop_rate=0,stochdepth_rate=0"
"""29 layers: 9 bottleneck blocks of three, the stem and the classifier."""
TWINS = {"NF": f"nf_resnet50:{LAYOUT},alpha=0.5,skipinit_gain=1", "BN": f"resnetv2_50:{LAYOUT}"}
RATES = (0.05, 0.1, 0.2, 0.4)
SEEDS = (0, 1, 2)
EPOCHS = 4
SMALL_BATCH, SMALL_STEPS = 2, 12_500
SPIKE = 2.0
TARGET = 0.65


def config(source: str, twin: str, rate: float, seed: int, folder: Path, **changes: Any) -> Any:
    """A run of the recipe with another network, rate and seed."""
    from normfree.train import RECIPES

    recipe = RECIPES["cifar"]()
    name = f"{twin}-{rate:g}-{seed}-{changes.get('batch_size', recipe.batch_size)}"
    return dataclasses.replace(
        recipe,
        **{
            "name": name,
            "model": TWINS[twin],
            "data": dataclasses.replace(recipe.data, source=source),
            "optimizer": dataclasses.replace(recipe.optimizer, learning_rate=rate),
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


def small_batches(
    source: str, folder: Path, best: dict[str, float], draws: Sequence[int], steps: int
) -> dict[str, list[dict[str, Any]]]:
    """Question 3: the same rate for each image, so that the step's rate shrinks with the batch."""
    found: dict[str, list[dict[str, Any]]] = {}
    for twin, rate in best.items():
        changes = {"batch_size": SMALL_BATCH, "limit_train_steps": steps, "epochs": 1, "log_every": 500}
        runs = []
        for seed in draws:
            chosen = config(source, twin, rate, seed, folder, **changes)
            optimizer = dataclasses.replace(chosen.optimizer, warmup_epochs=0.05)
            runs.append(run(dataclasses.replace(chosen, optimizer=optimizer)))
        found[twin] = runs
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
    lines += ["", f"Time at which NF reaches BN's final accuracy over BN's whole time, a seed each: {times} "]
    lines[-1] += f"(target: at most {TARGET}). A spike above {SPIKE:g} is one."
    if small := result["batch_2"]:
        lines += ["", "| batch 2 | test accuracy, % |", "|---|---|"]
        lines += [f"| {twin} | {_shown([100 * one['accuracy'] for one in runs], 2)} |" for twin, runs in small.items()]
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
    parser.add_argument("--out", type=Path, default=Path("results/cifar"))
    options = parser.parse_args()
    folder, limit = options.out / "runs", 4 if options.quick else None
    result: dict[str, Any] = {"quick": options.quick, "hardware": hardware(), "models": TWINS}
    main_part = result["compared"] = compared(options.data, folder, options.epochs, limit)
    result["batch_2"] = small_batches(options.data, folder, main_part["best"], main_part["draws"], limit or SMALL_STEPS)
    write_atomically(options.out / "cifar.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
