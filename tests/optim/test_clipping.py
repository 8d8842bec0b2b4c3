"""Adaptive gradient clipping against its equation, over every layout, precision and sort of gradient."""

import copy
import inspect
import math

import numpy as np
import optim_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normfree
from normfree.optim import AdaptiveGradientClipping, clip_grad_adaptive_

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), "linear", 1),
    "linear to one": (lambda: nn.Linear(6, 1), "linear", 1),
    "linear from one": (lambda: nn.Linear(1, 6), "linear", 1),
    "embedding": (lambda: nn.Embedding(7, 3), "linear", 1),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "linear", 1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), "conv", 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), "conv", 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3)), "conv", 1),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), "conv", 1),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=4), "conv", 1),
    "depthwise 1x1": (lambda: nn.Conv2d(4, 4, 1, groups=4), "conv", 1),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), "transposed", 1),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3), "transposed", 1),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(3, 2, 2), "transposed", 1),
    "grouped transposed conv2d": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), "transposed", 2),
    "depthwise transposed conv1d": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), "transposed", 4),
    "scaled convolution": (lambda: normfree.nn.ScaledWSConv2d(4, 6, 3, skip_gain=0.0), "conv", 1),
    "complex": (lambda: nn.Linear(5, 3, dtype=torch.complex128), "linear", 1),
    "channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), "conv", 1),
}


