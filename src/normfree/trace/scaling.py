"""What does not depend on the input: parameters, what is computed from them, and what they multiply.

Multiplications matter, for a branch is measured before it is scaled by α, a skip gain, a layer scale or a drop-path
mask. A scaling (:class:`Factor`) is followed wherever it is: on the activation itself, on a gate, or folded into the
weight *and* the bias of a convolution, whose output it then scales as a whole (a factor on the weight alone, such as γ
or a gain, is part of the branch). So factors are followed from parameter to weight. And a gain that starts at zero may
silence its branch: its name is followed through all that is zero because of it, so that an addition can tell which
gains its branch is zero by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from weakref import ref

from torch import Tensor, nn

from normfree.common.torch_compat import tree_leaves
from normfree.trace import operations as op


@dataclass(frozen=True)
class Factor:
    """One multiplication.

    Attributes:
        key: tells whether two factors are one and the same (the same 0-d tensor, the same constant).
        value: a number, or one per channel [C].
        constant: a number written in the code rather than a tensor of the model.
        tensor: whose memory the key names, which is not another's as long as the factor lasts; None of a number.
    """

    key: object
    value: float | Tensor
    constant: bool = False
    tensor: Tensor | None = field(default=None, compare=False, repr=False)

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
    tensor = None
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        number, constant = float(value.item()), not owned
        tensor = None if constant else value.detach()
        key: object = ("constant", number) if constant else ("tensor", value.data_ptr(), value.dtype)
    elif isinstance(value, (int, float)):
        number, constant = float(value), True
        key = ("constant", number)
    else:
        return None
    if inverse:
        number = 1 / number if number else float("inf")
    return Factor((key, inverse), number, constant, tensor)


def vector_factor(value: Tensor, *, inverse: bool = False) -> Factor:
    """The factor that one number per channel is."""
    numbers = value.detach().flatten().double().cpu()
    return Factor(("vector", value.data_ptr(), inverse), 1 / numbers if inverse else numbers, tensor=value.detach())


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


def numbers_among(factors: Sequence[Factor]) -> Iterator[Factor]:
    """Those of some factors that are one number for all channels."""
    return (factor for factor in factors if not isinstance(factor.value, Tensor))


def equal_factors(first: Sequence[Factor], second: Sequence[Factor]) -> tuple[Factor, ...]:
    """The numbers among the factors of two activations that scale their sum, too: each has one of that value."""
    left = [factor.value for factor in numbers_among(second)]
    equal = []
    for factor in numbers_among(first):
        if factor.value in left:
            left.remove(factor.value)
            equal.append(factor)
    return tuple(equal)


def gate_scaling(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """A gate's scaling of what it gates: all but the constant of the gate itself, the 2 of 2·sigmoid."""
    return factors[1:] if factors and factors[0].constant else factors


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


_UNKNOWN = Static()


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
        self.parameters: dict[int, Static] = {}

    def of(self, tensor: Tensor) -> Static:
        """What is known of ``tensor``."""
        if isinstance(tensor, nn.Parameter):
            found = self.parameters.get(id(tensor))
            if found is None or found.origin is not tensor:
                name = self.names.get(id(tensor))
                woken = (name,) if name in self.woken and name is not None else ()
                found = self.parameters[id(tensor)] = Static(origin=tensor, woken=woken)
            return found
        return self.known.get(tensor) or _UNKNOWN

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
        """The zero gains that may make a result zero: those its arguments carry, and those multiplied in now.

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
            return self._scale(args, woken, inverse=name == "div")
        if name in op.NORM:
            weight, bias = op.weight_and_bias(name, args)
            factors = self.of(weight).factors if weight is not None and bias is None else ()
            return Static(factors, None, woken)
        return Static((), None, woken)

    def _scale(self, args: Sequence[Any], woken: tuple[str, ...], *, inverse: bool) -> Static:
        values, other = args[0], args[1]
        swapped = isinstance(other, Tensor) and (not isinstance(values, Tensor) or values.numel() < other.numel())
        if swapped and not inverse:
            values, other = other, values
        factor = self.factor(other, inverse=inverse)
        if factor is None:
            return Static(woken=woken)
        static = self.of(values)
        return Static((*static.factors, factor), static.origin, woken)


Value = TypeVar("Value")


class _Key(ref):
    """A weak reference that knows where its tensor's value is kept."""

    __slots__ = ("place",)
    place: int


class TensorMap(Generic[Value]):
    """A mapping from tensors, compared by identity; an entry goes with its tensor.

    As ``torch.utils.weak.WeakTensorKeyDictionary``, at a tenth of its cost: every operation that is recorded asks
    several times, and a comparison of tensors by a method of a key class in Python was a third of a recording.

    Attributes:
        by_id: the values by ``id(tensor)``, to look many up at a time.
    """

    __slots__ = ("__weakref__", "_forget", "_keys", "by_id")

    def __init__(self) -> None:
        self.by_id: dict[int, Value] = {}
        self._keys: dict[int, _Key] = {}
        this = ref(self)

        def forget(key: _Key) -> None:
            map_ = this()
            if map_ is not None:
                map_.by_id.pop(key.place, None)
                map_._keys.pop(key.place, None)

        self._forget = forget

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self.by_id

    def __getitem__(self, tensor: Tensor) -> Value:
        return self.by_id[id(tensor)]

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        place = id(tensor)
        if place not in self._keys:
            self._keys[place] = key = _Key(tensor, self._forget)
            key.place = place
        self.by_id[place] = value

    def __len__(self) -> int:
        return len(self.by_id)

    def get(self, tensor: Tensor) -> Value | None:
        """The tensor's value, or None."""
        return self.by_id.get(id(tensor))

    def pop(self, tensor: Tensor) -> Value | None:
        """Take the tensor's value out."""
        self._keys.pop(id(tensor), None)
        return self.by_id.pop(id(tensor), None)
