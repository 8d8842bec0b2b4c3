"""The units of a network: the slices of each parameter that adaptive gradient clipping measures and clips.

A unit is what one output of a layer owns of the layer's weight. Which axis that is depends on the layer:

    linear, embedding               [out, in]              axis 0
    convolution, grouped too        [out, in/G, ...]       axis 0
    transposed convolution          [in, out, ...]         axis 1
    ... of G groups                 [in, out/G, ...]       seen as [G, in/G, out/G, ...], axes 0 and 2
    standardized in place           any layout             the axes that count its outputs
    vectors, scalars, and all with one axis longer than 1: the whole parameter is one unit
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from normfree.common.checks import invalid, suggestion
from normfree.nn import standardization_of
from normfree.nn.standardized_module import raw_name
from normfree.optim.final_layers import final_layers

Parameters = nn.Module | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Units:
    """One parameter and how it divides into units.

    Attributes:
        name: of the parameter.
        parameter: the parameter itself.
        groups: of a transposed convolution, whose first axis is to be seen as [groups, in / groups]; otherwise 1.
        kept: axes (after that) whose entries are the units; none if the parameter is one unit.
    """

    name: str
    parameter: Tensor
    groups: int = 1
    kept: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many units there are, over all shards of the parameter."""
        shape = self.parameter.shape
        shape = shape if self.groups == 1 else (self.groups, shape[0] // self.groups, *shape[1:])
        return math.prod(shape[axis] for axis in self.kept)

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return the parameter's values or gradient, or a shard of them, as a view whose axes ``kept`` are units."""
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return tensor if self.groups == 1 else tensor.unflatten(0, (self.groups, -1))

    def norms(self, arranged: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the norm of each unit of an arranged tensor, with the axes that it sums over kept at size 1."""
        summed = [axis for axis in range(arranged.dim()) if axis not in self.kept]
        return torch.linalg.vector_norm(arranged, 2, summed, keepdim=True, dtype=dtype)


def units_of(parameters: Parameters, exclude: Iterable[str] | None = None) -> list[Units]:
    """Say how every parameter divides into units, those excluded left out.

    Args:
        parameters: a module; or pairs (name, parameter), which do not say what layer a parameter belongs to: axis 0
            is then taken to be the output's, and ``exclude`` must be given.
        exclude: names of parameters, or of modules for all of theirs. By default the weights of a module's final
            layers, see :func:`normfree.optim.final_layers`; ``()`` for none.

    Returns:
        One entry for each parameter, shared ones once.

    Raises:
        ValueError: for a name that no parameter has, pairs without ``exclude``, and parameters that FSDP1 has
            flattened.
    """
    if isinstance(exclude, str):
        raise invalid("exclude", exclude, "must be a collection of names", f"pass exclude=[{exclude!r}]")
    if isinstance(parameters, nn.Module):
        model = original(parameters)
        owned = list(owned_parameters(model))
        excluded = _final_weights(model) if exclude is None else _named((n for n, *_ in owned), exclude)
    else:
        owned = [(name, parameter, None) for name, parameter in checked_pairs(parameters)]
        if exclude is None:
            rule = "bare parameters do not tell which of them are the final layers' weights"
            raise invalid("exclude", None, rule, "pass the model, or name what to leave alone; exclude=() clips all")
        excluded = _named((n for n, *_ in owned), exclude)
    # By identity: a tied weight has two names, and is left alone if either is excluded.
    left_out = {id(parameter) for name, parameter, _ in owned if name in excluded}
    found: dict[int, Units] = {}
    for name, parameter, owner in owned:
        if id(parameter) not in left_out and id(parameter) not in found:
            found[id(parameter)] = _units(name, parameter, owner)
    return list(found.values())


def original(model: nn.Module) -> nn.Module:
    """Return the module that a compiled, data-parallel or Fabric wrapper holds."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "_original_module", None))
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Every name of every parameter with the layer it belongs to, which for parametrizations is the layer above."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        owner = module
        if isinstance(module, ParametrizationList):
            owner = modules[prefix.rpartition(".parametrizations.")[0]]
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, parameter, owner


def _final_weights(model: nn.Module) -> set[str]:
    """The weights of the final layers, by all the names a parametrization may have split them into."""
    layers = final_layers(model)
    if not layers:
        warnings.warn(
            f"exclude: {type(model).__name__} has no final linear layer or convolution to be left alone, so all "
            "weights are clipped; pass exclude=() if that is meant, or the names of the layers its outputs come from",
            stacklevel=4,
        )
    prefixes = [f"{layer}." if layer else "" for layer in layers]
    starts = tuple(start for each in prefixes for start in (f"{each}weight", f"{each}parametrizations.weight."))
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if starts and name.startswith(starts)}


def _named(names: Iterable[str], exclude: Iterable[str]) -> set[str]:
    known, excluded = list(names), set[str]()
    for wanted in exclude:
        matching = {name for name in known if name == wanted or name.startswith(f"{wanted}.")}
        if not matching:
            raise invalid("exclude", wanted, "no parameter or module has this name", suggestion(wanted, known))
        excluded |= matching
    return excluded


def checked_pairs(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give the pairs (name, parameter); a ValueError says what is none."""
    if isinstance(parameters, Optimizer) or not isinstance(parameters, Iterable):
        rule = "must be a module, or give pairs (name, parameter)"
        remedy = "pass the model; AdaptiveGradientClipping takes the optimizer first and the model second"
        raise invalid("parameters", type(parameters).__name__, rule, remedy)
    for item in parameters:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor)):
            rule = "must be a module, or give pairs (name, parameter)"
            raise invalid("parameters", type(item).__name__, rule, "pass the model, or model.named_parameters()")
        yield item


def _units(name: str, parameter: Tensor, owner: nn.Module | None) -> Units:
    if getattr(parameter, "_fsdp_flattened", False):
        rule = "FullyShardedDataParallel flattens parameters, which then have no units"
        raise invalid("parameters", name, rule, "shard with torch.distributed.fsdp.fully_shard")
    if sum(size > 1 for size in parameter.shape) <= 1:
        return Units(name, parameter)
    part = None if owner is None else standardization_of(owner)
    if part is not None and name.endswith(raw_name(part.layout.weight)):
        layout = part.layout
        order = layout.order or range(parameter.dim() + (layout.groups > 1))
        return Units(name, parameter, layout.groups, tuple(sorted(order[: layout.leading])))
    if isinstance(owner, _ConvTransposeNd) and parameter.dim() > 2:
        return Units(name, parameter, owner.groups, (1,) if owner.groups == 1 else (0, 2))
    return Units(name, parameter, kept=(0,))
