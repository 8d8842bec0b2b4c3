"""What is left of a normalizer where its constants cannot be folded into a layer, and a branch's factor there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.nn.branch_end import BranchEnd
from normfree.nn.checks import check_integer


class ChannelAffine(nn.Module):
    """Scale and shift every channel of x [N, C, …]: ``y = weight_c * x + bias_c``.

    It normalizes nothing: examples stay independent, and training and evaluation are one function. It does
    multiply an activation, which a layer with the factor in its weight spares; it is for the places no layer reaches.

    Args:
        channels: C.

    Attributes:
        weight, bias: [C], learnable, start at 1 and 0.

    Raises:
        ValueError: channels below 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


class BranchScale(BranchEnd):
    """Scale x by ``alpha * s``: for a branch that ends in an activation, which no layer's weight can scale.

    Args:
        alpha: constant factor, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor; None for none.

    Raises:
        ValueError: a factor that is no finite number, or a negative alpha.
    """

    def __init__(self, *, alpha: float = 1.0, skip_gain: float | None = None) -> None:
        super().__init__()
        self.end_branch(alpha, skip_gain)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.branch_scale()
        return x if scale is None else x * scale

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"
