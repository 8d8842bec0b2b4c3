"""Folding: after training, each convolution only needs the weight that its factors and its standardization make."""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Foldable(Protocol):
    """A layer that knows a plainer one of the same outputs."""

    def folded(self) -> nn.Module:
        """Return that layer, sharing no tensor with this one."""
        ...


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, its convolutions plain: what inference and exporters need.

    Every :class:`normfree.nn.ScaledWSConv2d` and ``ScaledConv2d`` becomes an ``nn.Conv2d`` with the standardised,
    scaled weight ``alpha * s * gamma / beta * What`` and the bias ``alpha * s * b`` (a ``PaddedConv2d`` where the
    padding is TensorFlow's, which depends on the input's size). No gain, no standardization and no factor is left
    but the [N, C] gates' and the pooled features'. Layers of any other kind stay as they are, normalizers too.

    Args:
        model: any module; it is left as it is. A layer used twice is folded once, and used twice again.

    Returns:
        The copy, with the names of the original's modules.

    Raises:
        ValueError: a layer to fold has hooks or parametrizations, which a plain layer could not keep.
    """
    return _folded(copy.deepcopy(model), "model", {}).eval()


def _folded(module: nn.Module, name: str, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return what takes a module's place: itself, with its children folded, unless it folds as a whole."""
    if module not in known:
        if isinstance(module, Foldable):
            _check_bare(module, name)
            known[module] = module.folded()
        else:
            known[module] = module
            for child_name, child in module._modules.items():
                if child is not None:
                    module._modules[child_name] = _folded(child, f"{name}.{child_name}", known)
    return known[module]


def _check_bare(module: nn.Module, name: str) -> None:
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hooks) for hooks in kept):
        raise ValueError(f"model: {name} has hooks, which folding would lose; remove them first, add them afterwards")
    if "forward" in vars(module):
        raise ValueError(f"model: {name} has a forward of its own, which folding would lose; remove it first")
    if hasattr(module, "parametrizations"):
        remedy = "remove them first (torch.nn.utils.parametrize.remove_parametrizations)"
        raise ValueError(f"model: {name} has parametrizations, which folding would lose; {remedy}")
