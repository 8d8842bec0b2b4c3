"""Standardize the weight of any module that computes one linear map of it, whatever its forward does besides.

The module stays what it was: its class pads, reshapes or scales its input as before. Only its weight and its bias
are no parameters any longer, but computed when the forward reads them:

    weight      alpha * s * (c * What + m / sqrt(N))
    bias        alpha * s * b

W, b    its parameters ``raw_weight`` and ``raw_bias`` (of whatever name they had)
What    W standardized filter by filter, times a learnable gain, as in :mod:`normfree.nn.scaled_ws`
c       input_scale * factor, a constant
m       learnable mean per filter, where one is kept

:class:`WeightScale` is the same without the standardization, ``weight = c * W``: for a weight that is to stay as it is.

Gain, mean and skip gain are parameters of a child. The module is given a subclass of its class whose ``weight`` is a
property, which is what ``torch.nn.utils.parametrize`` does, too: how an attribute is read is for an object's class to
say. Two things differ: the raw parameters are the module's own, so that Opacus takes their gradients per example and
adaptive gradient clipping knows whose they are; and a module can be pickled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.fold import Reparametrization
from normfree.nn.scaled_ws import ADDED_BIAS, StandardizedFilters, WeightLayout

CHILD = "standardization"
"""The child of a standardized module that holds its factors."""

SCALE = "weight_scale"
"""The child of a module that holds the constant factor of its weight."""


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
        self.layout = layout
        self.input_scale = float(input_scale)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.set_branch_scale(alpha, skip_gain, **options)
        self.add_gain(weight, **options)
        if kept_mean:
            self.kept_mean = nn.Parameter(torch.zeros_like(self.gain))

    def weight(self, raw: Tensor) -> Tensor:
        """Return what the forward reads for a raw weight."""
        return self.standardized(raw, self.branch_scale())

    def bias(self, raw: Tensor | None) -> Tensor | None:
        """Return what the forward reads for a raw bias [O]."""
        scale = self.branch_scale()
        return raw if scale is None or raw is None else raw * scale

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Undo :func:`standardize_module`, what the forward has read becoming the parameters.

        The class is the one it had, but where a bias was added behind the forward: then a subclass stays that adds it.
        """
        values = {name: getattr(module, name).detach() for name in (self.layout.weight, *self.layout.biases)}
        module.__class__ = type(module).restored_class  # type: ignore[attr-defined]
        del module._modules[CHILD]
        for name, value in values.items():
            del module._parameters[raw_name(name)]
            module.register_parameter(name, nn.Parameter(value))

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
    _check_free(module, names_needed(layout))
    part = Standardization(module.get_parameter(layout.weight), layout, **factors)
    for name in (layout.weight, *layout.biases):
        raw = module._parameters.pop(name, None)
        module.register_parameter(raw_name(name), nn.Parameter(torch.zeros_like(part.gain)) if raw is None else raw)
    module.add_module(CHILD, part.train(module.training))
    kind = type(module) if layout.axis is None else _with_bias(type(module), layout.axis)
    module.__class__ = _with_standardized_weight(kind, layout.weight, layout.biases)
    return part


