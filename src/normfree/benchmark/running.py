"""Run a comparison: everyone warm, then in turns, then memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

from normfree.benchmark.contender import Call, Contender, Setting
from normfree.benchmark.machine import hardware
from normfree.benchmark.memory import peak_bytes
from normfree.benchmark.part import Part
from normfree.benchmark.timing import Clock, interleaved, spread
from normfree.common.text import first_line, one_line

WARM_UP = 2
"""Calls before anything is measured: compilers, allocators and caches have their say in the first."""


def measure(
    part: Part,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    lenient: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure one comparison, all contenders in this process.

    The rounds are A B C, A B C, …; ratios are taken within a round. In training the peak memory of one more step is
    taken of each. Gaussian images, channels last; every model is drawn with the same seed.

    Args:
        part: the comparison.
        device: where to run it.
        seed: of models and images.
        lenient: note a contender that cannot be had or fails under ``"failed"`` instead of raising.
        say: told what is going on.

    Returns:
        JSON's types: ``part``'s fields; where it was measured; per contender ``source``, ``steps``, ``seconds`` (a
        spread), ``raw_seconds`` and in training ``peak_bytes``; and ``targets`` as they were met.

    Raises:
        ValueError: a model that there is not.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _measured(part, torch.device(device), seed, lenient, say)


def _measured(part: Part, device: torch.device, seed: int, lenient: bool, say: Callable[[str], None]) -> dict[str, Any]:
    contenders: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    load = os.getloadavg()[0]
    setting = Setting(batch=_images(part, device, seed), precision=getattr(torch, part.precision))
    for contender in part.contenders:
        say(f"{part.name}: {contender.label}")
        noted = contenders[contender.label] = {"source": contender.source, "steps": list(contender.steps)}
        try:
            calls[contender.label] = _warm(contender, part, setting, seed)
        except Exception as error:
            if not lenient:
                raise
            noted["failed"] = _reason(error)
    say(f"{part.name}: rounds")
    times = interleaved(calls, rounds=part.rounds, budget=part.budget, clock=Clock(device))
    for label, values in times.items():
        contenders[label] |= {"seconds": spread(values), "raw_seconds": values}
        if part.task == "training":
            contenders[label]["peak_bytes"] = peak_bytes(calls[label], device)
    return {
        "schema": 1,
        **{name: getattr(part, name) for name in ("name", "title", "task", "batch_size", "image_size", "precision")},
        "device": str(device),
        "seed": seed,
        "rounds": len(next(iter(times.values()), [])),
        "hardware": {**hardware(), "load": load},
        "contenders": contenders,
        "targets": [target.judged(contenders) for target in part.targets],
    }


def _images(part: Part, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(part.batch_size, 3, part.image_size, part.image_size, generator=generator)
    return images.to(device, memory_format=torch.channels_last)


def _warm(contender: Contender, part: Part, setting: Setting, seed: int) -> Call:
    prepare = contender.training if part.task == "training" else contender.inference
    call = prepare(setting, seed)
    for _ in range(WARM_UP):
        call()
    gc.collect()
    return call


def _reason(error: Exception) -> str:
    return first_line(error) if isinstance(error, ValueError) else one_line(error)
