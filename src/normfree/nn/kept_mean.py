"""Standardised layers that keep a mean: what a trained layer and the BatchNorm behind it fold into.

    W_eff_i = g_i * (W_i - mean(W_i)) / sqrt(N * var(W_i)) + m_i / sqrt(N)

g_i     learnable gain, one per filter: the norm of what deviates from its mean
m_i     learnable mean, one per filter, as the norm of N equal weights

A trained filter rarely sums to zero, so standardization alone would change the function; with the mean it is any
weight at all, and trains at any batch size. Both factors stand before vectors of norm 1, so that a learning rate
means to them what it means to a plain weight. (A mean added to each weight as it is would move N times as fast.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.scaled_ws_conv import ScaledWSConv2d, Standardized
from normfree.nn.scaled_ws_layers import (
    ScaledWSConv1d,
    ScaledWSConv3d,
    ScaledWSConvTranspose1d,
    ScaledWSConvTranspose2d,
    ScaledWSConvTranspose3d,
    ScaledWSLinear,
)


class KeptMean(Standardized):
    """Gives the layer that follows it in a class's bases a learnable mean per filter.

    Attributes:
        kept_mean: [O], starts at 0.

    Source: this project's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept_mean = nn.Parameter(torch.zeros_like(self.gain))

    @torch.no_grad()
    def become(self, weight: Tensor, bias: Tensor | None, factor: Tensor) -> None:
        """Have the effective weight be ``weight`` with filter i times ``factor_i``, and the bias be ``bias``.

        Args:
            weight: in the layer's layout.
            bias: [O], or None where the layer has none.
            factor: [O].
        """
        self.fit(self.weight, weight, factor)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


class KeptMeanConv2d(KeptMean, ScaledWSConv2d):
    """A standardised 2-d convolution with a kept mean per filter."""


class KeptMeanLinear(KeptMean, ScaledWSLinear):
    """A standardised linear layer with a kept mean per filter."""


class KeptMeanConv1d(KeptMean, ScaledWSConv1d):
    """A standardised 1-d convolution with a kept mean per filter."""


class KeptMeanConv3d(KeptMean, ScaledWSConv3d):
    """A standardised 3-d convolution with a kept mean per filter."""


class KeptMeanConvTranspose1d(KeptMean, ScaledWSConvTranspose1d):
    """A standardised transposed 1-d convolution with a kept mean per filter."""


class KeptMeanConvTranspose2d(KeptMean, ScaledWSConvTranspose2d):
    """A standardised transposed 2-d convolution with a kept mean per filter."""


class KeptMeanConvTranspose3d(KeptMean, ScaledWSConvTranspose3d):
    """A standardised transposed 3-d convolution with a kept mean per filter."""
