"""The ``cifar`` recipe at full length on one GPU: NF and BatchNorm twins, three seeds each.

``python -m benchmarks.gpu_cifar --data DIR [--quick] [--at-once 6] [--minutes 9] [--out results/gpu_cifar]`` writes
``gpu_cifar.json`` and ``README.md`` (into $OUT where that is set). DIR holds CIFAR-10 as parquet.

NF is the recipe as it is, trained by its own loop, compiled. The twin has the same blocks with BatchNorm and the same
images, schedule and decay, but neither clipping nor a slower classifier, without which it is better, and the learning
rate that was best for it on two cores (``benchmarks.cifar``). The kernels of a batch of 128 leave most of a large GPU
idle, so that all runs go at once, a process each, and their seconds are nobody's speed. What is not done in the minutes
given is left out and said to be; the same command again goes on with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar import TWINS, run
from benchmarks.pool import at_once
from normfree.benchmark import hardware, versions
from normfree.signal import write_atomically
from normfree.train.config import cifar

SEEDS = (0, 1, 2)
BLOCKS = cifar().model.removeprefix("nf_resnet50:").replace("alpha=0.5,skipinit_gain=1,", "")
MODELS = {"NF": cifar().model, "BN": f"resnetv2_50:{BLOCKS}"}
RATES = {"NF": cifar().optimizer.learning_rate, "BN": 0.4}


def trained(twin: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network in this process; its accuracy, curve and spike."""
    recipe = cifar()
    optimizer = dataclasses.replace(recipe.optimizer, learning_rate=RATES[twin], **TWINS[twin][1])
    shortened = {"limit_train_steps": 4, "limit_eval_steps": 1} if options.quick else {}
    config = dataclasses.replace(
        recipe,
        name=f"{twin}-{seed}",
        model=MODELS[twin],
        data=dataclasses.replace(recipe.data, source=str(options.data)),
        optimizer=optimizer,
        seed=seed,
        compile=not options.quick,
        evaluate_every=5,
        out=options.runs / ("quick" if options.quick else "full") / f"{twin}-{seed}",
        **shortened,
    )
    started = time.perf_counter()
    return {**run(config), "seconds": round(time.perf_counter() - started, 1)}


def apart(twin: str, seed: int, options: argparse.Namespace, ends: float) -> dict[str, Any]:
    """The same in a process of its own, or why it "failed"."""
    words = ["--data", str(options.data), "--runs", str(options.runs), "--twin", twin, "--seed", str(seed)]
    command = [sys.executable, "-m", "benchmarks.gpu_cifar", *words, *["--quick"] * options.quick]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(1.0, ends - time.monotonic())
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time was left"}
    if process.returncode:
        return {"failed": (process.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(process.stdout.strip().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# CIFAR-10 at full length on one GPU",
        "",
        *__doc__.strip().splitlines()[2:],
        "",
        f"{versions(result['hardware'])}. {result['epochs']} epochs of batches of 128, bf16; median (least to most) "
        "over the seeds.",
        "",
        "| network | million parameters | rate | seeds | test accuracy, % | final training loss | spike |",
        "|---|---|---|---|---|---|---|",
    ]
    for twin, runs in result["runs"].items():
        done = [one for one in runs if "failed" not in one]
        cells = [twin, result["millions"][twin], RATES[twin], len(done)]
        cells += [
            _shown([100 * one["accuracy"] for one in done], 2),
            _shown([one["loss"] for one in done if one["loss"] is not None], 3),
            _shown([one["spike"] for one in done], 2),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "A spike is a noted loss over the smallest before it; above 2 it is one."]
    left = [f"{twin} with seed {one['seed']} ({one['failed']})" for twin in TWINS for one in _failed(result, twin)]
    return "\n".join([*lines, *(["", f"Left out: {', '.join(left)}."] if left else [])]) + "\n"


def _failed(result: dict[str, Any], twin: str) -> list[dict[str, Any]]:
    return [one for one in result["runs"][twin] if "failed" in one]


def _shown(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def millions(twin: str) -> float:
    """Parameters of a network, in millions."""
    from normfree.models import create_model
    from normfree.models.registry import parse_overrides

    name, _, overrides = MODELS[twin].partition(":")
    network = create_model(name, num_classes=10, **parse_overrides(overrides))
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2)


def run_all(options: argparse.Namespace) -> None:
    """Train them all at once, and write what came out after each."""
    ends = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {
        "quick": options.quick,
        "hardware": hardware(),
        "epochs": cifar().epochs,
        "models": MODELS,
        "millions": {twin: millions(twin) for twin in TWINS},
        "runs": {twin: [] for twin in TWINS},
    }
    with at_once(options.at_once) as pool:
        draws = [(twin, seed) for seed in (SEEDS[:1] if options.quick else SEEDS) for twin in TWINS]
        waiting = {pool.submit(apart, twin, seed, options, ends): (twin, seed) for twin, seed in draws}
        for done in as_completed(waiting):
            twin, seed = waiting[done]
            result["runs"][twin].append({"seed": seed} | done.result())
            print(twin, result["runs"][twin][-1], flush=True)
            write_atomically(options.out / "gpu_cifar.json", json.dumps(result, indent=1) + "\n")
            write_atomically(options.out / "README.md", table(result))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--quick", action="store_true", help="four steps each, one seed, not compiled: does it run?")
    parser.add_argument("--at-once", type=int, default=6, help="processes that share the GPU")
    parser.add_argument("--minutes", type=float, default=9, help="all of it, reading and compiling too")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "results/gpu_cifar"))
    parser.add_argument("--runs", type=Path, default=Path("out/gpu_cifar"), help="folder of the runs")
    parser.add_argument("--twin", choices=TWINS, help="train this one in this process, and print how it went")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.twin:
        torch.set_num_threads(1 if options.quick else 2)
        print(json.dumps(trained(options.twin, options.seed, options)))
    else:
        run_all(options)


if __name__ == "__main__":
    main()
