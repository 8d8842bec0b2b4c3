"""Fresh conversion of modules that run on what came of their own output, of lookups, and of first states of zeros."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree


class Tied(nn.Module):
    """One convolution and one norm that run many times."""

    STEPS: ClassVar = {
        "post-activation": lambda z, conv, norm: norm((z + conv(z)).relu()),
        "after the activation": lambda z, conv, norm: norm(conv(z).relu()),
        "plain": lambda z, conv, norm: norm(conv(z)).relu(),
        "pre-activation": lambda z, conv, norm: z + norm(conv(z.relu())),
        "bounded": lambda z, conv, norm: norm(conv(z)).tanh(),
    }

    def __init__(self, step, norm, times=16):
        super().__init__()
        self.first, self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), norm()
        self.last, self.step, self.times = nn.Conv2d(16, 5, 1), self.STEPS[step], times

    def forward(self, x):
        z = self.first(x)
        for _ in range(self.times):
            z = self.step(z, self.conv, self.norm)
        return self.last(z)


def images(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(16), lambda: nn.GroupNorm(4, 16)], ids=["batch", "group"])
@pytest.mark.parametrize("step", Tied.STEPS)
def test_a_norm_of_a_loop_goes_where_the_signal_keeps_its_size_without_it(step, norm):
    torch.manual_seed(0)
    model, x = Tied(step, norm), images(8, 3, 16, 16)
    if step in ("pre-activation", "bounded"):
        converted = normfree.convert(model, x).train()
        assert not converted.conversion.norms_left
        with torch.no_grad():
            assert 0.1 < float(converted(x).var() / model.train()(x).var()) < 10
    else:
        with pytest.raises(
            ValueError, match=r"norm \(.*conv runs 16 times on what came of its own output, and without"
        ):
            normfree.convert(model, x)


def test_a_norm_of_each_step_of_a_loop_stays_too_and_others_go():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.conv, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(16))

        def forward(self, x):
            z = self.first(x)
            for norm in self.norms:
                z = norm((z + self.conv(z)).relu())
            return self.last(z)

    torch.manual_seed(0)
    model, x = Steps(), images(8, 3, 16, 16)
    converted = normfree.convert(model, x).train()
    record = converted.conversion
    assert {one.name for one in record.norms_left} == {f"norms.{number}" for number in range(16)}
    assert all("runs 16 times" in one.reason for one in record.norms_left)
    assert type(converted.first[0]).__name__ == "ScaledWSConv2d" and type(converted.first[1]) is nn.Identity
    with torch.no_grad():
        assert 0.25 < float(converted(x).var() / model.train()(x).var()) < 4


class Mix(nn.Module):
    """A branch behind a norm and a learned gain, as token mixing has it."""

    def __init__(self, size):
        super().__init__()
        self.norm, self.gain, self.linear = nn.LayerNorm(size), nn.Parameter(torch.rand(size)), nn.Linear(size, size)

    def forward(self, x):
        return x + self.linear(self.norm(x) * self.gain)


class Tokens(nn.Module):
    def __init__(self, std, blocks=2, size=32):
        super().__init__()
        self.table, self.first = nn.Embedding(50, size), nn.LayerNorm(size)
        self.blocks = nn.Sequential(*[Mix(size) for _ in range(blocks)])
        self.norm, self.last = nn.LayerNorm(size), nn.Linear(size, 5)
        nn.init.normal_(self.table.weight, std=std)

    def forward(self, x):
        return self.last(self.norm(self.blocks(self.first(self.table(x)))))


class Feedforward(nn.Module):
    """x + f(norm(x)), of linear layers or of a causal convolution and a linear layer; the norm may be over channels."""

    def __init__(self, size, norm, convolved):
        super().__init__()
        self.norm, self.convolved, self.batch = norm(size), convolved, norm is nn.BatchNorm1d
        self.up = nn.Conv1d(size, size, 5) if convolved else nn.Linear(size, size)
        self.down = nn.Linear(size, size)

    def forward(self, x):
        y = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.batch else self.norm(x)
        y = self.up(F.pad(y.transpose(1, 2), (4, 0))).transpose(1, 2) if self.convolved else self.up(y)
        return x + self.down(F.gelu(y))


class LanguageModel(nn.Module):
    """A language model whose head is its table of embeddings."""

    def __init__(self, norm, convolved, final, size=32):
        super().__init__()
        self.table, self.final = nn.Embedding(50, size), final(size)
        self.blocks = nn.Sequential(*(Feedforward(size, norm, convolved) for _ in range(4)))
        self.head = nn.Linear(size, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.final(self.blocks(self.table(x))))


TIED = {
    "linear layers, a norm before the head": (nn.LayerNorm, False, nn.LayerNorm),
    "linear layers, batch norms": (nn.BatchNorm1d, False, nn.LayerNorm),
    "linear layers, a norm in each branch alone": (nn.LayerNorm, False, nn.Identity),
    "convolutions, a norm before the head": (nn.BatchNorm1d, True, nn.LayerNorm),
    "convolutions, a norm in each branch alone": (nn.BatchNorm1d, True, nn.Identity),
}


@pytest.mark.parametrize("kind", TIED)
def test_every_branch_of_a_tied_language_model_is_scaled_and_its_logits_keep_their_size(kind):
    torch.manual_seed(0)
    model, x = LanguageModel(*TIED[kind]), torch.randint(0, 50, (8, 20))
    before = normfree.spp(model, x)
    converted = normfree.convert(model, x)
    ends = {change.name for change in converted.conversion.changes if change.alpha == 0.2}
    assert ends == {f"blocks.{i}.down" for i in range(4)} and not converted.conversion.notes
    assert {kept.name for kept in converted.conversion.norms_left} <= {"final"}
    plot = normfree.spp(converted, x)
    assert not plot.findings and all(0.5 < block.residual_avg_channel_var < 2 for block in plot.blocks)
    assert 0.5 < plot.outputs[0].avg_channel_var / before.outputs[0].avg_channel_var < 2
    assert converted.head.weight is converted.table.weight


class After(nn.Module):
    """norm(x + f(x)), with a norm inside of f that goes, and one behind that stays, for the forward asks for it."""

    def __init__(self, size):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, size))
        self.norm = nn.LayerNorm(size)

    def forward(self, x):
        x = x + self.branch(x)
        return self.norm(x) if isinstance(self.norm, nn.LayerNorm) else 2 * x


def test_branches_whose_stream_is_normalized_after_each_keep_their_share_to_the_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), *(After(32) for _ in range(3)), nn.Tanh(), nn.Linear(32, 2))
    record = normfree.convert(model, images(64, 6)).conversion
    assert [kept.name for kept in record.norms_left] == ["1.norm", "2.norm", "3.norm"]
    assert not any(change.alpha for change in record.changes)


@pytest.mark.parametrize("std", [1.0, 0.02, 30.0])
def test_a_stream_that_begins_with_a_normalized_lookup_has_unit_variance(std):
    torch.manual_seed(0)
    model, x = Tokens(std), torch.randint(0, 50, (8, 20))
    converted = normfree.convert(model, x)
    record = converted.conversion
    assert not record.norms_left and not record.notes
    (first,) = [change for change in record.changes if change.name == "first"]
    assert "begins a residual stream" in first.reason
    plot = normfree.spp(converted, x)
    assert plot.verdict == "healthy" and all(0.5 < block.avg_channel_var < 2 for block in plot.blocks)


def test_norms_that_could_only_answer_one_another_do_not_all_go():
    class Net(nn.Module):
        """Two norms after a lookup with nothing but a gain between, then no layer."""

        def __init__(self):
            super().__init__()
            self.table, self.first, self.second = nn.Embedding(50, 16), nn.LayerNorm(16), nn.LayerNorm(16)
            self.gain, self.last = nn.Parameter(torch.ones(16)), nn.Linear(16, 5)

        def forward(self, x):
            return self.last(self.second(self.first(self.table(x)) * self.gain).tanh())

    torch.manual_seed(0)
    model, x = Net(), torch.randint(0, 50, (8, 10))
    record = normfree.convert(model, x).conversion
    (left,) = record.norms_left
    assert left.name == "first" and "only norms take over" in left.reason
    assert [change.name for change in record.changes] == ["second"]


class VectorNorm(nn.Module):
    """A layer norm over channels first, written by hand."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight + self.bias


