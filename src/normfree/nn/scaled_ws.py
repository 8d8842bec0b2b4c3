"""Layers with scaled weight standardization: convolutions and linear layers whose weight is standardized before use.

    y = alpha * s * (op(x, What) + b) = op(x, alpha * s * What) + alpha * s * b
    What_i = c * k * g_i * (W_i - mean(W_i)) * rsqrt(max(N * var(W_i), 1e-4)) + m_i / sqrt(N)

op      the convolution or the matrix product
W_i     filter i: the N = fan-in weights that feed output i; :class:`WeightLayout` says where they lie
g       ``gain``, learnable, one per filter, starts at 1
m       ``kept_mean``, learnable, one per filter; only in the ``KeptMean`` layers, which conversion makes
c       ``input_scale``, the constant factor of the layer's input (gamma / beta)
k       ``WeightLayout.factor``: 1, unless the forward itself multiplies its weight by a constant
alpha   constant factor of the output, where the layer ends a residual branch
s       ``skip_gain``, learnable, one number, where the layer ends a residual branch

The operation is linear, so each factor of its input or output is a factor of its weight (of its output: of its bias
too), and no activation is ever multiplied: a weight is far smaller than the activations it meets.

From the bottom up: the two factors of a branch (``BranchEnd``), layers with factors in their weight (``ScaledLayer``,
``ScaledConv2d``), the rule for the weight (``standardize``, ``StandardizedFilters``), layers that follow it
(``Standardized``), and those for each operation.

Source: Brock, De, Smith, ICLR 2021, sections 3 and 4; folding the factors into the weight, and the kept mean, are this
project's.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.common.checks import check_number, invalid
from normfree.common.text import first_line
from normfree.common.torch_compat import in_function_transform, operations_are_followed
from normfree.nn.fold import Foldable
from normfree.nn.padding import PaddedConv2d, PaddingMode, PaddingStyle, Size2d
from normfree.nn.standardization import HALF, VARIANCE_FLOOR, standardize_natively

Scale = float | Tensor


class BranchEnd(nn.Module):
    """A layer whose output may be scaled by ``alpha * s``, which it folds into its own numbers.

    Attributes:
        alpha: constant factor of the output.
        skip_gain: s, a learnable 0-d factor of the output, or None.
    """

    # Both are annotated where they are set: TorchScript reads a class's annotations, and cannot read postponed ones.

    def set_branch_scale(self, alpha: float, skip_gain: float | None, **tensor_options: Any) -> None:
        """Set both factors, after ``nn.Module``'s constructor; a layer that ends no branch has (1, None).

        Raises:
            ValueError: alpha negative or not finite; a skip gain that is no finite number.
        """
        self.alpha: float = check_number("alpha", alpha, 0.0)
        self.register_parameter("skip_gain", None)
        self.skip_gain: nn.Parameter | None = None
        if skip_gain is not None:
            initial = torch.full((), check_number("skip_gain", skip_gain), **tensor_options)
            self.skip_gain = nn.Parameter(initial)

    def branch_scale(self) -> Scale | None:
        """Return ``alpha * s``, or None if that is the constant 1."""
        if self.skip_gain is None:
            return None if self.alpha == 1 else self.alpha
        return self.skip_gain if self.alpha == 1 else self.alpha * self.skip_gain

    def apply_branch_scale(self, x: Tensor) -> Tensor:
        """Return ``alpha * s * x``: for a layer that has no weight to carry the factor. TorchScript can read it."""
        skip_gain = self.skip_gain
        if skip_gain is None:
            return x if self.alpha == 1 else x * self.alpha
        return x * skip_gain if self.alpha == 1 else x * (self.alpha * skip_gain)


class ScaledLayer(BranchEnd, Foldable):
    """A linear operation with the factors of its input and its output in its weight.

    A subclass adds the torch class whose geometry it has, and ``plain(weight, bias)``, which returns a layer in that
    geometry that only has the given weight and bias.

    Attributes:
        input_scale: constant factor of the input, such as gamma / beta.
    """

    weight: Any  # the torch classes declare them differently
    bias: Any
    input_scale: float

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight, in the layer's layout, and the bias [O] or None that a plain layer needs instead."""
        scale = self.branch_scale()
        bias = self.bias if scale is None or self.bias is None else self.bias * scale
        return self.scaled_weight(scale), bias

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the weight with the factor of the input and ``scale``, that of the output."""
        weight = self.weight if self.input_scale == 1 else self.weight * self.input_scale
        return weight if scale is None else weight * scale

    def measure_input(self, x: Tensor) -> None:
        """Record what a subclass needs of its input; nothing here."""

    def extra_repr(self) -> str:
        factors = {"input_scale": self.input_scale, "alpha": self.alpha}
        shown = "".join(f", {name}={value:.6g}" for name, value in factors.items() if value != 1)
        return super().extra_repr() + shown + (", skip_gain" if self.skip_gain is not None else "")

    def folded(self: Any) -> nn.Module:
        """Return a plain layer of the same outputs, its tensors where and as laid out as this one's."""
        with torch.no_grad():
            weight, bias = self.effective()
        return self.plain(weight.detach(), None if bias is None else bias.detach())


