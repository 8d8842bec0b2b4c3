"""Activations by their official names, each with its gamma."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid, suggestion
from normfree.nn import noted_activations as noted
from normfree.nn.gamma import gamma

# Slopes and approximations are those of the official (JAX) functions, which the gammas were sampled from. Their gelu is
# the tanh approximation; "gelu_exact", with the error function, is PyTorch's and timm's.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": noted.CELU,
    "elu": noted.ELU,
    "gelu": functools.partial(noted.GELU, approximate="tanh"),
    "gelu_exact": noted.GELU,
    "identity": nn.Identity,
    "leaky_relu": functools.partial(noted.LeakyReLU, 0.01),
    "log_sigmoid": noted.LogSigmoid,
    "relu": nn.ReLU,
    "relu6": noted.ReLU6,
    "selu": noted.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": noted.SiLU,
    "soft_sign": noted.Softsign,
    "softplus": noted.Softplus,
    "tanh": nn.Tanh,
}

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
        activation: a name of ``ACTIVATIONS`` (its gamma is the official sampled constant; the exact one for
            "gelu_exact"); or a module instance (copied), a factory of one (a class, or a callable without
            parameters) or an elementwise function (the gamma is then integrated to 1e-6). A module's ``inplace``
            option is switched off, because a residual block needs the activation's input again.

    Returns:
        The module and ``1 / sqrt(Var[act(z)]), z ~ N(0, 1)``.

    Raises:
        ValueError: unknown name; not a callable; not an elementwise function; works in place; draws random numbers.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise invalid("activation", activation, "unknown name", suggestion(activation, ACTIVATIONS))
        return ACTIVATIONS[activation](), gamma(activation)
    if not callable(activation):
        remedy = f"pass a module, a function or one of {', '.join(ACTIVATIONS)}"
        raise invalid("activation", activation, "must be a name or a callable", remedy)
    module = _as_module(activation)
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    _check_behaviour(activation, module)
    return noted.with_note(module), gamma(module)


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


def _check_behaviour(activation: object, module: nn.Module) -> None:
    """Raise if a module changes its input or leaves its output to chance.

    The block's shortcut would carry the activated value of the former; a gamma is of one function, which the latter
    has in evaluation alone. A copy is asked in float64 and in both modes, as far out as gamma looks, so that clipping
    is seen as well.
    """
    points = torch.linspace(-12, 12, 49, dtype=torch.float64, device="cpu")
    handed = [points.clone(), points.clone()]
    try:
        probe = copy.deepcopy(module).to(device="cpu", dtype=torch.float64)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            state = torch.get_rng_state()
            for training, copied in zip((True, False), handed, strict=True):
                probe.train(training)(copied)
            draws = not torch.equal(state, torch.get_rng_state())
    except Exception:  # gamma reports what a callable raises, with the remedy
        return
    if not all(torch.equal(points, copied) for copied in handed):
        raise invalid("activation", activation, "must not work in place", "pass one that returns a new tensor")
    if draws:
        remedy = "pass a function of its input alone; drop_rate and stochdepth_rate are for chance"
        raise invalid("activation", activation, "draws random numbers, so it has no gamma", remedy)
