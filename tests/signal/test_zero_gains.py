"""A zero gain is measured as one where its branch is zero because of it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normfree.signal import spp

WIDTH = 8
X = torch.randn(16, 6, WIDTH, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """x + f(x), where f has a zero parameter that the subclass uses somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.wide, self.narrow = nn.Parameter(torch.zeros(4 * WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.scalar, self.norm = nn.Parameter(torch.zeros(())), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.branch(x)


class ResponseNorm(Branch):
    """ConvNeXt V2: gain · norm(h) + h."""

    def branch(self, x):
        h = self.first(x).relu()
        size = h.norm(dim=1, keepdim=True)
        return self.last(self.wide * (h * size / size.mean(-1, keepdim=True)) + h)


class BesideOthers(Branch):
    """A second path of the branch that starts at zero, beside one that does not."""

    def branch(self, x):
        return self.last(self.first(x).relu()) + self.scalar * self.norm(x)


class Shifted(Branch):
    """h · (1 + gain), which is h."""

    def branch(self, x):
        return self.last(self.first(x).relu() * (1 + self.wide))


class Concatenated(Branch):
    def branch(self, x):
        h = self.first(x).relu()
        return self.last(torch.cat([h[..., : 2 * WIDTH], self.scalar * h[..., 2 * WIDTH :]], -1))


@pytest.mark.parametrize("kind", [ResponseNorm, BesideOthers, Shifted, Concatenated])
def test_a_gain_that_silences_nothing_is_left_alone(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind())
    signal = spp(model, X)
    assert not any(block.woken for block in signal.blocks)
    assert "silenced_branch" not in {finding.kind for finding in signal.findings}
    variance = model[0].branch(X).flatten(0, 1).var(0, correction=0).mean().item()
    whole = signal.blocks[len(signal.blocks) // 2 - 1]  # of the first block, behind the sum inside it
    assert whole.residual_avg_channel_var == pytest.approx(variance, rel=1e-5)


class LayerScale(Branch):
    def branch(self, x):
        return self.narrow * self.last(self.first(x).relu())


class SkipGain(Branch):
    def branch(self, x):
        return self.scalar * 0.2 * self.last(self.first(x).relu())


class LastNorm(Branch):
    def branch(self, x):
        return self.norm(self.last(self.first(x).relu()))


class InTheWeight(Branch):
    """The gain is multiplied into the weight and the bias of the last layer."""

    def branch(self, x):
        gain = 0.2 * self.scalar
        return nn.functional.linear(self.first(x).relu(), gain * self.last.weight, gain * self.last.bias)


class BeforeTheLast(Branch):
    """What the gain makes zero stays zero through a layer without bias and an activation."""

    def branch(self, x):
        return nn.functional.linear((self.wide * self.first(x)).relu(), self.last.weight)


class TwoGains(Branch):
    def branch(self, x):
        return self.scalar * (self.narrow * self.last(self.first(x).relu()))


SILENT = {
    LayerScale: ["narrow"],
    SkipGain: ["scalar"],
    LastNorm: ["norm.weight"],
    InTheWeight: ["scalar"],
    BeforeTheLast: ["wide"],
    TwoGains: ["narrow", "scalar"],
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_gain_that_silences_its_branch_is_measured_as_one(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind())
    if kind is LastNorm:
        for block in model:
            nn.init.zeros_(block.norm.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    signal = spp(model, X)
    assert [sorted(block.woken) for block in signal.blocks] == [[f"{i}.{n}" for n in SILENT[kind]] for i in (0, 1)]
    assert all(block.residual_avg_channel_var for block in signal.blocks)
    assert signal.blocks[0].avg_channel_var != pytest.approx(signal.entry.avg_channel_var, rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    asleep = spp(model, X, wake=False)
    assert [block.avg_channel_var for block in asleep.blocks] == [asleep.entry.avg_channel_var] * 2


class Modulated(nn.Module):
    """DiT: the gate of the branch comes from a layer of zeros, so that it is no gain that could be set to one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, condition):
        shift, scale, gate = self.modulation(condition.relu())[:, None].chunk(3, -1)
        return x + gate * self.layer(self.norm(x) * (1 + scale) + shift)


class Transformer(nn.Module):
    """As many such blocks, and a last layer of zeros."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, condition):
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


@pytest.mark.parametrize("build", [Modulated, lambda: Transformer(4)], ids=["block", "transformer"])
@pytest.mark.parametrize("wake", [True, False])
def test_gates_from_a_layer_of_zeros_are_silent_by_design(build, wake):
    torch.manual_seed(0)
    signal = spp(build(), (X, torch.randn(16, WIDTH)), wake=wake)
    found = {(finding.kind, finding.severity) for finding in signal.findings}
    assert ("silenced_branch", "info") in found
    assert all(block.residual_avg_channel_var == 0 and block.zero_gate for block in signal.blocks)
    assert {severity for _, severity in found} == {"info"}


def test_a_branch_that_ends_in_zeros_is_silent():
    torch.manual_seed(0)
    block = ResponseNorm()
    nn.init.zeros_(block.last.weight)
    nn.init.zeros_(block.last.bias)
    signal = spp(nn.Sequential(block), X)
    found = {finding.kind: finding.severity for finding in signal.findings}
    assert found["silenced_branch"] == "warning"
    assert not signal.blocks[0].zero_gate
