"""Adaptive gradient clipping, weight averaging and the schedule, written straight from their equations in NumPy."""

from __future__ import annotations

import math

import numpy as np


def rows_of(array: np.ndarray, kind: str, groups: int = 1) -> list[tuple]:
    """The index of each unit, as a tuple that selects it from the array."""
    if max(array.shape, default=1) == array.size:  # scalars, vectors, and what has one axis longer than 1
        return [(Ellipsis,)]
    if kind != "transposed":
        return [(unit,) for unit in range(array.shape[0])]
    inputs, outputs = array.shape[0] // groups, array.shape[1]
    return [(slice(g * inputs, (g + 1) * inputs), o) for g in range(groups) for o in range(outputs)]


def clip(weight: np.ndarray, gradient: np.ndarray, kind: str, groups: int, clip_factor: float, eps: float):
    """The clipped gradient, how many units were clipped, and how many there are."""
    result, count = gradient.copy(), 0
    units = rows_of(weight, kind, groups)
    for unit in units:
        limit = clip_factor * max(math.sqrt((np.abs(weight[unit]) ** 2).sum()), eps)
        length = math.sqrt((np.abs(gradient[unit]) ** 2).sum())
        if length > limit:
            result[unit] = gradient[unit] * (limit / length)
            count += 1
    return result, count, len(units)


def average(values: list[np.ndarray], decay: float) -> np.ndarray:
    """The moving average that starts at the first value and takes in each of the others."""
    mean = values[0]
    for t, value in enumerate(values[1:]):
        d = min(decay, (1 + t) / (10 + t))
        mean = d * mean + (1 - d) * value
    return mean


def learning_rate(t: int, peak: float, steps: int, warmup: int, final: float) -> float:
    """The warm-up from zero, then half a cosine from the peak to the final rate."""
    if t < warmup:
        return peak * t / warmup
    angle = np.pi * min(t - warmup, steps - warmup) / max(steps - warmup, 1)
    return final + (peak - final) * 0.5 * (1 + np.cos(angle)) if steps > warmup else final
