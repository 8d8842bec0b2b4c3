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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.branch_end import Scale
from normfree.nn.checks import invalid
from normfree.nn.padding import Size2d
from normfree.nn.scaled_conv import ScaledConv2d

VARIANCE_FLOOR = 1e-4  # of N * var: filters below it are divided by the floor's root instead

# Added to var by the native norms: keeps constant rows finite, and is 20 orders below the smallest floor.
_TINY = 1e-30
# See StandardizeRows.backward. A power of two: multiplying by it and dividing again is exact.
_DEMOTION = 2.0**-30


class StandardizeRows(torch.autograd.Function):
    """Standardise the rows of a matrix, scaling each: the equation above with W [O, N], g [O], c a number.

    Two fused native kernels forward (row moments; affine) and one backward. Outputs are the standardised
    matrix [O, N] and, for the backward pass, the rows' means [O] and unfloored inverse deviations [O].
    Differentiable twice, and transformed by ``torch.func``.
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
        standardized = F.batch_norm(rows[None], mean, variance, weight=weight, training=False, eps=0.0)
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
    if weight.dtype in (torch.float16, torch.bfloat16):
        return standardize(weight.float(), gain.float(), scale).to(weight.dtype)
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


class ScaledWSConv2d(ScaledConv2d):
    """A convolution with scaled weight standardization and factors folded into its weight.

    ``y = alpha * s * (conv(input_scale * x, What) + b)``, with What as at the top of this file

    Every filter sums to zero, so a positive mean of the input moves no channel's mean; every filter has norm
    g, so with ``input_scale = gamma / beta`` the output has variance g^2.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding, input_scale, alpha,
            skip_gain: as ``ScaledConv2d``'s.

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
            input_scale=input_scale,
            alpha=alpha,
            skip_gain=skip_gain,
            **tensor_options,
        )
        if self.fan_in == 1:
            rule = "a filter of one weight minus its mean is always zero"
            raise invalid("fan_in", 1, rule, "use ScaledConv2d, or a larger kernel or group")
        self.gain = nn.Parameter(torch.ones(out_channels, **tensor_options))

    def reset_parameters(self) -> None:
        """Draw the weight anew, set the bias to zero and the gain to one."""
        super().reset_parameters()
        if "gain" in self._parameters:  # nn.Conv2d's constructor calls this before there is one
            nn.init.ones_(self.gain)

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the standardised weight [O, I/G, kh, kw] with both factors."""
        gain = self.gain if scale is None else self.gain * scale
        return standardize(self.weight, gain, self.input_scale)
