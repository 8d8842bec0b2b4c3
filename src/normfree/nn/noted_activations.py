"""Activations that note what their output was made from, for :mod:`normfree.nn.recompute`.

They are cheap functions of their input alone, whose gradient needs that input. ReLU, sigmoid and tanh are absent, for
their gradient needs their output. Each is torch's class of that name, with its options and state, and notes in its own
``forward``: whatever hooks make of the output afterwards, the note is about what was computed here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn.fold import Refined
from normfree.nn.recompute import is_notable, note

Function = Callable[[Tensor], Tensor]


class Noted(Refined):
    """Notes the origin of the output of the activation that follows it in a class's bases."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if is_notable(output):
            # Under autocast some activations compute in float32: asked again, outside of it, they get such an input.
            function, dtype = self.function(), output.dtype
            note(output, lambda x: function(x.to(dtype)), input)
        return output

    @abstractmethod
    def function(self) -> Function:
        """Return the activation as a function, with the options it has now, never in place."""

    def plain_class(self) -> type[nn.Module]:
        """Return torch's activation."""
        return next(kind for kind, noted in NOTED.items() if isinstance(self, noted))


class CELU(Noted, nn.CELU):
    """``max(0, x) + min(0, alpha * (exp(x / alpha) - 1))``."""

    def function(self) -> Function:
        return partial(F.celu, alpha=self.alpha)


class ELU(Noted, nn.ELU):
    """``x above 0, alpha * (exp(x) - 1) below``."""

    def function(self) -> Function:
        return partial(F.elu, alpha=self.alpha)


class GELU(Noted, nn.GELU):
    """``x * P(x), P the normal distribution, or its tanh approximation``."""

    def function(self) -> Function:
        return partial(F.gelu, approximate=self.approximate)


class Hardswish(Noted, nn.Hardswish):
    """``x * min(max(x + 3, 0), 6) / 6``."""

    def function(self) -> Function:
        return F.hardswish


class LeakyReLU(Noted, nn.LeakyReLU):
    """``x above 0, negative_slope * x below``."""

    def function(self) -> Function:
        return partial(F.leaky_relu, negative_slope=self.negative_slope)


class LogSigmoid(Noted, nn.LogSigmoid):
    """``log(sigmoid(x))``."""

    def function(self) -> Function:
        return F.logsigmoid


class Mish(Noted, nn.Mish):
    """``x * tanh(log(1 + exp(x)))``."""

    def function(self) -> Function:
        return F.mish


class ReLU6(Noted, nn.ReLU6):
    """``min(max(x, 0), 6)``."""

    def function(self) -> Function:
        return partial(F.hardtanh, min_val=self.min_val, max_val=self.max_val)


class SELU(Noted, nn.SELU):
    """``scale * (x above 0, alpha * (exp(x) - 1) below)``."""

    def function(self) -> Function:
        return F.selu


class SiLU(Noted, nn.SiLU):
    """``x * sigmoid(x)``."""

    def function(self) -> Function:
        return F.silu


class Softplus(Noted, nn.Softplus):
    """``log(1 + exp(beta * x)) / beta``."""

    def function(self) -> Function:
        return partial(F.softplus, beta=self.beta, threshold=self.threshold)


class Softsign(Noted, nn.Softsign):
    """``x / (1 + abs(x))``."""

    def function(self) -> Function:
        return F.softsign


NOTED: dict[type[nn.Module], type[Noted]] = {
    nn.CELU: CELU,
    nn.ELU: ELU,
    nn.GELU: GELU,
    nn.Hardswish: Hardswish,
    nn.LeakyReLU: LeakyReLU,
    nn.LogSigmoid: LogSigmoid,
    nn.Mish: Mish,
    nn.ReLU6: ReLU6,
    nn.SELU: SELU,
    nn.SiLU: SiLU,
    nn.Softplus: Softplus,
    nn.Softsign: Softsign,
}


def with_note(module: nn.Module) -> nn.Module:
    """Return an activation module itself, now of the class that notes, if there is one for exactly its class.

    The convolution behind it can then keep the activation's input. Attributes, hooks and the module's name stay.
    """
    module.__class__ = NOTED.get(type(module), type(module))
    return module
