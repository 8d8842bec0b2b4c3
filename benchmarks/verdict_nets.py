"""Forty small nets of every kind, healthy and sick forward or backward, and the nets that the thresholds rest on.

All classify scikit-learn's digits, [N, 1, 8, 8]: as 64 numbers, as an image, or as a sequence of 8 rows. What makes a
net sick is in its name. Where no initialisation is named it is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree import create_model, gamma
from normfree.nn import ScaledWSConv2d

CLASSES = 10
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def gained(layer: Layer, gain: float, bias: float = 0.0) -> Layer:
    """The layer with weights of standard deviation gain / sqrt(fan-in) and a constant bias."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer


HE = math.sqrt(2)


def mlp(
    depth: int,
    activation: type[nn.Module],
    *,
    gain: float | None = None,
    bias: float = 0.0,
    norm: type[nn.Module] | None = None,
    width: int = 32,
) -> nn.Module:
    """A chain of linear layers, each with its norm and activation."""
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        linear = nn.Linear(64 if index == 0 else width, width)
        layers.append(linear if gain is None else gained(linear, gain, bias))
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def zero_head(net: nn.Module) -> nn.Module:
    """The net, with a last layer of zeros."""
    *_, head = net.children()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return net


class Pooled(nn.Module):
    """Layers on images, the mean over all positions, and a classifier."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, classes]."""
        return self.head(self.layers(x).mean((2, 3)))


def convolutions(
    depth: int,
    activation: Callable[[], nn.Module],
    *,
    gain: float | None = None,
    norm: type[nn.Module] | None = None,
    layer: type[nn.Conv2d] = nn.Conv2d,
    width: int = 12,
) -> nn.Module:
    """A chain of 3×3 convolutions, each with its norm and activation."""
    layers: list[nn.Module] = []
    for index in range(depth):
        convolution = layer(1 if index == 0 else width, width, 3, padding=1)
        layers.append(convolution if gain is None else gained(convolution, gain))
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
    return Pooled(layers, width)


class GainedReLU(nn.Module):
    """ReLU times its variance-preserving constant."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        return F.relu(x) * gamma("relu")


def separable(depth: int, width: int = 16) -> nn.Module:
    """Depthwise and pointwise convolutions with batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return Pooled(layers, width)


class Branch(nn.Module):
    """shortcut·x + scale·f(x), f two linear layers of the given gain, with norms before the activations if any."""

    def __init__(
        self, width: int, gain: float, scale: float | nn.Parameter, shortcut: float, norm: type[nn.Module] | None
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList((norm or nn.Identity)(width) for _ in range(2)) if norm else [nn.Identity()] * 2
        self.a, self.b = gained(nn.Linear(width, width), gain), gained(nn.Linear(width, width), gain)
        self.scale, self.shortcut = scale, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        y = self.a(F.relu(self.norms[0](x)))
        return self.shortcut * x + self.scale * self.b(F.relu(self.norms[1](y)))


def residual(
    depth: int,
    *,
    gain: float = HE,
    scale: float = 1.0,
    shortcut: float = 1.0,
    learnt: bool = False,
    norm: type[nn.Module] | None = None,
    width: int = 32,
) -> nn.Module:
    """A chain of residual blocks on the 64 pixels."""
    factors = [nn.Parameter(torch.tensor(scale)) if learnt else scale for _ in range(depth)]
    blocks = [Branch(width, gain, factor, shortcut, norm) for factor in factors]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), *blocks, nn.Linear(width, CLASSES))


class PostActivation(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), as in the first ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        return F.relu(x + self.norms[1](self.b(F.relu(self.norms[0](self.a(x))))))


