"""The residual families: shapes, blocks against their unfolded equations, initialisation, independence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watch import MapMultiplications

from normfree.models import create_model
from normfree.nn import ScaledConv2d, ScaledWSConv2d, fold

FAMILIES = ("nf_resnet50", "resnet50", "resnetv2_50", "skipinit_resnet50", "fixup_resnet50")
SMALL = {"width": 0.5, "depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0}


def small(name, **overrides):
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **{**SMALL, **overrides})


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5 * (parameter.ndim < 2))
    return model.double()


def blocks(model):
    return [block for stage in model.stages for block in stage]


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_depth_on_an_odd_oblong_image(name, padding):
    model = create_model(name, num_classes=3, in_channels=2, padding=padding, width=0.5).train()
    x = torch.randn(2, 2, 75, 61)
    logits = model(x)
    logits.sum().backward()
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())
    maps = model.forward_stages(x)
    assert [feature.channels for feature in model.feature_info] == [32, 64, 128, 256]
    assert [feature.stride for feature in model.feature_info] == [4, 8, 16, 32]
    for feature, tensor in zip(model.feature_info, maps, strict=True):
        expected = (2, feature.channels, math.ceil(75 / feature.stride), math.ceil(61 / feature.stride))
        assert tensor.shape == expected
        assert model.get_submodule(feature.name) is model.stages[int(feature.name[-1])]
    assert model.forward_features(x).shape == maps[-1].shape


@pytest.mark.parametrize("name", FAMILIES)
def test_without_classifier_the_features_come_out(name):
    model = create_model(name, num_classes=0, **{**SMALL, "drop_rate": 0.5}).train()
    x = torch.randn(2, 3, 32, 32)
    assert model.num_features == 256
    assert model.feature_scale == (1.7139588594436646 if name == "nf_resnet50" else 1)
    features = model.forward_features(x)
    assert features.shape == (2, 256, 1, 1)
    torch.testing.assert_close(model(x), model.feature_scale * features[..., 0, 0])
    assert not any("classifier" in key for key in model.state_dict())


@pytest.mark.parametrize("order", ["norm-act", "act-norm"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", None])
def test_resnetv2_normalizers_and_orders(norm, order):
    model = small("resnetv2_50", norm=norm, order=order)
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
    kinds = [type(layer) for layer in model.stages[0][0].pre1]
    expected = {
        "batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm,
        "instance": nn.InstanceNorm2d, None: nn.Identity,
    }[norm]  # fmt: skip
    assert kinds == ([expected, nn.ReLU] if order == "norm-act" else [nn.ReLU, expected])
    if expected is nn.GroupNorm:
        wide = create_model("resnetv2_50", norm=norm, depths=(1, 1, 1, 1))
        assert wide.final.norm.num_groups == (32 if norm == "group" else 1)
    # Instance norm too has a scale and an offset per channel.
    assert sum(p.numel() for p in model.final.parameters()) == (0 if norm is None else 2 * 256)


def unfolded(convolution, x):
    """The convolution with its input scale as an explicit multiplication of the input, without alpha and s."""
    weight = convolution.scaled_weight(None) / convolution.input_scale
    return convolution.convolve(x * convolution.input_scale, weight, convolution.bias)


@pytest.mark.parametrize("use_se", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nf_block_equals_its_unfolded_equation(index, use_se):
    model = randomised(small("nf_resnet50", use_se=use_se, alpha=0.3))
    block = blocks(model)[index]
    beta = math.sqrt([1, *model.expected_variances()][index])
    gamma = 1.7139588594436646
    x = torch.randn(2, block.conv0.in_channels, 6, 6, dtype=torch.float64)
    assert block.conv0.input_scale == pytest.approx(gamma / beta)
    assert block.conv1.input_scale == block.conv2.input_scale == gamma
    assert (block.shortcut is None) == (index == 2)
    if block.shortcut is not None:
        assert block.shortcut.input_scale == pytest.approx(gamma / beta)
    shortcut = x if block.shortcut is None else unfolded(block.shortcut, torch.relu(x))
    branch = unfolded(block.conv0, torch.relu(x))
    branch = unfolded(block.conv2, torch.relu(unfolded(block.conv1, torch.relu(branch))))
    gate = getattr(block, "squeeze_excite", None)
    if use_se:
        hidden = torch.relu(gate.linear0(branch.mean((2, 3))))
        branch = branch * (2 * torch.sigmoid(gate.linear1(hidden)))[:, :, None, None]
    torch.testing.assert_close(block(x), shortcut + 0.3 * (gate if use_se else block.conv2).skip_gain * branch)


def test_skipinit_block_equals_its_unfolded_equation():
    block = blocks(randomised(small("skipinit_resnet50")))[0]
    x = torch.randn(2, block.conv0.in_channels, 6, 6, dtype=torch.float64)
    active = torch.relu(x)
    hidden = torch.relu(block.conv1(torch.relu(block.conv0(active))))
    branch = F.conv2d(hidden, block.conv2.weight, block.conv2.bias)
    torch.testing.assert_close(block(x), block.shortcut(active) + block.conv2.skip_gain * branch)


@pytest.mark.parametrize("index", [0, 2])
def test_fixup_block_equals_its_unfolded_equation(index):
    block = blocks(randomised(small("fixup_resnet50")))[index]
    x = torch.randn(2, block.conv0.in_channels, 6, 6, dtype=torch.float64)
    b = [getattr(block, f"bias{i}").bias for i in range(6)]
    start = x + b[0]
    hidden = torch.relu(F.conv2d(start, block.conv0.weight) + b[1]) + b[2]
    hidden = torch.relu(F.conv2d(hidden, block.conv1.weight, padding=1) + b[3]) + b[4]
    branch = F.conv2d(hidden, block.conv2.weight) * block.conv2.skip_gain + b[5]
    shortcut = F.conv2d(start, block.shortcut.weight) if index == 0 else start
    torch.testing.assert_close(block(x), torch.relu(shortcut + branch))


def test_fixup_initialisation():
    torch.manual_seed(0)
    model = create_model("fixup_resnet50", depths=(1, 1, 1, 2), width=2)
    shrink = 5**-0.25
    first = model.stages[3][0]
    assert first.conv0.weight.std().item() == pytest.approx(math.sqrt(2 / 256) * shrink, rel=0.02)
    assert first.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)) * shrink, rel=0.02)
    assert first.shortcut.weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.02)
    assert not first.conv2.weight.any()
    assert not model.classifier.weight.any()
    assert first.conv2.skip_gain == 1
    assert not any(p.any() for n, p in model.named_parameters() if "bias" in n)


def test_skipinit_initialisation():
    torch.manual_seed(0)
    model = create_model("skipinit_resnet50", depths=(1, 1, 1, 1), width=2)
    assert model.stages[3][0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
    assert model.stem.conv.bias is None
    assert model.stages[0][0].shortcut.bias is not None
    assert not model.classifier.weight.any()
    assert model.stages[0][0].conv2.skip_gain.shape == ()
    assert model.stages[0][0].conv2.skip_gain == 0


def test_nf_initialisation():
    model = small("nf_resnet50", skipinit_gain=1)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.stem.conv.input_scale == 1
    assert all(block.conv2.skip_gain == 1 and block.conv2.skip_gain.shape == () for block in blocks(model))
    assert all(block.conv2.skip_gain == 0 for block in blocks(small("nf_resnet50")))
    assert model.expected_variances() == pytest.approx([1.04, 1.04, 1.08, 1.04, 1.04])


def block_statistics(model, size):
    squared_means, variances = [], []
    x = model.stem(torch.randn(4, 3, size, size))
    for block in blocks(model):
        x = block(x)
        squared_means.append(x.mean((0, 2, 3)).square().mean().item())
        variances.append(x.var((0, 2, 3), correction=0).mean().item())
    return squared_means, variances


@torch.no_grad()
def test_measured_variance_follows_the_plan_and_plain_weights_shift_the_mean():
    torch.manual_seed(0)
    shape = {"depths": (6, 1, 1, 1), "width": 1, "skipinit_gain": 1.0, "stochdepth_rate": 0.0}
    standardised = create_model("nf_resnet50", **shape)
    squared_means, variances = block_statistics(standardised, 96)
    # On 24 x 24 maps a 3x3 convolution keeps ((3 * 24 - 2) / (3 * 24))^2 = 0.945 of its taps; the rest of the
    # tolerance is the scatter of 64 random filters, a few percent.
    expected = standardised.expected_variances()[:6]
    assert variances[:6] == pytest.approx(expected, rel=0.1)
    assert max(squared_means[:6]) < 0.1
    plain = create_model("nf_resnet50", conv="scaled", **shape)
    assert isinstance(plain.stem.conv, ScaledConv2d)
    assert not any(isinstance(module, ScaledWSConv2d) for module in plain.modules())
    shifted, _ = block_statistics(plain, 96)
    assert shifted[5] > 0.5
    assert shifted[5] > 5 * squared_means[5]


@pytest.mark.parametrize("name", ["nf_resnet50", "skipinit_resnet50", "fixup_resnet50"])
def test_examples_are_independent_and_training_equals_evaluation(name):
    model = randomised(small(name)).train()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    torch.testing.assert_close(logits, model.eval()(x), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(logits[1].sum(), x)
    assert not gradient[0].any()
    assert gradient[1].any()
    assert not gradient[2].any()


@pytest.mark.parametrize("name", ["nf_resnet50", "skipinit_resnet50", "fixup_resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_no_activation_is_multiplied(name, training):
    # A batch of 5: no convolution here has as many filters.
    model = create_model(name, width=0.5, stochdepth_rate=0, drop_rate=0).train(training)
    with MapMultiplications(batch=5) as watch:
        model(torch.randn(5, 3, 64, 64))
    assert watch.found == []


def test_the_watch_sees_a_gate():
    with MapMultiplications(batch=5) as watch:
        small("nf_resnet50", use_se=True)(torch.randn(5, 3, 64, 64))
    assert watch.found == [((5, channels, 1, 1),) for channels in (32, 64, 64, 128, 256)]


def test_stochastic_depth_silences_whole_branches():
    model = small("nf_resnet50", stochdepth_rate=0.9, skipinit_gain=1.0).train()
    block = blocks(model)[2]
    assert block.stochastic_depth.rate == pytest.approx(0.9 * 2 / 5)
    x = torch.randn(200, block.conv0.in_channels, 2, 2)
    same = (block(x) == x).flatten(1).all(dim=1).float().mean().item()
    assert same == pytest.approx(0.36, abs=0.17)  # five standard deviations


def test_standardized_weights_beside_a_normalizer():
    model = small("resnetv2_50", norm="group", conv="scaled_ws").double()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    for convolution in convolutions:
        with torch.no_grad():
            convolution.weight.mul_(3).add_(0.1)
    assert convolutions
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(fold(model)(x), expected)
    assert all(type(module) is not ScaledWSConv2d for module in small("resnetv2_50", norm="group").modules())
