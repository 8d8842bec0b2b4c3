"""Names of torch that have no public form, in one place; ``tests/common/test_torch_compat.py`` calls each of them.

All are in torch 2.9 to 2.12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "ConvNd",
    "ConvTransposeNd",
    "NormBase",
    "in_forward_mode",
    "in_function_transform",
    "is_jit_tracing",
    "operations_are_followed",
]


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def in_function_transform() -> bool:
    """Return whether a transform of ``torch.func`` (grad, vmap, jvp, …) is running."""
    return torch._C._are_functorch_transforms_active()


def is_jit_tracing() -> bool:
    """Return whether ``torch.jit.trace`` or the TorchScript ONNX exporter is running."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def operations_are_followed(*tensors: Tensor) -> bool:
    """Return whether something other than eager autograd follows the operations on tensors one by one.

    A kernel of our own would be missing from what it sees: compilers and tracers, the transforms of ``torch.func``,
    forward mode, batches of gradients, subclasses of tensors, and dispatch modes that stand for tensors or, as the
    recorder of ``spp``, have an attribute ``follows_weights``.
    """
    return (
        torch.compiler.is_compiling()
        or is_jit_tracing()
        or in_function_transform()
        or in_forward_mode()
        or (torch._C._len_torch_dispatch_stack() > 0 and any(map(_follows, _get_current_dispatch_mode_stack())))
        or not all(map(_is_plain, tensors))
    )


def _follows(mode: Any) -> bool:
    return getattr(mode, "_mode_key", None) is not None or getattr(mode, "follows_weights", False)


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not (_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))
