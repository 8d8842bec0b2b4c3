"""The rule of scaled weight standardization in torch's own operations: native norms, or the equation as written.

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
from torch import Tensor

from normfree.common.torch_compat import in_forward_mode, is_jit_tracing

HALF = (torch.float16, torch.bfloat16)

VARIANCE_FLOOR = 1e-4  # of N * var: filters below it are divided by the floor's root instead

# Added to var by the native norms, some of which refuse a zero: keeps constant rows finite, and is 20 orders below
# the smallest floor.
_TINY = 1e-30
# See StandardizeRows.backward. A power of two: multiplying by it and dividing again is exact.
_DEMOTION = 2.0**-30


def standardize_natively(weight: Tensor, gain: Tensor, scale: float) -> Tensor:
    """Return the standardised weight from torch's own operations; shapes as :func:`normfree.nn.standardize`'s."""
    if weight.dtype in HALF:
        return standardize_natively(weight.float(), gain.float(), scale).to(weight.dtype)
    if in_forward_mode() or (is_jit_tracing() and torch.onnx.is_in_onnx_export()):
        return standardize_by_equation(weight, gain, scale)
    # Moments do not depend on the order within a row: reading channels last keeps that layout without a copy.
    last = weight.dim() == 4 and not weight.is_contiguous()
    ordered = weight.permute(0, 2, 3, 1) if last else weight
    rows = ordered.flatten(1)
    standardized = _standardize_above_floor(rows, gain, scale)
    if standardized is None:
        # Without gradients the plain function will do, which saves the custom function's 50 microseconds.
        function = StandardizeRows.apply if torch.is_grad_enabled() else StandardizeRows.forward
        standardized = function(rows, gain, scale)[0]  # type: ignore[index]
    standardized = standardized.view(ordered.shape)
    return standardized.permute(0, 3, 1, 2) if last else standardized


def _standardize_above_floor(rows: Tensor, gain: Tensor, scale: float) -> Tensor | None:
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


class StandardizeRows(torch.autograd.Function):
    """Standardise the rows of a matrix, scaling each: the equation above with W [O, N], g [O], c a number.

    Two fused native kernels forward (row moments; affine) and one backward. Outputs are the standardised
    matrix [O, N] and, for the backward pass, the rows' means [O] and unfloored inverse deviations [O].
    Differentiable twice, and transformed by ``torch.func``, but for forward mode: see :func:`standardize_natively`.
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


def standardize_by_equation(weight: Tensor, gain: Tensor, scale: float) -> Tensor:
    """Return the equation as it is written: for forward-mode differentiation and ONNX, which lack fused functions."""
    axes = tuple(range(1, weight.dim()))
    centred = weight - weight.mean(axes, keepdim=True)
    squares = centred.square().sum(axes, keepdim=True)
    return centred * squares.clamp_min(VARIANCE_FLOOR).rsqrt() * (gain * scale).view(-1, *[1] * len(axes))