def standardization_of(module: nn.Module) -> Standardization | None:
    """Return the factors of a module that :func:`standardize_module` has changed; None for any other."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Standardization) else None


class WeightScale(Reparametrization):
    """The constant factor of the input of a module's linear map, which its weight carries.

    ``y = op(c * x, W) + b = op(x, c * W) + b``: in whatever units the input is, W learns as on an input of c's.

    Args:
        name: of the weight.
        input_scale: c.
    """

    def __init__(self, name: str, input_scale: float = 1.0) -> None:
        super().__init__()
        self.name, self.input_scale = name, float(input_scale)

    def weight(self, raw: Tensor) -> Tensor:
        """Return what the forward reads for a raw weight."""
        return raw * self.input_scale

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        """Undo :func:`scale_weight`, what the forward has read becoming the parameter."""
        value = getattr(module, self.name).detach()
        module.__class__ = type(module).restored_class  # type: ignore[attr-defined]
        del module._modules[SCALE], module._parameters[raw_name(self.name)]
        module.register_parameter(self.name, nn.Parameter(value))

    def extra_repr(self) -> str:
        return f"input_scale={self.input_scale:.6g}"


def scale_weight(module: nn.Module, name: str, input_scale: float = 1.0) -> WeightScale:
    """Have a module's forward read its weight of a name times a constant; returns that.

    Args:
        module: the module, which is changed: its class becomes a subclass of the one it had, with the same forward.
        name: of the weight, a parameter of its own.
        input_scale: the constant.

    Raises:
        ValueError: the module has an attribute of a name that is needed.
    """
    _check_free(module, [SCALE, raw_name(name)])
    module.register_parameter(raw_name(name), module._parameters.pop(name))
    part = WeightScale(name, input_scale)
    module.add_module(SCALE, part.train(module.training))
    module.__class__ = _with_scaled_weight(type(module), name)
    return part


def weight_scale_of(module: nn.Module) -> WeightScale | None:
    """Return the factor of a module that :func:`scale_weight` has changed; None for any other."""
    found = module._modules.get(SCALE)
    return found if isinstance(found, WeightScale) else None


def raw_name(name: str) -> str:
    """Return the name of the parameter that a module's weight or bias of a name is computed from."""
    return f"raw_{name}"


def names_needed(layout: WeightLayout) -> list[str]:
    """Return the names that standardizing a module gives to what it adds."""
    return [CHILD, ADDED_BIAS, *(raw_name(name) for name in (layout.weight, *layout.biases))]


def _check_free(module: nn.Module, names: list[str]) -> None:
    for name in names:
        if hasattr(module, name):
            kind = type(module).__name__
            raise ValueError(f"module: {kind} has an attribute {name!r}, which standardizing needs; rename it")


@cache
def _with_standardized_weight(kind: type[nn.Module], weight: str, biases: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a module's class whose weight and bias are what its factors make of them."""
    namespace: dict[str, Any] = {weight: _computed_attribute(weight, "weight"), "restored_class": kind}
    namespace |= {name: _computed_attribute(name, "bias") for name in biases}
    return _subclass(kind, f"Standardized{kind.__name__}", namespace, (_with_standardized_weight, weight, biases))


@cache
def _with_scaled_weight(kind: type[nn.Module], weight: str) -> type[nn.Module]:
    """Return the subclass of a module's class whose weight is what its factor makes of it."""
    namespace = {weight: _computed_attribute(weight, "weight", SCALE), "restored_class": kind}
    return _subclass(kind, f"Scaled{kind.__name__}", namespace, (_with_scaled_weight, weight))


def _computed_attribute(name: str, method: str, child: str = CHILD) -> property:
    """What a method of a module's factors makes of its raw parameter of a name."""
    raw = raw_name(name)
    return property(lambda self: getattr(getattr(self, child), method)(getattr(self, raw)))


@cache
def _with_bias(kind: type[nn.Module], axis: int) -> type[nn.Module]:
    """Return the subclass of a module's class that adds a bias to what the forward returns, along an axis."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Tensor:
        output = kind.forward(self, *inputs, **named)
        behind = output.dim() - 1 - axis % output.dim()
        return output + getattr(self, ADDED_BIAS).view(-1, *[1] * behind)

    return _subclass(kind, f"Biased{kind.__name__}", {"forward": forward}, (_with_bias, axis))


def _subclass(kind: type[nn.Module], name: str, namespace: dict[str, Any], recipe: tuple[Any, ...]) -> type[nn.Module]:
    """Return a subclass made at run time whose instances can be pickled and copied, by the recipe that makes it."""
    make, *arguments = recipe
    namespace["_recipe"] = (make, getattr(kind, "_recipe", kind), *arguments)
    namespace["__reduce_ex__"] = lambda self, protocol: (_instance, self._recipe, self.__getstate__())
    return type(name, (kind,), {**namespace, "__module__": kind.__module__})


def _instance(*recipe: Any) -> nn.Module:
    """An instance without state of the class that a recipe makes."""
    kind = _class_of(recipe)
    return kind.__new__(kind)


def _class_of(recipe: Any) -> type[nn.Module]:
    """The class of a recipe: what makes it, of which class or recipe, and its other arguments."""
    if isinstance(recipe, type):
        return recipe
    make, kind, *arguments = recipe
    return make(_class_of(kind), *arguments)
