"""What a call costs: its time, measured in turns with others, and its peak memory; and on which machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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


def peak_bytes(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Return the most bytes a call holds at one time, above those held when it starts.

    For a training step that starts without gradients these are activations, gradients and what operations need
    besides; parameters, the optimizer's state and the batch are there before.

    On an accelerator the caching allocator counts. On a CPU PyTorch's profiler records every allocation and release,
    in order: unlike resident memory it depends on no earlier call. Scratch memory that a library takes from the
    system by itself is not seen.

    Args:
        call: what to run, warm.
        device: where it runs.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = highest = 0
    for change in _allocations(call):
        held += change
        highest = max(highest, held)
    return highest


def _allocations(call: Callable[[], Any]) -> list[int]:
    """The bytes of each allocation on the CPU, in order; negative ones are releases."""
    from torch.profiler import ProfilerActivity, profile

    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler from reporting to stderr that it starts, stops and finds no GPU; restores the environment."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


PACKAGES = ("torch", "torchvision", "timm", "numpy")


def hardware() -> dict[str, Any]:
    """Return the machine and the versions of packages, which stand beside every measured number."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def versions(found: dict[str, Any]) -> str:
    """Return what :func:`hardware` found as one sentence's words."""
    where = f"{found['cpu']}, {found['threads']} of {found['cores']} cores"
    if "gpu" in found:
        where = f"{found['gpu']}; {where}"
    return f"{where}; Python {found['python']}, " + ", ".join(f"{package} {found[package]}" for package in PACKAGES)


def machine_name(device: str | torch.device = "cpu") -> str:
    """Return a name for a folder of results: the device's, in lower case, such as ``nvidia-h200`` or ``amd-epyc-2``.

    Args:
        device: what ran the models; a CPU's name ends in the number of its cores.
    """
    if torch.device(device).type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = re.sub(r"\((R|TM|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", f"{_cpu()}") + f" {os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
