"""The ``cifar`` recipe on two cores: normalizer-free and BatchNorm twins, each at its best learning rate.

``python -m benchmarks.cifar --data DIR [--quick] [--epochs N] [--threads N] [--out results/cifar]`` writes
``cifar.json`` and ``README.md``. DIR holds CIFAR-10 as parquet. ``--part`` measures one part anew and keeps what the
file has of the others, each with the hardware it was measured on.

Six questions, each answered with the recipe's own loop, augmentation and schedule:

1. Accuracy at the same epochs: every network at every learning rate of a grid with one seed; then the best rate of
   each with all seeds. The recipe clips the gradient's norm and slows the classifier, which is for networks without
   normalizers; the BatchNorm twin is better without, so it goes without.
2. Wall time: a training step of NF over its twin's, the two taking turns; and what NF reaches with one epoch more.
   Whether a loss spiked, which is a noted mean loss of more than twice the smallest before it.
3. Batch size 2: one pass over the images at batch 2 and at 128, the same rate for each image.
4. The first question with Muon, the normalizer-free network with centred weights. Both at every rate of one grid
   (``--grid-epochs``, ``--grid-seeds``), then at their best rate (``--epochs``, ``--seeds``), NF also for an epoch
   more; ``--finished`` makes the page of the runs there are.
5. The first question for the normalizer-free network with centred weights and slow gains and biases.
6. Training to its end: the fourth question's networks at the rates that were best there, for the recipe's 30 epochs.

The runs are kept in DIR_OUT/runs, and one that is finished is not run again: an interruption costs one run's rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from normfree.benchmark import Contender, Part, Target, hardware, measure, versions
from normfree.signal import write_atomically

LAYOUT = "depths=(2,2,2,3),widths=(32,64,128,128),stem=cifar,drop_rate=0,stochdepth_rate=0"
"""29 layers: 9 bottleneck blocks of three, the stem and the classifier."""
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "NF": (f"nf_resnet50:{LAYOUT},alpha=0.5,skipinit_gain=1", {}),
    "BN": (f"resnetv2_50:{LAYOUT}", {"clip_norm": None, "classifier_lr_scale": 1.0}),
}
"""Each network, and what of the recipe's optimizer is not its own."""
MUON: dict[str, tuple[str, dict[str, Any]]] = {
    "NF Muon": (
        f"nf_resnet50:{LAYOUT},alpha=0.5,skipinit_gain=1,centred=True",
        {"rule": "muon", "clip_norm": None, "sgd_learning_rate": 0.01, "classifier_lr_scale": 1.0},
    ),
    "BN Muon": (
        f"resnetv2_50:{LAYOUT}",
        {"rule": "muon", "clip_norm": None, "sgd_learning_rate": 0.1, "classifier_lr_scale": 1.0},
    ),
}
CENTRED: dict[str, tuple[str, dict[str, Any]]] = {
    "NF centred": (f"nf_resnet50:{LAYOUT},alpha=0.5,skipinit_gain=1,centred=True", {"gain_lr_scale": 0.1}),
}
RATES = (0.1, 0.2, 0.4, 0.8)
MUON_RATES = (0.02, 0.04, 0.06)
SEEDS = (0, 1, 2)
EPOCHS = 4
BATCHES, BATCHES_SEEDS = (128, 2), (0, 1)
BATCHES_RATE = 0.4
"""Of a batch of 128 in the small batches' part: the best of the BatchNorm twin."""
LONG_RATES = {"NF Muon": 0.02, "BN Muon": 0.04}
LONG_EPOCHS = 30
SPIKE = 2.0
TARGET = 0.65


def config(source: str, twin: str, rate: float, seed: int, folder: Path, **changes: Any) -> Any:
    """A run of the recipe with another network, rate and seed."""
    from normfree.train import RECIPES

    recipe = RECIPES["cifar"]()
    model, others = {**TWINS, **MUON, **CENTRED}[twin]
    epochs = changes.get("epochs", EPOCHS)
    others = {**others, "warmup_epochs": min(recipe.optimizer.warmup_epochs, epochs / 4)}
    name = f"{twin}-{rate:g}-{seed}-{changes.get('batch_size', recipe.batch_size)}".replace(" ", "-")
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
    """Train, or read what a finished run left; its accuracy, curve and spike."""
    from normfree.train import NonFiniteLossError, train
    from normfree.train.records import read_rows

    try:
        summary = train(config)
    except NonFiniteLossError as error:  # a rate too high for the network is a result
        return {"rate": config.optimizer.learning_rate, "seed": config.seed, "accuracy": 0.0, "failed": str(error)}
    if not summary.finished:
        raise SystemExit("stopped as asked; the same command goes on")
    losses = [row["loss"] for row in read_rows(summary.folder / "train.csv") if row["loss"] is not None]
    curve = [(row["epoch"], row["top1"]) for row in read_rows(summary.folder / "eval.csv")]
    return {
        "rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "accuracy": summary.accuracy,
        "curve": curve,
        "loss": losses[-1] if losses else None,
        "spike": max((loss / min(losses[: i + 1]) for i, loss in enumerate(losses)), default=1.0),
    }


