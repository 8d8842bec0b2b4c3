"""Layers in plain NumPy, written from the papers' equations: convolutions tap by tap, every scalar in the open.

Nothing here knows our modules; arrays are NCHW and OIHW, float64.
"""

from __future__ import annotations

import math

import numpy as np


def pads(size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Cells before and after: TensorFlow's SAME, or (kernel - 1) / 2 on both sides."""
    if padding == "symmetric":
        return (kernel - 1) // 2, (kernel - 1) // 2
    missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


def convolution(x, weight, bias, stride=1, groups=1, padding="same"):
    """Cross-correlation, output cell by output cell."""
    kernel = weight.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), *(pads(size, kernel, stride, padding) for size in x.shape[2:])))
    rows, columns = ((size - kernel) // stride + 1 for size in x.shape[2:])
    outputs, inputs = weight.shape[:2]
    result = np.empty((len(x), outputs, rows, columns))
    for channel in range(outputs):
        first = channel // (outputs // groups) * inputs
        for i in range(rows):
            for j in range(columns):
                taps = x[:, first : first + inputs, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
                result[:, channel, i, j] = (taps * weight[channel]).sum((1, 2, 3)) + bias[channel]
    return result


def standardized(weight, gain):
    """(W - mean) * g * rsqrt(max(N * var, 1e-4)), filter by filter."""
    rows = weight.reshape(len(weight), -1)
    centred = rows - rows.mean(1, keepdims=True)
    spread = np.maximum(rows.shape[1] * (centred**2).mean(1), 1e-4)
    return (centred * (gain / np.sqrt(spread))[:, None]).reshape(weight.shape)


def ws_convolution(parameters, name, x, **geometry):
    """A convolution with scaled weight standardization, its parameters under ``name``."""
    weight, gain, bias = (parameters[f"{name}.{part}"] for part in ("weight", "gain", "bias"))
    return convolution(x, standardized(weight, gain), bias, **geometry)


def average_pool(x):
    """The mean over 2x2 windows of stride 2; what hangs over the edge is not counted."""
    rows, columns = (math.ceil(size / 2) for size in x.shape[2:])
    result = np.empty((*x.shape[:2], rows, columns))
    for i in range(rows):
        for j in range(columns):
            result[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    return result


def squeeze_excite(parameters, x):
    """2 * sigmoid(linear(relu(linear(mean)))) * x."""
    weights = [parameters[f"squeeze_excite.linear{index}.weight"] for index in (0, 1)]
    biases = [parameters[f"squeeze_excite.linear{index}.bias"] for index in (0, 1)]
    hidden = np.maximum(x.mean((2, 3)) @ weights[0].T + biases[0], 0)
    gate = 2 / (1 + np.exp(-(hidden @ weights[1].T + biases[1])))
    return gate[:, :, None, None] * x


def silu(x):
    """Times gamma, the official constant."""
    return 1.7881293296813965 * x / (1 + np.exp(-x))


def gelu(x):
    """The tanh approximation, times gamma, the official constant."""
    return 1.7015043497085571 * 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x):
    """The positive part, without a gain."""
    return np.maximum(x, 0)


def plain_convolution(parameters, name, x, **geometry):
    """A convolution with its weight as it is, and a bias if there is one under ``name``."""
    weight = parameters[f"{name}.weight"]
    bias = parameters.get(f"{name}.bias", np.zeros(len(weight)))
    return convolution(x, weight, bias, **geometry)


def batch_norm(parameters, name, x):
    """Over examples and space, with biased variance and 1e-5; scale and offset under ``name``."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, offset = (parameters[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + offset
