"""Tensors that do not depend on the input: parameters, and what the forward pass computes from them.

They matter twice. A scalar multiplied into a weight and its bias scales the output of the convolution, so
factors are followed from parameter to weight. And a gain that starts at zero may silence its branch: its name is
followed through all that is zero because of it, so that an addition can tell which gains its branch is zero by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normfree.trace import operations as op
from normfree.trace.scaling import Factor, scalar_factor
from normfree.trace.tensor_map import TensorMap


@dataclass(frozen=True)
class Static:
    """What is known of a tensor that does not depend on the input.

    Attributes:
        factors: scalars multiplied in since it was a parameter.
        origin: the parameter it is, or is a view or cast of, or a multiple of by those factors.
        woken: names of zero gains in it that are measured as one.
        silent: names of the zero gains that make all of it zero.
    """

    factors: tuple[Factor, ...] = ()
    origin: nn.Parameter | None = None
    woken: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


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
        woken: names of zero gains that were set to one.
    """

    def __init__(self, model: nn.Module, *, woken: Collection[str] = ()) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.woken = woken
        self.known: TensorMap[Static] = TensorMap()

    def of(self, tensor: Tensor) -> Static:
        """What is known of ``tensor``."""
        if isinstance(tensor, nn.Parameter):
            name = self.names.get(id(tensor))
            return Static(origin=tensor, woken=(name,) if name in self.woken and name is not None else ())
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

    def zero_gain(self, tensor: Tensor) -> tuple[str, ...]:
        """The name of the gain that ``tensor`` is if all of it is zero; a gain has one axis at most."""
        static = self.of(tensor)
        origin = static.origin
        if origin is None or id(origin) not in self.names:
            return static.silent
        if sum(size != 1 for size in origin.shape) > 1 or bool(origin.detach().any()):
            return static.silent
        return tuple(dict.fromkeys([*static.silent, self.names[id(origin)]]))

    def run(self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Execute an operation none of whose arguments depends on the input."""
        result = function(*args, **kwargs)
        if tensors and name not in op.FACTORY:
            static = self._result(name, args, tensors)
            silent = self._silenced_by(name, args, tensors)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                    zero = bool(silent) and not bool(tensor.any())
                    self.known[tensor] = replace(static, silent=silent if zero else ())
        return result

    def _silenced_by(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[str, ...]:
        """The zero gains that may make a result zero: those behind its arguments, and those multiplied in now.

        Of two vectors of one size either may be the gain and the other a bias, so only the smaller of two factors is.
        """
        silent = [name for tensor in tensors for name in self.of(tensor).silent]
        if name in op.SCALING:
            largest = max(tensor.numel() for tensor in tensors)
            silent += [name for tensor in tensors if tensor.numel() < largest for name in self.zero_gain(tensor)]
        elif name in op.NORM and (weight := op.weight_and_bias(name, args)[0]) is not None:
            silent += self.zero_gain(weight)
        return tuple(dict.fromkeys(silent))

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