class Attention(nn.Module):
    """Single-head attention: softmax(sharpness·q·kᵀ/√width)·v, with its input added or not."""

    def __init__(self, width: int, *, sharpness: float, added: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (gained(nn.Linear(width, width), 1.0) for _ in range(3))
        self.factor, self.added = sharpness / math.sqrt(width), added

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        logits = self.query(x) @ self.key(x).transpose(1, 2) * self.factor
        y = logits.softmax(-1) @ self.value(x)
        return x + y if self.added else y


class Tokens(nn.Module):
    """The rows of the image as tokens, with positions; blocks; the mean; a classifier."""

    def __init__(self, blocks: list[nn.Module], width: int = 32, *, norm: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, width), nn.Sequential(*blocks)
        self.positions = nn.Parameter(0.5 * torch.randn(8, width))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, classes]."""
        return self.head(self.norm(self.blocks(self.embed(x[:, 0]) + self.positions)).mean(1))


def transformer(depth: int, *, first: bool, width: int = 32) -> nn.Module:
    """A transformer with its norms before or behind the branches."""
    kwargs = {"dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True, "norm_first": first}
    blocks: list[nn.Module] = [nn.TransformerEncoderLayer(width, 4, **kwargs) for _ in range(depth)]
    return Tokens(blocks, width, norm=first)


class Plain(nn.Module):
    """x + attention(x), then x + mlp(x), without norms; all weights with the given gain."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.attention = Attention(width, sharpness=1.0, added=False)
        gained(self.attention.value, gain)
        self.a, self.b = gained(nn.Linear(width, width), gain), gained(nn.Linear(width, width), gain)

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        x = x + self.attention(x)
        return x + self.b(F.relu(self.a(x)))


class Recurrent(nn.Module):
    """A recurrent layer of torch over the rows, and a classifier of its last state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, classes]."""
        return self.head(self.layer(x[:, 0])[0][:, -1])


class Unrolled(nn.Module):
    """h ← act(in(row) + radius·Q·h) with Q orthogonal, over the 8 rows and ``extra`` empty steps."""

    def __init__(
        self, radius: float, activation: Callable[[Tensor], Tensor], *, extra: int = 0, width: int = 32
    ) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(8, width), nn.Linear(width, width)
        nn.init.orthogonal_(self.again.weight, radius)
        nn.init.zeros_(self.again.bias)
        self.head, self.activation, self.extra = nn.Linear(width, CLASSES), activation, extra

    def forward(self, x: Tensor) -> Tensor:
        """[N, classes]."""
        state = self.activation(self.enter(x[:, 0, 0]))
        for step in range(1, 8 + self.extra):
            fed = self.enter(x[:, 0, step]) if step < 8 else 0.0
            state = self.activation(fed + self.again(state))
        return self.head(state)


TINY = {"depths": (1, 1, 1, 1), "widths": (16, 16, 32, 32), "stem": "cifar", "in_channels": 1, "num_classes": CLASSES}

