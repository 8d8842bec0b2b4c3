"""Scaled weight standardization against straight-line NumPy, naive autograd, and its own laws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from normfree.nn import ScaledConv2d, ScaledWSConv2d, fold, standardize
from normfree.nn.standardization import StandardizeRows

GEOMETRIES = [
    # in, out, kernel, stride, dilation, groups, height, width
    (3, 4, 3, 1, 1, 1, 6, 6),
    (3, 4, 3, 2, 1, 1, 8, 5),
    (4, 6, (3, 5), (2, 1), 1, 2, 7, 10),
    (4, 4, 3, 2, 1, 4, 8, 8),
    (4, 8, 3, 1, 2, 1, 9, 7),
    (3, 2, 7, 2, 1, 1, 12, 9),
    (5, 4, 1, 2, 1, 1, 5, 6),
]


def numpy_standardize(weight, gain, scale=1.0):
    rows = weight.reshape(len(weight), -1)
    fan_in = rows.shape[1]
    mean = rows.mean(axis=1, keepdims=True)
    variance = ((rows - mean) ** 2).mean(axis=1, keepdims=True)
    rows = (rows - mean) * gain.reshape(-1, 1) * scale / np.sqrt(np.maximum(fan_in * variance, 1e-4))
    return rows.reshape(weight.shape)


def numpy_pads(size, kernel, stride, dilation, padding):
    if padding == "symmetric":
        return ((kernel - 1) // 2 * dilation,) * 2
    total = max((int(np.ceil(size / stride)) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def numpy_convolve(x, weight, bias, stride, dilation, groups, padding):
    kernels = weight.shape[2:]
    pads = [numpy_pads(x.shape[2 + i], kernels[i], stride[i], dilation, padding) for i in (0, 1)]
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    outs = [(x.shape[2 + i] - (kernels[i] - 1) * dilation - 1) // stride[i] + 1 for i in (0, 1)]
    y = np.zeros((len(x), len(weight), *outs))
    for o, r, c in np.ndindex(y.shape[1:]):
        first = o // (len(weight) // groups) * weight.shape[1]
        rows = r * stride[0] + dilation * np.arange(kernels[0])
        columns = c * stride[1] + dilation * np.arange(kernels[1])
        window = x[:, first : first + weight.shape[1]][:, :, rows][:, :, :, columns]
        y[:, o, r, c] = (window * weight[o]).sum(axis=(1, 2, 3)) + bias[o]
    return y


def naive_standardize(weight, gain, scale):
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = ((weight - mean) ** 2).mean((1, 2, 3), keepdim=True)
    floored = torch.clamp(variance * weight[0].numel(), min=1e-4)
    return gain[:, None, None, None] * scale * (weight - mean) / floored.sqrt()


def weight_with_floored_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows on both sides of the floor: ordinary, small, tiny, constant, zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    weight[1] *= 1e-2
    weight[2] = 0.7 + weight[2] * 1e-4
    weight[3] = -0.3
    weight[4] = 0.0
    gain = torch.randn(6, generator=generator, dtype=torch.float64)
    return weight, gain


def randomised(convolution: nn.Module) -> nn.Module:
    for parameter in convolution.parameters():
        nn.init.normal_(parameter)
    return convolution


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("kind", [ScaledWSConv2d, ScaledConv2d])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_equals_numpy(geometry, kind, padding):
    torch.manual_seed(0)
    inputs, outputs, kernel, stride, dilation, groups, height, width = geometry
    layer = kind(inputs, outputs, kernel, stride, padding=padding, dilation=dilation, groups=groups, input_scale=1.7)
    layer = randomised(layer).double()
    x = torch.randn(2, inputs, height, width, dtype=torch.float64)
    weight = layer.weight.detach().numpy()
    weight = numpy_standardize(weight, layer.gain.detach().numpy(), 1.7) if kind is ScaledWSConv2d else 1.7 * weight
    expected = numpy_convolve(x.numpy(), weight, layer.bias.detach().numpy(), layer.stride, dilation, groups, padding)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_standardization_equals_numpy_on_both_sides_of_the_floor(dtype, tolerance):
    weight, gain = weight_with_floored_rows()
    expected = numpy_standardize(weight.numpy(), gain.numpy(), 1.3)
    actual = standardize(weight.to(dtype), gain.to(dtype), 1.3).numpy()
    floored = 1e-2 if dtype is torch.float32 else 1e-12  # a tiny deviation around 0.7 has few float32 digits
    np.testing.assert_allclose(actual[[0, 1, 5]], expected[[0, 1, 5]], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(actual[[2, 3, 4]], expected[[2, 3, 4]], rtol=0, atol=floored)


def test_filters_sum_to_zero_and_have_the_norm_of_their_gain():
    layer = randomised(ScaledWSConv2d(5, 7, 3, input_scale=2.0)).double()
    weight = layer.effective()[0]
    assert weight.sum((1, 2, 3)).abs().max() < 1e-13
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), 2 * layer.gain.abs())


def test_draw_is_lecun_bias_zero_gain_one_and_reset_restores_it():
    torch.manual_seed(0)
    layer = ScaledWSConv2d(32, 64, 3, groups=2)
    randomised(layer).reset_parameters()
    assert layer.weight.std().item() == pytest.approx((16 * 9) ** -0.5, rel=0.03)
    assert not layer.bias.any()
    assert layer.gain.eq(1).all()
    assert ScaledConv2d(64, 64, 3, init_scale=2.0).weight.std().item() == pytest.approx(2 / 24, rel=0.03)


def test_no_native_norm_is_given_an_epsilon_of_zero(monkeypatch):
    """Torch before 2.15 refuses it."""
    given = []
    plain = torch.nn.functional.batch_norm
    monkeypatch.setattr(
        "torch.nn.functional.batch_norm", lambda *args, eps, **more: given.append(eps) or plain(*args, eps=eps, **more)
    )
    StandardizeRows.apply(torch.randn(3, 4), torch.ones(3), 1.0)
    assert given and min(given) > 0


def test_gradients_equal_a_naive_composition_on_both_sides_of_the_floor():
    weight, gain = (tensor.requires_grad_() for tensor in weight_with_floored_rows())
    upstream = torch.randn(weight.shape, dtype=torch.float64)
    actual = torch.autograd.grad(standardize(weight, gain, 1.3), (weight, gain), upstream)
    expected = torch.autograd.grad(naive_standardize(weight, gain, 1.3), (weight, gain), upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_first_and_second_derivatives_by_finite_differences():
    weight, gain = weight_with_floored_rows()
    rows = weight.flatten(1)[[0, 1, 2, 4]].clone().requires_grad_()
    gain = gain[[0, 1, 2, 4]].clone().requires_grad_()

    def function(rows: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return StandardizeRows.apply(rows, gain, 1.3)[0]

    assert torch.autograd.gradcheck(function, (rows, gain), eps=1e-8, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, (rows, gain), eps=1e-8, atol=1e-3)


def ending(kind, alpha, skip_gain, **options):
    """A layer that ends a branch, and its twin that does not."""
    layer = randomised(kind(3, 4, 3, alpha=alpha, skip_gain=skip_gain, **options)).double()
    twin = copy.deepcopy(layer)
    twin.set_branch_scale(1.0, None)
    return layer, twin


@pytest.mark.parametrize("skip_gain", [None, 0.7])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("kind", [ScaledWSConv2d, ScaledConv2d])
def test_alpha_and_the_skip_gain_are_factors_of_the_output(kind, alpha, skip_gain):
    layer, twin = ending(kind, alpha, skip_gain, input_scale=0.5)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    factor = alpha * (1 if skip_gain is None else layer.skip_gain)
    torch.testing.assert_close(layer(x), factor * twin(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, *layer.effective(), padding=1))
    assert ("skip_gain" in layer.state_dict()) == (skip_gain is not None)


def test_gradient_of_the_skip_gain_is_exact():
    layer, twin = ending(ScaledWSConv2d, 0.2, 0.7)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    (folded,) = torch.autograd.grad(layer(x).square().sum(), layer.skip_gain)
    (explicit,) = torch.autograd.grad((0.2 * layer.skip_gain * twin(x)).square().sum(), layer.skip_gain)
    torch.testing.assert_close(folded, explicit, rtol=1e-11, atol=0)


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"alpha": "big"}, {"skip_gain": float("nan")}])
def test_factors_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScaledConv2d(3, 4, 3, **wrong)


def test_without_bias():
    layer = ScaledWSConv2d(3, 4, 3, bias=False, alpha=2.0)
    assert layer.effective()[1] is None
    assert layer(torch.randn(1, 3, 4, 4)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_standardised_in_float32(dtype):
    layer = ScaledWSConv2d(16, 8, 3)
    expected = layer.to(dtype).float().effective()[0]
    actual = layer.to(dtype).effective()[0]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype))


def test_channels_last_layout_is_kept():
    layer = ScaledWSConv2d(6, 4, 3)
    expected = layer.effective()[0].clone()
    actual = layer.to(memory_format=torch.channels_last).effective()[0]
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected)


def test_torch_func_transforms():
    layer = randomised(ScaledWSConv2d(2, 3, 3)).double()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def loss(values: dict[str, torch.Tensor], example: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, values, (example[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for name in parameters:
        singles = torch.stack([grad(loss)(parameters, example)[name] for example in x])
        torch.testing.assert_close(per_sample[name], singles)
    gains = torch.stack([parameters["gain"], 3 * parameters["gain"]])
    by_gains = vmap(lambda gain: loss({**parameters, "gain": gain}, x[0]))(gains)
    torch.testing.assert_close(by_gains[0], loss(parameters, x[0]))
    ensemble = {name: torch.stack([value, -2 * value]) for name, value in parameters.items()}
    losses = vmap(loss, in_dims=(0, None))(ensemble, x[0])
    torch.testing.assert_close(losses[0], loss(parameters, x[0]))

    def by_gain(gain: torch.Tensor) -> torch.Tensor:
        return loss({**parameters, "gain": gain}, x[0])

    torch.testing.assert_close(jacrev(jacrev(by_gain))(parameters["gain"]), _hessian(by_gain, parameters["gain"]))


def _hessian(function, point):
    return torch.autograd.functional.hessian(function, point)


def test_compiles_whole():
    layer = randomised(ScaledWSConv2d(3, 4, 3, 2, padding="same", alpha=0.2, skip_gain=0.5))
    x = torch.randn(2, 3, 8, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, actual = layer(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    (one,) = torch.autograd.grad(actual.square().sum(), layer.weight)
    (other,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [ScaledConv2d, ScaledWSConv2d])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "padding"), [(3, "symmetric"), (4, "same"), (3, (2, 1))])
def test_padding_modes_are_torchs(kind, mode, kernel, padding):
    layer = kind(3, 4, kernel, padding=padding, padding_mode=mode, input_scale=1.7).double()
    own = 1 if padding == "symmetric" else padding
    reference = nn.Conv2d(3, 4, kernel, padding=own, padding_mode=mode).double()
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), layer.effective(), strict=True):
            parameter.copy_(value)
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
        assert torch.equal(layer(x), reference(x))
        assert torch.equal(fold(layer)(x), reference(x))


def test_refusals():
    with pytest.raises(ValueError, match=r"^fan_in=1: .*always zero; use ScaledConv2d"):
        ScaledWSConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"^padding='valid': unknown choice; choose one of 'symmetric', 'same'"):
        ScaledWSConv2d(4, 4, 3, padding="valid")