def tuned(source: str, folder: Path, twins: Iterable[str], epochs: int, limit: int | None) -> dict[str, Any]:
    """Networks at every rate with the first seed, and at their best with all; of few steps, with one rate and seed."""
    rates, draws = (RATES[:1], SEEDS[:1]) if limit else (RATES, SEEDS)
    common = {"epochs": epochs, "limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}
    grid = {twin: [run(config(source, twin, rate, SEEDS[0], folder, **common)) for rate in rates] for twin in twins}
    best = {twin: max(runs, key=lambda one: one["accuracy"])["rate"] for twin, runs in grid.items()}
    seeds: dict[str, list[dict[str, Any]]] = {twin: [] for twin in grid}
    for seed in draws:
        for twin in grid:
            seeds[twin].append(run(config(source, twin, best[twin], seed, folder, **common)))
    return {"epochs": epochs, "rates": rates, "draws": draws, "grid": grid, "best": best, "seeds": seeds}


def compared(source: str, folder: Path, epochs: int, limit: int | None) -> dict[str, Any]:
    """Questions 1 and 2."""
    found = tuned(source, folder, TWINS, epochs, limit)
    more = {"epochs": epochs + 1, "limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}
    rate = found["best"]["NF"]
    longer = [run(config(source, "NF", rate, seed, folder / "longer", **more)) for seed in found["draws"]]
    return {**found, "longer": longer}


def with_muon(source: str, folder: Path, options: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """Question 4; of few steps, with one rate and one seed."""
    rates, epochs = MUON_RATES[:1] if limit else MUON_RATES, options.epochs
    grid_epochs = epochs if options.grid_epochs is None else options.grid_epochs
    shortened = {"limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}

    def added(runs: list[dict[str, Any]], twin: str, rate: float, seed: int, length: int) -> None:
        one = config(source, twin, rate, seed, folder / f"muon-{length}", epochs=length, **shortened)
        if not options.finished or (one.folder / "metrics.json").exists():
            runs.append(run(one))

    grid: dict[str, dict[str, list[dict[str, Any]]]] = {twin: {f"{rate:g}": [] for rate in rates} for twin in MUON}
    for seed in range(1 if limit else options.grid_seeds):
        for rate in rates:
            for twin in MUON:
                added(grid[twin][f"{rate:g}"], twin, rate, seed, grid_epochs)
    best = {twin: float(max(runs, key=lambda rate, runs=runs: _mean(runs[rate]))) for twin, runs in grid.items()}
    final: dict[str, list[dict[str, Any]]] = {twin: [] for twin in MUON}
    for seed in range(1 if limit else options.seeds):
        for twin in MUON:
            added(final[twin], twin, best[twin], seed, epochs)
    longer: list[dict[str, Any]] = []
    for seed in range(1 if limit else options.seeds):
        added(longer, "NF Muon", best["NF Muon"], seed, epochs + 1)
    return {
        "epochs": epochs,
        "grid_epochs": grid_epochs,
        "models": MUON,
        "grid": grid,
        "best": best,
        "seeds": final,
        "longer": longer,
    }


def to_the_end(source: str, folder: Path, options: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """Question 6; of few steps, with one seed."""
    epochs, shortened = LONG_EPOCHS, {"limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}
    runs: dict[str, list[dict[str, Any]]] = {twin: [] for twin in LONG_RATES}
    for seed in range(1 if limit else options.seeds):
        for twin, rate in LONG_RATES.items():
            one = config(source, twin, rate, seed, folder / f"muon-{epochs}", epochs=epochs, **shortened)
            if not options.finished or (one.folder / "metrics.json").exists():
                runs[twin].append(run(one))
    return {"epochs": epochs, "rates": LONG_RATES, "seeds": runs}


def _mean(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(one["accuracy"] for one in runs) if runs else -1.0


def step_ratio(rounds: int) -> dict[str, float]:
    """Time of a training step of NF over its twin's, the two taking turns: median and quartiles."""
    nf, bn = (Contender(f"{model},num_classes=10", name=twin) for twin, (model, _) in TWINS.items())
    target = Target(of="NF", over="BN", at_most=TARGET)
    sizes = {"batch_size": 128, "image_size": 32, "precision": "bfloat16"}
    part = Part(
        name="step", title="step", task="training", contenders=(nf, bn), rounds=rounds, targets=(target,), **sizes
    )
    return measure(part)["targets"][0]["measured"]


def small_batches(source: str, folder: Path, limit: int | None) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Question 3: the same rate for each image, so that the step's rate shrinks with the batch, and its bound grows."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {twin: {batch: [] for batch in BATCHES} for twin in TWINS}
    for seed in BATCHES_SEEDS[:1] if limit else BATCHES_SEEDS:
        for batch in BATCHES:
            for twin in TWINS:
                changes = {"batch_size": batch, "limit_train_steps": limit, "limit_eval_steps": 1 if limit else None}
                chosen = config(
                    source, twin, BATCHES_RATE, seed, folder / "one_epoch", epochs=1, log_every=100, **changes
                )
                optimizer = dataclasses.replace(chosen.optimizer, warmup_epochs=0.1)
                found[twin][batch].append(run(dataclasses.replace(chosen, optimizer=optimizer)))
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown, of the parts that were measured."""
    lines = [
        "# CIFAR-10 on two cores",
        "",
        "29 layers; test accuracy in %, median (least to most) where there are seeds.",
    ]
    sections = {"muon": _muon, "long": _long, "epochs": _epochs, "centred": _centred, "batches": _batches}
    for name, section in sections.items():
        if name in result:
            lines += ["", *section(result[name])]
    return "\n".join(lines) + "\n"


def _muon(part: dict[str, Any]) -> list[str]:
    rates = list(part["grid"]["NF Muon"])
    lines = [
        "## Muon",
        "",
        f"{versions(part['hardware'])}. {_epochs_of(part['grid_epochs'])} for each rate, "
        f"{_epochs_of(part['epochs'])} for the best. NF has centred weights.",
        "",
        f"| network | rate {' | rate '.join(rates)} | best rate, {_epochs_of(part['epochs'])} | seeds | spike |",
        "|---" * (len(rates) + 4) + "|",
    ]
    for twin, runs in part["seeds"].items():
        cells = [_accuracies(part["grid"][twin][rate]) for rate in rates]
        seeds = ", ".join(str(one["seed"]) for one in runs)
        cells += [f"{part['best'][twin]:g}: {_accuracies(runs)}", seeds, f"{_largest_spike(runs):.2f}"]
        lines.append(f"| {twin} | {' | '.join(cells)} |")
    if any(not runs for rates_of in part["grid"].values() for runs in rates_of.values()):
        lines += ["", "Not every rate was run: neither network is tuned here, and this is no verdict."]
    if longer := part.get("longer"):
        seeds = ", ".join(str(one["seed"]) for one in longer)
        lines += ["", f"With one epoch more NF Muon reaches {_accuracies(longer)} (seeds {seeds})."]
    for twin, (_, fields) in part["models"].items():
        rest, final = fields["sgd_learning_rate"], fields["sgd_learning_rate"] * fields["classifier_lr_scale"]
        lines += ["", f"{twin}: gains and biases at {rest:g}, classifier at {final:g}, no clipping."]
    return lines


def _long(part: dict[str, Any]) -> list[str]:
    marks = [epoch for epoch in (5, 10, 15, 20, 25) if epoch < part["epochs"]]
    lines = [
        "## To the end of training, Muon",
        "",
        f"{versions(part['hardware'])}. {_epochs_of(part['epochs'])} at the rate that was best above; the columns of "
        "single epochs are the medians of the seeds on the way, before the rate has come down.",
        "",
        f"| network | rate | epoch {' | epoch '.join(map(str, marks))} | last epoch | last loss | seeds | spike |",
        "|---" * (len(marks) + 6) + "|",
    ]
    for twin, runs in part["seeds"].items():
        curves = [dict(one.get("curve", ())) for one in runs]
        cells = [f"{part['rates'][twin]:g}"]
        for epoch in marks:
            reached = [100 * curve[epoch] for curve in curves if epoch in curve]
            cells.append(f"{statistics.median(reached):.1f}" if reached else "not run")
        losses = [one["loss"] for one in runs if one.get("loss") is not None]
        cells += [
            _accuracies(runs),
            f"{statistics.median(losses):.3f}" if losses else "none",
            ", ".join(str(one["seed"]) for one in runs),
            f"{_largest_spike(runs):.2f}" if runs else "not run",
        ]
        lines.append(f"| {twin} | {' | '.join(cells)} |")
    return lines


def _epochs(part: dict[str, Any]) -> list[str]:
    main, ratio = part["compared"], part["step"]
    longer = main["epochs"] + 1
    return [
        "## SGD, the `cifar` recipe",
        "",
        *_tuned(part),
        "",
        f"A spike above {SPIKE:g} is one. A training step of NF takes {ratio['median']:.2f} ({ratio['q1']:.2f} to "
        f"{ratio['q3']:.2f}) of its twin's time, median and quartiles. With one epoch more, in "
        f"{ratio['median'] * longer / main['epochs']:.2f} of its twin's time, NF reaches {_accuracies(main['longer'])} "
        f"(wanted: the twin's accuracy in {TARGET}).",
    ]


def _centred(part: dict[str, Any]) -> list[str]:
    return [
        "## SGD, centred weights, gains and biases at a tenth of the rate",
        "",
        *_tuned(part),
        "",
        "All else as in the recipe.",
    ]


def _tuned(part: dict[str, Any]) -> list[str]:
    main = part["compared"]
    rates = " | ".join(f"rate {rate:g}" for rate in main["rates"])
    lines = [
        f"{versions(part['hardware'])}. {main['epochs']} epochs; each rate with seed {main['draws'][0]}, the best with "
        f"seeds {', '.join(map(str, main['draws']))}.",
        "",
        f"| network | {rates} | best rate, all seeds | spike |",
        "|---" * (len(main["rates"]) + 3) + "|",
    ]
    for twin, runs in main["seeds"].items():
        cells = [_accuracies([one]) for one in main["grid"][twin]]
        cells += [f"{main['best'][twin]:g}: {_accuracies(runs)}", f"{_largest_spike(runs):.2f}"]
        lines.append(f"| {twin} | {' | '.join(cells)} |")
    return lines


def _batches(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Small batches, SGD",
        "",
        f"{versions(part['hardware'])}. One epoch, seeds {', '.join(map(str, BATCHES_SEEDS))}.",
        "",
        "| network | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |",
        "|---" * (len(BATCHES) + 1) + "|",
    ]
    for twin, batches in part["one_epoch"].items():
        lines.append(f"| {twin} | {' | '.join(_accuracies(runs) for runs in batches.values())} |")
    return lines


def _epochs_of(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _accuracies(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "not run"
    if any("failed" in one for one in runs):
        return "diverged"
    values = [100 * one["accuracy"] for one in runs]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _largest_spike(runs: list[dict[str, Any]]) -> float:
    return max(one.get("spike", float("inf")) for one in runs)


def main() -> None:
    """Run what is asked, and write it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--quick", action="store_true", help="four steps, one rate, one seed: does it run?")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the Muon and the long part")
    parser.add_argument("--grid-epochs", type=int, help="of the Muon part's grid; those of --epochs by default")
    parser.add_argument("--grid-seeds", type=int, default=1)
    parser.add_argument(
        "--finished", action="store_true", help="of these two parts: no new runs, those that are finished"
    )
    parser.add_argument("--threads", type=int, help="of the processor; all by default")
    parser.add_argument(
        "--part", choices=("epochs", "batches", "muon", "long", "centred"), help="this part alone; all by default"
    )
    parser.add_argument("--out", type=Path, default=Path("results/cifar"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder, limit = options.out / "runs", 4 if options.quick else None
    parts = {
        "epochs": lambda: {
            "step": step_ratio(2 if limit else 21),
            "compared": compared(options.data, folder, options.epochs, limit),
        },
        "batches": lambda: {"one_epoch": small_batches(options.data, folder, limit)},
        "muon": lambda: with_muon(options.data, folder, options, limit),
        "long": lambda: to_the_end(options.data, folder, options, limit),
        "centred": lambda: {"compared": tuned(options.data, folder, CENTRED, options.epochs, limit)},
    }
    written = options.out / "cifar.json"
    result: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {}
    for name in (options.part,) if options.part else parts:
        result[name] = {"quick": options.quick, "hardware": hardware(), **parts[name]()}
    write_atomically(written, json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
