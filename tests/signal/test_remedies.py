"""Each kind of finding: its lines of Python run, the finding goes, and its place in the documentation is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import normfree
from normfree.signal import KINDS

DOCS = Path(__file__).parents[2]
X = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """``y = x + gain * conv(relu(x))``."""

    def __init__(self, std=1 / 6, gain=None, bias=0.0):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=std)
        nn.init.constant_(self.conv.bias, bias)
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        y = self.conv(torch.relu(x))
        return x + (y if self.gain is None else self.gain * y)


class Adapted(nn.Module):
    """A branch whose gate a layer computes (adaLN)."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x):
        return x + self.gate(x.mean((2, 3)))[:, :, None, None] * self.conv(torch.relu(x))


def images(*blocks):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks)


def dense(count, activation=nn.ReLU, gain=None, norm=None):
    layers = [nn.Linear(32, 32) for _ in range(count)]
    for layer in layers:
        if gain is not None:
            nn.init.normal_(layer.weight, std=gain * 32**-0.5)
            nn.init.zeros_(layer.bias)
    parts = [part for layer in layers for part in (layer, *([norm(32)] if norm else []), activation())]
    return nn.Sequential(*parts, nn.Linear(32, 4))


def changed(model, change):
    with torch.no_grad():
        change(model)
    return model


class Operation(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


SICK = {
    "explosion": [
        lambda: (images(*(Block() for _ in range(20))), IMAGES),
        lambda: (dense(12, gain=4.0), X),
    ],
    "attenuation": [lambda: (dense(12), X), lambda: (dense(12, nn.Tanh), X)],
    "mean_shift": [lambda: (images(*(Block(std=0.05, bias=0.3) for _ in range(8))), IMAGES)],
    "branch_variance": [
        lambda: (images(*(Block(std=0.02) for _ in range(3))), IMAGES),
        lambda: (images(*(Block(std=0.9) for _ in range(3))), IMAGES),
    ],
    "silenced_branch": [
        lambda: (images(*(Block(gain=0.0) for _ in range(3))), IMAGES),
        lambda: (images(*(Adapted() for _ in range(3))), IMAGES),
        lambda: (images(Block(std=0.0), Block()), IMAGES),
    ],
    "dead_channels": [
        lambda: (changed(dense(3, gain=1.5), lambda m: m[2].weight[:8].zero_()), X),
        lambda: (changed(dense(3), lambda m: m[0].bias.fill_(-50.0)), X),
    ],
    "zero_layer": [lambda: (changed(dense(3), lambda m: m[-1].weight.zero_()), X)],
    "correlation_collapse": [lambda: (changed(dense(20), lambda m: [p.mul_(1.5) for p in m.parameters()]), X)],
    "gradient_explosion": [
        lambda: (dense(30, nn.Tanh, gain=3.0), X),
        lambda: (dense(45, norm=nn.BatchNorm1d), X),
    ],
    "gradient_vanishing": [lambda: (dense(10, nn.Sigmoid, gain=1.0), X)],
    "non_finite": [
        lambda: (nn.Sequential(nn.Linear(32, 32), Operation(torch.log), nn.Linear(32, 4)), X),
        lambda: (dense(150, gain=4.0), X),
    ],
}
CASES = [(kind, number) for kind, made in SICK.items() for number in range(len(made))]


def found(model, batch, kind):
    return [finding for finding in normfree.spp(model, batch).findings if finding.kind == kind]


@pytest.mark.parametrize(("kind", "number"), CASES, ids=[f"{kind} {number}" for kind, number in CASES])
def test_the_remedy_can_be_pasted_and_the_finding_goes(kind, number):
    torch.manual_seed(0)
    model, batch = SICK[kind][number]()
    for finding in (findings := found(model, batch, kind)):
        assert finding.code and finding.remedy
    assert findings
    names = {"model": model, "batch": batch}
    exec(findings[0].code, names)
    assert not found(names["model"], batch, kind)


def test_a_gradient_that_is_not_finite_is_traced_to_its_line():
    distance = Operation(lambda x: x + (x * 0).square().sum(1, keepdim=True).sqrt())  # a norm of zero has no derivative
    model = nn.Sequential(nn.Linear(32, 32), distance, nn.Linear(32, 4))
    (finding,) = found(model, X, "gradient_explosion")
    with pytest.raises(RuntimeError, match="returned nan"), pytest.warns(UserWarning, match=r"has no derivative"):
        exec(finding.code, {"model": model, "batch": X})


def test_every_kind_is_tried_and_has_its_place_in_the_documentation():
    assert set(SICK) == set(KINDS)
    torch.manual_seed(0)
    for kind, number in CASES:
        model, batch = SICK[kind][number]()
        for finding in normfree.spp(model, batch, gradient=kind.startswith("gradient")).findings:
            page, anchor = finding.docs.split("#")
            assert anchor == finding.kind
            assert re.search(rf"^### {anchor}$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE), finding.docs
    page = (DOCS / "docs" / "signal.md").read_text(encoding="utf-8")
    assert all(f"\n### {kind}\n" in page and f"[`{kind}`](#{kind})" in page for kind in KINDS)


def test_a_failed_assertion_shows_the_remedy():
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=r"(?s)See docs/signal.md#attenuation.\nimport normfree"):
        normfree.spp(dense(12), X).assert_healthy()