class VarMean(VectorNorm):
    def forward(self, x):
        variance, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + 1e-6) * self.weight + self.bias


@pytest.mark.parametrize("norm", [VectorNorm, VarMean])
def test_a_branch_that_ends_in_a_norm_written_by_hand_is_scaled(norm):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            first, second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.branch = nn.Sequential(first, norm(16), nn.ReLU(), second, norm(16))

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(16), *[Block() for _ in range(10)]),
        images(8, 3, 16, 16),
    )
    converted = normfree.convert(model, x)
    assert sum(change.alpha is not None for change in converted.conversion.changes) == 10
    assert not converted.conversion.notes
    assert normfree.spp(converted, x).blocks[-1].avg_channel_var < 2


class ConvLSTM(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.given = nn.Conv2d(2, 4 * channels, 3, padding=1)
        self.state = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.norm, self.last, self.channels = nn.GroupNorm(4, 4 * channels), nn.Conv2d(channels, 1, 1), channels

    def forward(self, x):
        state = cell = torch.zeros(len(x), self.channels, *x.shape[-2:])
        for step in x.unbind(1):
            gates = self.norm(self.given(step) + self.state(state))
            let, forget, new, out = gates.chunk(4, 1)
            cell = forget.sigmoid() * cell + let.sigmoid() * new.tanh()
            state = out.sigmoid() * cell.tanh()
        return self.last(state)


def test_a_first_state_of_zeros_is_not_what_a_scale_is_measured_on():
    torch.manual_seed(0)
    model, x = ConvLSTM(), images(4, 5, 2, 12, 12)
    converted = normfree.convert(model, x).train()
    with torch.no_grad():
        assert 0.1 < float(converted(x).var() / model.train()(x).var()) < 10
    with pytest.raises(ValueError, match=r"all that a filter of .* sees at once is the same"):
        normfree.convert(model, torch.zeros(4, 5, 2, 12, 12))
