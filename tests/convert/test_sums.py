"""Sums in a plan: with factors, of one activation with itself, behind branches of several layers."""

from __future__ import annotations

import math

import pytest
import torch
from convert.nets import normed
from torch import nn

import normfree

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Joined(nn.Module):
    """Two layers' outputs joined in some way, and a third layer behind an activation."""

    def __init__(self, join):
        super().__init__()
        self.left, self.right, self.after = normed(3, 16), normed(3, 16), normed(16, 16)
        self.join = join

    def forward(self, x):
        return self.after(torch.relu(self.join(self.left(x), self.right(x))))


SUMS = {
    "a sum": (lambda a, b: a + b, 2),
    "a difference": (lambda a, b: a - b, 2),
    "a factor of the sum's own": (lambda a, b: torch.add(a, b, alpha=0.1), 1.01),
    "a factor before it": (lambda a, b: a + 0.1 * b, 1.01),
    "a division before it": (lambda a, b: a / 2 + b, 1.25),
    "a factor of the whole": (lambda a, b: (a + b) * 0.5, 0.5),
    "itself": (lambda a, b: a + a, 4),
    "less itself in part": (lambda a, b: torch.sub(a, a, alpha=0.5), 0.25),
    "a factor in front": (lambda a, b: a + torch.linspace(0, 1, 16)[:, None, None] * b, 1 + 31 / 90),
    "a factor of each channel": (lambda a, b: a + b * torch.linspace(0, 1, 16)[:, None, None], 1 + 31 / 90),
    "fused with a factor": (lambda a, b: torch.addcmul(a, b, torch.full((16, 1, 1), 0.5), value=2), 2),
    "interpolated": (lambda a, b: torch.lerp(a, b, 0.25), 0.75**2 + 0.25**2),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_has_the_variance_of_its_parts(name):
    join, variance = SUMS[name]
    torch.manual_seed(0)
    converted = normfree.convert(Joined(join), IMAGES)
    planned = next(change for change in converted.conversion.changes if change.name == "after.0")
    assert planned.input_scale == pytest.approx(normfree.gamma(nn.ReLU()) / math.sqrt(variance))
    assert planned.reason.startswith("γ")
    seen = []
    converted.after[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    converted(IMAGES)
    assert float(seen[0][:, :, 2:-2, 2:-2].var()) == pytest.approx(1, abs=0.35), "of 16 filters, no padding near"


CONSTANTS = {
    "of each channel": lambda a, b: a + torch.linspace(0, 1, 16)[:, None, None] + b,
    "a number": lambda a, b: a + 0.5 + b,
    "before it": lambda a, b: torch.sub(torch.ones(1), a, alpha=2.0) + b,
    "a product": lambda a, b: torch.addcmul(a, torch.ones(16, 1, 1), torch.ones(1)) + b,
    "a sum's beginning": lambda a, b: torch.zeros(1) + a + b,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_layer_behind_a_constant_that_is_added_is_measured(name):
    torch.manual_seed(0)
    converted = normfree.convert(Joined(CONSTANTS[name]), IMAGES)
    assert converted.conversion.norms_left == ()
    seen = []
    converted.after[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    converted(IMAGES)
    assert float(seen[0][:, :, 2:-2, 2:-2].var()) == pytest.approx(1, abs=0.35), "of 16 filters, no padding near"


class Residual(nn.Module):
    """A block whose branch joins the stream in some way."""

    def __init__(self, join):
        super().__init__()
        self.branch, self.other, self.join = normed(16, 16), normed(16, 16), join
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.5))

    def forward(self, x):
        return self.join(self, x)


BLOCKS = {  # how a branch is added, the variance behind it, and the layer's part of alpha beside the code's own factor
    "a sum": (lambda m, x: x + m.branch(x), lambda v: v + 0.04, 0.2),
    "a factor": (lambda m, x: x + 0.1 * m.branch(x), lambda v: v + 0.01, 1.0),
    "a large factor": (lambda m, x: x - m.branch(x) / 0.125, lambda v: v + 0.04, 0.025),
    "a factor of the sum's own": (lambda m, x: torch.add(x, m.branch(x), alpha=0.1), lambda v: v + 0.01, 1.0),
    "two layers": (lambda m, x: x + (m.branch(x) + m.other(x)), lambda v: v + 0.08, 0.2),
    "a layer scale": (lambda m, x: x + m.scale * m.branch(x), lambda v: v + 0.25 * 0.04, 0.2),
    "a layer scale fused": (lambda m, x: torch.addcmul(x, m.branch(x), m.scale), lambda v: v + 0.25 * 0.04, 0.2),
    "an interpolation": (lambda m, x: torch.lerp(x, m.branch(x), 0.5), lambda v: 0.25 * v + 0.04, 0.4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_a_row_have_the_variance_that_is_planned(name):
    join, step, alpha = BLOCKS[name]
    model = nn.Sequential(normed(3, 16), *(Residual(join) for _ in range(4)), normed(16, 16))
    record = normfree.convert(model, IMAGES).conversion
    variance = 1.0
    for _ in range(4):
        variance = step(variance)
    last = next(change for change in record.changes if change.name == "5.0")
    assert last.input_scale == pytest.approx(1 / math.sqrt(variance))
    branch = next(change for change in record.changes if change.name == "1.branch.0")
    assert branch.alpha == pytest.approx(alpha), "constant factors of the code count towards alpha"
    assert branch.skip_gain == (None if "layer scale" in name else 1), "the layer scale stands for it"


class StateSpace(nn.Module):
    """A block one of whose layers adds a multiple of its input, D·u, to what it makes of it."""

    def __init__(self, gain):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(2))
        self.mix, self.out = nn.Conv1d(16, 16, 5, padding=2), nn.Conv1d(16, 16, 1)
        self.gain = nn.Parameter(gain)

    def forward(self, x):
        u = nn.functional.gelu(self.norms[0](x))
        return x + self.out(nn.functional.gelu(self.norms[1](self.mix(u)) + self.gain * u))


@pytest.mark.parametrize("gain", [torch.ones(16, 1), torch.linspace(-1, 1, 16)[:, None]], ids=["ones", "noise"])
def test_the_skip_of_a_layer_inside_a_branch_is_not_scaled_by_alpha(gain):
    torch.manual_seed(0)
    model, series = nn.Sequential(nn.Conv1d(3, 16, 3), *(StateSpace(gain) for _ in range(3))), torch.randn(8, 3, 64)
    converted = normfree.convert(model, series)
    scaled = {change.name for change in converted.conversion.changes if change.alpha is not None}
    assert scaled == {"1.out", "2.out", "3.out"} and not converted.conversion.notes
    assert all(0.5 < block.residual_avg_channel_var < 2 for block in normfree.spp(converted, series).blocks)
