"""Which parameters of a converted model learn: where a function is kept, those made of parameters that did."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from normfree.convert.record import Change
from normfree.nn import ChannelAffine, ChannelUnits, KeptMean, WeightLayout, standardization_of
from normfree.nn.standardized_module import raw_name


def keep_frozen(original: nn.Module, converted: nn.Module, changes: Iterable[Change]) -> None:
    """Freeze what was made of frozen parameters of the original.

    A weight drawn anew (*fresh*) learns. A layer that a norm was folded into learns where the two did; an affine map in
    the place of a norm, where the norm did.
    """
    for change in changes:
        norm = original.get_submodule(change.name)
        if change.into is not None:
            _freeze_layer(converted.get_submodule(change.into), original.get_submodule(change.into), norm)
        elif change.now in (ChannelAffine.__name__, ChannelUnits.__name__):
            for module in converted.get_submodule(change.name).modules():
                if isinstance(module, ChannelAffine):
                    module.weight.requires_grad_(learns(norm, "weight"))
                    module.bias.requires_grad_(learns(norm, "bias"))


def _freeze_layer(new: nn.Module, old: nn.Module, norm: nn.Module) -> None:
    """Freeze the weight as the old weight, the bias as the biases, and the factors where neither weight learns."""
    part = standardization_of(new)
    layout = WeightLayout() if part is None else part.layout
    weight = learns(old, layout.weight)
    (bias_name,) = layout.biases
    parts = ((old, bias_name), (norm, "bias"))
    biases = [learns(one, name) for one, name in parts if one._parameters.get(name) is not None]
    scaled = weight or learns(norm, "weight")
    names = [layout.weight, bias_name] if part is None else [raw_name(layout.weight), raw_name(bias_name)]
    keeps_raw = part is not None or isinstance(new, KeptMean)
    own = dict(zip(names, (weight if keeps_raw else scaled, any(biases) if biases else weight), strict=True))
    for name, parameter in new.named_parameters(recurse=False):
        if part is None or name in own:
            parameter.requires_grad_(own.get(name, scaled))
    for parameter in () if part is None else part.parameters():
        parameter.requires_grad_(scaled)


def learns(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of a name, and it is not frozen; of a module with other names, any of them."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return any(
            p.requires_grad for n, p in module._parameters.items() if p is not None and n not in ("weight", "bias")
        )
    return parameter.requires_grad
