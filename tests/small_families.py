"""A small network of every family, in which nothing is silent."""

from __future__ import annotations

import torch
from torch import nn

from normfree.models import create_model

SHAPE = {"widths": (16, 24, 32, 32), "depths": (1, 2, 1, 1), "num_classes": 5}
FAMILIES = {
    "nf_resnet50": {},
    "nf_resnet101": {"use_se": True},
    "nf_regnet_b0": {},
    "nfnet_f0": {"group_size": 4},
    "skipinit_resnet50": {},
    "fixup_resnet50": {},
    "resnet50": {},
    "resnetv2_50": {},
    "bn_regnet_b0": {},
}


def randomised(name: str, **overrides):
    """A small network with nothing silent: gains, biases and skip gains are drawn, running statistics too."""
    torch.manual_seed(0)
    model = create_model(name, **{**SHAPE, **FAMILIES[name], **overrides})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("gain" in key or "norm" in key))
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.uniform_(0.5, 1.5)
    nn.init.normal_(model.classifier.weight, std=0.1)
    return model
