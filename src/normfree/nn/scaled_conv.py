"""A convolution that carries scalar factors in its weight, so that no activation is ever multiplied.

A convolution is linear: a factor of its input or of its output is a factor of its weight (of its output: of
its bias too). A weight is far smaller than the activations it meets, and the factor's gradient is as exact.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from normfree.nn.padding import PaddedConv2d, Size2d

Scale = float | Tensor


class ScaledConv2d(PaddedConv2d):
    """A convolution with factors folded into its weight.

    ``y = scale * (conv(input_scale * x, W) + b) = conv(x, scale * input_scale * W) + scale * b``

    W is drawn from N(0, init_scale^2 / fan_in), LeCun's normal; b starts at 0.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as ``nn.Conv2d``'s.
        padding: "symmetric" (default), "same" (TensorFlow's), or explicit numbers.
        input_scale: constant factor of the input, such as gamma / beta.
        init_scale: factor of the initial weight's standard deviation (He: sqrt(2)).

    Raises:
        ValueError: unknown padding style.

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
        input_scale: float = 1.0,
        init_scale: float = 1.0,
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
            **tensor_options,
        )

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.init_scale / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective_weight(self, scale: Scale | None = None) -> Tensor:
        """Return the weight [O, I/G, kh, kw] that a plain convolution would need, ``scale`` included."""
        weight = self.weight if self.input_scale == 1 else self.weight * self.input_scale
        return weight if scale is None else weight * scale

    def effective_bias(self, scale: Scale | None = None) -> Tensor | None:
        """Return the bias [O] that a plain convolution would need, ``scale`` included, or None."""
        return self.bias if scale is None or self.bias is None else self.bias * scale

    def forward(self, input: Tensor, scale: Scale | None = None) -> Tensor:
        """Convolve.

        Args:
            input: [N, C, H, W].
            scale: factor of the output, a number or a 0-d tensor.

        Returns:
            [N, O, H', W'].
        """
        return self.convolve(input, self.effective_weight(scale), self.effective_bias(scale))

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", input_scale={self.input_scale:.6g}" if self.input_scale != 1 else "")
