"""Activations by their official names, each with its gamma."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.checks import invalid, suggestion
from normfree.nn.gamma import gamma
from normfree.nn.recompute import note_origin

# Slopes and approximations are those of the official (JAX) functions, which the gammas were sampled from.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": functools.partial(nn.GELU, approximate="tanh"),
    "identity": nn.Identity,
    "leaky_relu": functools.partial(nn.LeakyReLU, 0.01),
    "log_sigmoid": nn.LogSigmoid,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "soft_sign": nn.Softsign,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}

# Cheap functions of their input alone, whose gradient needs that input: see ``normfree.nn.recompute``. ReLU, sigmoid
# and tanh are absent, for their gradient needs their output.
RECOMPUTED: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Softplus,
    nn.Softsign,
)

Activation = str | Callable[..., Any]


class Elementwise(nn.Module):
    """An elementwise function as a module: ``y = function(x)``, x and y of one shape."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def build_activation(activation: Activation) -> tuple[nn.Module, float]:
    """Return an activation module and its gamma.

    Args:
        activation: a name of ``ACTIVATIONS`` (its gamma is the official sampled constant); or a module
            instance (copied), a factory of one (a class, or a callable without parameters) or an elementwise
            function (the gamma is then integrated to 1e-6). A module's ``inplace`` option is switched off,
            because a residual block needs the activation's input again.

    Returns:
        The module and ``1 / sqrt(Var[act(z)]), z ~ N(0, 1)``.

    Raises:
        ValueError: unknown name; not a callable; not an elementwise function; works in place.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise invalid("activation", activation, "unknown name", suggestion(activation, ACTIVATIONS))
        return _recomputed(ACTIVATIONS[activation]()), gamma(activation)
    if not callable(activation):
        remedy = f"pass a module, a function or one of {', '.join(ACTIVATIONS)}"
        raise invalid("activation", activation, "must be a name or a callable", remedy)
    module = _as_module(activation)
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    _check_keeps_input(activation, module)
    return _recomputed(module), gamma(module)


def _recomputed(module: nn.Module) -> nn.Module:
    """Return an activation module that lets the convolution after it keep the activation's input, if it can."""
    if type(module) in RECOMPUTED:
        module.register_forward_hook(note_origin)
    return module


def _as_module(activation: Callable[..., Any]) -> nn.Module:
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    if _is_factory(activation):
        module = activation()
        if not isinstance(module, nn.Module):
            raise invalid("activation", activation, "a factory must return a module", "return an nn.Module")
        return module
    return Elementwise(activation)


def _is_factory(activation: Callable[..., Any]) -> bool:
    """Tell a factory from an elementwise function: a class, or something to be called with nothing."""
    if isinstance(activation, functools.partial):
        return _is_factory(activation.func)
    if isinstance(activation, type):
        return True
    try:
        return not inspect.signature(activation).parameters
    except ValueError:  # builtins such as torch.tanh show no signature
        return False


def _check_keeps_input(activation: object, module: nn.Module) -> None:
    """Raise if a module changes its input: the block's shortcut would carry the activated value.

    A copy is asked in float64 and in both modes, as far out as gamma looks, so that clipping is seen as well.
    """
    points = torch.linspace(-12, 12, 49, dtype=torch.float64, device="cpu")
    handed = [points.clone(), points.clone()]
    try:
        probe = copy.deepcopy(module).to(device="cpu", dtype=torch.float64)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training, copied in zip((True, False), handed, strict=True):
                probe.train(training)(copied)
    except Exception:  # gamma reports what a callable raises, with the remedy
        return
    if not all(torch.equal(points, copied) for copied in handed):
        raise invalid("activation", activation, "must not work in place", "pass one that returns a new tensor")
