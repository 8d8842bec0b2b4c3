"""The final layers of a network: those that its outputs come from, one for each of its heads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

HEAD = re.compile(r"(.*_)?(classifier|fc|logits|heads?\d*|predictor)(_.*)?", re.IGNORECASE)
"""What networks call the part, or each of the parts, that ends in a final layer."""

_PLAIN = (nn.Linear, nn.modules.conv._ConvNd)
_SEVERAL = (nn.ModuleList, nn.ModuleDict)


def final_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's final linear layers and convolutions, one for each head.

    The structure is looked at, not the dataflow. A head is a child with a name such as "classifier", "fc", "head" or
    "value_head", and each member of a list or dict of heads, unless a later head takes as many features as it gives;
    where there is none, the one child that has parameters is looked into (a training wrapper around a network), and
    failing that the network as a whole is the head. A head ends in its last layer with a weight, and in the layers
    beside it that take the same input (class scores and boxes).

    Args:
        model: the network.

    Returns:
        The names; "" is the model itself. Empty if a head ends in anything but a plain linear layer or convolution:
        the network is a backbone, whose last layer is not a classifier.
    """
    return tuple(sorted(set(_ends(model, "")), key=[name for name, _ in model.named_modules()].index))


def _ends(module: nn.Module, name: str) -> Iterator[str]:
    children = {_joined(name, key): child for key, child in module.named_children()}
    heads = {key: child for key, child in children.items() if _is_head(key)}
    if isinstance(module, _SEVERAL) and _is_head(name):
        heads = children
    inner = {key: child for key, child in children.items() if any(True for _ in child.parameters())}
    own = any(True for _ in module.parameters(recurse=False))
    if not heads and len(inner) == 1 and not own and not isinstance(module, nn.Sequential | nn.Linear):
        heads = inner
    if not heads:
        yield from _last_layers(module, name)
    taken = set[int]()  # by the heads behind
    for key, head in reversed(heads.items()):
        for end in _ends(head, key):
            if _sizes(module.get_submodule(end[len(name) :].lstrip(".")))[1] not in taken:
                yield end
        first = next((layer for _, layer in _weighted(head, key)), None)
        if isinstance(first, _PLAIN):
            taken.add(_sizes(first)[0])


def _is_head(name: str) -> bool:
    return HEAD.fullmatch(name.rpartition(".")[2]) is not None


def _last_layers(head: nn.Module, name: str) -> Iterator[str]:
    """The last layer with a weight, and the layers just before it that take the same input and do not feed it."""
    feeds = None
    for key, layer in reversed(list(_weighted(head, name))):
        if not isinstance(layer, _PLAIN) or _is_standardized(layer):
            return
        takes, gives = _sizes(layer)
        if feeds is not None and (takes != feeds or gives == feeds):
            return
        feeds = takes
        yield key


def _weighted(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a module that have a weight of more than one axis, as they were registered."""
    for key, layer in module.named_modules(prefix=name):
        if "parametrizations" not in key and any(parameter.dim() > 1 for parameter in _own_parameters(layer)):
            yield key, layer


def _own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a layer, those behind a parametrization too, and not those of its children."""
    yield from layer.parameters(recurse=False)
    parametrizations = layer._modules.get("parametrizations")
    if parametrizations is not None:
        yield from parametrizations.parameters()


def _is_standardized(layer: nn.Module) -> bool:
    return type_before_parametrizations(layer).__module__.startswith("normfree.")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels or features of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.in_channels, layer.out_channels


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
