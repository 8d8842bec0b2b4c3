"""Standardised layers of every layout, with and without a kept mean."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from normfree import nn as ours

LAYERS = {
    "1d": (ours.ScaledWSConv1d, ours.KeptMeanConv1d, (8, 12, 3), {"groups": 2}, (8, 8, 200)),
    "2d": (ours.ScaledWSConv2d, ours.KeptMeanConv2d, (8, 12, 3), {"groups": 4}, (8, 8, 20, 20)),
    "depthwise": (ours.ScaledWSConv2d, ours.KeptMeanConv2d, (64, 64, 3), {"groups": 64}, (8, 64, 20, 20)),
    "3d": (ours.ScaledWSConv3d, ours.KeptMeanConv3d, (8, 12, 3), {}, (4, 8, 9, 9, 9)),
    "up 1d": (ours.ScaledWSConvTranspose1d, ours.KeptMeanConvTranspose1d, (8, 12, 4), {"stride": 2}, (8, 8, 100)),
    "up 2d": (
        ours.ScaledWSConvTranspose2d,
        ours.KeptMeanConvTranspose2d,
        (8, 12, 4),
        {"stride": 2, "groups": 2, "padding": 1, "output_padding": 1},
        (8, 8, 20, 20),
    ),
    "up 3d": (ours.ScaledWSConvTranspose3d, ours.KeptMeanConvTranspose3d, (8, 12, 2), {"stride": 2}, (4, 8, 6, 6, 6)),
    "linear": (ours.ScaledWSLinear, ours.KeptMeanLinear, (32, 64), {}, (500, 32)),
}


def filters_of(layer, weight):
    """Filters [O, fan-in], gathered index by index."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight.flatten(1)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    rows = []
    for o in range(layer.out_channels):
        group = o // outputs
        rows.append(torch.cat([weight[group * inputs + i, o % outputs].flatten() for i in range(inputs)]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", LAYERS)
def test_variance_is_preserved_and_filters_sum_to_zero(name):
    kind, _, sizes, options, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = kind(*sizes, input_scale=1 / 3, **options)
    filters = filters_of(layer, layer.effective()[0])
    assert filters.sum(1).abs().max() < 1e-5
    with torch.no_grad():
        variance = float(layer(3 * torch.randn(*shape)).var())
    # zero padding and cropped edges take less than a tenth; the filters' norms are exact
    assert variance == pytest.approx(1, abs=0.1)
    taps = math.prod(layer.stride) if "up" in name else 1
    torch.testing.assert_close(filters.norm(dim=1), torch.full((len(filters),), taps**0.5 / 3))


@pytest.mark.parametrize("name", LAYERS)
def test_folded_layers_are_plain_and_the_same(name):
    for kind in LAYERS[name][:2]:
        _, _, sizes, options, shape = LAYERS[name]
        torch.manual_seed(0)
        layer = kind(*sizes, alpha=0.2, skip_gain=0.7, **options)
        nn.init.normal_(layer.bias)
        if isinstance(layer, ours.KeptMean):
            nn.init.normal_(layer.kept_mean)
        x = torch.randn(*shape)
        plain = ours.fold(nn.Sequential(layer))[0]
        assert type(plain).__module__.startswith("torch.nn")
        with torch.no_grad():
            torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_kept_mean_makes_any_weight(name):
    _, kind, sizes, options, _ = LAYERS[name]
    torch.manual_seed(0)
    layer = kind(*sizes, **options).double()
    weight = torch.randn_like(layer.weight) + 0.5
    factor = torch.randn(len(layer.gain), dtype=torch.float64)
    factor[0], factor[1] = 0, -2
    bias = torch.randn_like(layer.bias)
    layer.set_effective(weight.detach(), bias, factor)
    made, made_bias = layer.effective()
    torch.testing.assert_close(filters_of(layer, made), factor[:, None] * filters_of(layer, weight))
    assert torch.equal(made_bias, bias)
    torch.testing.assert_close(filters_of(layer, layer.weight)[0], filters_of(layer, weight)[0])  # of factor zero


def test_a_learning_rate_means_what_it_means_to_a_plain_weight():
    """One step of gradient descent moves the effective weight as it moves a plain one, to first order."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    nn.init.normal_(plain.weight, 0.1, 0.3)
    layer = ours.KeptMeanConv2d(4, 6, 3).double()
    layer.set_effective(plain.weight.detach(), plain.bias.detach(), torch.ones(6, dtype=torch.float64))
    x, rate = torch.randn(2, 4, 9, 9, dtype=torch.float64), 1e-6
    before = layer.effective()[0].detach()
    for one in (plain, layer):
        one(x).pow(3).sum().backward()
        with torch.no_grad():
            for parameter in one.parameters():
                parameter -= rate * parameter.grad
    moved = layer.effective()[0].detach() - before
    wanted = -rate * plain.weight.grad
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_gradients_of_a_transposed_layer_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = ours.KeptMeanConvTranspose2d(4, 6, 3, stride=2, groups=2, skip_gain=0.5).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())

    def run(*parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, values)


def test_a_filter_of_one_weight_is_refused():
    with pytest.raises(ValueError, match="fan_in=1: a filter of one weight"):
        ours.ScaledWSConv1d(3, 3, 1, groups=3)
    with pytest.raises(ValueError, match="skip_gain='x'"):
        ours.ScaledWSLinear(3, 3, skip_gain="x")


def test_affine_maps_scales_and_copies():
    x = torch.randn(2, 3, 4, 5)
    affine = ours.ChannelAffine(3)
    with torch.no_grad():
        affine.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        affine.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    torch.testing.assert_close(affine(x)[:, 2], 3 * x[:, 2] - 1)
    torch.testing.assert_close(affine(x[:, :, 0, 0])[:, 1], 2 * x[:, 1, 0, 0] + 1)
    torch.testing.assert_close(ours.BranchScale(correction=2, alpha=0.2, skip_gain=0.5)(x), 0.2 * x)
    assert ours.BranchScale()(x) is x
    copied = ours.Copy()(x)
    assert torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
    with pytest.raises(ValueError, match="channels=0"):
        ours.ChannelAffine(0)


def test_layers_copy_and_print():
    layer = ours.KeptMeanConv2d(3, 4, 3, input_scale=2.0)
    assert torch.equal(copy.deepcopy(layer).effective()[0], layer.effective()[0])
    assert "alpha=0.2" in repr(ours.BranchScale(alpha=0.2))


def test_units_are_constants_and_the_map_behind_them_learns_as_behind_a_norm():
    torch.manual_seed(0)
    x = 5000 + 1000 * torch.randn(64, 3, 5)
    units, norm = ours.ChannelUnits(3), nn.BatchNorm1d(3)
    units[0].mean.copy_(x.mean((0, 2)))
    units[0].deviation.copy_(x.std((0, 2), correction=0))
    weights = torch.randn(64, 3, 5)
    for module, weight in ((units, units[1].weight), (norm, norm.weight)):
        torch.nn.init.constant_(weight, 1.5)
        (module(x) * weights).sum().backward()
    torch.testing.assert_close(units(x), norm(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(units[1].weight.grad, norm.weight.grad, rtol=1e-2, atol=1e-2)
    assert set(units.state_dict()) == {"0.mean", "0.deviation", "1.weight", "1.bias"}


CHECKED = {
    "ScaledConv2d": (3, 4, 3),
    "ScaledWSConv1d": (3, 4, 3),
    "ScaledWSConv2d": (3, 4, 3),
    "ScaledWSConv3d": (3, 4, 3),
    "ScaledWSConvTranspose2d": (3, 4, 3),
    "ScaledWSLinear": (3, 4),
}


@pytest.mark.parametrize("name", CHECKED)
def test_factors_are_checked_and_shown(name):
    layer = getattr(ours, name)
    for value in (math.nan, math.inf, "x", None):
        with pytest.raises(ValueError, match=r"^input_scale=.*finite number"):
            layer(*CHECKED[name], input_scale=value)
    shown = repr(layer(*CHECKED[name], input_scale=1.7, alpha=0.2, skip_gain=0.0))
    assert "input_scale=1.7, alpha=0.2, skip_gain)" in shown
    assert "input_scale" not in repr(layer(*CHECKED[name]))
