"""The limit is the model's own graph: same function, plain layers, trainable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normfree.benchmark import limit
from normfree.models import create_model
from normfree.nn import ScaledConv2d


@pytest.mark.parametrize("name", ["nf_resnet50", "nf_regnet_b0"])
def test_the_limit_starts_as_the_same_function_of_plain_layers(name):
    torch.manual_seed(0)
    model = create_model(name, width=0.25, depths=(1, 1, 1, 1), num_classes=3, skipinit_gain=1.0, drop_rate=0.0)
    nn.init.normal_(model.classifier.weight)
    before = copy.deepcopy(model.state_dict())
    plain = limit(model)
    assert plain.training
    assert not any(isinstance(module, ScaledConv2d) for module in plain.modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any("gain" in name for name, _ in plain.named_parameters())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    plain(x).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_frozen_part_keeps_its_mode():
    model = create_model("nf_resnet50", width=0.25, depths=(1, 1, 1, 1))
    model.stages[0].eval()
    plain = limit(model)
    assert plain.training
    assert not plain.stages[0].training


def test_a_model_without_layers_that_fold_has_none():
    with pytest.raises(ValueError, match=r"^model: Sequential has no layer that folds"):
        limit(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
