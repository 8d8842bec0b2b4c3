"""Tables that rows are looked up in: each row learns by itself, so that it is no fault if all of them start alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.signal import spp

ROWS, WIDTH = 50, 32
NUMBERS = torch.randint(ROWS, (128,), generator=torch.Generator().manual_seed(0))
X = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))

LOOKUPS = {
    "nn.Embedding": (nn.Embedding, lambda table, i: table(i)),
    "F.embedding": (nn.Embedding, lambda table, i: F.embedding(i, table.weight)),
    "nn.EmbeddingBag": (nn.EmbeddingBag, lambda table, i: table(i[:, None])),
    "a parameter that is indexed": (lambda *size: nn.Parameter(torch.empty(size)), lambda table, i: table[i]),
    "rows selected of one": (
        lambda *size: nn.Parameter(torch.empty(size)),
        lambda table, i: table.index_select(0, i),
    ),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.last(self.first(x).relu())


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))


def without_bias() -> nn.Sequential:
    body = layers()
    for layer in (body[0], body[2]):
        nn.init.zeros_(layer.bias)
    return body


def blocks() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 4))


class Reads(nn.Module):
    """A network on the rows of a table, which are added to features where there are any."""

    def __init__(self, lookup="nn.Embedding", start=nn.init.zeros_, body=layers, activation=None) -> None:
        super().__init__()
        make, self.look_up = LOOKUPS[lookup]
        self.table, self.features, self.body = make(ROWS, WIDTH), nn.Linear(16, WIDTH), body()
        self.activation = activation or nn.Identity()
        start(self.table if isinstance(self.table, nn.Parameter) else self.table.weight)

    def forward(self, numbers, x=None):
        rows = self.activation(self.look_up(self.table, numbers))
        return self.body(rows if x is None else rows + self.features(x))


def half(weight):
    nn.init.normal_(weight)
    weight.data[:, WIDTH // 2 :] = 0


def found(*args, batch=NUMBERS, gradient=True, **options):
    torch.manual_seed(0)
    return {finding.kind: finding for finding in spp(Reads(*args, **options), batch, gradient=gradient).findings}


@pytest.mark.parametrize("batch", [NUMBERS, (NUMBERS, X)], ids=["alone", "added to features"])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_table_of_zeros_is_a_zero_layer(lookup, batch):
    """Trained, it reaches what one of N(0, 1) does."""
    findings = found(lookup, batch=batch)
    assert {finding.severity for finding in findings.values()} == {"info"}
    assert findings["zero_layer"].message.startswith("1 weighted layer starts with weights of zero")
    if batch is NUMBERS:
        assert "whose weights are all zero. They move with the first step" in findings["dead_channels"].message
    else:
        assert "dead_channels" not in findings


@pytest.mark.parametrize("body", [layers, blocks])
@pytest.mark.parametrize("batch", [NUMBERS, (NUMBERS, X)], ids=["alone", "added to features"])
@pytest.mark.parametrize("start", [nn.init.zeros_, nn.init.ones_, half])
def test_no_row_of_a_table_is_dead_however_it_starts(start, batch, body):
    severities = {kind: finding.severity for kind, finding in found(start=start, body=body, batch=batch).items()}
    assert {"error", "warning"}.isdisjoint(severities.values()), severities
    assert ("zero_layer" in severities) == (start is nn.init.zeros_)


@pytest.mark.parametrize("options", [{"activation": nn.ReLU()}, {"body": without_bias}], ids=["behind it", "later"])
def test_a_table_of_zeros_is_dead_where_a_relu_takes_its_gradient(options):
    """Trained, these do not fit the numbers' parity, which the others fit to 1e-5 in 200 steps of Adam."""
    findings = found(**options)
    assert findings["dead_channels"].severity == "error"
    assert "whose weights are all zero" in findings["dead_channels"].message


def test_without_a_gradient_it_is_not_known_whether_the_table_moves():
    assert found(gradient=False)["dead_channels"].severity == "warning"
    assert "dead_channels" not in found(gradient=False, batch=(NUMBERS, X))


def test_where_nothing_varies_the_gradient_is_that_of_the_output():
    torch.manual_seed(0)
    plot = spp(Reads(), NUMBERS)
    assert plot.configuration["gradient"] is True
    assert all(gradient > 0 for gradient in plot.curve("avg_sq_gradient")[1:])
