"""A variance that leaves the planned by a factor of two is a finding, and the package's own plans hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

import normfree
from normfree.models import create_model
from normfree.signal.findings import PLAN_FACTOR, findings_of
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation

ENTRY = Entry(name="stem", shape=(8, 16, 8, 8), channel_axis=1, avg_channel_sq_mean=0.0, avg_channel_var=1.0)
BLOCK = BlockSignal(
    index=0,
    name="block",
    kind="residual",
    shape=ENTRY.shape,
    channel_axis=1,
    avg_channel_sq_mean=0.0,
    avg_channel_var=1.0,
    residual_avg_channel_var=1.0,
    expected_var=1.0,
)


def found_in(variances: list[float], *, entry: float = 1.0, **last: Any) -> Finding | None:
    """The finding on blocks of these variances, of which each is planned to be one."""
    blocks = [replace(BLOCK, index=i, avg_channel_var=v) for i, v in enumerate(variances)]
    blocks[-1] = replace(blocks[-1], **last)
    start = replace(ENTRY, avg_channel_var=entry)
    signal = SignalPropagation(model="by hand", mode="eval", input={}, entry=start, blocks=tuple(blocks))
    return next((each for each in findings_of(signal) if each.kind == "variance_plan"), None)


@pytest.mark.parametrize("factor", [PLAN_FACTOR, 1 / PLAN_FACTOR])
def test_just_within_and_just_without(factor):
    within, without = (factor ** (1 + side) for side in (-1e-3, 1e-3))
    assert found_in([1.0, within]) is None
    finding = found_in([1.0, without])
    assert finding is not None and (finding.severity, finding.block) == ("warning", 1)


def test_what_the_plan_does_not_speak_of_is_no_finding():
    assert found_in([0.1, 0.1, 0.1], entry=0.1) is None, "an input of another variance"
    assert found_in([1.0, 1.0, 0.2], averaged=True) is None, "an average pool in the shortcut"
    assert found_in([1.0, 0.2, 1.0], residual_avg_channel_var=None) is None, "a branch that is silent"
    assert found_in([1.0, 1.0, 0.2], expected_var=None) is None, "no plan"
    assert found_in([1.0, 1.0, 0.2], shape=(8, 16, 8, 3)) is None, "a map that is mostly padding"
    assert found_in([1.0, 1.0, 0.2], shape=(8, 16, 8, 4)) is not None
    assert found_in([1.0, 1.0, 0.2]) is not None


def example() -> dict[str, Any]:
    """The network of the tutorial."""
    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "design.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0], names)
    return names


def plan_finding(model: nn.Module, expected: list[float]) -> Finding | None:
    plot = normfree.spp(model, torch.randn(8, 3, 32, 32), expected_var=expected, gradient=False)
    assert f"(expected {expected[-1]:.4g})" in str(plot).splitlines()[len(expected)]
    return next((each for each in plot.findings if each.kind == "variance_plan"), None)


def test_another_alpha_than_the_plans_is_found():
    torch.manual_seed(0)
    net = example()["Net"]
    planned = [block.expected_var for block in net(alpha=1.0).plan]
    assert plan_finding(net(alpha=1.0), planned) is None
    model = net(alpha=1.0)
    for name, module in model.named_modules():
        if name.endswith("conv1"):
            module.alpha = 0.35
    finding = plan_finding(model, planned)
    assert finding is not None and "alpha" in finding.remedy and "squeeze" not in finding.remedy


class Gate(nn.Module):
    """Squeeze-excite, with the factor that keeps the variance, or without."""

    def __init__(self, channels: int, factor: float) -> None:
        super().__init__()
        self.factor, self.layers = factor, nn.Sequential(nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, channels))

    def forward(self, x):
        return x * (self.factor * torch.sigmoid(self.layers(x.mean((2, 3)))))[:, :, None, None]


@pytest.mark.parametrize("factor", [2.0, 1.0])
def test_a_gates_factor_that_is_forgotten_is_found(factor):
    torch.manual_seed(0)
    model = example()["Net"](depths=(3, 3), alpha=1.0)
    expected = [block.expected_var for block in model.plan]
    for block in model.blocks:
        block.conv1 = nn.Sequential(block.conv1, Gate(block.conv1.out_channels, factor))
        block.conv1[0].skip_gain = None
    finding = plan_finding(model, expected)
    assert (finding is None) == (factor == 2.0)
    assert finding is None or "squeeze-excite" in finding.remedy


def photographs(examples: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    images = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    crops = [
        images[i % 2][y : y + size, x : x + size].permute(2, 0, 1) / 255
        for i, (y, x) in enumerate(torch.randint(400 - size, (examples, 2)).tolist())
    ]
    return (torch.stack(crops) - 0.45) / 0.225


INPUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "gaussian": lambda size: torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)),
    "photographs": lambda size: photographs(4, size),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("nf_resnet50", {}, 64),
        ("nf_resnet50", {"use_se": True}, 32),
        ("nf_resnet50", {"alpha": 1.0}, 64),
        ("nf_regnet_b0", {}, 64),
        ("nf_regnet_b8", {}, 32),
        ("nfnet_f0", {}, 64),
    ],
)
def test_the_networks_of_this_package_keep_their_plan(name, options, size, kind):
    torch.manual_seed(0)
    plot = normfree.spp(create_model(name, **options), INPUTS[kind](size), gradient=False)
    assert all(block.expected_var for block in plot.blocks)
    assert "variance_plan" not in {finding.kind for finding in plot.findings}
