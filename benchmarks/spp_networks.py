"""Networks that other people measure, written out small: what listening costs on each is a row of spp_cost.

Each is a stand-in with the sizes, operations and number of operations of the original, at random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class UNet(nn.Module):
    """ResNet-18 as encoder, a decoder of five stages of two Conv-BN-ReLU with skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        widths, skips = (512, 256, 128, 64, 32, 16), (256, 128, 64, 64, 0)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(a + skip, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)),
                *(nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)),
            )
            for a, b, skip in zip(widths, widths[1:], skips, strict=False)
        )
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        net = self.encoder
        maps = [net.relu(net.bn1(net.conv1(x)))]
        maps.append(net.layer1(net.maxpool(maps[0])))
        for layer in (net.layer2, net.layer3, net.layer4):
            maps.append(layer(maps[-1]))
        x = maps.pop()
        for stage in self.stages:
            x = F.interpolate(x, scale_factor=2.0)
            x = stage(torch.cat([x, maps.pop()], 1) if maps else x)
        return self.head(x)


class GPT2(nn.Module):
    """GPT-2's blocks: LayerNorm, attention by one projection, LayerNorm, MLP with the tanh GELU; vocabulary 50257."""

    def __init__(self, layers: int = 6, width: int = 768, heads: int = 12, tokens: int = 256) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50257, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(GPT2Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50257, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GPT2Block(nn.Module):
    """One block of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attention(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class VolumeBlock(nn.Module):
    """GroupNorm, ReLU, convolution, twice, and the sum; of SegResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Conv3d(width, width, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            out = layer(F.relu(norm(out)))
        return out + x


class SegResNet(nn.Module):
    """A 3-d encoder of 1, 2, 2 and 4 residual blocks and a decoder that adds the encoder's maps."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.stem, self.head = nn.Conv3d(1, width, 3, padding=1), nn.Conv3d(width, 2, 1)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Identity() if level == 0 else nn.Conv3d(widths[level - 1], channels, 3, 2, 1),
                *(VolumeBlock(channels) for _ in range((1, 2, 2, 4)[level])),
            )
            for level, channels in enumerate(widths)
        )
        self.up = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.blocks = nn.ModuleList(VolumeBlock(channels) for channels in widths[-2::-1])

    def forward(self, x: Tensor) -> Tensor:
        x, maps = self.stem(x), []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        maps.pop()
        for up, block in zip(self.up, self.blocks, strict=True):
            x = block(F.interpolate(up(x), scale_factor=2.0) + maps.pop())
        return self.head(F.relu(x))


class C2f(nn.Module):
    """YOLOv8's block: split in two, bottlenecks one after the other, all of it concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool) -> None:
        super().__init__()
        half, self.shortcut = outputs // 2, shortcut
        self.first, self.last = convolution(inputs, outputs, 1), convolution((2 + depth) * half, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(convolution(half, half), convolution(half, half)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class YOLO(nn.Module):
    """YOLOv8-n: backbone, pyramid pooling, path aggregation, a box and a class head at three scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 16, 3, 2), convolution(16, 32, 3, 2), C2f(32, 32, 1, shortcut=True))
        self.third = nn.Sequential(convolution(32, 64, 3, 2), C2f(64, 64, 2, shortcut=True))
        self.fourth = nn.Sequential(convolution(64, 128, 3, 2), C2f(128, 128, 2, shortcut=True))
        self.fifth = nn.Sequential(convolution(128, 256, 3, 2), C2f(256, 256, 1, shortcut=True))
        self.pool_in, self.pool_out = convolution(256, 128, 1), convolution(512, 256, 1)
        self.up = nn.ModuleList([C2f(384, 128, 1, shortcut=False), C2f(192, 64, 1, shortcut=False)])
        self.strided = nn.ModuleList([convolution(64, 64, 3, 2), convolution(128, 128, 3, 2)])
        self.down = nn.ModuleList([C2f(192, 128, 1, shortcut=False), C2f(384, 256, 1, shortcut=False)])
        self.heads = nn.ModuleList(
            nn.Sequential(convolution(channels, width), convolution(width, width), nn.Conv2d(width, outputs, 1))
            for channels in (64, 128, 256)
            for width, outputs in ((64, 64), (80, 80))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        third = self.third(self.stem(x))
        fourth = self.fourth(third)
        pooled = [self.pool_in(self.fifth(fourth))]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        fifth = self.pool_out(torch.cat(pooled, 1))
        middle = self.up[0](torch.cat([F.interpolate(fifth, scale_factor=2.0), fourth], 1))
        fine = self.up[1](torch.cat([F.interpolate(middle, scale_factor=2.0), third], 1))
        middle = self.down[0](torch.cat([self.strided[0](fine), middle], 1))
        coarse = self.down[1](torch.cat([self.strided[1](middle), fifth], 1))
        return [head((fine, middle, coarse)[index // 2]) for index, head in enumerate(self.heads)]


class Unrolled(nn.Module):
    """An LSTM cell with a residual, called once a step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = nn.LSTMCell(16, 16), steps

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = torch.zeros(len(x), 16)
        for step in range(self.steps):
            new, cell = self.cell(x[:, step], (hidden, cell))
            hidden = hidden + new
        return hidden


class Sums(nn.Module):
    """Each layer reads the sum of all outputs before it, added up anew: layers² / 2 additions."""

    def __init__(self, layers: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        outs = [x]
        for layer in self.layers:
            outs.append(layer(sum(outs[1:], outs[0])).relu())
        return outs[-1]


class Deep(nn.Module):
    """As many small residual blocks one after the other."""

    def __init__(self, blocks: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * layer(x.relu())
        return x


def words() -> Tensor:
    """A batch of two texts of 256 tokens."""
    return torch.randint(0, 50257, (2, 256))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], float | None]] = {
    "U-Net with a ResNet-18, 4×256²": (UNet, partial(torch.randn, 4, 3, 256, 256), 1.1),
    "GPT-2, 6 layers, 2×256 tokens": (GPT2, words, 1.1),
    "SegResNet, 1×64³": (SegResNet, partial(torch.randn, 1, 1, 64, 64, 64), 1.1),
    "YOLOv8-n, 2×416²": (YOLO, partial(torch.randn, 2, 3, 416, 416), 1.3),
    "LSTM cell, 100 steps": (partial(Unrolled, 100), partial(torch.randn, 4, 100, 16), 20.0),
    "LSTM cell, 200 steps": (partial(Unrolled, 200), partial(torch.randn, 4, 200, 16), 20.0),
    "LSTM cell, 400 steps": (partial(Unrolled, 400), partial(torch.randn, 4, 400, 16), 20.0),
    "sums of everything, 5,000 additions": (partial(Sums, 100), partial(torch.randn, 64, 64), 10.0),
    "sums of everything, 20,000 additions": (partial(Sums, 200), partial(torch.randn, 64, 64), 10.0),
    "5,000 layers": (partial(Deep, 5000), partial(torch.randn, 64, 64), None),
}
"""Of each row the network, its batch, and the ratio to a plain pass that it should not exceed."""

QUICK = ("GPT-2, 6 layers, 2×256 tokens", "LSTM cell, 100 steps")
