"""BN-RegNet: the graph of NF-RegNet with a batch norm after every convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.models import accepted_overrides, create_model
from normfree.nn import ScaledWSConv2d


def small(**overrides):
    torch.manual_seed(0)
    shape = {"widths": (12, 16, 24, 24), "depths": (1, 2, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0}
    return create_model("bn_regnet_b0", num_classes=5, **{**shape, **overrides})


def test_every_convolution_is_plain_and_followed_by_a_batch_norm():
    model = small()
    convolutions = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(convolutions) == 1 + 3 * 5 + 4 + 1
    assert {name.removesuffix("conv") + "norm" for name, _ in convolutions} == norms
    for _, convolution in convolutions:
        assert convolution.bias is None
        assert convolution.input_scale == 1
        assert not isinstance(convolution, ScaledWSConv2d)
    assert not any("gain" in name for name, _ in model.named_parameters())
    assert model.feature_scale == 1


@pytest.mark.parametrize("index", [0, 1, 2])
def test_block_equals_its_equation(index):
    model = small().double().train()
    block = [block for stage in model.stages for block in stage][index]
    x = torch.randn(3, block.conv0.conv.in_channels, 7, 6, dtype=torch.float64)
    stride = 2 if index < 2 else 1

    def normalized(layer, x, **geometry):
        x = F.conv2d(x, layer.conv.weight, **geometry)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    active = F.silu(x)
    shortcut = x
    if index < 2:
        pooled = F.avg_pool2d(F.pad(active, (0, 0, 0, 1)), 2)
        pooled[:, :, -1] *= 2  # the window over the edge holds two cells of four
        shortcut = normalized(block.shortcut, pooled)
    hidden = F.silu(normalized(block.conv0, active))
    hidden = normalized(block.conv1, hidden, stride=stride, padding=1, groups=block.conv1.conv.groups)
    gate = block.squeeze_excite
    weights = 2 * torch.sigmoid(gate.linear1(torch.relu(gate.linear0(hidden.mean((2, 3))))))
    branch = normalized(block.conv2, F.silu(hidden * weights[:, :, None, None]))
    torch.testing.assert_close(block(x), shortcut + branch)


def test_geometry_and_regularisation_are_nf_regnets():
    with torch.device("meta"):
        normalized, free = create_model("bn_regnet_b3"), create_model("nf_regnet_b3")
    shapes = [
        [(m.weight.shape, m.stride, m.groups) for m in model.modules() if isinstance(m, nn.Conv2d)]
        for model in (normalized, free)
    ]
    assert shapes[0] == shapes[1]
    assert normalized.feature_info == free.feature_info
    assert normalized.dropout.p == free.dropout.p == 0.3
    rates = [[b.stochastic_depth.rate for stage in m.stages for b in stage] for m in (normalized, free)]
    assert rates[0] == rates[1]
    dropped = {"alpha", "skipinit_gain", "centred"}
    assert accepted_overrides("bn_regnet_b3") == [o for o in accepted_overrides("nf_regnet_b3") if o not in dropped]
