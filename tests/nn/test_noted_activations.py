"""An origin is of what the activation computed, whatever others make of its output."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from normfree.nn import ScaledWSConv2d, build_activation, fold, recompute
from normfree.nn.recompute import NOTED, Noted


def doubled(module, inputs, output):
    """A forward hook that puts another tensor in the output's place."""
    return 2 * output if isinstance(module, (Noted, *NOTED)) else None


def doubled_in_place(module, inputs, output):
    if isinstance(module, (Noted, *NOTED)):
        with torch.no_grad():
            output.mul_(2)


def globally(hook, activation):
    return nn.modules.module.register_module_forward_hook(hook)


def first(hook, activation):
    return activation.register_forward_hook(hook, prepend=True)


def last(hook, activation):
    return activation.register_forward_hook(hook)


def weight_gradient(activation, x, call=lambda activation, x: activation(x)):
    torch.manual_seed(0)
    convolution = ScaledWSConv2d(3, 4, 3)
    convolution(call(activation, x)).square().sum().backward()
    return convolution.weight.grad


@pytest.mark.parametrize("hook", [doubled, doubled_in_place])
@pytest.mark.parametrize("registered", [globally, first, last])
def test_hooks_that_change_the_output_change_the_gradient(registered, hook):
    x = torch.randn(2, 3, 6, 6)
    gradients = []
    for kind in (nn.SiLU, lambda: build_activation("silu")[0]):
        activation = kind()
        handle = registered(hook, activation)
        gradients.append(weight_gradient(activation, x.clone().requires_grad_()))
        handle.remove()
    assert torch.equal(*gradients)


def test_a_hook_before_that_changes_the_input_is_seen():
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    gradients = []
    for activation in (nn.SiLU(), build_activation("silu")[0]):
        activation.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
        gradients.append(weight_gradient(activation, x))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", NOTED)
def test_options_changed_before_the_backward_pass_do_not_matter(kind):
    x = torch.randn(2, 3, 6, 6)

    def twisted(activation, x):
        output = activation(x)
        for option in {"alpha", "beta", "negative_slope", "threshold", "max_val"} & {*vars(activation)}:
            setattr(activation, option, 0.3)
        activation.inplace = True
        return output

    expected = weight_gradient(kind(), x.clone().requires_grad_())
    activation, _ = build_activation(kind)
    assert torch.equal(weight_gradient(activation, x.clone().requires_grad_(), twisted), expected)


@pytest.mark.parametrize("kind", NOTED)
def test_it_is_torchs_activation_in_all_else(kind):
    activation, _ = build_activation(kind())
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert isinstance(activation, kind)
    assert repr(activation) == repr(kind())
    assert recompute.origin_of(activation(input=x)) is not None
    for twin in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        assert type(twin) is type(activation)
        assert torch.equal(twin(x), kind()(x))
    assert type(fold(nn.Sequential(activation))[0]) is kind
    assert torch.equal(functional_call(activation, {}, (x,)), kind()(x))
    torch.testing.assert_close(jvp(activation, (x,), (x,)), jvp(kind(), (x,), (x,)))


def test_folding_keeps_an_activations_hooks_and_a_subclass():
    class Shifted(type(build_activation("silu")[0])):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(build_activation("silu")[0], Shifted())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(3)
    folded = fold(model)
    assert torch.equal(folded(x), model(x))
    assert len(seen) == 2
    assert type(folded[0]) is nn.SiLU
