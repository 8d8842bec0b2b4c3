"""Scaled weight standardization for the layers that are no 2-d convolution: one rule, one layout a kind.

Every layer's weight is read as filters [O, fan-in …], standardised as :mod:`normfree.nn.scaled_ws_conv` says, and
written back in the layer's own layout:

    convolution, linear      [O, I/G, k …], [O, I]: rows are filters already
    transposed convolution   [I, O/G, k …]: filter o gathers the I/G rows of its group

A transposed convolution of stride s lets only one tap in s (along each axis) reach an output, so its weight
carries ``sqrt(prod(stride))``, which restores on average what the missing taps take.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.branch_end import BranchEnd, Scale
from normfree.nn.checks import invalid
from normfree.nn.scaled_ws_conv import standardize


class ScaledWSLayer(BranchEnd):
    """What the layers share; a subclass adds the torch class whose geometry it has.

    ``y = alpha * s * (op(input_scale * x, What) + b)``

    Args:
        arguments, options: as the torch class's.
        input_scale: constant factor of the input, such as gamma / beta.
        alpha: constant factor of the output, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor of the output; None for none.

    Attributes:
        gain: [O], learnable, starts at 1.

    Raises:
        ValueError: a factor that is no finite number; a fan-in of 1, whose standardised weight is always zero.

    Source: Brock et al. 2021, section 4, for 2-d convolutions; the other layouts are this project's.
    """

    weight: Any  # the torch classes declare them differently
    bias: Any
    gain: nn.Parameter

    def __init__(
        self,
        *arguments: Any,
        input_scale: float = 1.0,
        alpha: float = 1.0,
        skip_gain: float | None = None,
        **options: Any,
    ) -> None:
        self.input_scale = float(input_scale)
        super().__init__(*arguments, **options)
        tensor_options = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.end_branch(alpha, skip_gain, **tensor_options)
        if self.fan_in == 1:
            rule = "a filter of one weight minus its mean is always zero"
            raise invalid("fan_in", 1, rule, "use the plain layer, or a larger kernel or group")
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

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that the plain layer needs instead."""
        scale = self.branch_scale()
        bias = self.bias if scale is None or self.bias is None else self.bias * scale
        return self.scaled_weight(scale), bias

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the standardised weight, in the layer's layout, with the factor of the input and of the output."""
        gain = self.gain if scale is None else self.gain * scale
        return self.weight_of(standardize(self.filters(self.weight), gain, self.constant))

    def folded(self) -> nn.Module:
        """Return the plain torch layer of the same outputs."""
        with torch.no_grad():
            weight, bias = self.effective()
        plain = self._plain()
        plain.weight = nn.Parameter(weight.detach())
        plain.bias = None if bias is None else nn.Parameter(bias.detach())
        return plain.train(self.training)

    def _plain(self) -> Any:
        raise NotImplementedError


class ScaledWSLinear(ScaledWSLayer, nn.Linear):
    """A linear layer with scaled weight standardization; see :class:`ScaledWSLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return F.linear(input, *self.effective())

    def _plain(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")


class _ScaledWSConvNd(ScaledWSLayer):
    def forward(self: Any, input: Tensor) -> Tensor:
        """Convolve [N, C, …] to [N, O, …]."""
        return self._conv_forward(input, *self.effective())

    def _plain(self: Any, **more: Any) -> Any:
        return self.kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
            **more,
        )


class ScaledWSConv1d(_ScaledWSConvNd, nn.Conv1d):
    """A 1-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.Conv1d


class ScaledWSConv3d(_ScaledWSConvNd, nn.Conv3d):
    """A 3-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.Conv3d


class _ScaledWSConvTransposeNd(_ScaledWSConvNd):
    @property
    def constant(self: Any) -> float:
        """The factor of the input, times what restores the taps that the stride leaves out."""
        return self.input_scale * math.sqrt(math.prod(self.stride))

    def filters(self: Any, weight: Tensor) -> Tensor:
        grouped = weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)

    def weight_of(self: Any, filters: Tensor) -> Tensor:
        grouped = filters.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve [N, C, …] to [N, O, …]; ``output_size`` as torch's."""
        axes = len(self.kernel_size)
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
        )
        operation = getattr(F, f"conv_transpose{axes}d")
        return operation(input, *self.effective(), self.stride, self.padding, padding, self.groups, self.dilation)

    def _plain(self: Any, **more: Any) -> Any:
        return super()._plain(output_padding=self.output_padding, **more)


class ScaledWSConvTranspose1d(_ScaledWSConvTransposeNd, nn.ConvTranspose1d):
    """A transposed 1-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.ConvTranspose1d


class ScaledWSConvTranspose2d(_ScaledWSConvTransposeNd, nn.ConvTranspose2d):
    """A transposed 2-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.ConvTranspose2d


class ScaledWSConvTranspose3d(_ScaledWSConvTransposeNd, nn.ConvTranspose3d):
    """A transposed 3-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.ConvTranspose3d
