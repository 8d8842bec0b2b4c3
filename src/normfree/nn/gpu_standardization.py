"""Scaled weight standardization on a GPU: one kernel forward and one backward.

    What_i = g_i * c * (W_i - mean(W_i)) * rsqrt(max(N * var(W_i), 1e-4))

as in :mod:`normfree.nn.scaled_ws`, whose native norms take about ten calls forward and twenty with the gradient.
A GPU is done with a filter's few thousand numbers before the next call reaches it, so calls are what takes time. The
kernels read the weight in whatever order it lies in within a filter, and compute in float32.

Needs Triton, which PyTorch's builds for GPUs bring along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from normfree.common.torch_compat import operations_are_followed
from normfree.nn.standardization import HALF, VARIANCE_FLOOR, standardize_by_equation

DTYPES = (torch.float32, *HALF)

LARGEST_FAN_IN = 16384
"""Weights of one filter that a program holds in its registers."""


@triton.jit
def _standardize_kernel(rows, gain, standardized, fan_in, scale, floor, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < fan_in
    values = tl.load(rows + row * fan_in + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 0) / fan_in, 0.0)
    inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(centred * centred, 0), floor))
    result = centred * (tl.load(gain + row).to(tl.float32) * scale * inverse)
    tl.store(standardized + row * fan_in + columns, result.to(standardized.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(  # noqa: ANN202
    rows,  # noqa: ANN001
    gain,  # noqa: ANN001
    gradient,  # noqa: ANN001
    rows_gradient,  # noqa: ANN001
    gain_gradient,  # noqa: ANN001
    fan_in,  # noqa: ANN001
    scale,  # noqa: ANN001
    floor,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < fan_in
    values = tl.load(rows + row * fan_in + columns, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(gradient + row * fan_in + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, 0) / fan_in, 0.0)
    squares = tl.sum(centred * centred, 0)
    inverse = 1.0 / tl.sqrt(tl.maximum(squares, floor))
    along = tl.sum(upstream * centred, 0)
    pull = tl.where(squares > floor, along * inverse * inverse, 0.0)  # below the floor the norm does not move
    result = upstream - tl.sum(upstream, 0) / fan_in - centred * pull
    result *= tl.load(gain + row).to(tl.float32) * scale * inverse
    tl.store(rows_gradient + row * fan_in + columns, result.to(rows_gradient.dtype.element_ty), mask=inside)
    tl.store(gain_gradient + row, (along * inverse * scale).to(gain_gradient.dtype.element_ty))


class FusedStandardization(torch.autograd.Function):
    """Standardise filters [O, …], each in one piece of memory, scaling each: W, g [O], c a number.

    With r = rsqrt(max(N * var, floor)), x = W - mean(W), G the gradient, sums and means over a filter:

        dW = g * c * r * (G - mean(G) - x * r^2 * sum(G * x)),   dg = c * r * sum(G * x)

    where a filter below the floor lacks the term in r^2. Differentiable twice: the gradient is then computed from
    the equation as it is written.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, scale: float) -> Tensor:
        standardized = torch.empty_like(weight)
        _launch(_standardize_kernel, (weight, gain.contiguous(), standardized), weight, scale)
        ctx.save_for_backward(weight, gain)
        ctx.scale = scale
        return standardized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, gain) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled() or operations_are_followed(gradient):
            return *_gradient_by_equation(ctx, weight, gain, gradient), None
        if gradient.stride() != weight.stride():
            gradient = torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)
        found = torch.empty_like(weight), torch.empty_like(gain, memory_format=torch.contiguous_format)
        _launch(_gradient_kernel, (weight, gain.contiguous(), gradient, *found), weight, ctx.scale)
        return *found, None


def standardize_fused(weight: Tensor, gain: Tensor, scale: float) -> Tensor:
    """Return the standardised weight, of any tensors that :func:`takes` takes."""
    return FusedStandardization.apply(weight if _lies_by_filters(weight) else weight.contiguous(), gain, scale)


def takes(weight: Tensor, gain: Tensor) -> bool:
    """Whether the kernels can: numbers of up to 32 bits, a gain for each filter, filters that registers hold.

    What is wrong with others is for the native operations to say.
    """
    return (
        weight.dtype in DTYPES
        and gain.dtype in DTYPES
        and weight.dim() > 1
        and 0 < weight.numel() <= LARGEST_FAN_IN * len(weight)
        and gain.shape == weight.shape[:1]
        and gain.device == weight.device
    )


def _lies_by_filters(weight: Tensor) -> bool:
    """Whether each filter lies in one piece of memory, one after the other, in whatever order within."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.is_contiguous() or (
        weight.dim() in layouts and weight.is_contiguous(memory_format=layouts[weight.dim()])
    )


def try_out(device: torch.device) -> None:
    """Build and run both kernels once.

    Raises:
        Exception: of whatever kind Triton has for a machine that cannot.
    """
    with torch.no_grad():
        rows, gain = torch.ones(2, 16, device=device), torch.ones(2, device=device)
        _launch(_standardize_kernel, (rows, gain, torch.empty_like(rows)), rows, 1.0)
        found = torch.empty_like(rows), torch.empty_like(gain)
        _launch(_gradient_kernel, (rows, gain, rows, *found), rows, 1.0)


def _gradient_by_equation(ctx: Any, weight: Tensor, gain: Tensor, gradient: Tensor) -> list[Tensor | None]:
    """The gradients from the equation as it is written, differentiable where that is asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the search ends here where one of the two was computed from the other.
        inputs = [tensor.view_as(tensor) for tensor in (weight, gain)]
        standardized = standardize_by_equation(inputs[0].float(), inputs[1].float(), ctx.scale).to(weight.dtype)
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(standardized, wanted, gradient, create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:2]]


def _launch(kernel: Any, tensors: tuple[Tensor, ...], weight: Tensor, scale: float) -> None:
    """Run a kernel on each filter, on the weight's device."""
    scale = float(scale)
    filters = len(weight)
    fan_in = weight.numel() // filters
    block = max(16, triton.next_power_of_2(fan_in))
    warps = min(16, max(1, block // 512))
    if weight.is_cuda and weight.device.index != torch.cuda.current_device():
        with torch.cuda.device(weight.device):
            kernel[(filters,)](*tensors, fan_in, scale, VARIANCE_FLOOR, BLOCK=block, num_warps=warps)
    else:
        kernel[(filters,)](*tensors, fan_in, scale, VARIANCE_FLOOR, BLOCK=block, num_warps=warps)
