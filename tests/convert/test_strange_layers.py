"""Norms and layers that give more than a tensor, constant channels, sums of equals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfree
from normfree.convert import Converted


def converted(model: nn.Module, batch: Any, **options: Any) -> Converted:
    return normfree.convert(model, batch, **options)


class WithSize(nn.Module):
    """An RMS norm that gives the size it has divided by, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inverse = x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        return self.gain * x * inverse, inverse


class Taken(nn.Module):
    """A chain that uses both results of one norm, and has one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.second, self.sized, self.last = nn.Linear(32, 32), WithSize(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x, inverse = self.sized(self.second(x))
        return self.last(x.relu()) + inverse.log()


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_a_norm_whose_results_are_taken_apart_stays_and_the_others_go(start: Any) -> None:
    batch = torch.randn(32, 8)
    record = converted(Taken(), batch, start=start).conversion
    assert [one.name for one in record.norms_left] == ["sized"]
    assert "more than the normalized tensor" in record.norms_left[0].reason
    assert "norm" in [change.name for change in record.changes]


class Pair(nn.Linear):
    """A layer of pairs of features and places, as in libraries of sparse tensors."""

    def forward(self, x: Any) -> Any:
        return super().forward(x[0]), x[1]


class PairNorm(nn.BatchNorm1d):
    def forward(self, x: Any) -> Any:
        return super().forward(x[0]), x[1]


class PairReLU(nn.Module):
    def forward(self, x: Any) -> Any:
        return x[0].relu(), x[1]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = (part for i in range(4) for part in (Pair(8 if i == 0 else 32, 32), PairNorm(32), PairReLU()))
        self.features, self.last = nn.Sequential(*parts), nn.Linear(32, 2)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.last(self.features((x, places))[0])


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_layers_of_pairs_are_standardized(start: Any) -> None:
    model, batch = Pairs(), (torch.randn(64, 8), torch.randint(0, 9, (64, 3)))
    after = converted(model, batch, start=start)
    assert not after.conversion.norms_left
    if start == "pretrained":
        assert torch.allclose(after.eval()(*batch), model.eval()(*batch), atol=1e-5)
    else:
        variances = [block.avg_channel_var for block in normfree.spp(after, batch).blocks[:-1]]
        assert max(variances) < 4 * min(variances)


@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_a_channel_that_is_constant_in_the_example_has_the_scale_of_the_others(constant: float) -> None:
    example = 3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    example[:, 4] = constant
    model = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    after = converted(model, example)
    slopes = (after[0](torch.ones(1, 10)) - after[0](torch.zeros(1, 10))).detach().flatten()
    others = torch.cat([slopes[:4], slopes[5:]])
    assert others.min() <= slopes[4] <= others.max()
    assert any("1 of 10 channels are the same throughout the example (first 4)" in n for n in after.conversion.notes)


def test_where_all_channels_are_constant_the_scale_is_one() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    example = torch.randn(32, 4)
    example[:, 1:] = 2.0
    after = converted(model, example)
    slopes = (after[0](torch.ones(1, 4)) - after[0](torch.zeros(1, 4))).detach().flatten()
    assert slopes[1:].tolist() == pytest.approx([float(slopes[0])] * 3)


class Skips(nn.Module):
    """A stream of gated blocks, each of which also gives to a sum beside it."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv1d(2, 16, 1)
        self.inner = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(blocks))
        self.onward = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(blocks))
        self.aside = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(blocks))
        self.last = nn.Conv1d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total, self.given = self.stem(x), torch.zeros(1), []
        for inner, norm, onward, aside in zip(self.inner, self.norms, self.onward, self.aside, strict=True):
            y = norm(inner(x)).relu()
            self.given.append(aside(y))
            total = total + self.given[-1]
            x = x + onward(y)
        return self.last(total.relu())


def test_what_blocks_give_to_a_sum_beside_them_stays_alike() -> None:
    batch = torch.randn(8, 2, 64, generator=torch.Generator().manual_seed(0))
    after = converted(Skips(), batch)
    after(batch)
    sizes = [float(each.var()) for each in after.given]
    assert max(sizes) < 4 * min(sizes)
    assert len(normfree.spp(Skips(), batch).blocks) in (5, 6)
