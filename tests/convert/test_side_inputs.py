"""What a network reads beside its signal: an embedding that scales and shifts, a memory, edges; queries and keys."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree

WIDTH = 16


def rows(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


class Modulated(nn.Module):
    """A norm whose scale and shift are a linear map of an embedding."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.modulation = norm, nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, embedding):
        scale, shift = self.modulation(embedding).reshape(len(x), -1, *[1] * (x.dim() - 2)).chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift


class Conditioned(nn.Module):
    """Residual blocks, each of which a time step's embedding modulates, as in a diffusion network."""

    def __init__(self, conv, norm, join):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.first, self.last, self.join = conv(), conv(), join
        self.convs, self.norms = nn.ModuleList(conv() for _ in range(4)), nn.ModuleList(norm() for _ in range(4))

    def forward(self, x, t):
        embedding, x = self.time(t), self.first(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.join(x, F.silu(norm(conv(x), embedding)))
        return self.last(x)


def residual(x, y):
    return x + y


def plain(x, y):
    return y


CONDITIONED = {
    "adaptive group norm": (
        lambda: Conditioned(
            lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), lambda: Modulated(nn.GroupNorm(4, WIDTH)), residual
        ),
        lambda: (rows(4, WIDTH, 8, 8), rows(4, WIDTH)),
    ),
    "conditional batch norm of a chain": (
        lambda: Conditioned(
            lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), lambda: Modulated(nn.BatchNorm1d(WIDTH)), plain
        ),
        lambda: (rows(4, WIDTH, 12), rows(4, WIDTH)),
    ),
    "conditional batch norm without affine of its own": (
        lambda: Conditioned(
            lambda: nn.Conv2d(WIDTH, WIDTH, 1), lambda: Modulated(nn.BatchNorm2d(WIDTH, affine=False)), residual
        ),
        lambda: (rows(4, WIDTH, 8, 8), rows(4, WIDTH)),
    ),
}


@pytest.mark.parametrize("kind", CONDITIONED)
def test_what_modulates_stays_in_every_block_alike(kind):
    build, batch = CONDITIONED[kind]
    torch.manual_seed(0)
    record = normfree.convert(build(), batch()).conversion
    assert not record.norms_left
    kept = {one.name for one in record.kept}
    assert {"time.0", "time.2", *(f"norms.{i}.modulation" for i in range(4))} <= kept
    assert {change.name for change in record.changes if change.input_scale} >= {f"convs.{i}" for i in range(4)}


class Remembering(nn.Module):
    """Residual blocks that read a memory through layers of their own, of few layers before the first."""

    def __init__(self):
        super().__init__()
        self.memory, self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))

    def forward(self, x, memory):
        memory, x = self.memory(torch.tanh(self.memory(memory))), self.first(x)
        for branch, norm in zip(self.branches, self.norms, strict=True):
            x = x + norm(branch(F.relu(x + memory)))
        return self.last(x)


def test_a_memory_lies_in_no_branch():
    torch.manual_seed(0)
    record = normfree.convert(Remembering(), (rows(16, WIDTH), rows(16, WIDTH))).conversion
    assert "memory" not in {change.name for change in record.changes}


class OwnRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class ScaledLast(OwnRMSNorm):
    """Llama's order: the weight comes last."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Centred(nn.LayerNorm):
    """A layer norm by hand."""

    def forward(self, x):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Attention(nn.Module):
    """Attention whose queries and keys are normalized."""

    def __init__(self, norm, heads=4):
        super().__init__()
        self.before, self.queries, self.keys = norm(WIDTH), norm(WIDTH // heads), norm(WIDTH // heads)
        self.three, self.out, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), heads

    def forward(self, x):
        q, k, v = self.three(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.queries(q), self.keys(k), v)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("norm", [OwnRMSNorm, ScaledLast, Centred, nn.RMSNorm, nn.LayerNorm])
def test_norms_of_queries_and_keys_stay_as_all_beside_attention_do(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDTH), Attention(norm), Attention(norm), norm(WIDTH), nn.Linear(WIDTH, 3))
    with pytest.raises(ValueError, match=r"all 7 normalizers stay, .* stands between linear and attention layers"):
        normfree.convert(model, rows(2, 6, 8))


@pytest.mark.parametrize("gathered", [torch.Tensor.index_add, torch.Tensor.scatter_add])
def test_nodes_that_see_each_other_are_told_for_any_number_of_edges(gathered):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))

        def forward(self, x, to, of):
            for linear, norm in zip(self.linears, self.norms, strict=True):
                wide = to if gathered is torch.Tensor.index_add else to[:, None].expand(-1, WIDTH)
                x = norm(gathered(linear(x), 0, wide, x[of])).relu()
            return x

    edges = torch.randint(0, 24, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    record = normfree.convert(Graph(), (rows(24, WIDTH), *edges)).conversion
    assert not record.norms_left
    assert [note for note in record.notes if "an example's output changed" in note and "by design where" in note]


class Half(nn.Module):
    def forward(self, x):
        return x[..., : x.shape[-1] // 2]


class Last(nn.Module):
    """A recurrent layer's states [N, T, C] as [N, C, T]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0].transpose(1, 2)


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.randn(8, 8, 3)), nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return F.conv1d(x, self.size * self.weight / self.weight.norm(dim=(1, 2), keepdim=True))


