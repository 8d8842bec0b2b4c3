"""Gradients are judged: thresholds at their boundary, laws of the sensitivity, and nets that do and do not train."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import normfree
from normfree.signal import KINDS, BlockSignal, Entry, SignalPropagation, spp
from normfree.signal import gradients as rules


def signal(
    sensitivities: list[float], powers: list[float] | None = None, names: list[str] | None = None
) -> SignalPropagation:
    """A measurement with the given S, and G (1 by default where it is not given: S is then the variance)."""
    powers = powers or sensitivities
    blocks = [
        BlockSignal(
            index=i,
            name=names[i] if names else str(i),
            kind="layer",
            shape=(4, 10),
            channel_axis=1,
            transition=False,
            avg_channel_sq_mean=0.0,
            avg_channel_var=s / p if p else 1.0,
            residual_avg_channel_var=None,
            avg_sq_gradient=p / 10,
        )
        for i, (s, p) in enumerate(zip(sensitivities, powers, strict=True))
    ]
    entry = Entry(name="", shape=(4, 10), channel_axis=1, avg_channel_sq_mean=0.0, avg_channel_var=1.0)
    return SignalPropagation(model="m", mode="eval", input={}, entry=entry, blocks=tuple(blocks))


def steady(total: float, points: int = 13) -> list[float]:
    """From ``total`` to 1, by the same factor at each point."""
    return [total ** (1 - i / (points - 1)) for i in range(points)]


def severities(measured: SignalPropagation) -> dict[str, str]:
    return {f.kind: f.severity for rule in (rules.gradient_explosion, rules.gradient_vanishing) for f in rule(measured)}


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        (0.9 * rules.ROUGH, {}),
        (1.1 * rules.ROUGH, {"gradient_explosion": "warning"}),
        (0.9 * rules.TOO_ROUGH, {"gradient_explosion": "warning"}),
        (1.1 * rules.TOO_ROUGH, {"gradient_explosion": "error"}),
    ],
)
def test_explosion_at_its_thresholds(growth, expected):
    assert severities(signal(steady(growth))) == expected
    # All at once, in front of healthy layers or behind them, counts as much as steadily.
    assert severities(signal([growth] * 9 + [1.0] * 9)) == expected
    # A jump of S at the pool before the head hides nothing of a steady growth.
    assert severities(signal([*steady(growth, 40), 30.0], [*steady(growth, 40), 30.0])) == expected


def test_scales_are_no_explosion():
    total = 1e9
    flat, grown = [1.0] * 13, steady(total)
    assert severities(signal(flat, grown)) == {}  # the signal grows, and S stays: the rule on the signal's own growth
    assert severities(signal(grown, flat)) == {}


@pytest.mark.parametrize(
    ("faint", "too_faint", "powers"),
    [
        (rules.FAINT, rules.TOO_FAINT, lambda values: values),
        (rules.WEAK, rules.TOO_WEAK, lambda values: values),
    ],
    ids=["sensitivity", "power"],
)
def test_vanishing_at_its_thresholds(faint, too_faint, powers):
    def found(loss: float) -> str | None:
        values = [loss] * 4 + [1.0] * 9
        measured = signal(values) if faint == rules.FAINT else signal([1.0] * 13, values)
        return severities(measured).get("gradient_vanishing")

    assert [found(x) for x in (1.1 * faint, 0.9 * faint)] == [None, "warning"]
    assert [found(x) for x in (1.1 * too_faint, 0.9 * too_faint)] == ["warning", "error"]


def test_the_first_quarter_is_compared():
    # A side branch at the beginning, such as the embedding of a time behind a gate of zero, is no vanished network.
    side, rest = [0.0] * 3, [1.0] * 10
    assert severities(signal([*side, *rest], [*side, *rest])) == {}
    assert severities(signal([*side, 0.0, *rest], [*side, 0.0, *rest])) == {"gradient_vanishing": "error"}
    # Queries and keys of hard attention receive nothing; the way past them does.
    attention = [1.0, 1e-20, 1e-20, 1.0] * 5
    assert severities(signal(attention)) == {}


def test_the_calls_of_one_module_share_its_weights():
    unrolled = ["cell", *(f"cell#{i}" for i in range(2, 20)), "head"]
    faded = [1e-12 ** (1 - i / 19) for i in range(20)]
    assert severities(signal(faded, names=unrolled)) == {}
    assert severities(signal(faded)) == {"gradient_vanishing": "error"}


def test_beyond_the_range_of_numbers():
    far = [1e300, 1.0, 1e-300]
    (found,) = rules.gradient_explosion(signal([1e150, 1.0, 1e-150, 1e-150, 1e-150], [*far, 1e-300, 1e-300]))
    assert "1e+300" in found.message
    # A gate at the end that receives nothing is no reference.
    assert severities(signal([1.0] * 5 + [0.0] * 3)) == {}


def test_a_gradient_that_is_not_finite():
    measured = signal([1.0] * 5)
    blocks = list(measured.blocks)
    blocks[2] = replace(blocks[2], avg_sq_gradient=math.inf)
    (found,) = rules.gradient_explosion(replace(measured, blocks=tuple(blocks)))
    assert (found.severity, found.block) == ("error", 2)


def test_nothing_is_said_without_gradients():
    measured = signal([1.0] * 5)
    none = tuple(replace(block, avg_sq_gradient=None) for block in measured.blocks)
    zero = tuple(replace(block, avg_sq_gradient=0.0) for block in measured.blocks)
    for blocks in (none, zero, (), measured.blocks[:1]):
        assert severities(replace(measured, blocks=blocks)) == {}


def rated(model: nn.Module, x: torch.Tensor) -> list:
    return rules._rate(spp(model, x))


def test_sensitivity_is_the_same_on_both_sides_of_linear_layers():
    """Whatever their fan-out, stride and scale; the gradient of a value is not."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(32, 128, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(128, 32, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 64, 1),
        nn.Conv2d(64, 32, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
    ]
    model = nn.Sequential(nn.Conv2d(8, 32, 1), *layers)
    for scale, layer in zip((1, 30, 0.01, 3, 1, 1, 1), model, strict=True):
        if not isinstance(layer, nn.Flatten):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(layer.weight[0].numel()))
            nn.init.zeros_(layer.bias)
    measured = spp(model, torch.randn(32, 8, 16, 16))
    sensitivity = [p.sensitivity for p in rules._rate(measured)]
    # 64 outputs, each drawn with r² of mean 1: the sum, and each ratio of S, deviates by sqrt(2 / 64) = 18 %.
    assert max(sensitivity) - min(sensitivity) < math.log10(1.5)
    per_value = [block.avg_sq_gradient for block in measured.blocks]
    assert max(per_value) / min(per_value) > 1e3


