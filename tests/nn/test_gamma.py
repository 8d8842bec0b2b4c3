"""Gamma: closed forms, the official constants, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.nn import ACTIVATIONS, OFFICIAL_GAMMA, build_activation, gamma
from normfree.nn.activations import OWN_GAMMA

RELU = math.sqrt(2 / (1 - 1 / math.pi))


def leaky_relu_gamma(slope: float) -> float:
    # E[y^2] = (1 + slope^2) / 2 and E[y] = (1 - slope) / sqrt(2 pi).
    return ((1 + slope**2) / 2 - (1 - slope) ** 2 / (2 * math.pi)) ** -0.5


def normal_cdf(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


def step_gamma(at: float) -> float:
    above = 1 - normal_cdf(at)
    return (above * (1 - above)) ** -0.5


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (torch.relu, RELU),
        (F.relu_, RELU),
        (nn.ReLU(inplace=True), RELU),
        (nn.Identity(), 1.0),
        (lambda x: 1000 - 3 * x, 1 / 3),
        (nn.LeakyReLU(0.3), leaky_relu_gamma(0.3)),
        (lambda x: (x > 0.123456).to(x.dtype), step_gamma(0.123456)),
        (lambda x: (x > 0.123456).float(), step_gamma(0.123456)),
        (torch.square, 1 / math.sqrt(2)),
        (torch.exp, (math.e**2 - math.e) ** -0.5),
        (torch.sin, ((1 - math.exp(-2)) / 2) ** -0.5),
        # A kink far from the grid and a narrow bump, x in [0.7, 0.71].
        (lambda x: torch.relu(x - 1 / 3) + torch.relu(1 / 3 - x), None),
        (lambda x: ((x > 0.7) & (x < 0.73)).to(x.dtype), None),
    ],
)
def test_quadrature_equals_closed_form(activation, expected):
    if expected is None:
        # |x - c| has second moment 1 + c^2; an indicator's variance is p (1 - p).
        c = 1 / 3
        mean = c * (2 * normal_cdf(c) - 1) + 2 * math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
        share = normal_cdf(0.73) - normal_cdf(0.7)
        is_bump = float(activation(torch.tensor(0.0))) == 0
        expected = (share * (1 - share) if is_bump else 1 + c * c - mean * mean) ** -0.5
    assert gamma(activation) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_official_constants_are_within_one_percent_of_the_integral(name):
    module, constant = build_activation(name)
    assert constant == {**OFFICIAL_GAMMA, **OWN_GAMMA}[name] == gamma(name)
    assert gamma(module) == pytest.approx(constant, rel=1e-2)


@pytest.mark.parametrize("name", sorted(OWN_GAMMA))
def test_our_own_constants_are_the_integral(name):
    assert gamma(build_activation(name)[0]) == pytest.approx(OWN_GAMMA[name], rel=1e-9)
    assert name not in OFFICIAL_GAMMA


def test_only_the_two_official_functions_that_mix_elements_have_no_module():
    assert set(OFFICIAL_GAMMA) - set(ACTIVATIONS) == {"glu", "log_softmax"}
    assert set(ACTIVATIONS) <= {*OFFICIAL_GAMMA, *OWN_GAMMA}


def test_module_and_random_state_are_untouched():
    module = nn.PReLU(init=0.1).train()
    state = torch.get_rng_state()
    assert gamma(module) == pytest.approx(leaky_relu_gamma(0.1), rel=1e-6)
    assert module.weight.dtype == torch.float32
    assert module.training
    assert module.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("activation", "rule"),
    [
        ("rellu", "did you mean relu"),
        ("qqq", "choose one of celu"),
        (3, "must be a name or a callable"),
        (lambda x: torch.softmax(x, -1), "must be elementwise"),
        (torch.rand_like, "must be elementwise and deterministic"),
        (lambda x: F.log_softmax(x, dim=1), "must take a tensor of any shape"),
        (F.glu, "must take a tensor of any shape|input's shape"),
        (torch.zeros_like, "must not be constant"),
        (torch.log, "must be finite"),
        (lambda x: torch.sign(torch.sin(3e7 * x)), "oscillates too fast"),
        (lambda x: torch.exp(x * x), "variance is infinite"),
        (lambda x: torch.exp(x * x / 3), "variance is infinite"),
        (lambda x: 1 / x, "variance is infinite"),
        (lambda x: x.abs() ** -0.5, "variance is infinite"),
        (lambda x: x.tolist(), "input's shape"),
        (torch.add, "must take a tensor of any shape"),
    ],
)
def test_refusals_name_argument_rule_and_remedy(activation, rule):
    with pytest.raises(ValueError, match=rf"^activation=.*({rule})"):
        gamma(activation)
