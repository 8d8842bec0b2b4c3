"""Streams and outputs beside each other: each is compared with its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.signal import spp


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def perceptron(inputs: int) -> nn.Sequential:
    sizes = (inputs, 32, 32, 32, 32)
    layers = [k for i, o in pairwise(sizes) for k in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(*layers)


def convolutions() -> nn.Sequential:
    sizes = (3, 8, 8, 8, 8)
    convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(sizes)]
    layers = [k for conv in convs for k in (conv, nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Beside(nn.Module):
    """Streams in units of their own, each normalized, and a layer that reads them all."""

    def __init__(self, *streams: nn.Module, features: int) -> None:
        super().__init__()
        self.streams, self.last = nn.ModuleList(streams), nn.Linear(features, 2)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        made = [stream(x) for stream, x in zip(self.streams, inputs, strict=True)]
        return self.last(torch.cat(made, 1))


STREAMS = {
    "images, and a row in small units": (
        lambda: Beside(convolutions(), perceptron(32), features=40),
        (50 + 100 * rows(4, 3, 16, 16), 0.01 * rows(4, 32)),
    ),
    "a row in small units, and images": (
        lambda: Beside(perceptron(32), convolutions(), features=40),
        (0.01 * rows(4, 32), rows(4, 3, 16, 16)),
    ),
    "two rows": (
        lambda: Beside(perceptron(12), perceptron(12), features=64),
        (rows(32, 12), 1e-3 * rows(32, 12)),
    ),
    "one row in small units": (lambda: Beside(perceptron(32), features=32), (0.01 * rows(32, 32),)),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_in_units_of_their_own_are_healthy_behind_their_normalizers(kind):
    build, batch = STREAMS[kind]
    torch.manual_seed(0)
    assert [f.message for f in spp(build(), batch).findings if f.severity != "info"] == []


def test_a_bias_that_no_normalizer_takes_off_is_a_collapse():
    torch.manual_seed(0)
    layers = [k for _ in range(4) for k in (nn.Linear(32, 32), nn.ReLU())]
    found = spp(nn.Sequential(*layers, nn.Linear(32, 2)), 0.01 * rows(32, 32)).findings
    assert "correlation_collapse" in [finding.kind for finding in found]


def test_a_stream_that_vanishes_beside_a_healthy_one_is_found():
    torch.manual_seed(0)
    saturated = [k for _ in range(9) for k in (nn.Linear(12, 12), nn.Sigmoid())]
    found = spp(Beside(perceptron(12), nn.Sequential(*saturated), features=44), (rows(32, 12), rows(32, 12))).findings
    assert "gradient_vanishing" in [finding.kind for finding in found]


class DenseAndPooled(nn.Module):
    """Residual blocks; a map for each position from the middle of them, and classes from the end."""

    def __init__(self, blocks: int, between: int, form) -> None:
        super().__init__()
        self.stem = self.conv(3)
        self.blocks = nn.ModuleList(self.conv(16) for _ in range(blocks))
        self.dense = nn.Sequential(*(self.conv(16) for _ in range(between)), nn.Conv2d(16, 2, 1))
        self.classes, self.form = nn.Linear(16, 3), form

    @staticmethod
    def conv(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x):
        x, dense = self.stem(x), None
        for number, block in enumerate(self.blocks, 1):
            x = x + block(x)
            dense = self.dense(x) if number == len(self.blocks) // 2 else dense
        return self.form(dense, self.classes(x.mean((2, 3))))


@pytest.mark.parametrize("form", [lambda dense, y: (dense, y), lambda dense, y: {"y": y, "dense": dense}])
@pytest.mark.parametrize(("blocks", "between"), [(2, 4), (3, 1), (6, 8)])
def test_a_map_and_classes_weigh_alike_in_the_gradient(blocks, between, form):
    torch.manual_seed(0)
    found = spp(DenseAndPooled(blocks, between, form), rows(2, 3, 64, 64)).findings
    assert not any(finding.kind.startswith("gradient") for finding in found)


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_gradients_pass_what_makes_sparse_tensors(sparse):
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x, adjacency):
            adjacency = sparse(adjacency)
            for layer in self.layers:
                x = F.relu(adjacency @ layer(x))
            return x

    adjacency = (rows(24, 24) > 1).float() + torch.eye(24)
    assert spp(Graph(), (rows(24, 16), adjacency)).configuration["gradient"] is True


SPARSE = {
    "COO": torch.Tensor.to_sparse,
    "CSR": torch.Tensor.to_sparse_csr,
    "CSC": torch.Tensor.to_sparse_csc,
}


class Convolved(nn.Module):
    """Layers over a graph (GCN)."""

    def __init__(self, operation: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norms, self.operation = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(3)), operation or nn.Identity()

    def forward(self, x, adjacency):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(adjacency @ layer(x)).relu()
        return self.operation(x)


class Doubled(nn.Module):
    """A layer that reads twice what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(2.0 * x).relu())


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize(
    ("build", "given"),
    [
        (Convolved, lambda sparse: (rows(24, 16), sparse)),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), lambda sparse: sparse),
        (Doubled, lambda sparse: {"x": sparse}),
    ],
    ids=["an adjacency", "words", "words that are scaled"],
)
def test_a_sparse_input_is_measured_as_a_dense_one(layout, build, given):
    torch.manual_seed(0)
    model = build()
    matrix = (rows(24, 24) > 1).float() + torch.eye(24)
    matrix = matrix if build is Convolved else matrix[:, :16]
    found, wanted = (spp(model, given(x)) for x in (SPARSE[layout](matrix), matrix))
    assert found.configuration["gradient"] is True
    for name in ("avg_channel_sq_mean", "avg_channel_var", "input_correlation", "avg_sq_gradient"):
        assert found.curve(name) == [
            None if value is None else pytest.approx(value, 1e-4) for value in wanted.curve(name)
        ]
    assert [(f.kind, f.severity) for f in found.findings] == [(f.kind, f.severity) for f in wanted.findings]


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_what_is_not_finite_is_found_beside_a_sparse_input(sparse):
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x - 1)

    torch.manual_seed(0)
    adjacency = (rows(24, 24) > 1).float() + torch.eye(24)
    signal = spp(Convolved(nn.Sequential(Log(), nn.Linear(16, 2))), (rows(24, 16), sparse(adjacency)))
    found = {finding.kind: finding for finding in signal.findings}
    assert "begin in log of module operation.0" in found["non_finite"].message
