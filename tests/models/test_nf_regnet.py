"""NF-RegNet: its block against an independent reference, its layout by hand, its signal against the laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch

from normfree.models import create_model
from normfree.signal import input_shape


def blocks(model):
    return [block for stage in model.stages for block in stage]


def small(**overrides):
    torch.manual_seed(0)
    shape = {"widths": (12, 16, 24, 24), "depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0}
    return create_model("nf_regnet_b0", num_classes=5, **{**shape, **overrides})


def randomised(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw * 0.3 + (1 if name.endswith("gain") else 0))
    return module.double()


def expected_block(p, x, *, alpha, beta, stride, groups, padding):
    a = reference.silu(x) / beta
    pooled = reference.average_pool(a) if stride == 2 else a
    shortcut = reference.ws_convolution(p, "shortcut", pooled) if "shortcut.weight" in p else x
    branch = reference.silu(reference.ws_convolution(p, "conv0", a))
    branch = reference.ws_convolution(p, "conv1", branch, stride=stride, groups=groups, padding=padding)
    if "squeeze_excite.linear0.weight" in p:
        branch = reference.squeeze_excite(p, branch)
    branch = reference.ws_convolution(p, "conv2", reference.silu(branch))
    return shortcut + alpha * p["conv2.skip_gain"] * branch


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 4)])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize(("index", "beta", "stride", "groups"), [(0, 1, 2, 1), (1, 1.09, 2, 3), (2, 1.09, 1, 4)])
def test_block_equals_the_reference(index, beta, stride, groups, padding, size):
    block = blocks(randomised(small(alpha=0.3, padding=padding)))[index]
    parameters = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x = np.random.default_rng(2).standard_normal((2, block.conv0.in_channels, *size)) + 0.5
    expected = expected_block(
        parameters, x, alpha=0.3, beta=math.sqrt(beta), stride=stride, groups=groups, padding=padding
    )
    assert expected.shape[2:] == tuple(math.ceil(cells / stride) for cells in size)
    with torch.no_grad():
        actual = block(torch.from_numpy(x)).numpy()
    assert np.abs(actual - expected).max() < 1e-10 * np.abs(expected).max()


def test_block_without_a_gate_equals_the_reference():
    block = blocks(randomised(small(use_se=False)))[0]
    parameters = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x = np.random.default_rng(2).standard_normal((2, 12, 5, 6))
    expected = expected_block(parameters, x, alpha=0.2, beta=1, stride=2, groups=1, padding="symmetric")
    np.testing.assert_allclose(block(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_stem_and_head_equal_the_reference():
    model = randomised(small(padding="same")).eval()
    x = np.random.default_rng(2).standard_normal((2, 3, 37, 50))
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    with torch.no_grad():
        stem = model.stem(torch.from_numpy(x)).numpy()
        last = model.forward_stages(torch.from_numpy(x))[-1].numpy()
        logits = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(stem, reference.ws_convolution(parameters, "stem.conv", x, stride=2), rtol=1e-9)
    pooled = reference.silu(reference.ws_convolution(parameters, "final.conv", last)).mean((2, 3))
    expected = pooled @ parameters["classifier.weight"].T + parameters["classifier.bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-9)


def test_b0_by_hand():
    with torch.device("meta"):
        model = create_model("nf_regnet_b0")
    assert [info.channels for info in model.feature_info] == [36, 78, 156, 330]
    assert model.num_features == model.final.conv.out_channels == 1280 * 330 // 440 == 960
    # 36 channels hold 4 groups of 8; after the first block they expand to 81, which hold 10.
    first, second = blocks(model)[:2]
    assert (first.conv0.out_channels, first.conv1.groups) == (32, 4)
    assert (second.conv0.out_channels, second.conv1.groups) == (80, 10)
    assert second.squeeze_excite.linear0.out_features == 40
    rates = [block.stochastic_depth.rate for block in blocks(model)]
    assert rates == pytest.approx([0.1 * index / 16 for index in range(16)])
    assert (model.dropout.p, model.train_size, model.test_size) == (0.2, 192, 224)
    assert input_shape(model) == (3, 224, 224)
    plan = [1.04, 1.04, 1.08, 1.12, *(1 + 0.04 * i for i in range(1, 7)), *(1 + 0.04 * i for i in range(1, 7))]
    assert model.expected_variances() == pytest.approx(plan)


def test_initialisation():
    model = small(skipinit_gain=1)
    assert not model.classifier.weight.any()
    assert all(block.conv2.skip_gain == 1 and block.conv2.skip_gain.shape == () for block in blocks(model))
    assert all(block.conv2.skip_gain == 0 for block in blocks(small()))
    assert model.stem.conv.input_scale == model.final.conv.input_scale == 1


@torch.no_grad()
def test_white_noise_loses_three_quarters_of_the_shortcut_and_smooth_images_do_not():
    """The pool averages four independent pixels of noise; it changes nothing where the four agree."""
    torch.manual_seed(0)
    options = {"widths": (128, 128, 128, 128), "depths": (1, 1, 1, 1), "stochdepth_rate": 0.0}
    block = blocks(create_model("nf_regnet_b0", skipinit_gain=1, alpha=0, **options))[0]
    noise = torch.randn(4, 128, 24, 24)
    smooth = torch.randn(4, 128, 12, 12).repeat_interleave(2, 2).repeat_interleave(2, 3)
    for x, expected in ((noise, 1 / 4), (smooth, 1.0)):
        # Over 128 random filters of 128 weights the mean variance scatters by about 1/128 of itself.
        assert block(x).var((0, 2, 3), correction=0).mean().item() == pytest.approx(expected, rel=0.05)


@torch.no_grad()
def test_variance_climbs_the_ladder_within_a_stage():
    torch.manual_seed(0)
    options = {"widths": (8, 8, 128, 8), "depths": (1, 1, 8, 1), "group_size": 16, "stochdepth_rate": 0.0}
    model = create_model("nf_regnet_b0", skipinit_gain=1, **options)
    expected = model.expected_variances()[2:10]
    assert expected == pytest.approx([1.04 + 0.04 * index for index in range(8)])
    x = math.sqrt(1.04) * torch.randn(4, 128, 16, 16)
    for block, variance in zip(model.stages[2][1:], expected[1:], strict=True):
        x = block(x)
        # On 16 x 16 maps a 3x3 convolution keeps 0.918 of its taps' squares: 8 % less of 0.28 are 2 % of 1.32.
        assert x.var((0, 2, 3), correction=0).mean().item() == pytest.approx(variance, rel=0.03)
    assert x.mean((0, 2, 3)).square().mean() < 0.01
