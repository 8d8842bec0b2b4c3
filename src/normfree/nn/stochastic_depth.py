"""Stochastic depth: skip a residual branch for some examples of a training batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.common.checks import check_rate


class StochasticDepth(nn.Module):
    """Drop the branch of each example independently with probability ``rate``.

    ``y_n = m_n * x_n, m_n ~ Bernoulli(1 - rate)`` in training; ``y = x`` in evaluation or at rate 0.

    As in the official code, the survivors are **not** divided by ``1 - rate``.

    Args:
        rate: probability of dropping, in [0, 1).

    Raises:
        ValueError: a rate outside [0, 1).

    Source: Huang et al. 2016 (arXiv 1603.09382); Brock et al. 2021, appendix.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = check_rate("rate", rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [N, ...] with the examples that were dropped set to zero."""
        if not self.training or self.rate == 0:
            return x
        # Drawn in float32 whatever x is: bfloat16 has too few steps in [0, 1) for a small rate.
        draw = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device, dtype=torch.float32)
        return x * (draw >= self.rate).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.rate:.4g}"