BEFORE = {
    "0 before it computes its weight from weight": Computed(),
    "it follows no layer alone, but stack in 0.layer$": Last(),
    "it follows no layer alone, but slice in 0.1$": nn.Sequential(nn.Conv1d(8, 8, 3), Half()),
    "it follows no layer alone, but max_pool2d in 0.1$": nn.Sequential(nn.Conv1d(8, 8, 3), nn.MaxPool1d(2)),
    "it follows no layer alone, but prelu in 0.1$": nn.Sequential(nn.Conv1d(8, 8, 3), nn.PReLU()),
}


@pytest.mark.parametrize("reason", BEFORE)
def test_a_reason_names_what_stands_before_the_norm(reason):
    model = nn.Sequential(BEFORE[reason], nn.BatchNorm1d(8), nn.Conv1d(8, 2, 3)).eval()
    (change,) = normfree.convert(model, rows(4, 8, 8), start="pretrained").conversion.changes
    assert change.now == "ChannelAffine"
    assert re.search(reason, change.reason)


def test_a_norm_of_a_state_that_begins_as_zeros_is_not_said_to_be_out_of_reach():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.given, self.state = nn.Linear(9, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x):
            state = x.new_zeros(len(x), WIDTH)
            for each in x.unbind(1):
                state = torch.tanh(self.norm(self.given(each)) + self.other(self.state(state)))
            return state

    (kept,) = normfree.convert(Recurrent(), rows(16, 5, 9)).conversion.norms_left
    assert kept.name == "other"
    assert "it runs 5 times, and not each time on what comes from the input" in kept.reason


def test_complex_weights_are_told_as_what_they_are():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat)), nn.InstanceNorm1d(8)

        def forward(self, x):
            return self.norm(torch.fft.irfft(torch.einsum("nct,cd->ndt", torch.fft.rfft(x), self.weight), n=12)).tanh()

    with pytest.raises(ValueError, match="0 before it has weights of complex numbers"):
        normfree.convert(nn.Sequential(Spectral(), nn.Conv1d(8, 2, 3)), rows(4, 8, 12))


class Convolved(nn.Module):
    """Layers over a graph (GCN)."""

    def __init__(self, matrix_first):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms, self.matrix_first = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3)), matrix_first

    def forward(self, *given):
        matrix, x = given if self.matrix_first else given[::-1]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(torch.sparse.mm(matrix, layer(x))).relu()
        return x


def words():
    return nn.Sequential(nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=["COO", "CSR"])
@pytest.mark.parametrize(
    ("build", "given"),
    [
        (lambda: Convolved(False), lambda matrix: (rows(64, WIDTH), matrix)),
        (lambda: Convolved(True), lambda matrix: (matrix, rows(64, WIDTH))),
        (words, lambda matrix: matrix),
    ],
    ids=["an adjacency", "an adjacency first", "words"],
)
def test_a_sparse_input_is_converted_as_a_dense_one(build, given, sparse, start):
    torch.manual_seed(0)
    model, matrix = build().eval(), (rows(64, 64) > 1.3).float() + torch.eye(64)
    found, wanted = (normfree.convert(model, given(x), start=start).conversion for x in (sparse(matrix), matrix))
    assert [(c.name, c.was, c.now) for c in found.changes] == [(c.name, c.was, c.now) for c in wanted.changes]
    for one, other in zip(found.changes, wanted.changes, strict=True):
        assert one.input_scale == (None if other.input_scale is None else pytest.approx(other.input_scale, 1e-4))


def test_a_nested_input_is_refused_in_one_line():
    nested = torch.nested.nested_tensor([rows(3, 64), rows(2, 64)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"^example_input: a tensor is nested, .* give tensor.to_padded_tensor"):
        normfree.convert(words(), nested)
