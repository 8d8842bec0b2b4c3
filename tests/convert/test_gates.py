"""Gates in residual branches: they keep their layers, carry the branch's factor, and what they take is restored."""

from __future__ import annotations

import pytest
import torch
from convert.nets import FunctionalGate, Gate, PostActivation, post_activation
from torch import nn

import normfree
from normfree.convert.dataflow import is_norm

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_gate_carries_the_branch_factor_and_the_two_that_it_halves():
    record = normfree.convert(post_activation(Gate), IMAGES).conversion
    gates = [change for change in record.changes if change.now == "BranchScale"]
    assert [gate.name for gate in gates] == [f"{block}.gate.sigmoid" for block in range(1, 6)]
    assert all(gate.correction == 2 and gate.alpha == 0.2 and gate.skip_gain == 1 for gate in gates)
    assert {"1.gate.fc1", "1.gate.fc2"} <= {
        kept.name for kept in record.kept if kept.reason == "it only computes a gate"
    }


@pytest.mark.parametrize("gate", [Gate, FunctionalGate])
def test_a_gated_branch_keeps_its_variance(gate):
    signal = normfree.spp(normfree.convert(post_activation(gate), IMAGES), IMAGES)
    # three 3x3 convolutions' worth of padding and few channels; half of it unless the gate's 2 is there
    assert all(block.residual_avg_channel_var > 0.45 for block in signal.blocks[:3])


def test_a_functional_gate_leaves_the_factor_to_the_layer_before():
    record = normfree.convert(post_activation(FunctionalGate), IMAGES).conversion
    last = next(change for change in record.changes if change.name == "2.conv2")
    assert last.alpha == 0.2
    assert last.input_scale == pytest.approx(2 * normfree.gamma(nn.ReLU()))


class Attention(nn.Module):
    """CBAM: a gate over channels, then one over positions."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.positions = nn.Conv2d(channels, channels, 1), nn.Conv2d(1, 1, 7, padding=3)
        self.first, self.second = nn.Sigmoid(), nn.Sigmoid()

    def forward(self, x):
        x = x * self.first(self.channels(x.mean((2, 3), keepdim=True)))
        return x * self.second(self.positions(x.mean(1, keepdim=True)))


class FunctionalAttention(Attention):
    """The same, its sigmoids functions of the forward."""

    def forward(self, x):
        x = x * torch.sigmoid(self.channels(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.positions(x.mean(1, keepdim=True)))


@pytest.mark.parametrize("gate", [Attention, FunctionalAttention])
def test_gates_in_series_restore_what_each_of_them_takes(gate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), PostActivation(64, 64, gate=gate(64)))
    converted = normfree.convert(model, IMAGES)
    changes = {change.name: change for change in converted.conversion.changes}
    if gate is Attention:
        assert changes["2.gate.second"].correction == 4 and "2.gate.first" not in changes
    else:
        assert changes["2.conv2"].correction == 4
        assert changes["2.conv2"].input_scale == pytest.approx(4 * normfree.gamma(nn.ReLU()))
    block = normfree.spp(converted, IMAGES).blocks[0]
    assert block.residual_avg_channel_var == pytest.approx(0.85, abs=0.15), "less padding; 0.2 without one of the 2s"


def test_gates_side_by_side_restore_their_own_each():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)) for _ in "12")
            self.gate1, self.gate2 = Gate(32), Gate(32)

        def forward(self, x):
            return x + (self.gate1(self.left(x)) + self.gate2(self.right(x)))

    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), Parallel())
    record = normfree.convert(model, IMAGES).conversion
    gates = {change.name: change.correction for change in record.changes if change.now == "BranchScale"}
    assert gates == {"2.gate1.sigmoid": 2, "2.gate2.sigmoid": 2}


def test_a_layer_that_is_read_gated_and_ungated_is_told():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            y = self.norm(self.conv(x))
            gate = torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))
            return x + torch.cat([y[:, :8], (y * gate)[:, 8:]], 1)

    record = normfree.convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Both()), IMAGES).conversion
    assert [change.alpha for change in record.changes if change.alpha is not None] == []
    assert "keeps its size" in record.notes[0]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)])
@pytest.mark.parametrize("functional", [False, True])
def test_a_gate_with_a_norm_of_its_own(kind, functional):
    class Normed(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Conv2d(channels, 8, 1), kind(8), nn.Conv2d(8, channels, 1)
            self.sigmoid = torch.sigmoid if functional else nn.Sigmoid()

        def forward(self, x):
            squeezed = self.norm(self.fc1(x.mean((2, 3), keepdim=True))).relu()
            return x * self.sigmoid(self.fc2(squeezed))

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), PostActivation(16, 16, gate=Normed(16)))
    converted = normfree.convert(model, IMAGES)
    assert not any(is_norm(module) for module in converted.modules()), "it would see the other examples"
    changes = {change.name: change for change in converted.conversion.changes}
    assert changes["2.gate.fc1"].now == "ScaledWSConv2d", "the norm had followed it"
    assert "2.gate.fc2" not in changes
    assert changes["2.conv2" if functional else "2.gate.sigmoid"].alpha == 0.2
    assert converted.conversion.notes == ()


class Concurrent(nn.Module):
    """scSE: a gate over channels and one over positions, their halves summed."""

    def __init__(self, channels):
        super().__init__()
        self.gate = Gate(channels)
        self.positions, self.sigmoid = nn.Conv2d(channels, 1, 1), nn.Sigmoid()

    def forward(self, x):
        return self.gate(x) + x * self.sigmoid(self.positions(x))


def test_two_halves_of_one_activation_are_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), PostActivation(64, 64, gate=Concurrent(64)))
    converted = normfree.convert(model, IMAGES)
    scaled = {c.name: c.correction for c in converted.conversion.changes if c.now == "BranchScale"}
    assert scaled == {"2.gate.gate.sigmoid": None, "2.gate.sigmoid": None}
    block = normfree.spp(converted, IMAGES).blocks[0]
    assert block.residual_avg_channel_var == pytest.approx(1.0, rel=0.2), "4 times as much with a 2 on each"


def test_a_sigmoid_that_all_gates_share_is_one_in_each_of_them():
    sigmoid = nn.Sigmoid()

    def gate(channels):
        made = Gate(channels)
        made.sigmoid = sigmoid
        return made

    torch.manual_seed(0)
    model = post_activation(gate)
    shared = normfree.convert(nn.Sequential(*model[:6], sigmoid), IMAGES)
    for block in model[1:6]:
        block.gate.sigmoid = nn.Sigmoid()
    own = normfree.convert(nn.Sequential(*model[:6], nn.Sigmoid()), IMAGES)

    def factors(converted):
        return {
            change.name: (change.now, change.input_scale, change.alpha, change.correction, change.skip_gain)
            for change in converted.conversion.changes
        }

    assert factors(shared) == factors(own)
    assert type(shared[6]) is nn.Sigmoid, "what ends no branch has no factor"
    torch.testing.assert_close(shared(IMAGES), own(IMAGES))
