"""What an ATen operation does to an activation: which kind it is of, and where it leaves the axis of the channels.

Names are overload packets without the in-place underscore: ``add`` stands for ``add.Tensor`` and ``add_``.
An operation in no set is elementwise or structural: it carries its input on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor

from normfree.common.torch_compat import argument_name, tree_leaves, written_positions


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def plain_name(name: str) -> str:
    """An operation's name as people know it, for messages: ``prelu`` of ``_prelu_kernel``."""
    return name.strip("_").removesuffix("_kernel").removesuffix("_with_indices")


LINEAR = frozenset({"addmm", "mm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "addmv", "mv", "mkldnn_linear"})
"""Matrix products: weighted if one factor is a parameter, a product of activations otherwise."""

CONVOLUTION = _names("""
    convolution _convolution mkldnn_convolution cudnn_convolution _slow_conv2d_forward conv_depthwise3d
    _conv_depthwise2d deform_conv2d conv2d
""")

EMBEDDING = frozenset({"embedding", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag"})

RECURRENT = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn", "_thnn_fused_lstm_cell"}
)

NORM = _names("""
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update
    _batch_norm_no_update cudnn_batch_norm miopen_batch_norm batch_norm native_layer_norm layer_norm
    native_group_norm group_norm rms_norm _fused_rms_norm
""")

ATTENTION = _names("""
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
    _scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention _native_multi_head_attention
    _transformer_encoder_layer_fwd
""")

POOL = _names("""
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d
    max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d max_pool2d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa _fft_r2c _fft_c2c _fft_c2r cumsum grid_sampler_2d grid_sampler_3d
""")
"""Mixes positions without parameters."""

NONLINEAR = _names("""
    relu relu6 gelu silu mish sigmoid hardsigmoid hardswish hardtanh tanh leaky_relu _prelu_kernel prelu
    rrelu_with_noise elu celu selu glu softplus softshrink hardshrink threshold log_sigmoid_forward _softmax
    _log_softmax _safe_softmax exp log erf sin cos abs pow sqrt rsqrt reciprocal square clamp clamp_min clamp_max
    maximum minimum sign where
""")

PARTIAL = frozenset(
    {"slice", "select", "narrow", "split", "split_with_sizes", "unbind", "chunk", "index_select", "index", "gather"}
)
"""Keeps a part of its input, where the output is smaller."""

VIEW = _names("""
    view _unsafe_view reshape _reshape_alias flatten unsqueeze squeeze alias detach clone contiguous _to_copy to
    expand permute transpose t as_strided copy lift_fresh
""")
"""Carries the values on as they are: a scaling before it is still the last thing that happened."""

SCALING = frozenset({"mul", "div"})
ADDITION = frozenset({"add"})

SUMS = frozenset({"add", "sub", "lerp", "addcmul"})
"""What may add two activations."""

MOVES_AXES = frozenset({"permute", "transpose", "t", "select", "unbind", "expand"})

ACTIVATION = NONLINEAR & {
    *("relu", "relu6", "leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise", "elu", "celu", "selu", "clamp_min"),
    *("gelu", "silu", "mish", "hardswish", "softplus", "sigmoid", "hardsigmoid", "hardtanh", "tanh"),
}
"""Elementwise activation functions."""

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "_prelu_kernel", "prelu", "abs"})
"""Functions f with f(c x) = c f(x) for every c > 0; the maximum of two activations is one of both."""

SOFTMAX = frozenset({"_softmax", "_safe_softmax"})

BOUNDED_GATE = SOFTMAX | {"sigmoid", "hardsigmoid"}
"""What makes a gate, or the weights of an attention, of the values it is given."""

INVERSE_SIZE = frozenset({"rsqrt", "reciprocal"})
"""What a hand-written normalizer multiplies by, where it does not divide."""

AVERAGE = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean"})

FACTORY = _names("""
    empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full
    new_empty_strided
""")
"""Takes from its input no more than shape and type."""


def name_and_written(function: Any) -> tuple[str, tuple[int, ...]]:
    """An operation's name, and the positions of the arguments it writes to."""
    known = _NAMES.get(id(function))
    if known is None:
        name = function.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        known = _NAMES[id(function)] = name, written_positions(function), function
    return known[0], known[1]


_NAMES: dict[int, tuple[str, tuple[int, ...], Any]] = {}
"""By identity, which is looked up in a third of the time that an operation's own hash takes."""


def name_of(function: Any) -> str:
    """``aten.add_.Tensor`` → ``add``; dunders and private names keep their leading underscore."""
    return name_and_written(function)[0]


def mutated_arguments(function: Any) -> tuple[int, ...]:
    """Positions of the arguments an operation writes to."""
    return name_and_written(function)[1]


def written_by(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation is about to write to."""
    for position in mutated_arguments(function):
        value = args[position] if position < len(args) else kwargs.get(argument_name(function, position))
        if isinstance(value, Tensor):
            yield value
        else:
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def weight_and_bias(name: str, arguments: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
    """The weight and the bias among the arguments of a weighted operation or a norm, where it has them."""
    positions = _WEIGHT_AND_BIAS.get(name)
    if positions is None:
        return None, None
    found = [arguments[i] if i is not None and i < len(arguments) else None for i in positions]
    weight, bias = (value if isinstance(value, Tensor) else None for value in found)
    return weight, bias


_WEIGHT_AND_BIAS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(CONVOLUTION | NORM, (1, 2)),
    "native_layer_norm": (2, 3),
    "layer_norm": (2, 3),
    "rms_norm": (2, None),
    "_fused_rms_norm": (2, None),
    "addmm": (2, 0),
    "mm": (1, None),
    "linear": (1, 2),
}


def multiplies_from_left(name: str, arguments: Sequence[Any], active: Sequence[Tensor]) -> bool:
    """Whether a matrix product has its one activation on the right, as in ``weight @ x``.

    Args:
        name: of the operation.
        arguments: of the operation; a bias that is added comes first.
        active: those that depend on the input.
    """
    if name not in LINEAR or name in ("linear", "mkldnn_linear") or len(active) != 1:
        return False
    left = 1 if name in ("addmm", "baddbmm", "addbmm", "addmv") else 0
    return arguments[left] is not active[0] and arguments[left + 1] is active[0]


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments, in their order; a schema nests them in lists at most."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def uses_statistics(name: str, args: Sequence[Any]) -> bool:
    """Whether a norm divides by the statistics of its input, and not by those it has kept."""
    kept = name.endswith(("no_training", "no_update")) or ("batch_norm" in name and len(args) > 5 and args[5] is False)
    return not kept


def likely_axis(dims: int) -> int:
    """Where PyTorch's conventions put the channels when the dataflow does not tell: maps [N, C, …], tokens last."""
    return 1 if dims >= 4 else dims - 1


def axis_after(
    name: str, arguments: Sequence[Any], shape: Sequence[int], axis: int | None, new_shape: Sequence[int]
) -> int | None:
    """Where the channels are after an operation that moves or keeps axes.

    Args:
        name: of the operation.
        arguments: its positional arguments.
        shape: shape of its input.
        axis: where the channels were, None if that is not known.
        new_shape: shape of its output.

    Returns:
        The axis, or None where they cannot be followed.
    """
    if axis is None:
        return None
    dims = len(shape)
    if name == "permute":
        return [d % dims for d in arguments[1]].index(axis)
    if name == "transpose":
        first, second = arguments[1] % dims, arguments[2] % dims
        return {first: second, second: first}.get(axis, axis)
    if name == "t":
        return dims - 1 - axis
    if name in ("select", "unbind"):
        removed = (arguments[1] if len(arguments) > 1 else 0) % dims
        return None if removed == axis else axis - (removed < axis)
    if name == "expand":
        return axis + len(new_shape) - dims
    if len(new_shape) == dims and shape[axis] == new_shape[axis]:
        return axis
    return _axis_after_view(shape, axis, new_shape) if prod(shape) == prod(new_shape) else None


def _axis_after_view(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """Where the channels are after a reshape: the axis of the same size with as many values before it."""
    before = prod(shape[:axis])
    for new_axis, size in enumerate(new_shape):
        if size == shape[axis] and prod(new_shape[:new_axis]) == before:
            return new_axis
    return None
