"""A fresh start learns at the pace of the original: a learning rate found for that fits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import normfree

ROWS = 4
IMAGES = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """Rows of a convolution, a norm and an activation; ``std`` of the weights, or PyTorch's default."""

    def __init__(self, norm, activation=nn.ReLU, std=None):
        super().__init__()
        rows = [[nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), activation()] for _ in range(ROWS)]
        self.rows, self.head = nn.Sequential(*(layer for row in rows for layer in row)), nn.Linear(8, 3)
        for layer in self.rows[::3] if std is not None else ():
            nn.init.normal_(layer.weight, std=std)

    def forward(self, x):
        return self.head(self.rows(x).mean((2, 3)))


def turned(model, layer, rate=1e-3):
    """The angle by which a step of gradient descent turns the centred filters of a layer."""
    model = copy.deepcopy(model).train()
    weight = model.get_submodule(layer).weight
    before = weight.detach().clone()
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    after = before - rate * weight.grad
    one, other = (each.flatten(1) - each.flatten(1).mean(1, keepdim=True) for each in (before, after))
    return float((one / one.norm(dim=1, keepdim=True) - other / other.norm(dim=1, keepdim=True)).norm())


@pytest.mark.parametrize(
    "build",
    [
        lambda: Network(nn.BatchNorm2d),
        lambda: Network(nn.BatchNorm2d, nn.SiLU, std=0.02),
        lambda: Network(nn.BatchNorm2d, std=1.0),
        lambda: Network(lambda channels: nn.GroupNorm(1, channels), nn.GELU),
    ],
    ids=["default", "small weights", "large weights", "group norm"],
)
def test_a_step_turns_the_filters_as_far_as_in_the_original(build):
    torch.manual_seed(0)
    model = build()
    converted = normfree.convert(model, IMAGES)
    ratios = [turned(converted, f"rows.{3 * row}") / turned(model, f"rows.{3 * row}") for row in range(ROWS)]
    assert 1 / 2.5 < math.prod(ratios) ** (1 / ROWS) < 2.5, ratios


def test_weights_of_zero_leave_a_filter_that_can_be_standardized():
    model = Network(nn.BatchNorm2d, std=1e-6)
    nn.init.zeros_(model.rows[3].weight)
    converted = normfree.convert(model, IMAGES)
    for row in range(ROWS):
        layer = converted.get_submodule(f"rows.{3 * row}")
        filters = layer.effective()[0].detach().flatten(1)
        torch.testing.assert_close(filters.norm(dim=1), torch.full((8,), layer.input_scale), rtol=1e-4, atol=0)
