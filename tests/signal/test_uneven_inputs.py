"""Inputs whose channels have very different sizes, as of a table whose columns have units of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree import spp
from normfree.signal import findings as rules


def network(*first: nn.Module, features: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


def rows(factor: float = 1.0, offset: float = 0.0, *, channel: int = 3, shape: tuple[int, ...] = (256, 16)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., channel] = x[..., channel] * factor + offset
    return x


def severity(model: nn.Module, batch: torch.Tensor, **options) -> str | None:
    found = [finding for finding in spp(model, batch, **options).findings if finding.kind == "uneven_inputs"]
    return found[0].severity if found else None


def test_both_sides_of_each_threshold():
    x = rows()
    others = x[:, torch.arange(16) != 3].square().mean(0).sqrt().median()
    factor = float(others / x[:, 3].square().mean().sqrt())
    for threshold, expected in ((rules.UNEVEN, (None, "warning")), (rules.TOO_UNEVEN, ("warning", "error"))):
        found = [severity(network(), rows(factor * threshold * side)) for side in (0.999, 1.001)]
        assert tuple(found) == expected


@pytest.mark.parametrize("batch", [rows(1.0, 1e3), rows(3e3, shape=(64, 20, 16)), rows(3e3).double()])
def test_offsets_and_sequences_count_too(batch):
    assert severity(network().to(batch.dtype), batch) == "warning"


def test_the_channel_of_a_map_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    (finding,) = spp(model, rows(500.0, channel=2, shape=(8, 12, 12, 5)).movedim(-1, 1)).findings
    assert finding.kind == "uneven_inputs"
    assert "layer 0" in finding.message and "channel 2" in finding.message


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


class Logarithm(nn.Module):
    def forward(self, x):
        return x.abs().log1p()


@pytest.mark.parametrize("first", [nn.BatchNorm1d(16), nn.InstanceNorm1d(16), Logarithm()])
def test_what_a_layer_reads_counts_and_not_what_the_model_is_given(first):
    batch = rows(2e3, shape=(64, 16, 16), channel=3).mT if isinstance(first, nn.InstanceNorm1d) else rows(2e3)
    head = Transposed() if isinstance(first, nn.InstanceNorm1d) else nn.Identity()
    assert severity(network(first, head), batch) is None
    assert severity(network(head), batch) == "warning"


def test_categories_are_as_large_as_they_are_frequent():
    batch = torch.cat([rows(), F.one_hot(torch.arange(256) % 200, 200).float()], 1)
    assert severity(network(features=216), batch) is None


def test_integers_and_few_channels_have_no_sizes_to_compare():
    table = nn.Sequential(nn.Embedding(50, 16), nn.ReLU(), nn.Linear(16, 4))
    assert severity(table, torch.randint(50, (32, 6))) is None
    assert severity(network(features=2), rows(1e6, channel=1, shape=(64, 2))) is None


def left_after_training(factor, optimizer_of, rates):
    """The least loss that is left after 200 steps, of a target whose variance is 1."""
    x, losses = rows(), []
    target = torch.tanh(x @ torch.linspace(-1, 1, 16 * 8).reshape(16, 8) / 2).sum(1, keepdim=True)
    target = (target - target.mean()) / target.std()
    for rate in rates:
        model = network()
        optimizer = optimizer_of(model.parameters(), rate)
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(model(rows(factor)), target)
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    return min(loss for loss in losses if loss == loss)


def test_training_tells_what_the_levels_mean():
    """At their best rates, SGD leaves most of the loss at the first threshold, and Adam much of it at the second."""
    sgd = partial(left_after_training, optimizer_of=partial(torch.optim.SGD, momentum=0.9))
    adam = partial(left_after_training, optimizer_of=torch.optim.Adam, rates=(1e-3, 3e-3, 1e-2))
    rates = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)
    assert sgd(1.0, rates=rates) < 0.05
    assert sgd(rules.UNEVEN, rates=rates) > 0.3
    assert adam(1.0) < 0.05
    assert adam(rules.TOO_UNEVEN) > 0.15
