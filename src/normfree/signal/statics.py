"""Tensors that do not depend on the input: parameters, and what the forward pass computes from them.

They matter twice. A scalar multiplied into a weight and its bias scales the output of the convolution, so
factors are followed from parameter to weight. And a gain that starts at zero silences its branch: such a
parameter is woken (set to one, put back afterwards) the moment it is about to be multiplied in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfree.signal import operations as op
from normfree.signal.scaling import Factor, scalar_factor
from normfree.signal.tensor_map import TensorMap


@dataclass(frozen=True)
class Static:
    """What is known of a tensor that does not depend on the input.

    Attributes:
        factors: scalars multiplied in since it was a parameter.
        origin: the parameter it is, or is a view or cast of, or a multiple of by those factors.
        woken: names of zero parameters in it that are measured as one.
    """

    factors: tuple[Factor, ...] = ()
    origin: nn.Parameter | None = None
    woken: tuple[str, ...] = ()


def written_by(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation is about to write to."""
    for position in op.mutated_arguments(function):
        value = args[position] if position < len(args) else kwargs.get(function._schema.arguments[position].name)
        if isinstance(value, Tensor):
            yield value
        else:
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class Statics:
    """Follows every tensor that does not depend on the input.

    Args:
        model: whose parameters they are.
        before_writing: told of every parameter about to be changed.
        wake: wake zero gains.
    """

    def __init__(self, model: nn.Module, before_writing: Callable[[Tensor], None], *, wake: bool) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.before_writing = before_writing
        self.wakes = wake
        self.woken: set[int] = set()
        self.known: TensorMap[Static] = TensorMap()

    def of(self, tensor: Tensor) -> Static:
        """What is known of ``tensor``."""
        if isinstance(tensor, nn.Parameter):
            name = (self.names[id(tensor)],) if id(tensor) in self.woken else ()
            return Static(origin=tensor, woken=name)
        return self.known.get(tensor) or Static()

    def owns(self, value: Any) -> bool:
        """Whether a value is a parameter or was computed from one."""
        return isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or value in self.known)

    def factor(self, value: Any, *, inverse: bool) -> Factor | None:
        """The scalar factor that multiplying (or dividing) by ``value`` is.

        A multiple of a parameter is the same factor each time it is computed: in the weight's and in the bias's.
        """
        factor = scalar_factor(value, owned=self.owns(value), inverse=inverse)
        if factor is None or factor.constant or (origin := self.of(value).origin) is None:
            return factor
        key = (id(origin), *(one.key for one in self.of(value).factors))
        return replace(factor, key=("multiple", key, inverse))

    def wake(self, tensor: Tensor) -> None:
        """Set the gain behind ``tensor`` to one if all of it is zero (a gain has one axis at most)."""
        origin = self.of(tensor).origin
        if not self.wakes or origin is None or id(origin) not in self.names or id(origin) in self.woken:
            return
        if sum(size != 1 for size in origin.shape) > 1 or bool(origin.detach().any()):
            return
        self.before_writing(origin)
        static = self.of(tensor)
        with torch.no_grad():
            origin.detach().fill_(1)
            if tensor is not origin:  # computed from it before the waking
                tensor.detach().fill_(float(prod(factor.value for factor in static.factors)))
        self.woken.add(id(origin))
        if tensor is not origin:
            self.known[tensor] = replace(static, woken=self.of(origin).woken)

    def run(self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Execute an operation none of whose arguments depends on the input."""
        if name in op.SCALING:
            self._wake_scalar(tensors)
        elif name in op.NORM and (weight := op.weight_and_bias(name, args)[0]) is not None:
            self.wake(weight)
        result = function(*args, **kwargs)
        if tensors and name not in op.FACTORY:
            static = self._result(name, args, tensors)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                    self.known[tensor] = static
        return result

    def _wake_scalar(self, tensors: Sequence[Tensor]) -> None:
        """Wake a scalar that is multiplied in; a vector may as well be a bias, and is left until its use tells."""
        largest = max((tensor.numel() for tensor in tensors), default=0)
        for tensor in tensors:
            if tensor.dim() == 0 or tensor.numel() == 1 < largest:
                self.wake(tensor)

    def _result(self, name: str, args: Sequence[Any], tensors: list[Tensor]) -> Static:
        woken = tuple(dict.fromkeys(name for tensor in tensors for name in self.of(tensor).woken))
        first = self.of(tensors[0])
        if name in op.VIEW or name in op.PARTIAL:
            return Static(first.factors, first.origin, woken)
        if name in op.SCALING and len(args) > 1:
            return self._scaled(args, woken, inverse=name == "div")
        if name in op.NORM:
            weight, bias = op.weight_and_bias(name, args)
            factors = self.of(weight).factors if weight is not None and bias is None else ()
            return Static(factors, None, woken)
        return Static((), None, woken)

    def _scaled(self, args: Sequence[Any], woken: tuple[str, ...], *, inverse: bool) -> Static:
        values, other = args[0], args[1]
        swapped = isinstance(other, Tensor) and (not isinstance(values, Tensor) or values.numel() < other.numel())
        if swapped and not inverse:
            values, other = other, values
        factor = self.factor(other, inverse=inverse)
        if factor is None:
            return Static(woken=woken)
        static = self.of(values)
        return Static((*static.factors, factor), static.origin, woken)
