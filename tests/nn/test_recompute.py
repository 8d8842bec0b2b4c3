"""What is cheap to compute again is not kept: the same gradients, fewer tensors, through every transform."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from saved import saved_tensors
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from normfree.models import create_model
from normfree.nn import AveragePool2x2, ScaledConv2d, ScaledWSConv2d, build_activation, recompute
from normfree.nn.recompute import NOTED, Noted

SMALL = {"widths": (16, 24, 32, 40), "depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0}


def small(name="nf_regnet_b0", **overrides):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **{**SMALL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def keeping(model):
    """A copy that keeps what autograd keeps: no activation notes what it was made from."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Noted):
            module.__class__ = module.plain_class()
    return model


def gradients(model, x, **autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **{"enabled": False, **autocast}):
        loss = model(x).float().square().sum()
    loss.backward()  # outside of autocast, as documented for it
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_equal_gradients(one, other, x, **autocast):
    for actual, expected in zip(gradients(one, x, **autocast), gradients(other, x, **autocast), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", ["nf_regnet_b0", "nfnet_f0"])
def test_gradients_are_bitwise_those_of_what_is_kept(name, padding, autocast):
    model = small(name, padding=padding)
    x = torch.randn(3, 3, 40, 33)
    assert_equal_gradients(model, keeping(model), x, enabled=autocast)
    layout = torch.channels_last
    assert_equal_gradients(model.to(memory_format=layout), keeping(model), x.to(memory_format=layout))


def test_autocast_leaves_float64_alone():
    model = nn.Sequential(build_activation("silu")[0], ScaledWSConv2d(4, 3, 3)).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == keeping(model)(x).dtype == torch.float64
    assert_equal_gradients(model, keeping(model), x, enabled=True)


@pytest.mark.parametrize("kind", NOTED)
def test_an_activation_and_its_convolution_keep_one_tensor(kind):
    activation, _ = build_activation(kind())
    model = nn.Sequential(activation, ScaledWSConv2d(4, 3, 3, 2, padding="same"))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    kept = saved_tensors(model, x, maps_of=2)
    assert kept[0].data_ptr() == x.data_ptr()
    # PyTorch's own of these two keep something besides their input.
    assert len(kept) == (2 if kind in (nn.LogSigmoid, nn.Softsign) else 1)
    assert len(saved_tensors(keeping(model), x, maps_of=2)) == len(kept) + 1
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal_gradients(model, keeping(model), x, enabled=dtype == torch.bfloat16)


def test_a_pool_keeps_nothing_of_its_own():
    activation, _ = build_activation("silu")
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)

    def pooled(x):
        return AveragePool2x2()(activation(x))

    (kept,) = saved_tensors(pooled, x, maps_of=2)
    assert kept.data_ptr() == x.data_ptr()
    (actual,) = torch.autograd.grad(pooled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(F.avg_pool2d(F.silu(x), 2, 2, 0, True, False).square().sum(), x)
    assert torch.equal(actual, expected)
    assert torch.autograd.gradgradcheck(pooled, x)


@pytest.mark.parametrize("name", ["nf_regnet_b0", "nfnet_f0"])
def test_second_derivatives(name):
    model = small(name).double()
    x = torch.randn(2, 3, 33, 32, dtype=torch.float64, requires_grad=True)

    def second(model):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(model.parameters()), materialize_grads=True)

    for actual, expected in zip(second(model), second(keeping(model)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_per_example_gradients_by_vmap():
    model = small().double()
    x = torch.randn(3, 3, 32, 35, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values, example):
        return functional_call(model, values, (example[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(3):
        for actual, expected in zip(together.values(), gradients(model, x[index : index + 1]), strict=True):
            torch.testing.assert_close(actual[index], expected, rtol=1e-6, atol=1e-7)


def test_compiles_whole():
    activation, _ = build_activation("silu")
    pooled = nn.Sequential(activation, AveragePool2x2(), ScaledWSConv2d(3, 3, 1))
    model = nn.Sequential(ScaledWSConv2d(4, 3, 3, 2, padding="same"), pooled)
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(actual, expected)


class Checkpointed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


def test_checkpointing_and_offloading_see_what_is_kept():
    model = small()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    expected = gradients(model, x)
    assert len(saved_tensors(Checkpointed(model), x, maps_of=2)) <= 1
    assert all(torch.equal(a, b) for a, b in zip(gradients(Checkpointed(model), x), expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), expected, strict=True))


def test_nothing_is_noted_where_nothing_is_kept():
    activation, _ = build_activation("silu")
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    assert recompute.origin_of(activation(x)) is not None
    assert recompute.origin_of(activation(x.detach())) is None
    with torch.no_grad():
        assert recompute.origin_of(activation(x)) is None
    changed = activation(x)
    changed.add_(1)
    assert recompute.origin_of(changed) is None
    frozen = ScaledWSConv2d(2, 3, 3).requires_grad_(False)
    assert frozen(activation(x)).grad_fn.name() == "ConvolutionBackward0"


def test_a_model_without_values_trains_as_well():
    with torch.device("meta"):
        model = create_model("nfnet_f0")
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.stem.conv0.weight.grad.shape == (16, 3, 3, 3)


def test_no_trace_is_left():
    model = small().train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    gc.collect()
    assert len(recompute.ORIGINS) == 0
    torch.save(model.forward_features(torch.randn(2, 3, 32, 32)), io.BytesIO())  # a tensor with an origin
    again = pickle.loads(pickle.dumps(model))
    assert_equal_gradients(again, model, torch.randn(2, 3, 32, 32))


def test_what_is_not_known_to_be_the_same_each_time_is_kept():
    for activation in (lambda x: x * torch.sigmoid(x), nn.PReLU(), "relu", "tanh"):
        assert not isinstance(build_activation(activation)[0], Noted)


def test_a_source_that_changed_or_is_overwritten_is_not_trusted():
    torch.manual_seed(0)
    activation, _ = build_activation("silu")
    convolution = ScaledConv2d(4, 4, 3)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    gradients = []
    for in_place in (False, True):
        activation.inplace = in_place
        convolution.zero_grad()
        convolution(activation(x * 1)).square().sum().backward()
        gradients.append(convolution.weight.grad.clone())
    assert torch.equal(*gradients)
    assert not recompute.ORIGINS

    y = x * 2
    shifted = recompute.with_origin(y + 1, torch.add, y, torch.ones(()))
    y.add_(1)
    gradients = []
    for given in (shifted, shifted.detach()):
        convolution.zero_grad()
        convolution(given).square().sum().backward()
        gradients.append(convolution.weight.grad.clone())
    assert torch.equal(*gradients)
