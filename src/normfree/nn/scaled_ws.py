"""Scaled weight standardization, as one fused normalisation of the weight.

    What_i = g_i * c * (W_i - mean(W_i)) * rsqrt(max(N * var(W_i), 1e-4))

W_i     filter i, one row of the weight, N = fan-in numbers
g       learnable gain, one per filter
c       constant factor of the convolution's input (gamma / beta)
var     biased variance

Source: Brock, De, Smith, ICLR 2021, section 4; the floor 1e-4 is the official code's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from normfree.common.checks import check_number, invalid
from normfree.nn.fold import Foldable
from normfree.nn.gpu_standardization import fused_standardization
from normfree.nn.padding import PaddedConv2d, PaddingMode, Size2d

VARIANCE_FLOOR = 1e-4  # of N * var: filters below it are divided by the floor's root instead

# Added to var by the native norms, some of which refuse a zero: keeps constant rows finite, and is 20 orders below
# the smallest floor.
_TINY = 1e-30
# See StandardizeRows.backward. A power of two: multiplying by it and dividing again is exact.
_DEMOTION = 2.0**-30


class StandardizeRows(torch.autograd.Function):
    """Standardise the rows of a matrix, scaling each: the equation above with W [O, N], g [O], c a number.

    Two fused native kernels forward (row moments; affine) and one backward. Outputs are the standardised
    matrix [O, N] and, for the backward pass, the rows' means [O] and unfloored inverse deviations [O].
    Differentiable twice, and transformed by ``torch.func``, but for forward mode: see ``standardize``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, gain: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        fan_in = rows.shape[-1]
        # For its row moments alone: on a CPU they come ten times faster than var_mean's. Its first output is
        # given back at once, so that the result takes its memory.
        mean, inverse_deviation = torch.native_layer_norm(rows, [fan_in], None, None, _TINY)[1:]
        mean, inverse_deviation = mean.flatten(), inverse_deviation.flatten()
        variance = inverse_deviation.pow(-2).clamp_min(VARIANCE_FLOOR / fan_in)
        weight = gain * (scale / math.sqrt(fan_in))
        standardized = F.batch_norm(rows[None], mean, variance, weight=weight, training=False, eps=_TINY)
        return standardized[0], mean, inverse_deviation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, ...]) -> None:
        rows, gain, scale = inputs
        _, mean, inverse_deviation = output
        ctx.mark_non_differentiable(mean, inverse_deviation)
        ctx.save_for_backward(rows, gain, mean, inverse_deviation)
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, which are batch norm's.

        Per row, with r = inverse deviation, w = g * c / sqrt(N), x = W - mean(W):

            dW = r * w * (G - mean(G) - x * r^2 * mean(G * x)),   dg = c / sqrt(N) * r * sum(G * x)

        A row on the floor has a constant deviation: the term in r^2, which the variance brings, is absent.
        Halving r 30 times and doubling w as often leaves the product r * w as it is and divides that term by
        2^60, which is beneath the rounding of float64; dg is then doubled back.
        """
        rows, gain, mean, inverse_deviation = ctx.saved_tensors
        fan_in = rows.shape[-1]
        limit = math.sqrt(fan_in / VARIANCE_FLOOR)
        constant = ctx.scale / math.sqrt(fan_in)
        demotion = torch.where(inverse_deviation > limit, _DEMOTION, 1.0).to(inverse_deviation.dtype)
        rows_gradient, weight_gradient, _ = torch.ops.aten.native_batch_norm_backward(
            gradients[0][None].contiguous(),
            rows[None],
            gain * constant / demotion,
            None,
            None,
            mean,
            inverse_deviation.clamp_max(limit) * demotion,
            True,
            0.0,
            [True, True, False],
        )
        return rows_gradient[0], weight_gradient * constant / demotion, None


def standardize(weight: Tensor, gain: Tensor, scale: float = 1.0) -> Tensor:
    """Return the standardised weight, each filter of unit norm times its gain and ``scale``.

    ``scale * gain_i * (W_i - mean(W_i)) * rsqrt(max(N * var(W_i), 1e-4))``

    Args:
        weight: [O, I, kh, kw], in any memory format (kept), or filters of any other shape [O, …]; float16 and
            bfloat16 are computed in float32.
        gain: [O].
        scale: a constant.

    Returns:
        A tensor of the weight's shape and type.

    Source: Brock et al. 2021, equation 1 of section 4.
    """
    if (fused := fused_standardization(weight, gain)) is not None:
        return fused(weight, gain, scale)
    if weight.dtype in (torch.float16, torch.bfloat16):
        return standardize(weight.float(), gain.float(), scale).to(weight.dtype)
    if forward_ad._current_level >= 0 or _is_exporting_to_onnx():  # has no public name; -1 where forward mode is off
        return standardized_step_by_step(weight, gain, scale)
    # Moments do not mind the order within a row: reading channels last keeps that layout without a copy.
    last = weight.dim() == 4 and not weight.is_contiguous()
    ordered = weight.permute(0, 2, 3, 1) if last else weight
    rows = ordered.flatten(1)
    standardized = _standardized_above_floor(rows, gain, scale)
    if standardized is None:
        # Without gradients the plain function will do, which saves the custom function's 50 microseconds.
        function = StandardizeRows.apply if torch.is_grad_enabled() else StandardizeRows.forward
        standardized = function(rows, gain, scale)[0]  # type: ignore[index]
    standardized = standardized.view(ordered.shape)
    return standardized.permute(0, 3, 1, 2) if last else standardized


def _is_exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export(dynamo=False)`` traces the model."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()  # pyright: ignore[reportPrivateImportUsage]


def standardized_step_by_step(weight: Tensor, gain: Tensor, scale: float) -> Tensor:
    """Return the equation as it is written: for forward-mode differentiation and ONNX, which lack fused functions."""
    axes = tuple(range(1, weight.dim()))
    centred = weight - weight.mean(axes, keepdim=True)
    squares = centred.square().sum(axes, keepdim=True)
    return centred * squares.clamp_min(VARIANCE_FLOOR).rsqrt() * (gain * scale).view(-1, *[1] * len(axes))


def _standardized_above_floor(rows: Tensor, gain: Tensor, scale: float) -> Tensor | None:
    """Return the standardised rows from one native operation, or None where that will not do.

    A group norm of one example whose groups are single channels is the equation, but for the floor. It and its
    gradient take a third of the custom function's time for the small filters of small networks, half for large
    ones. Whether a row is below the floor is a question to values: an accelerator would have to be waited for, and
    a trace or a transform has none.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    filters, fan_in = rows.shape
    weight = gain * (scale / math.sqrt(fan_in))
    sizes = (1, filters, fan_in, filters)
    try:
        standardized, _, inverse_deviation = torch.native_group_norm(rows, weight, None, *sizes, _TINY)
        below = inverse_deviation.detach().amax().item() > math.sqrt(fan_in / VARIANCE_FLOOR)
    except RuntimeError:  # a batch of weights or of gains under vmap, or weights without values
        return None
    return None if below else standardized


