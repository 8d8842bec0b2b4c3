"""Layers whose weight is standardised before it is used, and the 2-d convolution among them.

The rule is :func:`normfree.nn.standardize`'s, filter by filter; what a filter is, each layout says for itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from normfree.nn.branch_end import Scale
from normfree.nn.checks import invalid
from normfree.nn.padding import PaddingMode, Size2d
from normfree.nn.scaled_conv import ScaledConv2d
from normfree.nn.scaled_layer import ScaledLayer
from normfree.nn.standardization import standardize

torch.fx.wrap("standardize")  # one node of a symbolic trace, for it asks for dimensions and values


class Standardized(ScaledLayer):
    """Standardises the weight of the layer that follows it in a class's bases.

    The weight is read as filters [O, fan-in …]; a layout whose rows are none says how.

    Attributes:
        gain: [O], learnable, starts at 1.
    """

    gain: nn.Parameter

    def start_gain(self, **tensor_options: Any) -> None:
        """Make the gain, after the constructor of the layer.

        Raises:
            ValueError: a fan-in of 1, whose standardised weight is always zero.
        """
        if self.fan_in == 1:
            rule = "a filter of one weight minus its mean is always zero"
            raise invalid("fan_in", 1, rule, "use ScaledConv2d or a plain layer, or a larger kernel or group")
        self.gain = nn.Parameter(torch.ones(len(self.filters(self.weight)), **tensor_options))

    @property
    def fan_in(self) -> int:
        """Weights of one filter."""
        return self.filters(self.weight)[0].numel()

    @property
    def constant(self) -> float:
        """The constant factor of the standardised weight."""
        return self.input_scale

    def filters(self, weight: Tensor) -> Tensor:
        """Return a weight as filters [O, fan-in …]."""
        return weight

    def weight_of(self, filters: Tensor) -> Tensor:
        """Return filters [O, fan-in …] as a weight."""
        return filters

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1/fan_in), set the bias to zero and the gain to one."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if "gain" in self._parameters:  # the torch class's constructor calls this before there is one
            nn.init.ones_(self.gain)

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the standardised weight, in the layer's layout, with the factor of the input and of the output."""
        gain = self.gain if scale is None else self.gain * scale
        return self.weight_of(standardize(self.filters(self.weight), gain, self.constant))


class ScaledWSConv2d(Standardized, ScaledConv2d):
    """A convolution with scaled weight standardization and factors folded into its weight.

    ``y = alpha * s * (conv(input_scale * x, What) + b)``, with What as in :mod:`normfree.nn.standardization`

    Every filter sums to zero, so a positive mean of the input moves no channel's mean; every filter has norm
    g, so with ``input_scale = gamma / beta`` the output has variance g^2.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding, padding_mode,
            input_scale, alpha, skip_gain: as ``ScaledConv2d``'s.

    Attributes:
        gain: [O], learnable, starts at 1.

    Raises:
        ValueError: as ``ScaledConv2d``; a fan-in of 1 (the standardised weight is then always zero).

    Source: Brock et al. 2021, section 4.
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
        alpha: float = 1.0,
        skip_gain: float | None = None,
        **tensor_options: Any,
    ) -> None:
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
            input_scale=input_scale,
            alpha=alpha,
            skip_gain=skip_gain,
            **tensor_options,
        )
        self.start_gain(**tensor_options)
