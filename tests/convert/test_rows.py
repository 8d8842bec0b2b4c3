"""Long rows of layers: a bias at which gradients do not explode, in models with norms and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import normfree
from normfree.convert.unnormalized import MOST_GROWTH
from normfree.nn.activations import gradient_gain

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def dense(count, activation=nn.ReLU, norm=None):
    parts = [p for _ in range(count) for p in (nn.Linear(64, 64), *([norm(64)] if norm else []), activation())]
    return nn.Sequential(*parts, nn.Linear(64, 4))


def biases(model, x=X):
    return {change.name: change.bias for change in normfree.convert(model, x).conversion.changes if change.bias}


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d])
def test_the_gradient_grows_as_planned(norm):
    torch.manual_seed(0)
    converted = normfree.convert(dense(50, norm=norm), X)
    signal = normfree.spp(converted, X)
    signal.assert_healthy()
    points = [p for p in signal.blocks if not p.last]
    powers = [p.avg_sq_gradient * 64 for p in points]
    # Of 64 channels and 64 examples the growth has a spread of a few percent a layer; without biases it is 1.467^49.
    assert powers[0] / powers[-1] < 10 * MOST_GROWTH < 1.467**49 / 1000
    assert all(1 / 2 < p.avg_channel_var < 2 for p in points)


@pytest.mark.parametrize(("count", "expected"), [(18, None), (30, 0.5), (50, 0.9), (100, 1.35)])
def test_the_bias_is_the_least_that_is_enough(count, expected):
    found = set(biases(dense(count)).values())
    assert found == (set() if expected is None else {expected})
    if expected is not None:
        assert gradient_gain(lambda z: torch.relu(z + expected)) ** count <= MOST_GROWTH
        assert gradient_gain(lambda z: torch.relu(z + expected - 0.05)) ** count > MOST_GROWTH


def test_what_is_read_in_another_way_and_what_is_last_start_at_zero():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.ModuleList([nn.Linear(64, 64) for _ in range(30)])
            self.last = nn.Linear(128, 4)

        def forward(self, x):
            made = []
            for layer in self.row:
                made.append(layer(x))
                x = torch.relu(made[-1])
            return self.last(torch.cat([x, made[9]], 1))

    # The output of the tenth is read without the function, too; that of the last by a layer that is not standardized.
    assert set(biases(Read())) == {f"row.{index}" for index in range(29) if index != 9}
    assert set(biases(dense(30))) == {str(2 * index) for index in range(29)}


def test_a_saturating_function_has_no_better_place():
    assert not biases(dense(60, nn.Tanh)), "chi of tanh grows with the bias"
    assert biases(dense(60, nn.SiLU)) and biases(dense(60, nn.GELU))


def test_a_row_may_lie_in_a_branch():
    """A short branch starts at zero, for its shortcut ends each row; one of 24 layers is a row by itself."""

    class Block(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(count)])

        def forward(self, x):
            y = x
            for layer in self.layers:
                y = layer(torch.relu(y))
            return x + y

    assert not biases(nn.Sequential(nn.Linear(64, 64), *(Block(2) for _ in range(40)), nn.Linear(64, 4)))
    found = biases(nn.Sequential(nn.Linear(64, 64), Block(24), nn.Linear(64, 4)))
    assert set(found) == {f"1.layers.{index}" for index in range(23)}


class FusedNorm(nn.BatchNorm1d):
    """A norm with its activation in its own forward, as timm writes it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, input):
        return self.act(super().forward(input))


def test_fused_norms_do_not_hide_a_row():
    assert len(biases(dense(30, nn.Identity, FusedNorm))) == 29


def test_pools_do_not_end_a_row():
    channels = 16
    parts = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for index in range(23):
        pool = [nn.MaxPool2d(2)] if index in (5, 11) else []
        parts += [*pool, nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * 16, 4))
    assert len(biases(model, images)) == 23


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_the_gain_of_a_rectified_gradient_has_a_closed_form(bias):
    """Of relu(z + b), with Φ and φ at b: E[f'²] = Φ, E[f] = φ + bΦ, E[f²] = (1 + b²)Φ + bφ."""
    phi, cdf = math.exp(-(bias**2) / 2) / math.sqrt(2 * math.pi), (1 + math.erf(bias / math.sqrt(2))) / 2
    variance = (1 + bias**2) * cdf + bias * phi - (phi + bias * cdf) ** 2
    assert gradient_gain(lambda z: torch.relu(z + bias)) == pytest.approx(cdf / variance, rel=1e-5)
    assert gradient_gain(lambda z: 3 * z - 2) == pytest.approx(1, rel=1e-6)
