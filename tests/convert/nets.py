"""Small networks as other people write them; each stands for a structure that conversion has to understand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Statistics, gains and biases of every norm as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(getattr(norm, "running_mean", None), Tensor):
                for name in ("running_mean", "weight", "bias"):
                    tensor = getattr(norm, name)
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator))
                norm.running_var.copy_(0.2 + torch.rand(norm.running_var.shape, generator=generator))
    return model


def normed(channels: int, out: int) -> nn.Sequential:
    """A convolution and its norm."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out))


class Offset(nn.BatchNorm2d):
    """A norm with another gain than it has in its weight: no operation of its forward tells."""

    def forward(self, input):
        statistics = self.running_mean, self.running_var, self.weight + 1, self.bias
        return F.batch_norm(input, *statistics, self.training, self.momentum, self.eps)


class PostActivation(nn.Module):
    """y = relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int, out: int, stride: int = 1, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.gate = gate
        projected = stride > 1 or channels != out
        self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.down = self.down if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = y if self.gate is None else self.gate(y)
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Gate(nn.Module):
    """Squeeze-and-excitation with a sigmoid of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class FunctionalGate(Gate):
    """The same, its sigmoid a function of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class PreActivation(nn.Module):
    """y = shortcut + conv(act(bn(conv(act(bn(x)))))), the activations in place, as timm writes them."""

    def __init__(self, channels: int, out: int, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm1, self.act1 = norm(channels), nn.SiLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm2, self.act2 = norm(out), nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        projected = stride > 1 or channels != out
        self.down = nn.Conv2d(channels, out, 1, stride, bias=False) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.act1(self.norm1(x))
        return (x if self.down is None else self.down(a)) + self.conv2(self.act2(self.norm2(self.conv1(a))))


def post_activation(gate: type[nn.Module] | None = None) -> nn.Module:
    """A small ResNet, post-activation."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    blocks = [
        PostActivation(*sizes, gate=gate(sizes[1]) if gate else None)
        for sizes in ((16, 16), (16, 32, 2), (32, 32), (32, 64, 2), (64, 64))
    ]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def pre_activation(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A small ResNet, pre-activation, with a final norm."""
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    sizes = ((16, 32), (32, 32), (32, 64, 2), (64, 64), (64, 64))
    blocks = [PreActivation(*size, norm=norm) for size in sizes]
    head = [norm(64), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(stem, *blocks, *head)


class UNet(nn.Module):
    """One level: down, up by a transposed convolution, concatenated with the skip; its forward branches on data."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.join = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        low = self.low(skip)
        if low.sum() != 0:  # what symbolic tracing cannot follow
            low = self.up(low)
        return self.out(self.join(torch.cat([skip, low], 1)))


class Generator(nn.Module):
    """A GAN's generator: linear and BatchNorm1d, then transposed convolutions, tanh at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Linear(8, 16 * 16), nn.BatchNorm1d(16 * 16), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.up2(self.up1(self.start(z).unflatten(1, (16, 4, 4)))).tanh()
