"""Networks for images of 32 px: those of ``normfree.models`` with a stem that keeps the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from normfree.models import create_model
from normfree.nn import ScaledWSConv2d


def _network(widths: Sequence[int], depths: Sequence[int]) -> nn.Module:
    """Return an NF-ResNet whose stem is a 3x3 convolution, the regularisation off and the skip gains awake."""
    plain: dict[str, Any] = {"stochdepth_rate": 0.0, "drop_rate": 0.0, "skipinit_gain": 1.0}
    model = create_model("nf_resnet50", widths=tuple(widths), depths=tuple(depths), num_classes=10, **plain)
    model.stem = nn.Sequential(ScaledWSConv2d(3, widths[0] // 4, 3))
    return model


def nf_resnet50() -> nn.Module:
    """50 layers, stages 64 to 512 channels wide: 1.5 million parameters."""
    return _network((64, 128, 256, 512), (3, 4, 6, 3))


def nf_resnet26() -> nn.Module:
    """26 layers, stages 32 to 256 channels wide: 0.2 million parameters."""
    return _network((32, 64, 128, 256), (2, 2, 2, 2))
