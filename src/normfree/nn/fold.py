"""Folding: after training, each convolution only needs the weight that its factors and its standardization make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar, overload

from torch import nn

from normfree.common.checks import invalid
from normfree.common.torch_compat import copy_model

Model = TypeVar("Model", bound=nn.Module)

_COMPUTE = ("forward", "convolve", "_conv_forward", "__call__")
_DESCRIBE = ("folded", "plain", "plain_class")
_REMEDIES = {
    "hooks": "remove them first, add them afterwards",
    "parametrizations": "remove them first (torch.nn.utils.parametrize.remove_parametrizations)",
}


class Foldable(nn.Module, ABC):
    """A layer for which there is a plainer one of the same outputs."""

    @abstractmethod
    def folded(self) -> nn.Module:
        """Return that layer, sharing no tensor with this one."""


class Refined(nn.Module, ABC):
    """A layer of torch's that does something besides, for training's sake; folding leaves torch's."""

    @abstractmethod
    def plain_class(self) -> type[nn.Module] | None:
        """Return the base class that computes the same from the same attributes; None if none does."""


def with_class(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of another class with the attributes, parameters and hooks of one that is given up for it."""
    other = kind.__new__(kind)
    other.__dict__ = module.__dict__
    return other


class Reparametrization(nn.Module, ABC):
    """A child that makes what its parent reads for its own parameters; folding stores that and takes the child away."""

    @abstractmethod
    def restore(self, module: nn.Module) -> None:
        """Give the parent the class and the kind of parameters it had before, its outputs staying the same."""


def reparametrization_of(module: nn.Module) -> Reparametrization | None:
    """Return the child that makes a module's parameters; None if they are its own."""
    return next((child for child in module._modules.values() if isinstance(child, Reparametrization)), None)


def has_foldable(model: nn.Module) -> bool:
    """Return whether any layer of a model is still to be folded: not so of what :func:`fold` returns."""
    return any(isinstance(module, (Foldable, Reparametrization)) for module in model.modules())


@overload
def fold(model: Foldable | Refined) -> nn.Module: ...


@overload
def fold(model: Model) -> Model: ...


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, its convolutions plain: what inference and exporters need.

    Every :class:`normfree.nn.ScaledWSConv2d` and ``ScaledConv2d`` becomes an ``nn.Conv2d`` with the standardised,
    scaled weight ``alpha * s * gamma / beta * What`` and the bias ``alpha * s * b`` (a ``PaddedConv2d`` where the
    padding is TensorFlow's, which depends on the input's size). No gain, no standardization and no factor is left
    but the [N, C] gates' and the pooled features'. A module of another library that conversion has standardized is of
    its own class again, with the effective weight. Activations and pools become torch's own, with their hooks. Layers
    of any other kind stay as they are, normalizers too.

    Args:
        model: any module; it is left as it is. A layer used twice is folded once, and used twice again.

    Returns:
        The copy, with the names of the original's modules; of the original's class, unless that is a layer to fold.

    Raises:
        ValueError: no module; a layer to fold has hooks or parametrizations, which a plain layer could not keep, or
            computes its output in a way of its own: its class (or itself) has another ``forward`` than the class
            whose ``folded`` it inherits.
    """
    __tracebackhide__ = True
    if not isinstance(model, nn.Module):
        remedy = "build it first, normfree.fold(normfree.create_model(name)), or read it by normfree.load"
        raise invalid("model", model, "must be a torch module", remedy)
    folded = _folded(copy_model(model), "model", {})
    folded.eval()
    return folded


def _folded(module: nn.Module, name: str, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return what takes a module's place: itself, with its children folded, unless it folds as a whole."""
    if module in known:
        return known[module]
    if isinstance(module, Foldable):
        _check_bare(module, name)
        known[module] = module.folded()
        return known[module]
    if (child := reparametrization_of(module)) is not None:
        child.restore(module)
    kept = module
    if isinstance(module, Refined) and _describes_its_outputs(type(module)):
        kept = with_class(module, module.plain_class() or type(module))
    known[module] = kept
    for child_name, child in kept._modules.items():
        if child is not None:
            kept._modules[child_name] = _folded(child, f"{name}.{child_name}", known)
    return kept


def attached_to(module: nn.Module) -> str:
    """What a module in the place of this one would lose: "hooks", "a forward put on it" …; "" for nothing."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hooks) for hooks in kept):
        return "hooks"
    if method := next((method for method in _COMPUTE if method in vars(module)), ""):
        return f"a {method} put on it"
    return "parametrizations" if hasattr(module, "parametrizations") else ""


def _check_bare(module: nn.Module, name: str) -> None:
    if attached := attached_to(module):
        remedy = _REMEDIES.get(attached, "remove it first")
        raise ValueError(f"model: {name} has {attached}, which folding would lose; {remedy}")
    if not _describes_its_outputs(type(module)):
        kind = type(module).__name__
        raise ValueError(
            f"model: {name} is a {kind}, whose forward is not that of the layer it extends, so that folding would "
            f"lose it; give {kind} a method folded() that returns a layer of the same outputs"
        )


def _describes_its_outputs(kind: type[nn.Module]) -> bool:
    """Return whether the method that names the plain layer belongs to the class whose method computes, or a later one.

    A weight made in another way needs nothing: the plain layer has whatever ``effective`` returns.
    """

    def first(names: tuple[str, ...]) -> int:
        return next(depth for depth, base in enumerate(kind.__mro__) if any(name in vars(base) for name in names))

    return first(_DESCRIBE) <= first(_COMPUTE)
