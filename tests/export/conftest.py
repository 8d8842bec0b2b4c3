"""Small networks in which nothing is silent, so that any slip of an exporter shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from normfree.models import create_model

SHAPE = {"widths": (16, 24, 32, 32), "depths": (1, 1, 1, 1), "num_classes": 5, "skipinit_gain": 1.0}
FAMILIES = {"nf_resnet50": {}, "nf_regnet_b0": {}, "nfnet_f0": {"group_size": 4}}


@pytest.fixture(scope="session")
def network() -> Callable[..., nn.Module]:
    """Build a family's network in training mode; gains, biases and skip gains are drawn. Never change one."""

    @cache
    def build(name: str, padding: str = "symmetric") -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = create_model(name, padding=padding, **SHAPE, **FAMILIES[name])
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.dim() < 2:
                        parameter.copy_(torch.randn_like(parameter) * 0.3 + ("gain" in key))
            nn.init.normal_(model.classifier.weight, std=0.1)
        return model

    return build


@pytest.fixture(scope="session")
def linear() -> nn.Module:
    """The smallest model; nothing in it is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3)
