"""Layers whose weight is standardised before it is used, and the 2-d convolution among them.

The rule is :func:`normfree.nn.standardize`'s, filter by filter; what a filter is, each layout says for itself.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.nn.branch_end import BranchEnd, Scale
from normfree.nn.padding import PaddingMode, Size2d
from normfree.nn.scaled_conv import ScaledConv2d
from normfree.nn.scaled_layer import ScaledLayer
from normfree.nn.standardization import VARIANCE_FLOOR, standardize

HALF = (torch.float16, torch.bfloat16)

torch.fx.wrap("standardize")  # one node of a symbolic trace, for it asks for dimensions and values


class StandardizedFilters(BranchEnd):
    """The rule for a weight [O, fan-in …] in whatever layout it lies: learnable factors, and what they make of it.

    Attributes:
        gain: [O], learnable, starts at 1.
        kept_mean: [O], learnable, a mean per filter as :mod:`normfree.nn.kept_mean` says; None for none.
    """

    gain: nn.Parameter
    kept_mean: nn.Parameter | None

    def start_gain(self, weight: Tensor, **tensor_options: Any) -> None:
        """Make the gain of a weight; a mean is kept only where one is set afterwards.

        Raises:
            ValueError: a fan-in of 1, whose standardised weight is always zero.
        """
        filters = self.filters(weight)
        if filters[0].numel() == 1:
            rule = "a filter of one weight minus its mean is always zero"
            raise invalid("fan_in", 1, rule, "use ScaledConv2d or a plain layer, or a larger kernel or group")
        self.gain = nn.Parameter(torch.ones(len(filters), **tensor_options))
        for name in ("kept_mean", "input_mean"):
            self.register_parameter(name, None)

    @property
    @abstractmethod
    def constant(self) -> float:
        """The constant factor of the standardised weight."""

    def filters(self, weight: Tensor) -> Tensor:
        """Return a weight as filters [O, fan-in …]."""
        return weight

    def weight_of(self, filters: Tensor) -> Tensor:
        """Return filters [O, fan-in …] as a weight."""
        return filters

    def made_of(self, weight: Tensor, scale: Scale | None) -> Tensor:
        """Return the standardised weight, in the layer's layout, with the factor of the input and of the output."""
        filters = self.filters(weight)
        gain = self.gain if scale is None else self.gain * scale
        if self.kept_mean is None:
            return self.weight_of(standardize(filters, gain, self.constant))
        mean = self.kept_mean if scale is None else self.kept_mean * scale
        return self.weight_of(standardize_about(filters, gain, mean, self.constant))

    @torch.no_grad()
    def fit(self, raw: Tensor, weight: Tensor, factor: Tensor) -> None:
        """Have what is made of a raw weight be ``weight`` with filter i times ``factor_i``; a mean must be kept.

        Args:
            raw: is set to the weight with the factors' magnitudes, so that it, too, trains at the pace of a plain
                weight; where a factor is zero it keeps its own size. In float16 and bfloat16 with the nearest powers
                of two, which round nothing.
            weight: in the layer's layout.
            factor: [O].
        """
        assert self.kept_mean is not None, "a standardized weight alone sums to zero"
        factor = factor.double()
        magnitude = torch.where(factor == 0, 1.0, factor.abs())
        if raw.dtype in HALF:
            magnitude = magnitude.log2().round().exp2()
        filters = self.filters(weight.double())
        filters = filters * magnitude.view(-1, *[1] * (filters.dim() - 1))
        raw.copy_(self.weight_of(filters))
        rows, rest = filters.flatten(1), factor / magnitude
        norm = (rows - rows.mean(1, keepdim=True)).square().sum(1).clamp_min(VARIANCE_FLOOR).sqrt()
        self.gain.copy_(rest * norm / self.constant)
        self.kept_mean.copy_(rest * rows.mean(1) * rows.shape[1] ** 0.5)


@torch.fx.wrap  # one node of a symbolic trace, for it asks for dimensions
def standardize_about(filters: Tensor, gain: Tensor, means: Tensor, scale: float) -> Tensor:
    """Return standardised filters [O, fan-in …] with one mean for each, [O], over sqrt(N), added to its N weights.

    Filters in float16 and bfloat16 are computed in float32 and rounded once: a mean is often below half a unit in the
    last place of a weight, and added to one that was rounded before it would be lost in every weight.
    """
    if filters.dtype in HALF:
        return standardize_about(filters.float(), gain.float(), means.float(), scale).to(filters.dtype)
    spread = (means * filters[0].numel() ** -0.5).view(-1, *[1] * (filters.dim() - 1))
    return standardize(filters, gain, scale) + spread


class Standardized(StandardizedFilters, ScaledLayer):
    """Standardises the weight of the layer that follows it in a class's bases.

    Attributes:
        input_mean: [I], means of the input's channels if the layer is centred (:mod:`normfree.nn.centring`), or None.
        measured_share: part of each training batch whose channel means are added to ``measured_mean``; 0 for none.
        measured_mean: [I + 1], sum of the channel means of training batches, and their number; None for none.
    """

    input_mean: nn.Parameter | None
    measured_share: float = 0.0
    measured_mean: Tensor | None = None

    @property
    def fan_in(self) -> int:
        """Weights of one filter."""
        return self.filters(self.weight)[0].numel()

    @property
    def constant(self) -> float:
        """The constant factor of the standardised weight."""
        return self.input_scale

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight, in the layer's layout, and the bias [O] or None that a plain layer needs instead."""
        if self.input_mean is None:
            return super().effective()
        weight = self.scaled_weight(None)
        bias, scale = self.bias - self.response(weight, self.input_mean), self.branch_scale()
        return (weight, bias) if scale is None else (weight * scale, bias * scale)

    def response(self, weight: Tensor, means: Tensor) -> Tensor:
        """Return what a weight of this layer gives, [O], for an input whose channels have these values [I] throughout.

        The taps of a transposed convolution are averaged over the positions that its stride gives them to.
        """
        taps = self.filters(weight)
        taps = taps.flatten(2).sum(2) if taps.dim() > 2 else taps
        grouped = taps.unflatten(0, (getattr(self, "groups", 1), -1))
        # Not a matrix product, which autocast would round to half precision.
        return (grouped * means.view(len(grouped), 1, -1)).sum(2).flatten() / self.strided_taps

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Add the channel means of a training batch [N, C, …] (linear: [..., C]) to ``measured_mean``."""
        if not (self.measured_share and self.training) or torch._C._are_functorch_transforms_active():
            return
        x = x.detach()[: math.ceil(len(x) * self.measured_share)]
        channels = x.dim() - 1 if isinstance(self, nn.Linear) else 1
        mean = x.mean([axis for axis in range(x.dim()) if axis != channels], dtype=torch.float32)
        measured = F.pad(mean, (0, 1), value=1.0)
        self.measured_mean = measured if self.measured_mean is None else self.measured_mean + measured

    @property
    def strided_taps(self) -> int:
        """Positions of the output among which the taps of a filter are divided: more than 1 if it is transposed."""
        return 1

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1/fan_in), set the bias to zero and the gain to one."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if "gain" in self._parameters:  # the torch class's constructor calls this before there is one
            nn.init.ones_(self.gain)

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the standardised weight, in the layer's layout, with the factor of the input and of the output."""
        return self.made_of(self.weight, scale)


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
        self.start_gain(self.weight, **tensor_options)
