"""Each finding fires on a network that is sick in just that way, and on no healthy one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from normfree.models import create_model
from normfree.signal import KINDS, spp
from normfree.signal.findings import COLLAPSED, LOST


class Block(nn.Module):
    """x + scale · f(x / beta), where f is act, linear of the given gain (and mean), act, linear."""

    def __init__(
        self, channels: int, *, gain: float = 1.0, scale: float = 0.2, mean: float = 0.0, norm: bool = False
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.BatchNorm1d(channels) if norm else nn.Identity()
        self.first, self.last = nn.Linear(channels, channels), nn.Linear(channels, channels)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight, mean=mean / channels, std=gain / math.sqrt(channels))
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return x + self.scale * self.last(torch.relu(self.first(torch.relu(self.norm(x)))))


def net(blocks: int = 12, channels: int = 48, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(channels, **options) for _ in range(blocks)))


HE = math.sqrt(2)
X = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))


def findings(model: nn.Module, x: torch.Tensor = X, **options) -> dict[tuple[str, str], object]:
    found = {(f.kind, f.severity): f for f in spp(model, x, **options).findings}
    assert {kind for kind, _ in found} <= set(KINDS)
    return found


def kinds(model: nn.Module, x: torch.Tensor = X, **options) -> list[str]:
    return sorted(kind for kind, _ in findings(model, x, **options))


def test_a_healthy_network_is_silent():
    assert kinds(net(gain=HE, norm=True, scale=1.0)) == []
    assert kinds(net(gain=HE, scale=0.1)) == []


def test_explosion():
    found = findings(net(gain=HE, scale=1.0))
    finding = found["explosion", "error"]
    # Each branch carries the second moment on, so it doubles per block and passes 100 at the 7th (2⁷ = 128); a
    # growing part of it is the squared mean, which delays the variance by a block or two.
    assert finding.block in (6, 7, 8)
    assert "times per block" in finding.message
    # Six blocks of it are not yet called so: 2⁶ = 64.
    assert "explosion" not in kinds(net(5, gain=HE, scale=1.0))


def plain(gains, channels: int = 48) -> nn.Module:
    """Linear layers with ReLU that keep the second moment, each times a gain of its own."""
    torch.manual_seed(0)
    layers = []
    for gain in gains:
        layers += [nn.Linear(channels, channels, bias=False), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=gain * math.sqrt(2 / channels))
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("gains", "severity"),
    [
        ([1, 1, 1e3, 1, 1, 1], "error"),
        ([1] * 5 + [3e3], "error"),
        ([1, 1, 1, 300, 1, 1], "warning"),
        ([1, 1, 5, 1], None),
    ],
)
def test_a_signal_that_explodes_in_one_step(gains, severity):
    found = {kind: f for (kind, _), f in findings(plain(gains)).items()}
    assert (found["explosion"].severity if severity else found.get("explosion")) == severity
    if severity:
        assert f"layer {gains.index(max(gains))} " in found["explosion"].message.split("past")[1]


def test_a_burst_that_a_normalizer_takes_back_is_none():
    model = plain([1, 1, 1e3, 1])
    assert "explosion" not in kinds(nn.Sequential(*model[:6], nn.BatchNorm1d(48), *model[6:]))


@pytest.mark.parametrize("unit", [100.0, 1e-3])
def test_an_input_in_units_of_its_own_is_no_change_of_the_signal(unit):
    layers = plain([1 / unit, 1, 1, 1])
    assert not {"attenuation", "explosion"} & {*kinds(layers, unit * X)}
    assert {"attenuation", "explosion"} & {*kinds(plain([1 / unit**2, 1, 1, 1]), unit * X)}, "past one"


def test_token_numbers_are_no_signal():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.mix, self.head = nn.Embedding(1000, 48), plain([1, 1, 1]), nn.Linear(48, 4)

        def forward(self, x):
            return self.head(self.mix(self.embedding(x)).mean(1))

    numbers = torch.randint(0, 1000, (16, 64), generator=torch.Generator().manual_seed(0))
    assert not {"attenuation", "explosion"} & {*kinds(Tokens(), numbers)}


def test_an_unscaled_input_fades_all_the_same():
    assert ("attenuation", "error") in findings(plain([1, 1, 1e-3, 1e-3, 1]), 100 * X)


def test_the_sign_of_one_feature_is_no_collapse():
    errors = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        nn.init.constant_(model[2].bias, 2.0)
        errors += "correlation_collapse" in kinds(model, X[:, :8])
    assert errors == 0


def test_attenuation():
    class Plain(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(9))
            for layer in self.layers:
                nn.init.normal_(layer.weight, std=factor / math.sqrt(48))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    # The variance is multiplied by factor² a layer: of eight before the last, powers of 0.09 pass 0.01 with the 2nd and
    # 1e-8 with the 8th; of 0.36, 0.01 with the 5th and 1e-8 with none; of 0.81, neither.
    finding = findings(Plain(0.3))["attenuation", "error"]
    assert finding.block == 1
    assert findings(Plain(0.6))["attenuation", "warning"].block == 4
    assert "attenuation" not in kinds(Plain(0.9))


def test_a_signal_that_comes_back_has_not_faded():
    model = nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48), nn.Linear(48, 48))
    nn.init.normal_(model[0].weight, std=1e-3)
    nn.init.zeros_(model[0].bias)
    assert kinds(model) == []
    assert ("attenuation", "warning") not in findings(model)


def test_mean_shift():
    # Plain weights that do not sum to zero turn a rectified, positive signal into an offset of each channel.
    assert findings(net(gain=1.7, mean=2.0, scale=0.5))["mean_shift", "error"].block <= 6
    assert "mean_shift" not in kinds(net(gain=HE, norm=True, scale=1.0))
    assert pytest.approx(COLLAPSED / (1 - COLLAPSED)) == LOST


def test_an_offset_of_the_input_is_not_the_network_s_doing():
    assert "mean_shift" not in kinds(net(gain=HE, scale=0.05), X + 3.0)


def test_between_layers_an_offset_is_a_note():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
    nn.init.constant_(model[2].bias, 20.0)
    assert ("mean_shift", "info") in findings(model)
    assert ("mean_shift", "error") not in findings(model)


@pytest.mark.parametrize(("gain", "severity"), [(3.0, "warning"), (0.5, "info")])
def test_branch_variance(gain, severity):
    finding = findings(net(3, gain=gain, scale=0.01))["branch_variance", severity]
    assert finding.block == 0
    assert "3 of 3 branches" in finding.message
    assert "branch_variance" not in kinds(net(3, gain=HE, scale=0.01))


class Outweighed(nn.Module):
    """``x + factor * norm(linear(x))``: a branch of unit variance, beside a stream of any."""

    def __init__(self, factor):
        super().__init__()
        self.linear, self.norm, self.factor = nn.Linear(48, 48), nn.BatchNorm1d(48), factor

    def forward(self, x):
        return x + self.factor * self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("factor", "units", "told"),
    [
        (0.2, 255.0, True),
        (1.0, 255.0, True),
        (0.2, 1.0, False),  # as it is planned
        (1e-6, 1.0, False),  # a layer scale is a choice, and no fault of the stream
        (255.0, 255.0, False),  # a factor that brings the branch to its stream
    ],
)
def test_branches_that_are_nothing_beside_their_stream(factor, units, told):
    torch.manual_seed(0)
    found = findings(nn.Sequential(*(Outweighed(factor) for _ in range(6))), units * X)
    assert (("branch_variance", "warning") in found) == told
    if told:
        assert "branches add next to nothing to their stream" in found["branch_variance", "warning"].message


class Gated(nn.Module):
    def __init__(self, gain: float = 0.0, *, zero_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 48)
        self.skip_gain = nn.Parameter(torch.tensor(gain))
        if zero_last:
            nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return x + self.skip_gain * self.layer(x)


def test_silenced_branch():
    woken = findings(nn.Sequential(Gated(), Gated(1.0)))["silenced_branch", "info"]
    assert woken.block == 0
    assert "1 of 2 branches" in woken.message
    assert "0.skip_gain" in woken.message
    assert "silenced_branch" not in kinds(nn.Sequential(Gated(1.0), Gated(1.0)))


def test_a_branch_that_cannot_be_woken():
    silent = findings(nn.Sequential(Gated(1.0), Gated(1.0, zero_last=True)))["silenced_branch", "warning"]
    assert silent.block == 1
    assert "1 of 2 branches are zero for their weights are" in silent.message
    # Nor one that is not to be: here the gain is in the weights, and nothing is left to see.
    model = create_model("nf_resnet50", depths=(1, 1, 1, 1), width=1)
    asleep = findings(model, torch.randn(2, 3, 32, 32), wake=False)["silenced_branch", "warning"]
    assert "4 of 4 branches are multiplied by zero" in asleep.message
    assert "wake=True" in asleep.remedy and "wake=True" in (asleep.code or "")


@pytest.mark.parametrize(("dead", "severity"), [(48, "error"), (12, "warning"), (1, "info"), (0, None)])
def test_dead_channels(dead, severity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
    with torch.no_grad():
        model[0].bias -= 100 * (dead == 48)  # a layer of zeros would be a choice: the activation kills all
        model[2].weight[: dead % 48] = 0
        model[2].bias[: dead % 48] = 0.3
    found = findings(model)
    if severity is None:
        assert not any(kind == "dead_channels" for kind, _ in found)
    else:
        assert found["dead_channels", severity].block == 1


def test_correlation_collapse():
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(48, 48, bias=False)

        def forward(self, x):
            return 0.05 * x + self.layer(torch.ones_like(x)) + 0.0 * self.layer(x)

    finding = findings(nn.Sequential(Flattens(), Flattens()))["correlation_collapse", "warning"]
    assert finding.block == 0
    assert "correlation_collapse" not in kinds(net(gain=HE, norm=True, scale=1.0))
    alike = X[:1] + 0.01 * X
    assert "correlation_collapse" not in kinds(nn.Sequential(Flattens()), alike)  # alike to begin with


class Coupling(nn.Module):
    """A layer of a flow, whose scale and shift are of a network that ends in weights of some size, and a bias."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48))
        nn.init.normal_(self.net[2].weight, std=size)

    def forward(self, x):
        first, second = x.chunk(2, 1)
        scale, shift = self.net(first).chunk(2, 1)
        return torch.cat([second * scale.tanh().exp() + shift, first], 1)


