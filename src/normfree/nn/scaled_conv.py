"""A convolution that carries scalar factors in its weight, so that no activation is ever multiplied.

A convolution is linear: a factor of its input or of its output is a factor of its weight (of its output: of
its bias too). A weight is far smaller than the activations it meets, and the factor's gradient is as exact.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from normfree.nn.padding import PaddedConv2d, PaddingMode, Size2d
from normfree.nn.scaled_layer import ScaledLayer


class ScaledConv2d(ScaledLayer, PaddedConv2d):
    """A convolution with factors folded into its weight.

    ``y = alpha * s * (conv(input_scale * x, W) + b) = conv(x, alpha * s * input_scale * W) + alpha * s * b``

    W is drawn from N(0, init_scale^2 / fan_in), LeCun's normal; b starts at 0.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as ``nn.Conv2d``'s.
        padding: "symmetric" (default), "same" (TensorFlow's), or explicit numbers.
        padding_mode: as ``nn.Conv2d``'s; with "same", all but "zeros" ask for a stride of 1.
        input_scale: constant factor of the input, such as gamma / beta.
        init_scale: factor of the initial weight's standard deviation (He: sqrt(2)).
        alpha: constant factor of the output, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor of the output; None for none.

    Raises:
        ValueError: unknown padding style or mode; a factor that is no finite number.

    Source: the folding is this project's; the factors are those of Brock et al. 2021, sections 3 and 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d = 1,
        *,
        padding: str | Size2d = "symmetric",
        dilation: Size2d = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        input_scale: float = 1.0,
        init_scale: float = 1.0,
        alpha: float = 1.0,
        skip_gain: float | None = None,
        **tensor_options: Any,
    ) -> None:
        # Before super().__init__, which draws the weight by calling reset_parameters.
        self.input_scale = float(input_scale)
        self.init_scale = float(init_scale)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            **tensor_options,
        )
        self.end_branch(alpha, skip_gain, **tensor_options)

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.init_scale / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        factors = {"input_scale": self.input_scale, "alpha": self.alpha}
        return super().extra_repr() + "".join(f", {name}={value:.6g}" for name, value in factors.items() if value != 1)
