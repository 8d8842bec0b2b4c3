"""Activations: names, modules, functions and factories."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.nn import Elementwise, build_activation, gamma


class InplaceReLU(nn.Module):
    """Works in place without an ``inplace`` option to switch off."""

    def forward(self, x):
        return x.relu_()


class InplaceInTraining(nn.Module):
    """Works in place in training alone, and draws random numbers there."""

    def forward(self, x):
        return x.mul_(torch.rand(())) if self.training else x.relu()


class RandomInTraining(nn.Module):
    def forward(self, x):
        return x.relu() * torch.rand(()) if self.training else x.relu()


def test_names_compute_the_official_functions():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    gelu = build_activation("gelu")[0](x)
    cube = 0.7978845608028654 * (x + 0.044715 * x**3)
    torch.testing.assert_close(gelu, 0.5 * x * (1 + torch.tanh(cube)), rtol=1e-12, atol=1e-12)
    exact = build_activation("gelu_exact")[0](x)
    torch.testing.assert_close(exact, 0.5 * x * (1 + torch.erf(x / 2**0.5)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(build_activation("leaky_relu")[0](x), torch.where(x > 0, x, 0.01 * x))
    torch.testing.assert_close(build_activation("soft_sign")[0](x), x / (1 + x.abs()))


@pytest.mark.parametrize(
    "activation",
    [
        nn.Mish,
        nn.Mish(),
        F.mish,
        functools.partial(nn.Mish, inplace=True),
        lambda: nn.Mish(),
        nn.Mish(inplace=True),
    ],
)
def test_module_class_instance_function_and_factory_agree(activation):
    module, constant = build_activation(activation)
    x = torch.linspace(-3, 3, 9)
    kept = x.clone()
    torch.testing.assert_close(module(x), F.mish(kept))
    assert torch.equal(x, kept)
    assert constant == pytest.approx(gamma(F.mish), rel=1e-9)


def test_an_instance_is_copied():
    module = nn.ReLU(inplace=True)
    built, _ = build_activation(module)
    assert built is not module
    assert module.inplace


def test_functions_show_their_name():
    assert "mish" in repr(Elementwise(F.mish))


@pytest.mark.parametrize(
    ("activation", "rule"),
    [
        ("swiish", "unknown name"),
        (None, "must be a name or a callable"),
        (torch.relu_, "must not work in place"),
        (InplaceReLU(), r"must not work in place; pass one that returns a new tensor"),
        (InplaceReLU, "must not work in place"),
        (nn.Sequential(nn.Identity(), InplaceReLU()), "must not work in place"),
        (InplaceInTraining().eval(), "must not work in place"),
        (lambda x: x.clamp_(-6, 6), "must not work in place"),
        (lambda: 3, "a factory must return a module"),
        (torch.add, "must take a tensor"),
        (nn.Dropout(0.1), "draws random numbers, so it has no gamma; pass a function of its input alone"),
        (nn.RReLU, "draws random numbers"),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.01)).eval(), "draws random numbers"),
        (torch.dropout, "must take a tensor"),
    ],
)
def test_refusals(activation, rule):
    with pytest.raises(ValueError, match=rf"(?s)^activation=.*{rule}"):
        build_activation(activation)


def test_the_check_leaves_no_trace():
    module = RandomInTraining().eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers"):
        build_activation(module)
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.training
    assert not build_activation(nn.Mish().eval())[0].training
    assert build_activation(nn.PReLU)[0].weight.dtype == torch.float32
