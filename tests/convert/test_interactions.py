"""Products of two activations: those of attention, beside which norms stay, and all others, beside which they go."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree import convert, spp


def normed(*sizes: int) -> nn.Sequential:
    pairs = list(pairwise(sizes))
    layers = [[nn.Linear(i, o), nn.LayerNorm(o), nn.ReLU()] for i, o in pairs[:-1]]
    return nn.Sequential(*(layer for group in layers for layer in group), nn.Linear(*pairs[-1]))


class DotInteraction(nn.Module):
    """All dot products between embeddings, as of a recommender."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = normed(13, 32, 16), normed(16 + 15, 64, 64, 1)
        self.tables = nn.ModuleList(nn.Embedding(50, 16) for _ in range(5))

    def forward(self, x, kinds):
        dense = self.below(x)
        z = torch.stack([dense, *(table(kinds[:, i]) for i, table in enumerate(self.tables))], 1)
        i, j = torch.tril_indices(6, 6, -1)
        return self.above(torch.cat([dense, torch.bmm(z, z.mT)[:, i, j]], 1))


class Bilinear(nn.Module):
    """Outer product of two streams, pooled into one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = normed(12, 32, 16), normed(12, 32, 16), normed(256, 32, 2)

    def forward(self, x):
        return self.head(torch.einsum("bi,bj->bij", self.one(x), self.other(x)).flatten(1))


class Hypernetwork(nn.Module):
    """Two layers whose weights another network makes of a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.first, self.last = normed(4, 32, 16 * 8 + 16 * 16), nn.Linear(8, 8), normed(16, 32, 2)

    def forward(self, x, condition):
        a, b = self.weights(condition).split([128, 256], 1)
        x = torch.einsum("boi,bi->bo", a.view(-1, 16, 8), self.first(x)).relu()
        return self.last(torch.einsum("boi,bi->bo", b.view(-1, 16, 16), x).relu())


class Attention(nn.Module):
    """A block of attention, written out, and a gated layer behind it."""

    def __init__(self, weigh) -> None:
        super().__init__()
        self.weigh = weigh
        self.first, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.second, self.up = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        x = x + self.out(self.weigh(*self.qkv(self.first(x)).chunk(3, -1)))
        return x + self.up(self.second(x).relu())


def by_exponentials(q, k, v):
    weights = (q @ k.mT / 4).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


INTERACTIONS = {
    "dot products": (DotInteraction, lambda: (torch.randn(64, 13), torch.randint(50, (64, 5)))),
    "bilinear pooling": (Bilinear, lambda: torch.randn(64, 12)),
    "weights made by a network": (Hypernetwork, lambda: (torch.randn(64, 8), torch.randn(64, 4))),
}
ATTENTIONS = {
    "softmax": lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v,
    "sigmoid": lambda q, k, v: torch.sigmoid(q @ k.mT / 4) @ v,
    "exponentials": by_exponentials,
    "linear": lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v),
    "in one operation": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("kind", INTERACTIONS)
def test_a_product_of_two_activations_is_no_attention(kind):
    torch.manual_seed(0)
    model, inputs = INTERACTIONS[kind]
    batch = inputs()
    converted = convert(model(), batch)
    assert not converted.conversion.norms_left
    spp(converted, batch).assert_healthy()


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_norms_stay_beside_attention_however_it_is_written(kind):
    with pytest.raises(ValueError, match="attention"):
        convert(Attention(ATTENTIONS[kind]), torch.randn(8, 10, 16))
