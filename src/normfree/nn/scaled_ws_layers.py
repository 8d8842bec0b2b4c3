"""Scaled weight standardization for the layers that are no 2-d convolution: one rule, one layout a kind.

Every layer's weight is read as filters [O, fan-in …], standardised as :mod:`normfree.nn.standardization` says, and
written back in the layer's own layout:

    convolution, linear      [O, I/G, k …], [O, I]: rows are filters already
    transposed convolution   [I, O/G, k …]: filter o gathers the I/G rows of its group

A transposed convolution of stride s lets only one tap in s (along each axis) reach an output, so its weight
carries ``sqrt(prod(stride))``, which restores on average what the missing taps take.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.scaled_ws_conv import Standardized


class ScaledWSLayer(Standardized):
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
        self.start_gain(self.weight, **tensor_options)

    def take(self, plain: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a plain layer with a weight and a bias, in this layer's mode."""
        plain.weight = nn.Parameter(weight)
        plain.bias = None if bias is None else nn.Parameter(bias)
        return plain.train(self.training)


class ScaledWSLinear(ScaledWSLayer, nn.Linear):
    """A linear layer with scaled weight standardization; see :class:`ScaledWSLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        self.observe(input)
        return F.linear(input, *self.effective())

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return an ``nn.Linear`` with the given weight and bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        return self.take(plain, weight, bias)


class _ScaledWSConvNd(ScaledWSLayer):
    def forward(self: Any, input: Tensor) -> Tensor:
        """Convolve [N, C, …] to [N, O, …]."""
        self.observe(input)
        return self._conv_forward(input, *self.effective())

    def plain(self: Any, weight: Tensor, bias: Tensor | None, **more: Any) -> nn.Module:
        """Return torch's layer of this geometry with the given weight and bias."""
        plain = self.kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
            **more,
        )
        return self.take(plain, weight, bias)


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

    @property
    def strided_taps(self: Any) -> int:
        return math.prod(self.stride)

    def filters(self: Any, weight: Tensor) -> Tensor:
        grouped = weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)

    def weight_of(self: Any, filters: Tensor) -> Tensor:
        grouped = filters.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve [N, C, …] to [N, O, …]; ``output_size`` as torch's."""
        self.observe(input)
        axes = len(self.kernel_size)
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
        )
        operation = getattr(F, f"conv_transpose{axes}d")
        return operation(input, *self.effective(), self.stride, self.padding, padding, self.groups, self.dilation)

    def plain(self: Any, weight: Tensor, bias: Tensor | None, **more: Any) -> nn.Module:
        """Return torch's layer of this geometry with the given weight and bias."""
        return super().plain(weight, bias, output_padding=self.output_padding, **more)


class ScaledWSConvTranspose1d(_ScaledWSConvTransposeNd, nn.ConvTranspose1d):
    """A transposed 1-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.ConvTranspose1d


class ScaledWSConvTranspose2d(_ScaledWSConvTransposeNd, nn.ConvTranspose2d):
    """A transposed 2-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.ConvTranspose2d


class ScaledWSConvTranspose3d(_ScaledWSConvTransposeNd, nn.ConvTranspose3d):
    """A transposed 3-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.ConvTranspose3d
