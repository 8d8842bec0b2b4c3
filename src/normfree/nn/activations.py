"""Activations by their official names, and gamma, the constant that makes an activation variance preserving.

    gamma = 1 / sqrt(Var[act(z)]),  z ~ N(0, 1)

Source: Brock, De, Smith, *Characterizing signal propagation to close the performance gap in unnormalized
ResNets*, ICLR 2021, section 4.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from normfree.common.checks import choices_of, invalid, suggestion
from normfree.common.process import seeded
from normfree.nn import recompute

ActivationName = Literal[
    "celu",
    "elu",
    "gelu",
    "gelu_exact",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "tanh",
]
"""Of what a network can be built with."""

GammaName = ActivationName | Literal["glu", "log_softmax"]
"""Of what has a constant; the last two mix elements."""

# The authors' published constants. They were sampled, not integrated, so they differ from the integral in
# the third or fourth digit; pretrained weights need them as they stand.
OFFICIAL_GAMMA: dict[str, float] = {
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "glu": 1.8484294414520264,
    "identity": 1.0,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}

# Names of this project's own. GELU with the error function, which the authors did not use, has a closed form: for
# z ~ N(0, 1) with distribution function P and density p, E[z P] = E[p] = 1 / (2 sqrt(pi)), and
# E[z^2 P^2] = E[P^2 + 2 z P p] = 1/3 + 1 / (2 pi sqrt(3)), both by Stein's identity E[z f(z)] = E[f'(z)].
OWN_GAMMA: dict[str, float] = {
    "gelu_exact": (1 / 3 + 1 / (2 * math.pi * math.sqrt(3)) - 1 / (4 * math.pi)) ** -0.5,
}

_NAMED = OFFICIAL_GAMMA | OWN_GAMMA

# Slopes and approximations are those of the official (JAX) functions, which the gammas were sampled from. Their gelu is
# the tanh approximation; "gelu_exact", with the error function, is PyTorch's and timm's.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": recompute.CELU,
    "elu": recompute.ELU,
    "gelu": functools.partial(recompute.GELU, approximate="tanh"),
    "gelu_exact": recompute.GELU,
    "identity": nn.Identity,
    "leaky_relu": functools.partial(recompute.LeakyReLU, 0.01),
    "log_sigmoid": recompute.LogSigmoid,
    "relu": nn.ReLU,
    "relu6": recompute.ReLU6,
    "selu": recompute.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": recompute.SiLU,
    "soft_sign": recompute.Softsign,
    "softplus": recompute.Softplus,
    "tanh": nn.Tanh,
}

Activation = ActivationName | Callable[..., Any]
"""A name, or a module, a factory of one or an elementwise function."""


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
        if activation not in choices_of(ActivationName):
            remedy = suggestion(activation, choices_of(ActivationName))
            raise invalid("activation", activation, "unknown name", remedy)
        return ACTIVATIONS[activation](), _NAMED[activation]
    if not callable(activation):
        remedy = f"pass a module, a function or one of {', '.join(ACTIVATIONS)}"
        raise invalid("activation", activation, "must be a name or a callable", remedy)
    module = _as_module(activation)
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    _check_behaviour(activation, module)
    return recompute.note_origins(module), gamma(module)


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
        with torch.no_grad(), seeded(0):
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


_LIMIT = 12.0  # the Gaussian's mass beyond is 4e-33
_PANELS = 96  # to begin with: nodes about 0.02 apart, so that no feature wider than that is overlooked
_DEPTH = 44  # halvings: a jump ends up in a panel of 1.4e-14
_MAXIMUM_PANELS = 20_000  # open at once; only noise or unbounded oscillation gets there
_TOLERANCE = 1e-11  # per panel, relative to the variance
_UNSETTLED = 1e-6  # of the variance, in panels of the least width: a pole leaves that or more, a jump its width
_COARSE = np.polynomial.legendre.leggauss(8)
_FINE = np.polynomial.legendre.leggauss(15)

_REMEDY = "pass an elementwise, deterministic function of a tensor, such as torch.tanh"


def gamma(activation: GammaName | Callable[[Tensor], Tensor]) -> float:
    """Return the factor that restores unit variance after an activation of a standard Gaussian.

    ``gamma = 1 / sqrt(Var[act(z)]), z ~ N(0, 1)``

    Args:
        activation: a name (one of ``OFFICIAL_GAMMA``: returns the authors' sampled constant, which is off in
            the third or fourth digit and is what pretrained weights need; "gelu_exact", which they have none for:
            returns the exact one), or any elementwise callable or
            ``nn.Module`` (integrated in float64 to a relative 1e-6; never modified: a module is copied, and
            evaluated in evaluation mode).

    Returns:
        The constant, a positive float.

    Raises:
        ValueError: unknown name; a callable that is not elementwise, is constant, gives non-finite values or
            oscillates too fast to integrate; a variance that is infinite.

    Source: Brock et al. 2021, section 4 (ReLU: ``sqrt(2 / (1 - 1/pi))``).
    """
    if isinstance(activation, str):
        if activation not in choices_of(GammaName):
            raise invalid("activation", activation, "unknown name", suggestion(activation, choices_of(GammaName)))
        return _NAMED[activation]
    if not callable(activation):
        raise invalid("activation", activation, "must be a name or a callable", _REMEDY)
    return 1 / math.sqrt(_variance(_evaluator(activation), activation))


def gradient_gain(activation: Callable[[Tensor], Tensor]) -> float:
    """Return by how much a standardized layer and an activation with its gamma multiply the power of a gradient.

    ``E[act'(z)^2] / Var[act(z)], z ~ N(0, 1)``

    It is 1 for what is linear and more for all else, by the Gaussian Poincaré inequality: pi / (pi - 1) = 1.467 for
    ReLU. In a row of L layers without a shortcut the gradient grows by its L-th power towards the input.

    Args:
        activation: any elementwise callable or ``nn.Module``, as of :func:`gamma`.

    Returns:
        The factor, at least 1 but for rounding of 1e-6.

    Raises:
        ValueError: as :func:`gamma`.

    Source: Yang et al., "A mean field theory of batch normalization", ICLR 2019.
    """
    evaluate, step = _evaluator(activation), 1e-5

    def slope(points: np.ndarray) -> np.ndarray:
        return (evaluate(points + step) - evaluate(points - step)) / (2 * step)

    variance = _variance(evaluate, activation)
    edges = np.linspace(-_LIMIT, _LIMIT, _PANELS + 1)
    return _integrate(slope, edges, 1e4 * variance, activation)[1] / variance


def _evaluator(activation: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Wrap an activation as a checked float64 function of an array, leaving the original untouched."""
    function = activation
    if isinstance(activation, nn.Module):
        function = copy.deepcopy(activation).to(device="cpu", dtype=torch.float64).eval()

    def evaluate(points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            # The copy keeps `points` intact under activations that work in place.
            values = function(torch.tensor(points, dtype=torch.float64, device="cpu"))
        if not isinstance(values, Tensor) or tuple(values.shape) != points.shape:
            raise invalid("activation", activation, "must return a tensor of its input's shape", _REMEDY)
        array = values.to(dtype=torch.float64).numpy()
        if not np.isfinite(array).all():
            raise invalid("activation", activation, f"must be finite on [-{_LIMIT:g}, {_LIMIT:g}]", _REMEDY)
        return array

    _check_elementwise(activation, evaluate)
    return evaluate


def _check_elementwise(activation: object, evaluate: Callable[[np.ndarray], np.ndarray]) -> None:
    """Raise unless each output depends on its own input alone, and the same way each time."""
    points = np.linspace(-3.1, 2.9, 12)
    try:
        whole = evaluate(points)
        rearranged = evaluate(points[::-1].copy().reshape(3, 4)).reshape(-1)[::-1]
        parts = np.concatenate([evaluate(points[:5]), evaluate(points[5:])])
    except ValueError:
        raise
    except Exception as error:  # whatever a user's callable raises on a plain vector
        rule = f"must take a tensor of any shape (it raised {type(error).__name__}: {error})"
        raise invalid("activation", activation, rule, _REMEDY) from error
    if not (np.allclose(whole, rearranged, 1e-9, 1e-12) and np.allclose(whole, parts, 1e-9, 1e-12)):
        raise invalid("activation", activation, "must be elementwise and deterministic", _REMEDY)


def _variance(evaluate: Callable[[np.ndarray], np.ndarray], activation: object) -> float:
    """Return Var[act(z)] for a standard Gaussian z.

    The values are shifted by a first estimate of their mean, so that a large mean costs no digits.
    """
    edges = np.linspace(-_LIMIT, _LIMIT, _PANELS + 1)
    nodes, weights = _panel_nodes(edges[:-1], edges[1:], _FINE)
    values = evaluate(nodes.reshape(-1)).reshape(nodes.shape)
    shift = float((weights * values).sum())
    panels = (weights * (values - shift) ** 2).sum(axis=1)
    scale = float(panels.sum())
    if max(panels[0], panels[-1]) > _TOLERANCE * scale:
        rule = f"grows too fast: its variance is infinite, or decided beyond [-{_LIMIT:g}, {_LIMIT:g}]"
        raise invalid("activation", activation, rule, _REMEDY)
    if scale <= 1e-24 * (1 + shift * shift):
        raise invalid("activation", activation, "must not be constant (its variance is zero)", _REMEDY)
    mean, square = _integrate(lambda points: evaluate(points) - shift, edges, scale, activation)
    return square - mean * mean


def _integrate(
    function: Callable[[np.ndarray], np.ndarray], edges: np.ndarray, scale: float, activation: object
) -> tuple[float, float]:
    """Return E[f(z)] and E[f(z)^2], bisecting each panel until two Gauss-Legendre rules agree on both."""
    left, right = edges[:-1], edges[1:]
    total = np.zeros(2)
    # The first moment counts in units of the standard deviation, the second in units of the variance.
    tolerance = _TOLERANCE * np.array([math.sqrt(scale), scale])
    for depth in range(_DEPTH + 1):
        fine = _panel_moments(function, left, right, _FINE)
        error = np.abs(fine - _panel_moments(function, left, right, _COARSE))
        settled = np.all(error <= tolerance, axis=1) | (depth == _DEPTH)
        if depth == _DEPTH and error[:, 1].sum() > _UNSETTLED * max(total[1], scale):
            raise invalid("activation", activation, "has a pole: its variance is infinite", _REMEDY)
        total += fine[settled].sum(axis=0)
        left, right = left[~settled], right[~settled]
        if not len(left):
            break
        if len(left) > _MAXIMUM_PANELS:
            raise invalid("activation", activation, "oscillates too fast to integrate", _REMEDY)
        middle = (left + right) / 2
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    return float(total[0]), float(total[1])


def _panel_moments(
    function: Callable[[np.ndarray], np.ndarray],
    left: np.ndarray,
    right: np.ndarray,
    rule: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return the Gaussian-weighted integrals of f and f^2 over each panel, [panels, 2]."""
    nodes, weights = _panel_nodes(left, right, rule)
    values = function(nodes.reshape(-1)).reshape(nodes.shape)
    return np.stack([(weights * values).sum(axis=1), (weights * values * values).sum(axis=1)], axis=1)


def _panel_nodes(
    left: np.ndarray, right: np.ndarray, rule: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a rule's nodes in each panel and its weights times the density, both [panels, nodes]."""
    half = (right - left)[:, None] / 2
    nodes = (left + right)[:, None] / 2 + half * rule[0]
    return nodes, half * rule[1] * np.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
