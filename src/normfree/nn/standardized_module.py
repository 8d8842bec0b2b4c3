"""Standardize the weight of any module that computes one linear map of it, whatever its forward does besides.

The module stays what it was: its class pads, reshapes or scales its input as before, and its parameters keep their
names. Only what its forward reads changes. Of the module's own parameters W and b it reads

    weight      alpha * s * (c * What + m / sqrt(N))
    bias        alpha * s * b

What    W standardized filter by filter, times a learnable gain, as in :mod:`normfree.nn.standardization`
c       input_scale * factor, a constant
m       learnable mean per filter, where one is kept: see :mod:`normfree.nn.kept_mean`

This is what ``torch.nn.utils.parametrize`` does, except that the raw weight stays a parameter of the module, under the
name it had: optimizer groups, adaptive gradient clipping, state dicts and Opacus find it where they look for it. Gain,
mean and skip gain are parameters of a child.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.fold import Reparametrization
from normfree.nn.scaled_ws_conv import StandardizedFilters

CHILD = "standardization"
"""The child of a standardized module that holds its factors."""

ADDED_BIAS = "added_bias"
"""The bias of a module whose own forward takes none."""


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Where a module keeps the weight of its one linear map, and how the map reads it.

    A weight is read as filters [O, fan-in …]: its first axis is split into ``groups``, all axes are put in ``order``,
    and the first ``leading`` of them together count the outputs.

    Attributes:
        weight: name of the parameter.
        bias: name of the bias parameter that the forward reads; "" for none.
        groups: parts of the first axis, of a grouped transposed convolution; otherwise 1.
        order: of the axes, once split; () for the order they have.
        leading: number of axes, once ordered, that count the outputs.
        factor: constant of the standardized weight besides the input scale: what undoes a constant that the forward
            multiplies its weight by, and the taps that the stride of a transposed convolution leaves out.
        bias_factor: constant that the forward multiplies its bias by.
        axis: of the channels in what the forward returns, where a bias is added to that; None where none is.
    """

    weight: str = "weight"
    bias: str = "bias"
    groups: int = 1
    order: tuple[int, ...] = ()
    leading: int = 1
    factor: float = 1.0
    bias_factor: float = 1.0
    axis: int | None = None

    @property
    def biases(self) -> tuple[str, ...]:
        """The name of the bias parameter of the module once standardized, if it has one."""
        return (self.bias,) if self.bias else () if self.axis is None else (ADDED_BIAS,)

    def filters(self, weight: Tensor) -> Tensor:
        """Return a weight as filters [O, fan-in …]."""
        weight = weight if self.groups == 1 else weight.unflatten(0, (self.groups, -1))
        weight = weight.permute(self.order) if self.order else weight
        return weight if self.leading == 1 else weight.flatten(0, self.leading - 1)

    def weight_of(self, filters: Tensor, shape: torch.Size) -> Tensor:
        """Return filters [O, fan-in …] as a weight of a shape."""
        split = shape if self.groups == 1 else torch.Size((self.groups, shape[0] // self.groups, *shape[1:]))
        order = self.order or tuple(range(len(split)))
        if self.leading > 1:
            filters = filters.unflatten(0, [split[axis] for axis in order[: self.leading]])
        if self.order:
            filters = filters.permute([order.index(axis) for axis in range(len(order))])
        return filters if self.groups == 1 else filters.flatten(0, 1)


class Standardization(StandardizedFilters, Reparametrization):
    """The factors of a standardized module, and what they make of its parameters.

    Args:
        weight: the module's raw weight.
        layout: how its map reads it.
        input_scale: constant factor of the map's input, such as gamma / beta.
        alpha: constant factor of its output, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor of the output; None for none.
        kept_mean: whether each filter has a learnable mean.

    Attributes:
        gain: [O], learnable, starts at 1.
        kept_mean: [O], learnable, starts at 0; None for none.

    Raises:
        ValueError: a factor that is no finite number; a fan-in of 1, whose standardised weight is always zero.
    """

    def __init__(
        self,
        weight: Tensor,
        layout: WeightLayout,
        *,
        input_scale: float = 1.0,
        alpha: float = 1.0,
        skip_gain: float | None = None,
        kept_mean: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.shape = layout, weight.shape
        self.input_scale = float(input_scale)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.end_branch(alpha, skip_gain, **options)
        self.start_gain(weight, **options)
        if kept_mean:
            self.kept_mean = nn.Parameter(torch.zeros_like(self.gain))

    @property
    def constant(self) -> float:
        """The constant factor of the standardised weight."""
        return self.input_scale * self.layout.factor

    def filters(self, weight: Tensor) -> Tensor:
        """Return a weight as filters [O, fan-in …]."""
        return self.layout.filters(weight)

    def weight_of(self, filters: Tensor) -> Tensor:
        """Return filters [O, fan-in …] as a weight."""
        return self.layout.weight_of(filters, self.shape)

    def weight(self, raw: Tensor) -> Tensor:
        """Return what the forward reads for a raw weight."""
        return self.made_of(raw, self.branch_scale())

    def bias(self, raw: Tensor | None) -> Tensor | None:
        """Return what the forward reads for a raw bias [O]."""
        scale = self.branch_scale()
        return raw if scale is None or raw is None else raw * scale

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Undo :func:`standardize_module`, what the forward has read becoming the parameters.

        The class is the one it had, but where a bias was added behind the forward: then a subclass stays that adds it.
        """
        names = self.layout.weight, *self.layout.biases
        values = [getattr(module, name).detach() for name in names]
        module.__class__ = type(module).restored_class  # type: ignore[attr-defined]
        module._modules.pop(CHILD)
        for name, value in zip(names, values, strict=True):
            module._parameters[name] = nn.Parameter(value)

    def extra_repr(self) -> str:
        kept = ", kept_mean=True" if self.kept_mean is not None else ""
        return f"input_scale={self.input_scale:.6g}, alpha={self.alpha:.6g}{kept}"


def standardize_module(module: nn.Module, layout: WeightLayout, **factors: Any) -> Standardization:
    """Have a module's forward read its weight standardized; returns the factors.

    The module's class becomes a subclass of the one it had, with the same forward. A module without a bias gets one of
    zeros, unless the layout has no place for it.

    Args:
        module: the module, which is changed.
        layout: where its weight is, and how its map reads it.
        factors: as :class:`Standardization`'s.

    Raises:
        ValueError: as :class:`Standardization`; the module has an attribute of a name that is needed.
    """
    for name in (CHILD, ADDED_BIAS):
        if hasattr(module, name):
            kind = type(module).__name__
            raise ValueError(f"module: {kind} has an attribute {name!r}, which standardizing needs; rename it")
    part = Standardization(module.get_parameter(layout.weight), layout, **factors)
    for name in layout.biases:
        if module._parameters.get(name) is None:
            module.register_parameter(name, nn.Parameter(torch.zeros_like(part.gain)))
    module.add_module(CHILD, part.train(module.training))
    kind = type(module) if layout.axis is None else _biased(type(module), layout.axis)
    module.__class__ = _standardized(kind, layout.weight, layout.biases)
    return part


def standardization_of(module: nn.Module) -> Standardization | None:
    """Return the factors of a module that :func:`standardize_module` has changed; None for any other."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Standardization) else None


@cache
def _standardized(kind: type[nn.Module], weight: str, biases: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a module's class whose weight and bias are what its factors make of them."""

    def made_weight(self: Any) -> Tensor:
        return self._modules[CHILD].weight(nn.Module.__getattr__(self, weight))

    namespace: dict[str, Any] = {weight: _computed(weight, made_weight), "restored_class": kind}
    for name in biases:

        def made_bias(self: Any, name: str = name) -> Tensor | None:
            return self._modules[CHILD].bias(nn.Module.__getattr__(self, name))

        namespace[name] = _computed(name, made_bias)
    return _subclass(kind, f"Standardized{kind.__name__}", namespace, (_standardized, weight, biases))


@cache
def _biased(kind: type[nn.Module], axis: int) -> type[nn.Module]:
    """Return the subclass of a module's class that adds a bias to what the forward returns, along an axis."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Tensor:
        output = kind.forward(self, *inputs, **named)
        behind = output.dim() - 1 - axis % output.dim()
        return output + getattr(self, ADDED_BIAS).view(-1, *[1] * behind)

    return _subclass(kind, f"Biased{kind.__name__}", {"forward": forward}, (_biased, axis))


def _computed(name: str, make: Any) -> property:
    """A property that reads what is made of a parameter and sets the parameter itself, as FSDP does."""

    def put(self: Any, value: Tensor) -> None:
        self._parameters[name] = value

    return property(make, put)


def _subclass(kind: type[nn.Module], name: str, namespace: dict[str, Any], recipe: tuple[Any, ...]) -> type[nn.Module]:
    """Return a subclass made at run time whose instances can be pickled and copied, by the recipe that makes it."""
    make, *arguments = recipe
    namespace["_recipe"] = (make, getattr(kind, "_recipe", kind), *arguments)
    namespace["__reduce_ex__"] = lambda self, protocol: (_instance, self._recipe, self.__getstate__())
    # Of torch's, so that a symbolic trace calls it as it calls torch's layers: inside of the forward it would read the
    # computed weight for the raw one.
    return type(name, (kind,), {**namespace, "__module__": nn.Module.__module__})


def _instance(*recipe: Any) -> nn.Module:
    """An instance without state of the class that a recipe makes."""
    kind = _made(recipe)
    return kind.__new__(kind)


def _made(recipe: Any) -> type[nn.Module]:
    """The class of a recipe: what makes it, of which class or recipe, and its other arguments."""
    if isinstance(recipe, type):
        return recipe
    make, kind, *arguments = recipe
    return make(_made(kind), *arguments)