# MERGED from nn/scaled_ws.py


Scale = float | Tensor


class BranchEnd(nn.Module):
    """A layer whose output may be scaled by ``alpha * s``, which it folds into its own numbers.

    Attributes:
        alpha: constant factor of the output.
        skip_gain: s, a learnable 0-d factor of the output, or None.
    """

    # Both are annotated where they are set: TorchScript reads a class's annotations, and cannot read postponed ones.

    def end_branch(self, alpha: float, skip_gain: float | None, **tensor_options: Any) -> None:
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

    def ended(self, x: Tensor) -> Tensor:
        """Return ``alpha * s * x``: for a layer that has no weight to carry the factor. TorchScript can read it."""
        skip_gain = self.skip_gain
        if skip_gain is None:
            return x if self.alpha == 1 else x * self.alpha
        return x * skip_gain if self.alpha == 1 else x * (self.alpha * skip_gain)


# MERGED from nn/scaled_ws.py


class ScaledLayer(BranchEnd, Foldable):
    """A linear operation with the factors of its input and its output in its weight.

    ``y = alpha * s * (op(input_scale * x, W) + b) = op(x, alpha * s * input_scale * W) + alpha * s * b``

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

    def folded(self: Any) -> nn.Module:
        """Return a plain layer of the same outputs, its tensors where and as laid out as this one's."""
        with torch.no_grad():
            weight, bias = self.effective()
        return self.plain(weight.detach(), None if bias is None else bias.detach())


# MERGED from nn/scaled_ws.py
#
# A convolution is linear: a factor of its input or of its output is a factor of its weight (of its output: of
# its bias too). A weight is far smaller than the activations it meets, and the factor's gradient is as exact.


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


# MERGED from nn/scaled_ws.py
#
# The rule is :func:`normfree.nn.standardize`'s, filter by filter; what a filter is, each layout says for itself.


HALF = (torch.float16, torch.bfloat16)

torch.fx.wrap("standardize")  # one node of a symbolic trace, for it asks for dimensions and values


class StandardizedFilters(BranchEnd):
    """The rule for a weight [O, fan-in …] in whatever layout it lies: learnable factors, and what they make of it.

    Attributes:
        gain: [O], learnable, starts at 1.
        kept_mean: [O], learnable, a mean per filter as :mod:`normfree.nn.scaled_ws` says; None for none.
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

    ``y = alpha * s * (conv(input_scale * x, What) + b)``, with What as in :mod:`normfree.nn.scaled_ws`

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


# MERGED from nn/scaled_ws.py
#
# Every layer's weight is read as filters [O, fan-in …], standardised as :mod:`normfree.nn.scaled_ws` says, and
# written back in the layer's own layout:
#
#     convolution, linear      [O, I/G, k …], [O, I]: rows are filters already
#     transposed convolution   [I, O/G, k …]: filter o gathers t


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


# MERGED from nn/scaled_ws.py
#
#     W_eff_i = g_i * (W_i - mean(W_i)) / sqrt(N * var(W_i)) + m_i / sqrt(N)
#
# g_i     learnable gain, one per filter: the norm of what deviates from its mean
# m_i     learnable mean, one per filter, as the norm of N equal weights
#
# A trained filter rarely sums to zero, so standardization alone would chan


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