class ScaledConv2d(ScaledLayer, PaddedConv2d):
    """A 2-d convolution with factors folded into its weight, which is not standardized.

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
        padding: PaddingStyle | Size2d = "symmetric",
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
        self.input_scale = check_number("input_scale", input_scale)
        self.init_scale = check_number("init_scale", init_scale)
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
        self.set_branch_scale(alpha, skip_gain, **tensor_options)

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.init_scale / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [N, C, H, W] to [N, O, H', W']."""
        self.measure_input(input)
        return self.convolve(input, *self.effective())

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        """Return a convolution in this layer's geometry that only has the given weight and bias.

        Returns:
            An ``nn.Conv2d``; a ``PaddedConv2d`` for TensorFlow's padding, which depends on the input's size.
        """
        channels: tuple[int, int] = (self.in_channels, self.out_channels)
        geometry: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": bias is not None,
            "device": "meta",
        }
        if self.padding_style == "same":
            plain = PaddedConv2d(*channels, padding="same", **geometry)
        else:
            geometry |= {"padding": self.padding, "padding_mode": self.padding_mode}
            plain = nn.Conv2d(*channels, **geometry)
        plain.weight = nn.Parameter(weight)
        plain.bias = None if bias is None else nn.Parameter(bias)
        return plain.train(self.training)


def standardize(weight: Tensor, gain: Tensor, scale: float = 1.0) -> Tensor:
    """Return the standardised weight, each filter of unit norm times its gain and ``scale``.

    ``scale * gain_i * (W_i - mean(W_i)) * rsqrt(max(N * var(W_i), 1e-4))``

    On a GPU one Triton kernel computes it (:mod:`normfree.nn.gpu_standardization`), unless the operations are followed
    one by one; otherwise torch's own operations do (:mod:`normfree.nn.standardization`).

    Args:
        weight: [O, I, kh, kw], in any memory format (kept), or filters of any other shape [O, …]; float16 and
            bfloat16 are computed in float32.
        gain: [O].
        scale: a constant.

    Returns:
        A tensor of the weight's shape and type.

    Source: Brock et al. 2021, equation 1 of section 4.
    """
    if on_gpu(weight) and (kernels := kernels_for(weight, gain)) is not None:
        return kernels.standardize_fused(weight, gain, scale)
    return standardize_natively(weight, gain, scale)


torch.fx.wrap("standardize")  # one node of a symbolic trace, for it asks for dimensions and values


def on_gpu(weight: Tensor) -> bool:
    """Return whether a weight is on a GPU, where an operation of its size takes less time than its launch."""
    return weight.is_cuda


