"""Multiplications by something that is not computed from the input, and how to see past them.

A branch is judged before it is scaled by α, a skip gain, a layer scale or a drop-path mask. Scalings are
followed wherever they hide: on the activation itself, on a gate, or folded into the weight *and* the bias
of a convolution, whose output they then scale as a whole (a factor on the weight alone, such as γ or a
gain, is part of the branch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normfree.signal.moments import Moments


@dataclass(frozen=True)
class Factor:
    """One multiplication.

    Attributes:
        key: tells whether two factors are one and the same (the same 0-d tensor, the same constant).
        value: a number, or one per channel [C].
        constant: a number written in the code rather than a tensor of the model.
    """

    key: object
    value: float | Tensor
    constant: bool = False

    @property
    def vanishes(self) -> bool:
        """Whether nothing, or nothing of some channel, is left after it."""
        return not bool(self.value.all()) if isinstance(self.value, Tensor) else self.value == 0


def scalar_factor(value: Any, *, owned: bool, inverse: bool = False) -> Factor | None:
    """The factor that a Python number or a one-element tensor is, or None if it is neither.

    Args:
        value: what is multiplied in.
        owned: it is a parameter or computed from one (otherwise a 0-d tensor is a number of the code).
        inverse: it is divided by.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        number, constant = float(value.item()), not owned
        key: object = ("constant", number) if constant else ("tensor", value.data_ptr(), value.dtype)
    elif isinstance(value, (int, float)):
        number, constant = float(value), True
        key = ("constant", number)
    else:
        return None
    if inverse:
        number = 1 / number if number else float("inf")
    return Factor((key, inverse), number, constant)


def vector_factor(value: Tensor, *, inverse: bool = False) -> Factor:
    """The factor that one number per channel is."""
    numbers = value.detach().flatten().double().cpu()
    return Factor(("vector", value.data_ptr(), inverse), 1 / numbers if inverse else numbers)


def varying_axis(x: Tensor, factor: Tensor) -> int | None:
    """The one axis of ``x`` along which a broadcast factor varies, or None if there are none or several."""
    if factor.is_complex():  # it turns the values, which no factor of their variance can say
        return None
    offset = x.dim() - factor.dim()
    varying = [offset + i for i, size in enumerate(factor.shape) if size != 1]
    return varying[0] if offset >= 0 and len(varying) == 1 else None


def common_factors(weight: Sequence[Factor], bias: Sequence[Factor]) -> tuple[Factor, ...]:
    """The factors of a weight that scale its bias alike, and hence the output as a whole."""
    left = [factor.key for factor in weight]
    common = []
    for factor in bias:
        if factor.key in left:
            left.remove(factor.key)
            common.append(factor)
    return tuple(common)


def gate_scaling(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """A gate's scaling of what it gates: all but the constant of the gate itself, the 2 of 2·sigmoid."""
    return factors[1:] if factors and factors[0].constant else factors


def before_scaling(moments: Moments, factors: Sequence[Factor]) -> Moments | None:
    """The moments before the factors were multiplied in; None if they left nothing to see.

    Channels that a vector factor silences have no trace of what they were and are left out.
    """
    for factor in factors:
        value = factor.value
        if isinstance(value, Tensor):
            if value.numel() != moments.mean.numel():
                return None
            kept = value != 0
            moments, value = moments.channels(kept), value[kept]
        if value.numel() == 0 if isinstance(value, Tensor) else value == 0:
            return None
        moments = moments.divided(value)
    return moments