def test_the_growth_of_a_chain_with_batch_norm():
    """π/(π − 1) = 1.467 a layer for wide layers and large batches (Yang et al., 2019)."""
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU())]
    points = rated(nn.Sequential(*layers), torch.randn(256, 256))
    slope = -rules._slope([p.sensitivity for p in points])
    assert 10**slope == pytest.approx(math.pi / (math.pi - 1), rel=0.05)


def chain(depth: int, activation: type[nn.Module], norm: type[nn.Module] | None, width: int = 48) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(64 if index == 0 else width, width), *([norm(width)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


CASES = {
    "batch norm, 20: learns": (chain(20, nn.ReLU, nn.BatchNorm1d), "gradient_explosion", None),
    "batch norm, 50: half": (chain(50, nn.ReLU, nn.BatchNorm1d), "gradient_explosion", "error"),
    "batch norm, 100: chance": (chain(100, nn.ReLU, nn.BatchNorm1d), "gradient_explosion", "error"),
    "sigmoid, 3: learns": (chain(3, nn.Sigmoid, None), "gradient_vanishing", None),
    "sigmoid, 30: chance": (chain(30, nn.Sigmoid, None), "gradient_vanishing", "error"),
    "tanh, 10: learns": (chain(10, nn.Tanh, None), "gradient_vanishing", None),
    "tanh, 30: chance": (chain(30, nn.Tanh, None), "gradient_vanishing", "error"),
}


@pytest.mark.parametrize(("model", "kind", "severity"), CASES.values(), ids=CASES)
def test_nets_that_do_and_do_not_train(model, kind, severity):
    result = spp(model, torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    found = {f.kind: f for f in result.findings}
    assert kind in KINDS
    assert (found[kind].severity if kind in found else None) == severity
    if severity == "error":
        with pytest.raises(AssertionError, match=kind):
            result.assert_healthy()
        assert not {f.kind for f in spp(model, torch.randn(64, 64), gradient=False).findings} & {kind}


def test_emptiness_that_the_variance_hides():
    """Zero padding keeps a pattern of its own in a chain of sigmoids, and nothing of the image."""
    torch.manual_seed(0)
    layers = [layer for i in range(8) for layer in (nn.Conv2d(12 if i else 1, 12, 3, padding=1), nn.Sigmoid())]
    points = rated(nn.Sequential(*layers), torch.randn(16, 1, 8, 8))
    assert points[-1].block.avg_channel_var > 1e-3
    assert rules._loss([p.sensitivity for p in points])[2] > -math.log10(rules.TOO_FAINT)


@pytest.mark.parametrize("units", [1.0, 1e4, 1e5])
def test_a_model_in_other_units_than_its_data_is_rough(units):
    """Scales that were measured on large inputs make small ones a ripple on an offset, which no rate can train."""
    torch.manual_seed(0)
    layers = [layer for _ in range(24) for layer in (nn.Linear(24, 24), nn.ReLU())]
    x = torch.randn(128, 24)
    converted = normfree.convert(nn.Sequential(*layers, nn.Linear(24, 3)), x * units)
    errors = {finding.kind for finding in normfree.spp(converted, x).findings if finding.severity == "error"}
    assert ("gradient_explosion" in errors) == bool(errors) == (units > 1)
