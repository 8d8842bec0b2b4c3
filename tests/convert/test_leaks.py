"""What is said where an example's output depends on the other examples of its batch: what was seen, and its cause."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import normfree

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Centred(nn.Module):
    """Takes the mean of the batch off, in training."""

    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True) if self.training else x


class Deviation(nn.Module):
    """A map of the deviation among examples beside the others, as a discriminator has it: it normalizes nothing."""

    def forward(self, x):
        return torch.cat([x, x.std(0, keepdim=True).mean().expand(len(x), 1, *x.shape[2:])], 1)


class Shuffled(nn.Module):
    """Takes the examples in another order in training."""

    def forward(self, x):
        return x + x[torch.arange(len(x)).flip(0)] if self.training else x


class Sorted(nn.Module):
    """Mixes examples by no operation that is known."""

    def forward(self, x):
        return x + x.sort(0).values if self.training else x


def converted(part):
    torch.manual_seed(0)
    return normfree.convert(nn.Sequential(convolution(), part), IMAGES).conversion


SEEN = r"^an example's output changed when the other examples of its batch did \(relative change [0-9.e+-]{1,7}\): "


def test_a_mean_of_the_batch_that_is_taken_off_is_a_normalizer_left():
    (kept,) = converted(Centred()).norms_left
    assert (kept.name, kept.was) == ("1", "centring")
    assert re.search(SEEN + "1 subtracts the mean over examples, positions of an activation$", kept.reason)


@pytest.mark.parametrize(
    ("part", "cause"),
    [(Deviation(), "1 computes std of them$"), (Sorted(), "no normalization that is recognised does so$")],
)
def test_what_normalizes_nothing_is_recorded_as_what_was_seen(part, cause):
    record = converted(part)
    assert record.norms_left == ()
    reasons = [one.reason for one in record.kept if "an example's output" in one.reason]
    assert len(reasons) == 1
    assert re.search(SEEN + cause, reasons[0])


def test_rows_that_are_read_by_index_are_the_models_own_design():
    record = converted(Shuffled())
    assert record.norms_left == ()
    assert not any("example's output" in one.reason for one in record.kept)
    (note,) = record.notes
    assert re.search(
        SEEN + "1 computes index along the first axis, so that its rows see each other: by design where", note
    )


class Graph(nn.Module):
    """Linear layers and norms, the nodes' features mixed in between by a function."""

    def __init__(self, mixed, width=16, depth=3):
        super().__init__()
        self.first, self.mixed = nn.Linear(8, width), mixed
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))

    def forward(self, x, *edges):
        x = self.first(x)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(linear(self.mixed(x, *edges))).relu()
        return x


def by_edges(x, to, of):
    return torch.zeros_like(x).index_add(0, to, x[of])


def by_matrix(x, matrix):
    return matrix @ x


def by_sparse_matrix(x, matrix):
    return torch.sparse.mm((matrix * NODES > 0.5).float().to_sparse(), x)


def in_time(x):
    """A state that goes from the last row to the first."""
    state, states = torch.zeros_like(x[0]), []
    for row in reversed(x.unbind(0)):
        state = 0.5 * state + row
        states.append(state)
    return torch.stack(states[::-1])


NODES = 24
GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.rand(NODES, NODES, generator=GENERATOR) / NODES
EDGES = tuple(torch.randint(0, NODES, (2, NODES), generator=GENERATOR))
"""As many as nodes, so that every input seems to hold one row for each example."""

DESIGNS = {
    "edges": (by_edges, EDGES),
    "a matrix": (by_matrix, (MATRIX,)),
    "a sparse matrix": (by_sparse_matrix, (MATRIX,)),
    "time": (in_time, ()),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_nodes_of_a_graph_that_see_each_other_are_no_norm(name):
    mixed, edges = DESIGNS[name]
    torch.manual_seed(0)
    batch = (torch.randn(NODES, 8), *edges)
    record = normfree.convert(Graph(mixed).eval(), batch, start="pretrained").conversion
    assert record.norms_left == ()
    (note,) = record.notes
    assert re.search(SEEN + "the model computes [a-z_]+ along the first axis", note)


def test_a_norm_over_the_nodes_of_a_graph_is_one():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph, self.own = Graph(by_edges), OwnGraphNorm()

        def forward(self, x, to, of):
            return self.own(self.graph(x, to, of), to % 3)

    class OwnGraphNorm(nn.Module):
        def forward(self, x, graph):
            count = torch.zeros(3).index_add(0, graph, torch.ones(len(x)))[:, None]
            x = x - (torch.zeros(3, x.shape[1]).index_add(0, graph, x) / count)[graph]
            variance = torch.zeros(3, x.shape[1]).index_add(0, graph, x * x) / count
            return x / (variance + 1e-5).sqrt()[graph]

    torch.manual_seed(0)
    record = normfree.convert(Normed().eval(), (torch.randn(NODES, 8), *EDGES), start="pretrained").conversion
    assert [(one.name, one.was) for one in record.norms_left] == [("own", "standardization")]
    assert "standard deviation over nodes" in record.norms_left[0].reason


def test_every_norm_over_the_examples_is_listed():
    class Examples(nn.Module):
        """Divides by the larger of two deviations, one of them over the examples, in training alone."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 1, 1))
            self.register_buffer("variance", torch.ones(1, 8, 1, 1))

        def forward(self, x):
            among = x.var((0, 2, 3), unbiased=False, keepdim=True) if self.training else self.variance
            alone = x.var((2, 3), unbiased=False, keepdim=True)
            return x / torch.max((among + 1e-5).sqrt(), self.weight * x + (alone + 1e-5).sqrt())

    torch.manual_seed(0)
    layers = [part for number in range(4) for part in (nn.Conv2d(3 if number == 0 else 8, 8, 3, padding=1), Examples())]
    record = normfree.convert(nn.Sequential(*layers, nn.Conv2d(8, 2, 1)), torch.randn(4, 3, 12, 12)).conversion
    assert {one.name for one in record.norms_left} == {"1", "3", "5", "7"}