def kernels_for(weight: Tensor, gain: Tensor) -> Any:
    """Return the module with the kernels that standardize a weight on a GPU; None where torch's operations have to."""
    if operations_are_followed(weight, gain):
        return None
    if weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # building the kernels waits for the device, which a capture does not allow
    kernels = gpu_kernels(weight.device)
    return kernels if kernels is not None and kernels.takes(weight, gain) else None


@cache
def gpu_kernels(device: torch.device) -> Any:
    """Return the module with the kernels, built and run once for each device.

    Where they cannot be built, for Triton needs a compiler, a warning says so, and it is None from then on.
    """
    try:
        from normfree.nn import gpu_standardization

        gpu_standardization.try_out(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the loader's, the compiler's, Triton's own kinds
        reason = first_line(error)
        remedy = "install triton and a C compiler, or compile the model, for faster steps"
        warnings.warn(
            f"filters are standardized by several calls each: no kernels here ({reason}); {remedy}", stacklevel=2
        )
        return None
    return gpu_standardization


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


ADDED_BIAS = "added_bias"
"""The bias of a module whose own forward takes none."""


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Where a module keeps the weight of its one linear map, and how the map reads it.

    A weight is read as filters [O, fan-in …]: its first axis is split into ``groups``, all axes are put in ``order``,
    and the first ``leading`` of them together count the outputs. The rows of convolutions and linear layers are
    filters already; filter o of a transposed convolution [I, O/G, k …] is the I/G rows of its group at column o.

    Attributes:
        weight: name of the parameter.
        bias: name of the bias parameter that the forward reads; "" for none.
        groups: parts of the first axis, of a grouped transposed convolution; otherwise 1.
        order: of the axes, once split; () for the order they have.
        leading: number of axes, once ordered, that count the outputs.
        factor: constant of the standardized weight besides the input scale: what undoes a constant that the forward
            multiplies its weight by, and the taps that the stride of a transposed convolution leaves out.
        bias_factor: constant that the forward multiplies its bias by.
        axis: of the channels in what the forward returns, where a bias is added to that; None where none is.
    """

    weight: str = "weight"
    bias: str = "bias"
    groups: int = 1
    order: tuple[int, ...] = ()
    leading: int = 1
    factor: float = 1.0
    bias_factor: float = 1.0
    axis: int | None = None

    @property
    def biases(self) -> tuple[str, ...]:
        """The name of the bias parameter of the module once standardized, if it has one."""
        return (self.bias,) if self.bias else () if self.axis is None else (ADDED_BIAS,)

    def filters(self, weight: Tensor) -> Tensor:
        """Return a weight as filters [O, fan-in …]."""
        weight = weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))
        weight = weight.permute(self.order) if self.order else weight
        return weight if self.leading == 1 else weight.flatten(0, self.leading - 1)

    def weight_of(self, filters: Tensor, shape: torch.Size) -> Tensor:
        """Return filters [O, fan-in …] as a weight of a shape."""
        split = shape if self.groups == 1 else torch.Size((self.groups, shape[0] // self.groups, *shape[1:]))
        order = self.order or tuple(range(len(split)))
        if self.leading > 1:
            filters = filters.unflatten(0, [split[axis] for axis in order[: self.leading]])
        if self.order:
            filters = filters.permute([order.index(axis) for axis in range(len(order))])
        return filters if self.groups == 1 else filters.flatten(0, 1)


ROWS = WeightLayout()
"""The layout of convolutions and linear layers: rows are filters."""


class StandardizedFilters(BranchEnd):
    """The rule for a weight in whatever layout it lies: learnable factors, and the standardized weight they give.

    Attributes:
        gain: [O], learnable, starts at 1.
        kept_mean: [O], learnable; None for none.
        input_scale: constant factor of the input, such as gamma / beta.
        layout: how the weight is read as filters.
    """

    gain: nn.Parameter
    kept_mean: nn.Parameter | None
    input_scale: float
    layout: WeightLayout = ROWS

    def add_gain(self, weight: Tensor, **tensor_options: Any) -> None:
        """Add the gain of a weight; a mean is kept only where one is set afterwards.

        Raises:
            ValueError: a fan-in of 1, whose standardised weight is always zero.
        """
        filters = self.layout.filters(weight)
        if filters[0].numel() == 1:
            rule = "a filter of one weight minus its mean is always zero"
            raise invalid("fan_in", 1, rule, "use ScaledConv2d or a plain layer, or a larger kernel or group")
        self.weight_shape = weight.shape
        self.gain = nn.Parameter(torch.ones(len(filters), **tensor_options))
        for name in ("kept_mean", "input_mean"):
            self.register_parameter(name, None)

    @property
    def constant(self) -> float:
        """The constant factor of the standardised weight."""
        return self.input_scale * self.layout.factor

    def standardized(self, weight: Tensor, scale: Scale | None) -> Tensor:
        """Return the standardised weight, in the layer's layout, with the factor of the input and of the output."""
        filters = self.layout.filters(weight)
        gain = self.gain if scale is None else self.gain * scale
        if self.kept_mean is None:
            made = standardize(filters, gain, self.constant)
        else:
            mean = self.kept_mean if scale is None else self.kept_mean * scale
            made = standardize_about(filters, gain, mean, self.constant)
        return made if self.layout is ROWS else self.layout.weight_of(made, self.weight_shape)

    @torch.no_grad()
    def set_effective_weight(self, raw: Tensor, weight: Tensor, factor: Tensor) -> None:
        """Set the factors so that the standardized weight is ``weight`` with filter i times ``factor_i``.

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
        filters = self.layout.filters(weight.double())
        filters = filters * magnitude.view(-1, *[1] * (filters.dim() - 1))
        raw.copy_(self.layout.weight_of(filters, self.weight_shape))
        rows, rest = filters.flatten(1), factor / magnitude
        norm = (rows - rows.mean(1, keepdim=True)).square().sum(1).clamp_min(VARIANCE_FLOOR).sqrt()
        self.gain.copy_(rest * norm / self.constant)
        self.kept_mean.copy_(rest * rows.mean(1) * rows.shape[1] ** 0.5)


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
        return self.layout.filters(self.weight)[0].numel()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1/fan_in), set the bias to zero and the gain to one."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if "gain" in self._parameters:  # the torch class's constructor calls this before there is one
            nn.init.ones_(self.gain)

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the standardised weight with the factor of the input and ``scale``, that of the output."""
        return self.standardized(self.weight, scale)

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
        taps = self.layout.filters(weight)
        taps = taps.flatten(2).sum(2) if taps.dim() > 2 else taps
        grouped = taps.unflatten(0, (getattr(self, "groups", 1), -1))
        # Not a matrix product, which autocast would round to half precision.
        return (grouped * means.view(len(grouped), 1, -1)).sum(2).flatten() / self.strided_taps

    @property
    def strided_taps(self) -> int:
        """Positions of the output among which the taps of a filter are divided: more than 1 if it is transposed."""
        return 1

    @torch.no_grad()
    def measure_input(self, x: Tensor) -> None:
        """Add the channel means of a training batch [N, C, …] (linear: [..., C]) to ``measured_mean``."""
        if not (self.measured_share and self.training) or in_function_transform():
            return
        x = x.detach()[: math.ceil(len(x) * self.measured_share)]
        channels = x.dim() - 1 if isinstance(self, nn.Linear) else 1
        mean = x.mean([axis for axis in range(x.dim()) if axis != channels], dtype=torch.float32)
        measured = F.pad(mean, (0, 1), value=1.0)
        self.measured_mean = measured if self.measured_mean is None else self.measured_mean + measured


class ScaledWSConv2d(Standardized, ScaledConv2d):
    """A 2-d convolution with scaled weight standardization, all scalar factors folded into its weight.

    ``y = alpha * s * (conv(input_scale * x, What) + b)``, the equation at the top of this file

    Every filter sums to zero, so a positive mean of the input moves no channel's mean; every filter has norm
    g, so with ``input_scale = gamma / beta`` the output has variance g^2.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
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
        padding: PaddingStyle | Size2d = "symmetric",
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
        self.add_gain(self.weight, **tensor_options)


class ScaledWSLayer(Standardized):
    """What the layers that are no 2-d convolution share; a subclass adds the torch class whose geometry it has.

    ``y = alpha * s * (op(input_scale * x, What) + b)``

    A transposed convolution of stride s lets only one tap in s (along each axis) reach an output, so its weight
    carries ``sqrt(prod(stride))``, which restores on average what the missing taps take.

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
        self.input_scale = check_number("input_scale", input_scale)
        super().__init__(*arguments, **options)
        tensor_options = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.set_branch_scale(alpha, skip_gain, **tensor_options)
        self.add_gain(self.weight, **tensor_options)

    def with_parameters(self, plain: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a plain layer with a weight and a bias, in this layer's mode."""
        plain.weight = nn.Parameter(weight)
        plain.bias = None if bias is None else nn.Parameter(bias)
        return plain.train(self.training)


class ScaledWSLinear(ScaledWSLayer, nn.Linear):
    """A linear layer with scaled weight standardization; see :class:`ScaledWSLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        self.measure_input(input)
        return F.linear(input, *self.effective())

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return an ``nn.Linear`` with the given weight and bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        return self.with_parameters(plain, weight, bias)


class _ScaledWSConvNd(ScaledWSLayer):
    def forward(self: Any, input: Tensor) -> Tensor:
        """Convolve [N, C, …] to [N, O, …]."""
        self.measure_input(input)
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
        return self.with_parameters(plain, weight, bias)


class ScaledWSConv1d(_ScaledWSConvNd, nn.Conv1d):
    """A 1-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.Conv1d


class ScaledWSConv3d(_ScaledWSConvNd, nn.Conv3d):
    """A 3-d convolution with scaled weight standardization; see :class:`ScaledWSLayer`."""

    kind = nn.Conv3d


@cache
def transposed_layout(axes: int, groups: int, stride: tuple[int, ...]) -> WeightLayout:
    """Return the layout of the weight [I, O/G, k …] of a transposed convolution: filter o is a column of its group."""
    factor = math.sqrt(math.prod(stride))
    if groups == 1:
        return WeightLayout(order=(1, 0, *range(2, axes)), factor=factor)
    return WeightLayout(groups=groups, order=(0, 2, 1, *range(3, axes + 1)), leading=2, factor=factor)


class _ScaledWSConvTransposeNd(_ScaledWSConvNd):
    @property
    def layout(self: Any) -> WeightLayout:  # pyright: ignore[reportIncompatibleVariableOverride]
        return transposed_layout(2 + len(self.kernel_size), self.groups, self.stride)

    @property
    def strided_taps(self: Any) -> int:
        return math.prod(self.stride)

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve [N, C, …] to [N, O, …]; ``output_size`` as torch's."""
        self.measure_input(input)
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


class KeptMean(Standardized):
    """Gives the layer that follows it in a class's bases a learnable mean per filter: m at the top of this file.

    It is what a trained layer and the BatchNorm behind it fold into: a trained filter rarely sums to zero, so
    standardization alone would change the function; with the mean the weight is any weight at all, and trains at any
    batch size. Gain and mean both stand before vectors of norm 1, so that a learning rate means to them what it means
    to a plain weight. (A mean added to each weight as it is would move N times as fast.)

    Attributes:
        kept_mean: [O], starts at 0.

    Source: this project's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kept_mean = nn.Parameter(torch.zeros_like(self.gain))

    @torch.no_grad()
    def set_effective(self, weight: Tensor, bias: Tensor | None, factor: Tensor) -> None:
        """Set the parameters so that the effective weight is ``weight`` with filter i times ``factor_i``.

        Args:
            weight: in the layer's layout.
            bias: [O], the effective bias, or None where the layer has none.
            factor: [O].
        """
        self.set_effective_weight(self.weight, weight, factor)
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
