"""What the training loop costs beside a bare PyTorch loop, per step.

``python -m benchmarks.loop_overhead [--quick] [--cifar DIR] [--out results/loop_overhead]`` writes
``loop_overhead.json`` and ``README.md``.

Both loops train a network of their own of the same recipe, on the same batches with the same augmentation, in the
same precision and memory layout. The bare one is what a user would write: forward under autocast, backward, SGD with
Nesterov momentum, a schedule, the loss read once a step. Ours also looks whether loss and gradient are finite,
derives the draws of each step from the seed, listens to the network, and writes CSV, TensorBoard and progress. The
rounds alternate (ours, bare, ours, …); the ratio is taken within a round, so that a drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from normfree.benchmark import hardware, spread
from normfree.optim import nesterov_sgd, warmup_cosine
from normfree.signal import write_atomically

ROUNDS, STEPS = 15, 20
TARGET = 1.02


def ours(config: Any, folder: Path) -> Iterator[None]:
    """Train by the loop, one step for each turn."""
    from rich.console import Console

    from normfree.train.distributed import launch
    from normfree.train.trainer import Trainer

    fabric = launch(config.accelerator, config.precision, config.strategy)
    trainer = Trainer(dataclasses.replace(config, out=folder), fabric, Console(quiet=True))
    with trainer.recording():
        trainer.start_clock()
        while True:
            for batches in trainer.rest_of_epoch():
                trainer.log_step(trainer.train_step(batches))
                yield


def bare(config: Any) -> Iterator[None]:
    """Train by hand, one step for each turn."""
    from normfree.data import open_training
    from normfree.models import create_model
    from normfree.train.distributed import resolve_precision

    data = open_training(config.rank_data(1))
    augmentation = data.augmentation()
    torch.manual_seed(config.seed)
    network = create_model(
        config.model_name, num_classes=data.num_classes, in_channels=data.in_channels, **config.model_overrides
    ).to(memory_format=torch.channels_last)
    peak = config.optimizer.peak(config.batch_size)
    optimizer = nesterov_sgd(network, peak, weight_decay=config.optimizer.weight_decay, foreach=True)
    steps = config.epochs * data.steps_per_epoch
    schedule = warmup_cosine(optimizer, steps=steps, warmup_steps=data.steps_per_epoch)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    mixed = resolve_precision(config.precision, "cpu") == "bf16"
    network.train()
    step, total = 0, 0.0
    while True:
        for batch in data:
            images, targets = augmentation(*batch, step=step)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = criterion(network(images.contiguous(memory_format=torch.channels_last)), targets)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
            step += 1
            yield


def compared(config: Any, rounds: int, steps: int) -> dict[str, Any]:
    """Times of both, round by round."""
    with tempfile.TemporaryDirectory() as name:
        loops = {"ours": ours(config, Path(name)), "bare": bare(config)}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for loop in loops.values():
            _seconds(lambda loop=loop: next(loop), 3)
        for number in range(rounds):
            for which in ("ours", "bare") if number % 2 else ("bare", "ours"):
                times[which].append(_seconds(lambda loop=loops[which]: next(loop), steps) / steps)
        for loop in loops.values():
            loop.close()
    ratios = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
    return {
        "recipe": config.name,
        "model": config.model,
        "batch_size": config.batch_size,
        "rounds": rounds,
        "steps_per_round": steps,
        "milliseconds_per_step": {name: spread([1e3 * one for one in values]) for name, values in times.items()},
        "ratio": spread(ratios),
        "raw_seconds_per_step": times,
    }


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = result["hardware"]
    lines = [
        "# What the training loop costs",
        "",
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load'][0]:.2f} at the start; "
        f"Python {where['python']}, torch {where['torch']}. Milliseconds a step, median (quartiles) of alternating "
        f"rounds; target: at most {TARGET:.2f} times a bare PyTorch loop.",
        "",
        "| recipe | batch | rounds × steps | ours, ms | bare, ms | ours / bare |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["recipes"]:
        mine, theirs, ratio = (*one["milliseconds_per_step"].values(), one["ratio"])
        lines.append(
            f"| {one['recipe']} | {one['batch_size']} | {one['rounds']} × {one['steps_per_round']} | "
            f"{_shown(mine, 1)} | {_shown(theirs, 1)} | {_shown(ratio, 3)} |"
        )
    return "\n".join(lines) + "\n"


def _shown(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f} to {values['q3']:.{digits}f})"


def main() -> None:
    """Compare, and write what came out."""
    from normfree.train import RECIPES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all?")
    parser.add_argument("--cifar", help="folder with CIFAR-10 as parquet: also compare by that recipe")
    parser.add_argument("--out", type=Path, default=Path("results/loop_overhead"))
    options = parser.parse_args()
    load = list(os.getloadavg())
    rounds, steps = (2, 2) if options.quick else (ROUNDS, STEPS)
    configs = [dataclasses.replace(RECIPES["digits"](), accelerator="cpu")]
    if options.cifar:
        cifar = RECIPES["cifar"]()
        data = dataclasses.replace(cifar.data, source=options.cifar)
        configs.append(dataclasses.replace(cifar, data=data, accelerator="cpu"))
    result = {"quick": options.quick, "hardware": {**hardware(), "load": load}}
    result["recipes"] = [
        compared(config, rounds, steps if config.name == "digits" else max(2, steps // 5)) for config in configs
    ]
    write_atomically(options.out / "loop_overhead.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
