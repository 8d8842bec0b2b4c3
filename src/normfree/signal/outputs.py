"""What a model returns, whatever it wraps it in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of an output: a tensor, nested tuples, lists and dicts of them, or an object holding some."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not found and hasattr(output, "__dict__"):
        found = [value for value in vars(output).values() if isinstance(value, Tensor)]
    return found
