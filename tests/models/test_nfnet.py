"""NFNet: its block against an independent reference, its layout by hand, its signal against the laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch

from normfree.models import create_model
from normfree.signal import input_shape, spp


def blocks(model):
    return [block for stage in model.stages for block in stage]


def small(**overrides):
    torch.manual_seed(0)
    shape = {"widths": (16, 24, 32, 32), "depths": (1, 2, 1, 1), "group_size": 4, "num_classes": 5}
    return create_model("nfnet_f0", **{**shape, "stochdepth_rate": 0.0, "drop_rate": 0.0, **overrides})


def randomised(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw * 0.3 + (1 if name.endswith("gain") else 0))
    return module.double()


def expected_block(p, x, *, alpha, beta, stride, groups, padding):
    a = reference.gelu(x) / beta
    pooled = reference.average_pool(a) if stride == 2 else a
    shortcut = reference.ws_convolution(p, "shortcut", pooled) if "shortcut.weight" in p else x
    branch = reference.gelu(reference.ws_convolution(p, "conv0", a))
    branch = reference.ws_convolution(p, "conv1", branch, stride=stride, groups=groups, padding=padding)
    branch = reference.ws_convolution(p, "conv1b", reference.gelu(branch), groups=groups, padding=padding)
    branch = reference.ws_convolution(p, "conv2", reference.gelu(branch))
    if "squeeze_excite.linear0.weight" in p:
        branch = reference.squeeze_excite(p, branch)
    (skip_gain,) = (value for name, value in p.items() if name.endswith("skip_gain"))
    return shortcut + alpha * skip_gain * branch


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 4)])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("use_se", [True, False])
@pytest.mark.parametrize(("index", "beta", "stride", "groups"), [(0, 1, 1, 2), (1, 1.09, 2, 3), (2, 1.09, 1, 3)])
def test_block_equals_the_reference(index, beta, stride, groups, use_se, padding, size):
    block = blocks(randomised(small(alpha=0.3, padding=padding, use_se=use_se)))[index]
    parameters = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x = np.random.default_rng(2).standard_normal((2, block.conv0.in_channels, *size)) + 0.5
    expected = expected_block(
        parameters, x, alpha=0.3, beta=math.sqrt(beta), stride=stride, groups=groups, padding=padding
    )
    assert expected.shape[2:] == tuple(math.ceil(cells / stride) for cells in size)
    with torch.no_grad():
        actual = block(torch.from_numpy(x)).numpy()
    assert np.abs(actual - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_stem_and_head_equal_the_reference(padding):
    model = randomised(small(padding=padding)).eval()
    x = np.random.default_rng(2).standard_normal((2, 3, 37, 18))
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = x
    for index, stride in enumerate((2, 1, 1, 2)):
        activated = reference.gelu(expected) if index else expected
        expected = reference.ws_convolution(parameters, f"stem.conv{index}", activated, stride=stride, padding=padding)
    with torch.no_grad():
        np.testing.assert_allclose(model.stem(torch.from_numpy(x)).numpy(), expected, rtol=1e-9, atol=1e-12)
        last = model.forward_stages(torch.from_numpy(x))[-1].numpy()
        logits = model(torch.from_numpy(x)).numpy()
    pooled = reference.gelu(reference.ws_convolution(parameters, "final.conv", last)).mean((2, 3))
    expected = pooled @ parameters["classifier.weight"].T + parameters["classifier.bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-9)


def test_f0_and_its_wide_variant_by_hand():
    with torch.device("meta"):
        model, wide, f3 = (create_model(name) for name in ("nfnet_f0", "nfnet_f0_plus", "nfnet_f3"))
    assert [info.channels for info in model.feature_info] == [256, 512, 1536, 1536]
    assert [info.channels for info in wide.feature_info] == [384, 768, 2048, 2048]
    assert [model.stem[index].out_channels for index in (0, 2, 4, 6)] == [16, 32, 64, 128]
    assert wide.stem.conv3.out_channels == 192
    assert (model.num_features, wide.num_features) == (3072, 4096)
    first, last = blocks(model)[0], blocks(model)[-1]
    assert (first.conv1.in_channels, first.conv1.groups, last.conv1.in_channels, last.conv1b.groups) == (128, 1, 768, 6)
    assert blocks(wide)[0].conv1.groups == 1  # 192 channels hold one group of 128
    assert blocks(wide)[0].conv1.in_channels == 128
    assert last.squeeze_excite.linear0.out_features == 768
    rates = [block.stochastic_depth.rate for block in blocks(model)]
    assert rates == pytest.approx([0.25 * index / 12 for index in range(12)])
    assert (model.dropout.p, model.train_size, model.test_size) == (0.2, 192, 256)
    assert input_shape(f3) == (3, 416, 416)
    assert [len(stage) for stage in f3.stages] == [4, 8, 24, 12]
    assert f3.expected_variances()[:6] == pytest.approx([1.04, 1.08, 1.12, 1.16, 1.04, 1.08])


def test_width_does_not_scale_the_stem_and_widths_do():
    with torch.device("meta"):
        narrow, own = create_model("nfnet_f0", width=0.5), create_model("nfnet_f0", widths=(96, 64, 64, 40))
    assert (narrow.stem.conv3.out_channels, narrow.stages[0][0].conv2.out_channels) == (128, 128)
    assert (own.stem.conv3.out_channels, own.num_features) == (48, 80)
    assert own.stages[3][0].conv1.in_channels == 20  # narrower than a group of 128: one group
    assert own.stages[3][0].conv1.groups == 1


def test_initialisation():
    model = small(skipinit_gain=1, num_classes=1000)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.classifier.bias.any()
    gates = [block.squeeze_excite for block in blocks(model)]
    assert all(gate.skip_gain == 1 and gate.skip_gain.shape == () for gate in gates)
    assert all(block.squeeze_excite.skip_gain == 0 for block in blocks(small()))
    assert model.stem.conv0.input_scale == model.final.conv.input_scale == 1
    assert model.stem.conv3.input_scale == 1.7015043497085571


@pytest.mark.parametrize("use_se", [True, False])
def test_signal_heard_from_outside_follows_the_plan(use_se):
    """The first stage has stride 1: no pool, whose loss on noise the plan does not know."""
    torch.manual_seed(0)
    options = {"widths": (256, 64, 64, 64), "depths": (6, 1, 1, 1), "use_se": use_se, "group_size": 32}
    model = create_model("nfnet_f0", skipinit_gain=1.0, stochdepth_rate=0.0, **options)
    result = spp(model, torch.randn(4, 3, 96, 96))
    assert [block.transition for block in result.blocks[:6]] == [True] + [False] * 5
    assert result.blocks[0].expected_var == pytest.approx(1.04)
    assert result.blocks[5].expected_var == pytest.approx(1.24)
    # Two 3x3 convolutions on 24 x 24 maps keep ((3 * 24 - 2) / (3 * 24))^2 = 0.945 each of the squares of their
    # taps, which makes 0.893; the ladder has such steps. A branch has 128 random filters: 6 % for their scatter.
    kept = 0.893
    variance = result.entry.avg_channel_var
    assert variance == pytest.approx(0.95, abs=0.07)  # of the stem, whose four convolutions pad too
    for block in result.blocks[:6]:
        variance += 0.04 * kept
        assert block.residual_avg_channel_var == pytest.approx(kept, abs=0.06)
        assert block.avg_channel_var == pytest.approx(variance, rel=0.03)


def test_a_silent_branch_is_woken_and_judged_before_its_scaling():
    """The gate carries 2, then alpha * s: the recorder divides by the latter and keeps the former."""
    x = torch.randn(4, 3, 64, 64)
    loud, silent = (spp(small(skipinit_gain=gain, alpha=alpha), x) for gain, alpha in ((0.5, 0.4), (0.0, 0.4)))
    plain = spp(small(skipinit_gain=1.0, alpha=0.4), x)
    first = [result.blocks[0].residual_avg_channel_var for result in (loud, silent, plain)]
    assert first == pytest.approx([first[2]] * 3, rel=1e-5)
    assert 0.5 < first[2] < 1.5
