"""Which parameters of a converted model learn: where a function is kept, those made of parameters that did."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from normfree.convert.record import Change
from normfree.nn import ChannelAffine, KeptMean


def keep_frozen(original: nn.Module, converted: nn.Module, changes: Iterable[Change]) -> None:
    """Freeze what was made of frozen parameters of the original.

    A weight drawn anew (*fresh*) learns. A layer that a norm was folded into learns where the two did; an affine map in
    the place of a norm, where the norm did.
    """
    for change in changes:
        norm = original.get_submodule(change.name)
        if change.into is not None:
            _freeze_layer(converted.get_submodule(change.into), original.get_submodule(change.into), norm)
        elif change.now == ChannelAffine.__name__:
            for module in converted.get_submodule(change.name).modules():
                if isinstance(module, ChannelAffine):
                    module.weight.requires_grad_(learns(norm, "weight"))
                    module.bias.requires_grad_(learns(norm, "bias"))


def _freeze_layer(new: nn.Module, old: nn.Module, norm: nn.Module) -> None:
    weight = learns(old, "weight")
    biases = [part for part in (old, norm) if part._parameters.get("bias") is not None]
    bias = any(learns(part, "bias") for part in biases) if biases else weight
    for name, parameter in new.named_parameters():
        own = weight if name == "weight" and isinstance(new, KeptMean) else weight or learns(norm, "weight")
        parameter.requires_grad_(bias if name == "bias" else own)


def learns(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of a name, and it is not frozen."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad
