"""Folding keeps the function and leaves plain convolutions, in every family, precision and layout."""

from __future__ import annotations

import copy

import pytest
import torch
from small_families import FAMILIES, SHAPE, randomised
from torch import nn
from torch.nn.utils import parametrize

from normfree.models import create_model
from normfree.nn import (
    KeptMeanConv2d,
    MaxPool2d,
    PaddedConv2d,
    ScaledConv2d,
    ScaledWSConv2d,
    ScaledWSConvTranspose2d,
    ScaledWSLinear,
    SqueezeExcite,
    fold,
    has_foldable,
)


@pytest.mark.parametrize("size", [(64, 64), (65, 47)])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_outputs_from_plain_convolutions(name, padding, size):
    model = randomised(name, padding=padding).eval()
    folded = fold(model)
    x = torch.randn(2, 3, *size)
    expected, actual = model(x), folded(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    plain = nn.Conv2d if padding == "symmetric" else PaddedConv2d
    convolutions = [layer for layer in folded.modules() if isinstance(layer, nn.Conv2d)]
    assert convolutions
    assert {type(layer) for layer in convolutions} == {plain}
    assert not any(key.endswith(".gain") for key in folded.state_dict())


def test_float64_agrees_to_rounding():
    model = randomised("nfnet_f0").double().eval()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_original_is_untouched_and_shares_nothing():
    model = randomised("nf_resnet101").train()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert model.training
    assert not folded.training
    assert not any(layer.training for layer in folded.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {name for name, _ in folded.named_modules()} == {name for name, _ in model.named_modules()}


def test_only_the_gates_keep_a_skip_gain():
    assert not any("skip_gain" in key for key in fold(randomised("nf_resnet50")).state_dict())
    gated = fold(randomised("nfnet_f0"))
    owners = {type(gated.get_submodule(key.rpartition(".")[0])) for key in gated.state_dict() if "skip_gain" in key}
    assert owners == {SqueezeExcite}


def test_precision_layout_and_device_are_kept():
    model = randomised("nf_resnet50").to(torch.bfloat16, memory_format=torch.channels_last)
    weight = fold(model).stages[1][0].conv1.weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        imagined = create_model("nf_resnet50", **SHAPE)
    assert fold(imagined).stem.conv.weight.is_meta


def test_a_layer_alone_and_a_layer_twice():
    layer = ScaledWSConv2d(4, 4, 3, input_scale=1.7, alpha=0.2, skip_gain=0.5)
    x = torch.randn(1, 4, 5, 5)
    alone = fold(layer)
    assert type(alone) is nn.Conv2d
    torch.testing.assert_close(alone(x), layer(x))
    twice = fold(nn.Sequential(layer, nn.ReLU(), layer))
    assert twice[0] is twice[2]
    torch.testing.assert_close(twice(x), layer(layer(x).relu()))


def test_folding_again_changes_nothing():
    once = fold(randomised("nf_regnet_b0"))
    again = fold(once)
    assert all(torch.equal(once.state_dict()[key], value) for key, value in again.state_dict().items())


def test_geometry_survives():
    layer = ScaledConv2d(4, 8, (3, 5), (2, 1), dilation=2, groups=2, padding=(1, 3), bias=False, input_scale=0.3)
    x = torch.randn(2, 4, 11, 12)
    torch.testing.assert_close(fold(layer)(x), layer(x))
    assert fold(layer).bias is None


def test_what_a_plain_layer_could_not_keep_is_refused():
    model = randomised("nf_resnet50")
    handle = model.stages[0][0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model\.stages\.0\.0\.conv1 has hooks.*remove them first"):
        fold(model)
    handle.remove()
    parametrize.register_parametrization(model.stages[0][0].conv0, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"conv0 has parametrizations.*remove_parametrizations"):
        fold(model)


@pytest.mark.parametrize("method", ["forward", "convolve"])
def test_a_patched_layer_is_refused(method):
    layer = ScaledConv2d(4, 4, 3)
    original = getattr(layer, method)
    setattr(layer, method, lambda *inputs: 3 * original(*inputs))
    with pytest.raises(ValueError, match=rf"has a {method} put on it.*remove it first"):
        fold(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (ScaledConv2d, (4, 4, 3)),
        (KeptMeanConv2d, (4, 4, 3)),
        (ScaledWSConvTranspose2d, (4, 4, 3)),
        (ScaledWSLinear, (4, 4)),
    ],
)
def test_a_subclass_with_a_forward_of_its_own_has_to_say_what_it_folds_to(kind, sizes):
    class Rectified(kind):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match=r"^model: model\.0 is a Rectified, .*give Rectified a method folded\(\)"):
        fold(nn.Sequential(Rectified(*sizes)))

    class Answering(Rectified):
        def folded(self):
            return nn.Sequential(super().folded(), nn.ReLU())

    layer = Answering(*sizes)
    x = torch.randn(2, 4) if len(sizes) == 2 else torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fold(layer)(x), layer(x))


def test_a_subclass_that_convolves_otherwise_is_refused():
    class Circular(ScaledWSConv2d):
        def convolve(self, x, weight, bias):
            return super().convolve(x.roll(1, -1), weight, bias)

    with pytest.raises(ValueError, match="is a Circular, whose forward is not that of the layer it extends"):
        fold(Circular(4, 4, 3))


def test_a_subclass_that_makes_its_weight_otherwise_folds_to_that_weight():
    class Halved(ScaledWSConv2d):
        def scaled_weight(self, scale):
            return super().scaled_weight(scale) / 2

    layer = Halved(4, 4, 3, alpha=0.2, skip_gain=0.7)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(fold(layer)(x), layer(x))


def test_a_method_called_folded_does_not_make_a_layer_one_of_ours():
    class Map(nn.Module):
        def folded(self, times):
            return times

    model = nn.Sequential(Map())
    assert type(fold(model)[0]) is Map
    assert not has_foldable(model)
    assert has_foldable(nn.Sequential(nn.ReLU(), ScaledConv2d(1, 1, 1)))
    assert not has_foldable(fold(randomised("nfnet_f0")))


def test_pools_become_torchs_own():
    model = fold(randomised("nf_regnet_b0"))
    assert type(model.stages[1][0].pool) is nn.AvgPool2d
    x = torch.randn(1, 2, 7, 8)
    for padding, kind in (("symmetric", nn.MaxPool2d), ("same", MaxPool2d)):
        pool = MaxPool2d(3, 2, padding=padding)
        plain = fold(nn.Sequential(pool))[0]
        assert type(plain) is kind
        assert torch.equal(plain(x), pool(x))


@pytest.mark.parametrize("model", ["nf_resnet50", nn.ReLU, None])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ValueError, match=r"^model=.*must be a torch module; build it first"):
        fold(model)
