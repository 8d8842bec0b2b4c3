"""The blocks of the ResNets and of BN-RegNet against straight-line NumPy; NF-RegNet and NFNet have files of their own.

Random weights, gains, biases and skip gains; odd and oblong maps; both paddings. The third block is the second of its
stage: its shortcut is the identity, and its beta is that after one transition.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from reference import batch_norm, plain_convolution, relu, ws_convolution

from normfree.models import create_model

GAMMA = 1.7139588594436646
SILU_GAMMA = 1.7881293296813965
SIZES = [(6, 8), (7, 5), (1, 4)]
# A block's index, whether it is the first of its stage, its stride, and the variance that enters it for alpha 0.3.
PLACES = [(0, True, 1, 1.0), (1, True, 2, 1.09), (2, False, 1, 1.09)]

on_every_block = pytest.mark.parametrize(("index", "projects", "stride", "variance"), PLACES)
on_every_padding = pytest.mark.parametrize("padding", ["same", "symmetric"])
on_every_size = pytest.mark.parametrize("size", SIZES)


def random_block(name, index, **overrides):
    """A block with random parameters, in float64 and training mode."""
    shape = {"width": 0.5} if "regnet" not in name else {"widths": (12, 16, 24, 24)}
    quiet = {"depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0}
    model = create_model(name, **{**quiet, **shape, **overrides})
    block = [block for stage in model.stages for block in stage][index]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in block.named_parameters():
            centre = 1 if path.endswith("gain") or "norm" in path else 0
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + centre)
    return block.double().train()


def compare(block, expected_block, channels, size):
    """``expected_block(parameters, x)`` and the block agree, on a map whose mean is not zero."""
    parameters = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x = np.random.default_rng(2).standard_normal((3, channels, *size)) + 0.5
    expected = expected_block(parameters, x)
    with torch.no_grad():
        actual = block(torch.from_numpy(x)).numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-10 * np.abs(expected).max()


@on_every_size
@on_every_padding
@on_every_block
@pytest.mark.parametrize("use_se", [False, True])
def test_nf_resnet(index, projects, stride, variance, padding, size, use_se):
    block = random_block("nf_resnet50", index, alpha=0.3, padding=padding, use_se=use_se)

    def expected(p, x):
        a = GAMMA * relu(x) / math.sqrt(variance)
        shortcut = ws_convolution(p, "shortcut", a, stride=stride, padding=padding) if projects else x
        branch = GAMMA * relu(ws_convolution(p, "conv0", a))
        branch = GAMMA * relu(ws_convolution(p, "conv1", branch, stride=stride, padding=padding))
        branch = ws_convolution(p, "conv2", branch)
        if use_se:
            branch = reference.squeeze_excite(p, branch)
        return shortcut + 0.3 * p["squeeze_excite.skip_gain" if use_se else "conv2.skip_gain"] * branch

    compare(block, expected, block.conv0.in_channels, size)


@on_every_size
@on_every_padding
@on_every_block
def test_skipinit_resnet(index, projects, stride, variance, padding, size):
    block = random_block("skipinit_resnet50", index, padding=padding)

    def expected(p, x):
        shortcut = plain_convolution(p, "shortcut", relu(x), stride=stride, padding=padding) if projects else x
        branch = relu(plain_convolution(p, "conv0", relu(x)))
        branch = relu(plain_convolution(p, "conv1", branch, stride=stride, padding=padding))
        return shortcut + p["conv2.skip_gain"] * plain_convolution(p, "conv2", branch)

    compare(block, expected, block.conv0.in_channels, size)


@on_every_size
@on_every_padding
@on_every_block
def test_fixup_resnet(index, projects, stride, variance, padding, size):
    block = random_block("fixup_resnet50", index, padding=padding)

    def expected(p, x):
        b = [p[f"bias{position}.bias"] for position in range(6)]
        x = x + b[0]
        shortcut = plain_convolution(p, "shortcut", x, stride=stride, padding=padding) if projects else x
        branch = relu(plain_convolution(p, "conv0", x) + b[1]) + b[2]
        branch = relu(plain_convolution(p, "conv1", branch, stride=stride, padding=padding) + b[3]) + b[4]
        branch = p["conv2.skip_gain"] * plain_convolution(p, "conv2", branch) + b[5]
        return relu(shortcut + branch)

    compare(block, expected, block.conv0.in_channels, size)


@on_every_size
@on_every_padding
@on_every_block
def test_resnet(index, projects, stride, variance, padding, size):
    block = random_block("resnet50", index, padding=padding)

    def expected(p, x):
        shortcut = x
        if projects:
            shortcut = plain_convolution(p, "shortcut.conv", x, stride=stride, padding=padding)
            shortcut = batch_norm(p, "shortcut.norm", shortcut)
        branch = relu(batch_norm(p, "norm0", plain_convolution(p, "conv0", x)))
        branch = plain_convolution(p, "conv1", branch, stride=stride, padding=padding)
        branch = plain_convolution(p, "conv2", relu(batch_norm(p, "norm1", branch)))
        return relu(shortcut + batch_norm(p, "norm2", branch))

    compare(block, expected, block.conv0.in_channels, size)


@on_every_size
@on_every_padding
@on_every_block
@pytest.mark.parametrize("order", ["norm-act", "act-norm"])
def test_resnetv2(index, projects, stride, variance, padding, size, order):
    block = random_block("resnetv2_50", index, padding=padding, order=order)

    def pre(p, position, x):
        name = f"pre{position}.norm"
        return relu(batch_norm(p, name, x)) if order == "norm-act" else batch_norm(p, name, relu(x))

    def expected(p, x):
        a = pre(p, 0, x)
        shortcut = plain_convolution(p, "shortcut", a, stride=stride, padding=padding) if projects else x
        branch = pre(p, 1, plain_convolution(p, "conv0", a))
        branch = pre(p, 2, plain_convolution(p, "conv1", branch, stride=stride, padding=padding))
        return shortcut + plain_convolution(p, "conv2", branch)

    compare(block, expected, block.conv0.in_channels, size)


@on_every_size
@on_every_padding
@pytest.mark.parametrize(("index", "stride", "groups"), [(0, 2, 1), (1, 2, 3), (2, 1, 4)])
@pytest.mark.parametrize("use_se", [True, False])
def test_bn_regnet(index, stride, groups, padding, size, use_se):
    block = random_block("bn_regnet_b0", index, padding=padding, use_se=use_se)

    def silu(x):
        return reference.silu(x) / SILU_GAMMA

    def normalized(p, name, x, **geometry):
        return batch_norm(p, f"{name}.norm", plain_convolution(p, f"{name}.conv", x, **geometry))

    def expected(p, x):
        a = silu(x)
        shortcut = normalized(p, "shortcut", reference.average_pool(a)) if stride == 2 else x
        branch = silu(normalized(p, "conv0", a))
        branch = normalized(p, "conv1", branch, stride=stride, groups=groups, padding=padding)
        if use_se:
            branch = reference.squeeze_excite(p, branch)
        return shortcut + normalized(p, "conv2", silu(branch))

    compare(block, expected, block.conv0.conv.in_channels, size)