NETS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "relu, He, 5": ("plain", lambda: mlp(5, nn.ReLU, gain=HE)),
    "relu, He, 12": ("plain", lambda: mlp(12, nn.ReLU, gain=HE)),
    "relu, He, 8, zero head": ("plain", lambda: zero_head(mlp(8, nn.ReLU, gain=HE))),
    "relu, a third of He, 15": ("plain", lambda: mlp(15, nn.ReLU, gain=HE / 3)),
    "relu, 4 times He, 15": ("plain", lambda: mlp(15, nn.ReLU, gain=4 * HE)),
    "relu, He, biases -4, 8": ("plain", lambda: mlp(8, nn.ReLU, gain=HE, bias=-4.0)),
    "relu, He, biases 100, 8": ("plain", lambda: mlp(8, nn.ReLU, gain=HE, bias=100.0)),
    "selu, LeCun, 15": ("plain", lambda: mlp(15, nn.SELU, gain=1.0)),
    "tanh, Xavier, 10": ("plain", lambda: mlp(10, nn.Tanh, gain=1.0)),
    "tanh, gain 4, 30": ("plain", lambda: mlp(30, nn.Tanh, gain=4.0)),
    "tanh, 25": ("plain", lambda: mlp(25, nn.Tanh)),
    "sigmoid, 12": ("plain", lambda: mlp(12, nn.Sigmoid)),
    "relu, batch norm, 15": ("plain", lambda: mlp(15, nn.ReLU, norm=nn.BatchNorm1d)),
    "relu, batch norm, 50": ("plain", lambda: mlp(50, nn.ReLU, norm=nn.BatchNorm1d)),
    "relu, batch norm, 100": ("plain", lambda: mlp(100, nn.ReLU, norm=nn.BatchNorm1d, width=24)),
    "tanh, layer norm, 10": ("plain", lambda: mlp(10, nn.Tanh, norm=nn.LayerNorm)),
    "conv, relu, He, 6": ("conv", lambda: convolutions(6, nn.ReLU, gain=HE)),
    "conv, relu, batch norm, 8": ("conv", lambda: convolutions(8, nn.ReLU, norm=nn.BatchNorm2d)),
    "conv, relu, batch norm, 60": ("conv", lambda: convolutions(60, nn.ReLU, norm=nn.BatchNorm2d, width=8)),
    "conv, relu, a quarter of He, 10": ("conv", lambda: convolutions(10, nn.ReLU, gain=HE / 4)),
    "conv, relu, 6 times He, 12": ("conv", lambda: convolutions(12, nn.ReLU, gain=6 * HE)),
    "conv, sigmoid, 10": ("conv", lambda: convolutions(10, nn.Sigmoid)),
    "separable conv, batch norm, 4": ("conv", lambda: separable(4)),
    "standardized conv, 12": ("conv", lambda: convolutions(12, GainedReLU, layer=ScaledWSConv2d)),
    "residual, batch norm, 10": ("residual", lambda: residual(10, norm=nn.BatchNorm1d)),
    "residual, no norm, scale 0.2, 15": ("residual", lambda: residual(15, scale=0.2)),
    "residual, no norm, zero gains, 15": ("residual", lambda: residual(15, scale=0.0, learnt=True)),
    "residual, no norm, gain 3, 20": ("residual", lambda: residual(20, gain=3.0)),
    "residual, shortcut 0.2, 15": ("residual", lambda: residual(15, gain=0.5, scale=0.2, shortcut=0.2)),
    "resnet, batch norm, 5": (
        "residual",
        lambda: Pooled([nn.Conv2d(1, 12, 3, padding=1), *(PostActivation(12) for _ in range(5))], 12),
    ),
    "nf_resnet, 4": ("residual", lambda: create_model("nf_resnet50", **TINY)),
    "transformer, pre-norm, 8": ("attention", lambda: transformer(8, first=True)),
    "transformer, post-norm, 3": ("attention", lambda: transformer(3, first=False)),
    "transformer, no norm, gain 4, 10": ("attention", lambda: Tokens([Plain(32, 4.0) for _ in range(10)])),
    "attention alone, no shortcut, 12": (
        "attention",
        lambda: Tokens([Attention(32, sharpness=1.0, added=False) for _ in range(12)]),
    ),
    "attention alone, 4": ("attention", lambda: Tokens([Attention(32, sharpness=1.0, added=True) for _ in range(4)])),
    "lstm": ("recurrent", lambda: Recurrent(nn.LSTM(8, 32, batch_first=True))),
    "gru, two layers": ("recurrent", lambda: Recurrent(nn.GRU(8, 32, 2, batch_first=True))),
    "unrolled tanh, radius 1": ("recurrent", lambda: Unrolled(1.0, torch.tanh)),
    "unrolled tanh, radius 0.2, 24 empty steps": ("recurrent", lambda: Unrolled(0.2, torch.tanh, extra=24)),
}

CALIBRATION: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    **{
        f"relu, batch norm, {depth}": ("calibration", lambda depth=depth: mlp(depth, nn.ReLU, norm=nn.BatchNorm1d))
        for depth in (25, 30, 40)
    },
    **{
        f"tanh, gain {gain:g}, 30": ("calibration", lambda gain=gain: mlp(30, nn.Tanh, gain=gain))
        for gain in (2.0, 2.5, 3.0)
    },
    **{f"sigmoid, {depth}": ("calibration", lambda depth=depth: mlp(depth, nn.Sigmoid)) for depth in (3, 4, 5, 6, 8)},
    **{f"tanh, {depth}": ("calibration", lambda depth=depth: mlp(depth, nn.Tanh)) for depth in (10, 12, 16, 20, 30)},
    **{
        f"relu, {depth}": ("calibration", lambda depth=depth: mlp(depth, nn.ReLU))
        for depth in (4, 6, 8, 10, 12, 15, 20)
    },
    **{f"gelu, {depth}": ("calibration", lambda depth=depth: mlp(depth, nn.GELU)) for depth in (8, 12)},
    **{
        f"conv, relu, {depth}": ("calibration", lambda depth=depth: convolutions(depth, nn.ReLU)) for depth in (4, 6, 8)
    },
    **{
        f"relu, He, biases {bias}, 6": ("calibration", lambda bias=bias: mlp(6, nn.ReLU, gain=HE, bias=bias))
        for bias in (3.0, 10.0, 30.0, 100.0)
    },
}
