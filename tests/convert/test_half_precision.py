"""Models in float16 and bfloat16: constants are folded in float64, and an effective weight is rounded once."""

from __future__ import annotations

import copy

import pytest
import torch
from convert.nets import post_activation
from torch import nn

import normfree
from normfree.nn import KeptMeanConv2d, KeptMeanConvTranspose2d, KeptMeanLinear

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALF
@pytest.mark.parametrize("layer", [KeptMeanConv2d(16, 8, 3), KeptMeanLinear(64, 8), KeptMeanConvTranspose2d(16, 8, 3)])
def test_an_effective_weight_is_rounded_once(layer, dtype):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        layer.kept_mean.normal_(std=0.1)
        layer.gain.uniform_(0.5, 2.0)
        precise = copy.deepcopy(layer).float()
        assert torch.equal(layer.effective()[0], precise.effective()[0].to(dtype))


@HALF
def test_folding_errs_little_more_than_the_original(dtype):
    """Means of weights matter behind ReLU, whose outputs have a mean: a mean lost in rounding shifts the channel."""
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = post_activation().train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.2)
        for _ in range(20):
            model(torch.randn(16, 3, 16, 16))
        half = model.eval().to(dtype)
        images = torch.randn(32, 3, 16, 16).to(dtype)
        precise = copy.deepcopy(half).float()
        converted = normfree.convert(half, images[:4], start="pretrained")
        assert not converted.conversion.norms_left
        with torch.no_grad():
            wanted = precise(images.float())
            found = [(each(images).float() - wanted).square().mean().sqrt() for each in (half, converted)]
        errors.append([float(each) for each in found])
    before, after = (sum(each) for each in zip(*errors, strict=True))
    assert after < 2 * before, f"{after / before:.2f} times; 4 with a mean added to weights rounded before"
