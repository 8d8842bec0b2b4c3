"""When filters are standardized by kernels of our own: on a GPU, where nobody has to see each operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from normfree.common.text import first_line

_BUILT: dict[torch.device, Any] = {}
"""The module of the kernels for each device, None where they cannot be built."""


def fused_standardization(weight: Tensor, gain: Tensor) -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """Return the function of weight, gain and scale that does it, or None where the native operations have to."""
    if not on_gpu(weight) or must_be_seen(weight, gain):
        return None
    kernels = _kernels(weight.device)
    if kernels is None or not kernels.takes(weight, gain):
        return None
    return kernels.standardize_fused


def on_gpu(weight: Tensor) -> bool:
    """Whether a weight lies where calls take more time than what they do."""
    return weight.is_cuda


def must_be_seen(*tensors: Tensor) -> bool:
    """Whether somebody follows the operations on tensors one by one, and would miss what a kernel writes.

    Compilers and tracers, the transforms of ``torch.func``, forward mode, batches of gradients, subclasses of tensors,
    and dispatch modes that stand for tensors or, as the recorder of ``spp``, have ``follows_weights``.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_dispatch_stack() > 0 and any(map(_follows, _get_current_dispatch_mode_stack())))
        or not all(map(_is_plain, tensors))
    )


def _follows(mode: Any) -> bool:
    return getattr(mode, "_mode_key", None) is not None or getattr(mode, "follows_weights", False)


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not (_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))


def _kernels(device: torch.device) -> Any:
    """Return the module of the kernels, built and tried once for each device.

    Where they cannot be built, for Triton needs a compiler, a warning says so, and it is None from then on.
    """
    if device not in _BUILT:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # building waits for the device, which a capture does not allow
        try:
            from normfree.nn import fused_standardization as kernels

            kernels.try_out(device)
            _BUILT[device] = kernels
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the loader's, the compiler's, Triton's own kinds
            reason = first_line(error)
            remedy = "install triton and a C compiler, or compile the model, for faster steps"
            warnings.warn(
                f"filters are standardized by several calls each: no kernels here ({reason}); {remedy}", stacklevel=2
            )
            _BUILT[device] = None
    return _BUILT[device]
