"""Copies of models, whatever tensors their modules hold."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """Return a deep copy of a model, which shares no tensor with it.

    Hooks such as those of ``torch.nn.utils.weight_norm`` and ``spectral_norm`` leave the weight they have computed as a
    plain attribute, with the graph of its computation, and ``copy.deepcopy`` takes no such tensor. It is copied
    without its graph: the hook, which is copied, too, computes it anew before the next forward.
    """
    held = [leaf for module in model.modules() for leaf in tree_leaves(list(vars(module).values()))]
    computed = {id(leaf): leaf.detach().clone() for leaf in held if isinstance(leaf, Tensor) and not leaf.is_leaf}
    return copy.deepcopy(model, computed)
