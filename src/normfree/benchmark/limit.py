"""The limit: what a network would cost whose convolutions came with their weights ready."""

from __future__ import annotations

import copy

from torch import nn

from normfree.nn import fold, has_foldable


def limit(model: nn.Module) -> nn.Module:
    """Return the same graph with plain convolutions and activations only, to be trained.

    No normalizer, no standardization and no factor: every layer that folds is the plain convolution it folds to, with
    the same bias. It is made of the model itself, so that it cannot drift from it, and starts as the same function.

    Args:
        model: of our layers; it is left as it is.

    Returns:
        The copy, in the model's mode, every parameter of its own trainable.

    Raises:
        ValueError: nothing in it folds, so there is no standardization to compare with.
    """
    if not has_foldable(model):
        raise ValueError(f"model: {type(model).__name__} has no layer that folds, so its limit is itself")
    modes = {name: module.training for name, module in model.named_modules()}
    plain = fold(copy.deepcopy(model)).requires_grad_()
    for name, module in plain.named_modules():
        module.training = modes[name]
    return plain
