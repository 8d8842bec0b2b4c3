"""Times of calls that take turns, so that whatever slows a machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

MINIMUM_ROUNDS = 3
"""Fewest a median is taken of, also where the time is up."""


class Clock:
    """Wall-clock seconds of a call, an accelerator's work included.

    Args:
        device: what the call runs on.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, call: Callable[[], Any]) -> float:
        """Return the seconds ``call`` takes until its results are there."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Return when the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of a call on the CPU."""
    return Clock()(call)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    budget: float = float("inf"),
    clock: Callable[[Callable[[], Any]], float] = seconds,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round: A B C, A B C and so on.

    Args:
        calls: by name; each is expected to be warm.
        rounds: most to run.
        budget: seconds after which no further round starts, once there are three.
        clock: times one call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for completed in range(rounds):
        if completed >= MINIMUM_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Return the ratio within each round, in which a drift of the machine cancels."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, quartiles and extremes."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


def shown(values: Mapping[str, float], digits: int = 3) -> str:
    """Return a spread in words: median (lower to upper quartile)."""
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f} to {values['q3']:.{digits}f})"