class Modulated(nn.Module):
    """Features that get a scale and a shift of a condition, at first one and zero for all (FiLM)."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.conditions = nn.ModuleList(nn.Linear(48, 96) for _ in range(3))
        for layer, condition in zip(self.layers, self.conditions, strict=True):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(condition.weight, std=size)
            condition.bias.data = torch.cat([torch.ones(48), torch.zeros(48)])

    def forward(self, x, given):
        for layer, condition in zip(self.layers, self.conditions, strict=True):
            scale, shift = condition(given).chunk(2, 1)
            x = (layer(x) * scale + shift).relu()
        return x


def small_weights(size: float, norm) -> nn.Module:
    """Layers whose biases are far above what their weights make, each behind which a norm takes them off again."""
    layers = []
    for _ in range(5):
        layers += [nn.Linear(48, 48), norm(48), nn.ReLU()]
        nn.init.normal_(layers[-3].weight, std=size)
    return nn.Sequential(*layers, nn.Linear(48, 3))


BIASED = {
    "couplings": lambda size: nn.Sequential(*(Coupling(size) for _ in range(6))),
    "modulation": Modulated,
    "before a batch norm": lambda size: small_weights(size, nn.BatchNorm1d),
    "one layer": lambda size: nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)).apply(
        lambda layer: isinstance(layer, nn.Linear) and nn.init.constant_(layer.bias, 0.1 / max(size, 1e-3))
    ),
}


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("name", BIASED)
def test_what_a_bias_alone_has_in_common_is_no_collapse(name, size):
    """The first step takes the weights to where the inputs are told apart."""
    if size or name != "before a batch norm":  # behind layers of zeros nothing varies
        torch.manual_seed(0)
        plot = spp(BIASED[name](size), (X, X.flip(0)) if name == "modulation" else X)
        assert "correlation_collapse" not in {finding.kind for finding in plot.findings}
        assert any((point.input_correlation or 0) > COLLAPSED for point in plot.blocks)


@pytest.mark.parametrize("bias", [0.5, 5.0, 100.0])
def test_what_a_second_layer_makes_of_a_bias_is_a_collapse(bias):
    """No norm takes off what the first has added: all that follows is made of what the examples have in common."""
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(48, 48), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.constant_(layer.bias, bias)
    assert "correlation_collapse" in kinds(nn.Sequential(*layers, nn.Linear(48, 4)))


class Breaks(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 48)
        self.broken = Operation(operation)

    def forward(self, x):
        return x + self.broken(self.layer(x))


class Operation(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


def masked_attention(x: torch.Tensor) -> torch.Tensor:
    """Four ways to mask logits by −∞, all of which a softmax turns into zeros."""
    mask = torch.ones(48, 48).tril().bool()
    q = x[:, :, None]
    logits = (q @ q.transpose(1, 2)).masked_fill(~mask, -math.inf)
    logits = torch.where(mask, logits, -math.inf)
    logits = logits + torch.zeros(48, 48).masked_fill(~mask, -math.inf)
    logits = logits + torch.full((48, 48), -math.inf).triu(1)
    return (logits.softmax(-1) @ q)[:, :, 0]


@pytest.mark.parametrize(
    ("operation", "name", "count"),
    [
        (lambda x: (x * 100).exp(), "exp", None),
        (lambda x: x / (x - x), "div", X.numel()),
        (lambda x: (masked_attention(x) * 100).exp(), "exp", None),
        (lambda x: (-x.abs()).log(), "log", X.numel()),
        (lambda x: x.to(torch.float16).mul(1e5).float(), "mul", None),
        (lambda x: torch.full_like(x, -math.inf).softmax(-1) + x, "_softmax", X.numel()),
        (lambda x: (x * 0 + math.inf) - (x * 0 + math.inf), "sub", X.numel()),
    ],
    ids=["overflow", "division by zero", "after a mask", "logarithm", "half precision", "nothing left", "difference"],
)
def test_the_first_operation_that_is_not_finite_is_named(operation, name, count):
    model = nn.Sequential(Gated(1.0), Breaks(operation), Gated(1.0))
    finding = findings(model)["non_finite", "error"]
    assert finding.block == 1
    assert f"begin in {name} of module 1.broken:" in finding.message
    assert "first seen at block 1 (1)" in finding.message
    if count is not None:
        assert f": {count} of {X.numel()} results" in finding.message


def test_masks_are_no_finding():
    assert "non_finite" not in kinds(nn.Sequential(Gated(1.0), Breaks(masked_attention)))


def test_what_breaks_after_the_last_block_is_found_too():
    model = nn.Sequential(Gated(1.0), Operation(lambda x: (x * 1000).exp()))
    finding = findings(model)["non_finite", "error"]
    assert finding.block is None
    assert "after the last block. They begin in exp of module 1" in finding.message


def test_a_later_batch_that_breaks_is_the_one_searched():
    model = nn.Sequential(Breaks(lambda x: (x * 100).exp()))
    finding = findings(model, [X * 1e-3, X])["non_finite", "error"]
    assert "begin in exp of module 0.broken" in finding.message
