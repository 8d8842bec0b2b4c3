"""One tensor kept for an activation and the convolution after it, where autograd would keep two.

For its gradient a smooth activation such as SiLU keeps its input x, and the convolution after it keeps its own
input, act(x). Only one of them is needed: what is cheap to compute from x again need not be kept. (ReLU has no
such pair: its gradient is known from its output, which is the convolution's input.)

A tensor that is cheap to make says so: :func:`derived` notes what it was made from, its *origin*. A
convolution whose input has an origin keeps the origin's tensors instead, and makes the input anew in its backward
pass. The same holds for a padded copy of a map, and for a map plus a number. The note is about one tensor, the one
that the function itself returned, as it was then. A hook may put another tensor in its place or change it in place, or
its source: that is seen, and the input is kept. What is not seen, here as by autograd, is a change in place to
``tensor.data`` or through NumPy: between an activation and its convolution such a change would be missing from the
weight's gradient.

Of NF-RegNet-B0 at 16×3×128×128 a training step keeps 117 MiB instead of 190, of NFNet-F0 509 instead of 748, and peaks
at 123 instead of 195 and 576 instead of 815; it takes 1.03 and 1.04 times the processor time on a CPU, the middle half
of the rounds 0.99 to 1.06 and 1.03 to 1.06 (``results/recompute``). Compiled models do without: the compiler decides by
itself what it keeps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from normfree.nn.fold import Refined

# Beside the tensors, not on them, so that a tensor with an origin is copied and pickled like any other.
_origins = WeakTensorKeyDictionary()


class Origin(NamedTuple):
    """How a tensor is made: ``function(*sources)``."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


class Note(NamedTuple):
    """An origin that keeps nothing alive, with the numbers of in-place changes to the output and its sources."""

    function: Callable[..., Tensor]
    sources: tuple[TensorWeakRef, ...]
    versions: tuple[int, ...]


class Geometry(NamedTuple):
    """Stride, padding, dilation (each height and width) and groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def derived(output: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Return ``output``, with a note that it is ``function(*sources)``.

    Args:
        output: what the function returned.
        function: gives the same whenever it is called, in training as in evaluation, and is cheap.
        sources: what it was given.
    """
    if is_notable(output):
        note(output, function, *sources)
    return output


def note(output: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> None:
    """Note that a notable tensor is ``function(*sources)``."""
    for source in sources:
        if output is source:  # changed in place: there is nothing left to make it from
            return
    versions = tuple(tensor._version for tensor in (output, *sources))
    _origins[output] = Note(function, tuple(TensorWeakRef(source) for source in sources), versions)


def is_notable(output: Any) -> bool:
    """Tell whether the origin of an activation's or pad's result is worth noting: where a gradient will ask for it."""
    return _noted(output) and torch.is_grad_enabled() and output.requires_grad


def origin_of(x: Tensor) -> Origin | None:
    """Return how a tensor is made, if that is known, the sources are still there and nothing has changed since."""
    note = _origins.get(x) if _noted(x) else None
    if note is None:
        return None
    sources = tuple(source() for source in note.sources)
    if any(source is None for source in sources):
        return None
    if note.versions != tuple(tensor._version for tensor in (x, *sources)):  # type: ignore[union-attr]
        return None
    return Origin(note.function, sources)  # type: ignore[arg-type]


def _noted(x: Any) -> bool:
    """Whether tensors are noted here: not in what compilers and tracers see, nor where forward mode differentiates."""
    return (
        isinstance(x, Tensor)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and forward_ad._current_level < 0
    )


def derive(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``function(x)``, derived from what x is made from, or from x where that is not known."""
    known = origin_of(x)
    if known is None:
        return derived(function(x), function, x)
    make = known.function  # not the origin itself, which would keep the sources
    return derived(function(x), lambda *sources: function(make(*sources)), *known.sources)


def convolve_recomputing(x: Tensor, origin: Origin, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve x [N, C, H, W], whose origin's tensors are kept for the backward pass in place of x."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # As autocast does, which leaves float64 alone, but where autograd sees it: outside of the function.
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Convolution.apply(x, weight, bias, geometry, origin.function, *origin.sources)  # type: ignore[return-value]


class _Convolution(torch.autograd.Function):
    """A convolution that keeps the tensors its input is made from, not its input.

    Differentiable twice: in the second pass the input's dependence on its sources is seen through their gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, function: Any, *sources: Tensor
    ) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, bias, ctx.geometry, ctx.function, *sources = inputs
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.save_for_backward(weight, *sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        x = ctx.function(*sources).to(weight.dtype)
        stride, padding, dilation, groups = ctx.geometry
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(
            gradients[0], x, weight, ctx.bias_sizes, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        return *found, None, None, *(None for _ in sources)


def average_pool_2x2(x: Tensor) -> Tensor:
    """Return the means of x [N, C, H, W] over 2x2 windows of stride 2; those over the edge average what exists.

    Autograd would keep x, of which the gradient needs the shape alone. Where x has an origin of that shape, which is
    kept anyway, it is taken instead.
    """
    origin = origin_of(x)
    if origin is None or (origin.sources[0].shape, origin.sources[0].dtype) != (x.shape, x.dtype):
        return F.avg_pool2d(x, *_HALVING)
    return _AveragePool.apply(x, origin.sources[0])  # type: ignore[return-value]


# Kernel, stride, padding, ceil_mode, count_include_pad.
_HALVING = (2, 2, 0, True, False)


class _AveragePool(torch.autograd.Function):
    """A 2x2 average pool of stride 2 that keeps any tensor of its input's shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shaped: Tensor) -> Tensor:
        return F.avg_pool2d(x, *_HALVING)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (shaped,) = ctx.saved_tensors
        kernel, stride, padding, *modes = _HALVING
        both = ([kernel] * 2, [stride] * 2, [padding] * 2)
        return torch.ops.aten.avg_pool2d_backward(gradients[0], shaped, *both, *modes, None), None


# MERGED from nn/recompute.py
#
# They are cheap functions of their input alone, whose gradient needs that input. ReLU, sigmoid and tanh are absent, for
# their gradient needs their output. Each is torch's class of that name, with its options and state, and notes in its own
# ``forward``: whatever hooks make of the output afterwards, the note is


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
