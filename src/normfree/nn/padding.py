"""Padding styles: TensorFlow's SAME, which the official weights were trained with, and PyTorch's symmetric.

For an axis of `size` cells, SAME gives ceil(size / stride) outputs from

    total = max((ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)

padded cells, total // 2 of them before and the rest after: one more after when total is odd, as it is for a
3x3 convolution of stride 2 on an even size. Symmetric padding puts (kernel - 1) // 2 * dilation on each side.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.common.checks import check_choice
from normfree.nn.fold import Refined
from normfree.nn.recompute import Geometry, average_pool_2x2, convolve_recomputing, derive, origin_of

PaddingStyle = Literal["symmetric", "same"]
"""PyTorch's, or TensorFlow's."""

PADDING_STYLES: tuple[PaddingStyle, ...] = get_args(PaddingStyle)

Size2d = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def as_pair(value: Size2d) -> tuple[int, int]:
    """Return a kernel size, stride or dilation as (height, width)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def same_padding(size: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> tuple[int, int]:
    """Return TensorFlow's SAME padding of one axis.

    Args:
        size: cells along the axis.
        kernel_size: of the convolution or pool, along the axis, as are the next two.
        stride: cells between outputs.
        dilation: cells between taps.

    Returns:
        Cells to pad (before, after); ``after - before`` is 0 or 1.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel_size - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def symmetric_padding(kernel_size: Size2d, dilation: Size2d = 1) -> tuple[int, int]:
    """Return PyTorch's usual padding (height, width): ``(kernel_size - 1) // 2 * dilation`` on each side."""
    (height, width), (row_dilation, column_dilation) = as_pair(kernel_size), as_pair(dilation)
    return (height - 1) // 2 * row_dilation, (width - 1) // 2 * column_dilation


@torch.fx.wrap  # one node of a symbolic trace, for it asks for sizes
def pad_same(
    x: Tensor, kernel_size: Size2d, stride: Size2d = 1, dilation: Size2d = 1, value: float = 0.0
) -> tuple[Tensor, tuple[int, int]]:
    """Pad x [N, C, H, W] explicitly where SAME is asymmetric, and return what is left to pad on both sides.

    Returns:
        x, with one row below and one column to the right of ``value`` where SAME asks for one more after than
        before (x itself where it does not), and the symmetric padding (height, width) for the operation.
    """
    kernels, strides, dilations = as_pair(kernel_size), as_pair(stride), as_pair(dilation)
    rows, columns = (same_padding(x.shape[2 + i], kernels[i], strides[i], dilations[i]) for i in (0, 1))
    extra_row, extra_column = rows[1] - rows[0], columns[1] - columns[0]
    if extra_row or extra_column:
        x = derive(x, functools.partial(F.pad, pad=(0, extra_column, 0, extra_row), value=value))
    return x, (rows[0], columns[0])


class PaddedConv2d(nn.Conv2d):
    """A 2-d convolution with the padding styles.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as ``nn.Conv2d``'s.
        padding: "symmetric", "same" (TensorFlow's), or explicit numbers as ``nn.Conv2d`` takes them.
        padding_mode: "zeros", "reflect", "replicate" or "circular"; with "same", all but "zeros" ask for a stride of 1.

    Raises:
        ValueError: unknown padding style or mode, or another mode than "zeros" with "same" and a stride.
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
        **tensor_options: Any,
    ) -> None:
        self.padding_style = padding if isinstance(padding, str) else "explicit"
        if isinstance(padding, str):
            check_choice("padding", padding, PaddingStyle)
            if padding == "symmetric":
                padding = symmetric_padding(kernel_size, dilation)
            elif padding_mode == "zeros":
                padding = 0
            else:
                self.padding_style = "explicit"  # torch's own "same" has the mode
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            **tensor_options,
        )

    @property
    def fan_in(self) -> int:
        """Weights that feed one output: ``in_channels / groups * height * width``."""
        return self.weight[0].numel()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [N, C, H, W] to [N, O, H', W']."""
        return self.convolve(input, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve x [N, C, H, W] with the given weight and bias in this layer's geometry."""
        padding = self.padding
        if self.padding_style == "same":
            x, padding = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        elif self.padding_mode != "zeros" or isinstance(padding, str):
            return self._conv_forward(x, weight, bias)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]
        origin = origin_of(x)
        if origin is None or not weight.requires_grad:
            return F.conv2d(x, weight, bias, *geometry)
        return convolve_recomputing(x, origin, weight, bias, geometry)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", padding=same" if self.padding_style == "same" else "")


class MaxPool2d(nn.MaxPool2d, Refined):
    """Max-pool x [N, C, H, W]; padded cells never win, whatever the sign of the activations.

    Args:
        kernel_size: window, square.
        stride: of the window.
        padding: "symmetric" or "same".

    Raises:
        ValueError: unknown padding style.
    """

    def __init__(self, kernel_size: int, stride: int, *, padding: PaddingStyle = "symmetric") -> None:
        self.padding_style = check_choice("padding", padding, PaddingStyle)
        super().__init__(kernel_size, stride, symmetric_padding(kernel_size) if padding == "symmetric" else 0)

    def forward(self, input: Tensor) -> Tensor:
        x, padding = input, self.padding
        if self.padding_style == "same":
            x, padding = pad_same(x, self.kernel_size, self.stride, value=-float("inf"))  # type: ignore[arg-type]
        return F.max_pool2d(x, self.kernel_size, self.stride, padding)

    def plain_class(self) -> type[nn.Module] | None:
        return nn.MaxPool2d if self.padding_style == "symmetric" else None

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding_style}"


class AveragePool2x2(nn.AvgPool2d, Refined):
    """Halve x [N, C, H, W] to [N, C, ceil(H/2), ceil(W/2)]: the mean over 2x2 windows of stride 2.

    At odd sizes the last windows hang over the edge and average the cells that exist, as the official SAME
    pool does. The two padding styles agree here, so there is nothing to choose.
    """

    def __init__(self) -> None:
        super().__init__(2, 2, ceil_mode=True, count_include_pad=False)

    def forward(self, input: Tensor) -> Tensor:
        return average_pool_2x2(input)

    def plain_class(self) -> type[nn.Module]:
        return nn.AvgPool2d
