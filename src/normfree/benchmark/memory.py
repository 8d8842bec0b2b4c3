"""Peak memory of a call, beyond what is there before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Return the most bytes a call holds at one time, above those held when it starts.

    For a training step that starts without gradients these are activations, gradients and what operations need
    besides; parameters, the optimizer's state and the batch are there before.

    On an accelerator the caching allocator counts. On a CPU PyTorch's allocator is listened to by its profiler, every
    allocation and release in order: unlike resident memory it depends on no earlier call. Scratch memory that a
    library takes from the system by itself is not seen.

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
    return _highest(_allocations(call))


def _allocations(call: Callable[[], Any]) -> list[int]:
    """Return the bytes of each allocation, in order; negative ones are releases."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports to stderr that it starts, stops and finds no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        call()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]


def _highest(changes: list[int]) -> int:
    held = highest = 0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest
