"""What no row of a batch comes to is no point, and what one row comes to is no fault of the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import normfree


class Packed(nn.Module):
    """Sequences of different lengths: the last step is of the longest alone."""

    def __init__(self, cell: type[nn.Module], lengths: torch.Tensor, size: int = 8) -> None:
        super().__init__()
        self.cell, self.last, self.lengths = cell(size, 32, batch_first=True), nn.Linear(32, 2), lengths

    def forward(self, x):
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        hidden = self.cell(packed)[1]
        return self.last((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])


class Heads(nn.Module):
    """A head for each task, of some layers or residual blocks."""

    def __init__(self, made, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.heads = nn.ModuleList(nn.Sequential(made(), norm(32), nn.Linear(32, 4)) for _ in range(3))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x, task):
        h = self.body(x)
        made = h.new_zeros(len(x), 4)
        for number, head in enumerate(self.heads):
            made[task == number] = head(h[task == number])
        return made


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + 0.2 * self.second(self.first(x.relu()).relu())


def layers(count: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(count) for part in (nn.Linear(32, 32), nn.ReLU())))


def tasks(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of which so many rows are of the last task."""
    random = torch.Generator().manual_seed(rows)
    task = torch.randint(0, 2, (128,), generator=random)
    task[:rows] = 2
    return torch.randn(128, 16, generator=random), task


def found(plot: normfree.SignalPropagation) -> dict[str, str]:
    return {each.kind: each.severity for each in plot.findings if each.severity != "info"}


HEADS = {
    "a layer": lambda: layers(1),
    "layers": lambda: layers(6),
    "blocks": lambda: nn.Sequential(Block(), Block(), Block(), Block()),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_no_row_comes_to_is_no_point(kind: str) -> None:
    torch.manual_seed(0)
    plot = normfree.spp(Heads(HEADS[kind]), tasks(0))
    plot.assert_healthy()
    assert not any("heads.2" in point.name for point in (*plot.blocks, *plot.layers))
    assert any("heads.1" in point.name for point in (*plot.blocks, *plot.layers))
    with normfree.SignalMonitor(Heads(HEADS[kind]), tasks(0)) as monitor:
        assert len(monitor.history) == 1


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_one_row_comes_to_is_not_judged_and_the_others_are(kind: str) -> None:
    torch.manual_seed(0)
    model = Heads(HEADS[kind])
    several, one = (normfree.spp(model, tasks(rows)) for rows in (20, 1))
    assert found(several) == {}
    assert found(one) == {"single_value": "warning"}
    (told,) = [each for each in one.findings if each.kind == "single_value"]
    assert "heads.2" in told.message and "all others are judged" in told.message
    assert "2 or more rows" in told.remedy


@pytest.mark.parametrize("longer", [1, 6])
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM, nn.RNN])
def test_packed_sequences_are_judged_where_several_run(cell: type[nn.Module], longer: int) -> None:
    """At its last steps the longest sequence runs alone; at those before the same cell is judged.

    The part of the state in an LSTM's or a simple cell's gates is a term of a sum, of which nothing is said.
    """
    torch.manual_seed(0)
    lengths = torch.randint(2, 13 - longer, (32,))
    lengths[:2] = torch.tensor([12, 12 - longer])
    plot = normfree.spp(Packed(cell, lengths), torch.randn(32, 12, 8))
    assert "error" not in found(plot).values()
    assert not {"single_value", "silenced_branch"}.intersection(found(plot))
    lone = [each for each in plot.findings if each.kind == "single_value"]
    assert [each.severity for each in lone] == (["info"] if cell is nn.GRU else [])


LENGTHS = torch.tensor([20, 15, 12, 9, 7, 5, 3, 2])


class Unrolled(nn.Module):
    """A cell of torch's, called for each step."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head, self.is_lstm = cell(32, 32), nn.Linear(32, 3), cell is nn.LSTMCell

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if self.is_lstm else state)


class ByHand(nn.Module):
    """An LSTM whose gates are the sum of two linear maps, of all steps at once and of the state."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.inputs, self.states, self.head = nn.Linear(32, 128), nn.Linear(32, 128, bias=False), nn.Linear(32, 3)
        self.inputs.weight.data *= scale

    def forward(self, x):
        state = memory = x.new_zeros(len(x), 32)
        gates = self.inputs(x)
        for step in range(x.shape[1]):
            i, f, o, new = (gates[:, step] + self.states(state)).chunk(4, -1)
            memory = f.sigmoid() * memory + i.sigmoid() * new.tanh()
            state = o.sigmoid() * memory.tanh()
        return self.head(state)


@pytest.mark.parametrize(
    "build",
    [
        *(lambda cell=cell: Packed(cell, LENGTHS, 32) for cell in (nn.LSTM, nn.GRU, nn.RNN)),
        *(lambda cell=cell: Unrolled(cell) for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
        ByHand,
    ],
)
def test_recurrent_layers_are_healthy_however_their_steps_are_run(build) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        plot = normfree.spp(build(), torch.randn(8, 20, 32))
        assert plot.verdict == "healthy", plot.findings


def test_of_two_terms_the_larger_is_judged() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 20, 32)
    assert found(normfree.spp(ByHand(3e-3), x))["attenuation"] == "warning"
    terms = {point.name for point in normfree.spp(ByHand(), x).blocks if point.smaller_term}
    assert terms == {"states", *(f"states#{step}" for step in range(2, 20))}


def test_a_fault_beside_what_is_not_judged_is_found() -> None:
    torch.manual_seed(0)
    model = Heads(lambda: layers(6))
    for number in range(3):
        for layer in model.heads[number][0]:
            if isinstance(layer, nn.Linear):
                layer.weight.data *= 0.1
    assert found(normfree.spp(model, tasks(1)))["attenuation"] == "error"


def test_a_norm_that_one_row_comes_to_is_named() -> None:
    model = Heads(lambda: nn.Linear(32, 32), nn.BatchNorm1d)
    with pytest.raises(ValueError, match=r"in heads\.2\.1: .* one row, or position, of the batch came to it"):
        normfree.spp(model, tasks(1))
    normfree.spp(model, tasks(1), mode="eval")
    with pytest.raises(ValueError, match=r"give a batch of two examples or more"):
        normfree.spp(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)), torch.randn(1, 16))


class Experts(nn.Module):
    """Experts of one of which no row is, called or not; and what could be taken for such and is read."""

    def __init__(self, way: str) -> None:
        super().__init__()
        wrap = nn.utils.parametrizations.weight_norm if way == "weight norm" else lambda layer: layer
        self.way, self.first = way, nn.Linear(16, 32)
        self.experts = nn.ModuleList(nn.Sequential(wrap(nn.Linear(32, 32)), nn.ReLU()) for _ in range(3))
        self.head, self.auxiliary = nn.Linear(32, 4), nn.Linear(32, 4)
        self.place, self.queries, self.base = nn.Embedding(1, 32), nn.Embedding(1, 32), nn.Linear(32, 32)
        self.mask = nn.Parameter(torch.zeros(1, 32))  # of the model as a whole, and no layer

    def forward(self, x):
        x = self.first(x) + self.place(torch.arange(1)) + self.queries.weight.expand(len(x), -1)
        x = nn.functional.linear(x, self.base.weight + torch.eye(32))
        kind, made = torch.arange(len(x)) % 2, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(kind == number)[0]
            if self.way == "not called" and not len(rows):
                continue
            made = made.index_add(0, rows, expert(x[rows]))
        return (self.head(made), self.auxiliary(made)) if self.training else self.head(made)


@pytest.mark.parametrize("way", ["no rows", "not called", "weight norm"])
def test_what_was_not_measured_is_said_once(way: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Experts(way), torch.randn(20, 16)
    plot = normfree.spp(model, x)
    assert plot.unmeasured == ("experts.2.0", "auxiliary")
    assert plot.to_dict()["unmeasured"] == ["experts.2.0", "auxiliary"]
    assert str(plot).count("experts.2.0") == 1 and "2 not measured" in repr(plot)
    assert "experts.2.0, auxiliary" in plot._repr_html_()
    assert "experts.2.0, auxiliary" in plot.to_html(tmp_path / "report.html").read_text()
    assert normfree.spp(model, x, mode="train").unmeasured == ("experts.2.0",)


def test_where_all_is_measured_nothing_is_said() -> None:
    plot = normfree.spp(Heads(HEADS["layers"]), tasks(3))
    assert plot.unmeasured == () and "not measured" not in f"{plot}{plot!r}{plot._repr_html_()}"
