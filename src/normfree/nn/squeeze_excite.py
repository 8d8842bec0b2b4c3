"""Squeeze-and-excitation, with the block's scalar factors on its gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.common.checks import check_integer, check_number
from normfree.nn.branch_end import BranchEnd


class SqueezeExcite(BranchEnd):
    """Gate the channels of a map by a small network of their means.

    ``y = x * alpha * s * gate``, ``gate = 2 * sigmoid(linear1(relu(linear0(mean_HW(x)))))``

    The 2 restores what a sigmoid around 1/2 takes, so that the branch keeps its variance.

    Args:
        channels: C.
        ratio: hidden units per channel; the hidden width is ``max(1, int(channels * ratio))``.
        alpha: constant factor of the output, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor of the output; None for none. Like alpha it multiplies
            the [N, C] gate, never the map.

    Raises:
        ValueError: channels below 1; a ratio that is not above 0; a factor that is no finite number.

    Source: Hu et al. 2018 (arXiv 1709.01507); the 2 is Brock et al. 2021's.
    """

    def __init__(
        self, channels: int, ratio: float = 0.25, *, alpha: float = 1.0, skip_gain: float | None = None
    ) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        check_number("ratio", ratio, 0.0, exclusive=True)
        hidden = max(1, int(channels * ratio))
        self.linear0 = nn.Linear(channels, hidden)
        self.linear1 = nn.Linear(hidden, channels)
        self.end_branch(alpha, skip_gain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights from N(0, 1/fan_in) and set both biases to zero."""
        for linear in (self.linear0, self.linear1):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gate [N, C, H, W]."""
        gate = 2 * torch.sigmoid(self.linear1(F.relu(self.linear0(x.mean((2, 3))))))
        return x * self.ended(gate)[:, :, None, None]
