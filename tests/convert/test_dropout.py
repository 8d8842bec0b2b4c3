"""A fresh start of a model with dropout: the signal keeps its variance in training, where dropout acts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree

FEATURES = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(16, 24, 10, 10, generator=torch.Generator().manual_seed(1))


class Functional(nn.Module):
    """Dropout as a function, behind the activation."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p, self.layers = p, nn.ModuleList(nn.Linear(48, 48) for _ in range(8))
        self.norms, self.head = nn.ModuleList(nn.BatchNorm1d(48) for _ in range(8)), nn.Linear(48, 3)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.dropout(F.silu(norm(layer(x))), p=self.p, training=self.training)
        return self.head(x)


class Residual(nn.Module):
    """Dropout between the two layers of a branch, as in wide residual networks."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.norms, self.drop = nn.ModuleList(nn.BatchNorm2d(24) for _ in range(2)), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.last(self.drop(F.relu(self.norms[1](self.first(F.relu(self.norms[0](x)))))))


def linear_rows(*order, p=0.5):
    parts = {"n": lambda: nn.BatchNorm1d(48), "a": nn.ReLU, "d": lambda: nn.Dropout(p)}
    rows = [[nn.Linear(48, 48), *(parts[one]() for one in order)] for _ in range(8)]
    return nn.Sequential(*(layer for row in rows for layer in row), nn.Linear(48, 3))


def convolution_rows():
    rows = [
        [nn.Conv2d(24, 24, 3, padding=1), nn.Dropout2d(0.3), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(24), nn.ReLU()]
        for _ in range(8)
    ]
    return nn.Sequential(*(layer for row in rows for layer in row), nn.Conv2d(24, 3, 1))


MODELS = {
    "behind the activation": (lambda: linear_rows("n", "a", "d"), FEATURES),
    "between layer and norm": (lambda: linear_rows("d", "n", "a"), FEATURES),
    "before the norm, activated": (lambda: linear_rows("a", "d", "n"), FEATURES),
    "weak": (lambda: linear_rows("n", "a", "d", p=0.2), FEATURES),
    "of channels, pooled": (convolution_rows, IMAGES),
    "functional": (Functional, FEATURES),
    "in branches": (lambda: nn.Sequential(*(Residual() for _ in range(8)), nn.Conv2d(24, 3, 1)), IMAGES),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_variance_stays_in_training(name):
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build()
    converted = normfree.convert(model, x)
    assert not converted.conversion.norms_left
    blocks = normfree.spp(converted, x, mode="train", gradient=False).blocks[1:-1]
    variances = [block.avg_channel_var for block in blocks]
    assert max(variances) < 4 * min(variances)
    ours, theirs = (copy.deepcopy(each).train()(x).detach().var() for each in (converted, model))
    assert theirs / 10 < ours < 10 * theirs


def test_dropout_is_named_in_the_record_and_the_conversion_is_the_same_every_time():
    model = linear_rows("n", "a", "d")
    first = normfree.convert(model, FEATURES).conversion
    torch.manual_seed(1)
    assert normfree.convert(model, FEATURES).conversion == first
    assert first.changes[2].reason.startswith("measured, with dropout on")
    assert any("mode='train'" in note for note in first.notes)


def test_a_dropout_that_drops_nothing_leaves_the_closed_forms():
    record = normfree.convert(linear_rows("n", "a", "d", p=0.0), FEATURES).conversion
    scales = [change.input_scale for change in record.changes if change.input_scale is not None]
    assert scales[1:] == [pytest.approx(normfree.gamma(nn.ReLU()))] * 7
    assert record.notes == ()