def with_gradients(model, dtype=torch.float64, scale=0.02, seed=0):
    """Gradients around the clipping threshold, so that some units are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        kind = parameter.dtype if parameter.is_complex() else dtype
        rows = torch.logspace(-1.5, 1.5, parameter.shape[0] if parameter.dim() else 1, dtype=torch.float64)
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.promote_types(kind, torch.float64))
        drawn = drawn * rows[torch.randperm(len(rows), generator=generator)].view(-1, *[1] * (drawn.dim() - 1))
        parameter.data = parameter.data.to(kind)
        parameter.grad = torch.empty_like(parameter).copy_((drawn * scale).reshape(parameter.shape))
    return model


def clipped_in_numpy(model, kind, groups, clip_factor, eps):
    expected, count, total = {}, 0, 0
    for name, parameter in model.named_parameters():
        weight, gradient = parameter.detach().numpy(), parameter.grad.numpy()
        expected[name], some, units = optim_reference.clip(weight, gradient, kind, groups, clip_factor, eps)
        count, total = count + some, total + units
    return expected, count / total


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layout_equals_numpy(layer):
    build, kind, groups = LAYERS[layer]
    torch.manual_seed(1)
    model = with_gradients(build())
    expected, fraction = clipped_in_numpy(model, kind, groups, 0.02, 1e-3)
    found = clip_grad_adaptive_(model, 0.02, exclude=())
    assert found.shape == () and found.item() == pytest.approx(fraction, abs=1e-7)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), expected[name], rtol=1e-12, atol=0)


def test_by_hand():
    # Rows of norm 5 and 0.0001: limits 0.5 and, from the floor, 0.1 * 0.001; gradients of norm 1 and 1e-5.
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0], [1e-4, 0.0]])
    model.weight.grad = torch.tensor([[0.6, 0.8], [1e-5, 0.0]])
    assert clip_grad_adaptive_(model, 0.1, 1e-3, exclude=()) == 0.5
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.3, 0.4], [1e-5, 0.0]]))


def test_the_papers_constants_are_the_defaults():
    for function in (clip_grad_adaptive_, AdaptiveGradientClipping):
        defaults = inspect.signature(function).parameters
        assert defaults["clip_factor"].default == 0.01 and defaults["eps"].default == 1e-3


def norms(tensor):
    return tensor.flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.norm()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), clip_factor=st.floats(1e-4, 1.0), eps=st.floats(1e-6, 1.0), scale=st.floats(1e-6, 1e6)
)
def test_properties(seed, clip_factor, eps, scale):
    """No unit is longer than its limit, none turns, none that was short enough changes, and twice is once."""
    torch.manual_seed(seed)
    model = with_gradients(nn.Sequential(nn.Conv1d(3, 4, 2), nn.Linear(2, 5)), scale=scale, seed=seed)
    before = copy.deepcopy(model)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        old.grad = new.grad.clone()
    fraction = clip_grad_adaptive_(model, clip_factor, eps, exclude=())
    assert 0 <= fraction <= 1
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        limit = clip_factor * norms(old.detach()).clamp_min(eps)
        assert bool((norms(new.grad) <= limit * (1 + 1e-12)).all())
        short = (norms(old.grad) <= limit * (1 - 1e-12)).view(-1, *[1] * (old.dim() - 1))
        assert torch.equal(torch.where(short, new.grad, 0), torch.where(short, old.grad, 0))
        cosine = (old.grad * new.grad).sum() / (old.grad.norm() * new.grad.norm())
        assert old.dim() > 1 or cosine > 1 - 1e-9
    once = [parameter.grad.clone() for parameter in model.parameters()]
    clip_grad_adaptive_(model, clip_factor * (1 + 1e-9), eps, exclude=())
    assert all(torch.equal(a, p.grad) for a, p in zip(once, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "row"),
    [
        (torch.bfloat16, [2.0, 0.109375]),  # of norm 2.003, which bfloat16 would round to the limit
        (torch.float16, [400.0] * 40_000),  # of norm 80 000, which float16 does not have
    ],
)
def test_half_precision_is_measured_in_float32(dtype, row):
    model = nn.Linear(40_000, 2, bias=False, dtype=dtype)
    nn.init.ones_(model.weight)  # norm 200, limit 2
    gradient = torch.zeros(2, 40_000)
    gradient[:, : len(row)] = torch.tensor(row)
    model.weight.grad = gradient.to(dtype)
    assert clip_grad_adaptive_(model, 0.01, exclude=()) == 1
    expected = (gradient * (2 / gradient[0].double().norm())).to(dtype)
    assert model.weight.grad.dtype == dtype
    torch.testing.assert_close(model.weight.grad, expected)


def test_pairs_have_their_outputs_on_axis_0_and_no_gradient_is_nothing_to_do():
    model = with_gradients(nn.Linear(6, 4))
    twin = copy.deepcopy(model)
    twin.weight.grad, twin.bias.grad = model.weight.grad.clone(), None
    clip_grad_adaptive_(model)  # the weight of the final linear layer is left alone
    assert torch.equal(model.weight.grad, twin.weight.grad)
    clip_grad_adaptive_(model, exclude=())
    clip_grad_adaptive_([("w", twin.weight), ("b", twin.bias)], exclude=())
    assert torch.equal(model.weight.grad, twin.weight.grad) and twin.bias.grad is None
    assert clip_grad_adaptive_(nn.Linear(3, 2), exclude=()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stay_so(bad):
    model = with_gradients(nn.Linear(6, 4))
    model.weight.grad[1, 2] = bad
    clip_grad_adaptive_(model, exclude=())
    finite = torch.isfinite(model.weight.grad)
    assert not finite[1, 2] and bool(finite[[0, 2, 3]].all())


def test_a_norm_that_overflows_leaves_zero():
    model = nn.Linear(4, 2, bias=False)
    model.weight.grad = torch.full_like(model.weight, 1e30)
    assert clip_grad_adaptive_(model, exclude=()) == 1 and model.weight.grad.abs().max() == 0


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(9, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"weight.*sparse_coo.*sparse=False"):
        clip_grad_adaptive_(embedding, exclude=())


class Kernels(TorchDispatchMode):
    """Counts the operations that would start a kernel: all but views and the fused ones' slices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return result


def test_a_whole_network_takes_few_operations():
    """Two norms for each weight, a product for each parameter, and a handful for all the rest."""
    model = normfree.create_model("nf_resnet50", width=0.25)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = sum(p.dim() > 1 for p in model.parameters()) - 1
    products = len(list(model.parameters())) - 1
    with Kernels() as kernels:
        clip_grad_adaptive_(model)
    assert kernels.count <= 2 * weights + products + 15
