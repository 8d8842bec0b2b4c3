"""Parameters of other people's modules, followed from where they are kept into the operations that read them.

A layer of torch's, or a subclass that leaves its forward alone, is exchanged for a standardized twin. Of every other
module with a weight the recorder follows the parameters, through views, casts and constant factors, into operations on
activations, so that :mod:`normfree.convert.maps` can tell which module computes one linear map of its own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from normfree.convert.kinds import base_of, is_norm
from normfree.nn import Standardization
from normfree.trace import operations as op
from normfree.trace.graph import Node
from normfree.trace.scaling import Statics

_REARRANGING = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unsqueeze", "squeeze", "expand", "permute"}
    | {"transpose", "t", "slice", "select", "narrow", "flip", "unbind", "split", "split_with_sizes", "chunk"}
)
_CASTING = frozenset({"alias", "detach", "clone", "contiguous", "_to_copy", "to", "lift_fresh"})


@dataclass(frozen=True, eq=False)
class Origin:
    """What a tensor is that is a parameter, or a rearranged or scaled one.

    Attributes:
        owner: the module that has the parameter.
        name: of the parameter in it.
        shape: of the parameter.
        rearranged: what was done to the parameter, in order: each takes a tensor of its shape and returns one.
        factor: the constant that it was multiplied by.
    """

    owner: nn.Module
    name: str
    shape: torch.Size
    rearranged: tuple[Callable[[Tensor], Tensor], ...] = ()
    factor: float = 1.0

    def elements(self) -> Tensor:
        """Which element of the parameter, counted from 0, stands where in the tensor."""
        elements = torch.arange(self.shape.numel()).view(self.shape)
        for rearrange in self.rearranged:
            elements = rearrange(elements)
        return elements


@dataclass(frozen=True, eq=False)
class Use:
    """One operation on activations that reads a parameter, as it is or rearranged or scaled.

    Attributes:
        origin: what it reads.
        name: of the operation.
        args, kwargs: its arguments, activations replaced by their nodes.
        position: of the parameter among the arguments; None where it is in a list or has a keyword.
        origins: of every argument.
        made: the activation it makes, the first of several; None for none.
        run: how often the owner had begun to run.
        inside: whether the owner is the innermost running module.
    """

    origin: Origin
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int | None
    origins: tuple[Origin | None, ...]
    made: Node | None
    run: int
    inside: bool


class FollowedWeights(Statics):
    """Statics that also know what of a foreign module's parameters a tensor is.

    Attributes:
        uses: the operations on activations that read a parameter, by its owner.
        spoilt: another operation that reads a parameter, and makes something else of it, by owner and name.
        runs: how often each module has begun to run.
        returned: the activation that each run of a foreign module returned; None for anything else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.origins: Any = WeakTensorKeyDictionary()
        self.uses: dict[nn.Module, list[Use]] = {}
        self.spoilt: dict[tuple[nn.Module, str], str] = {}
        self.runs: dict[nn.Module, int] = {}
        self.returned: dict[nn.Module, list[Node | None]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items() if is_foreign(module) else ():
                if parameter is not None and parameter.is_floating_point():
                    self.origins[parameter] = Origin(module, name, parameter.shape)

    def run(self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Execute an operation on tensors that are no activations, and follow the parameters among them."""
        result = super().run(name, function, args, kwargs, tensors)
        read = [origin for tensor in tensors if (origin := self.origins.get(tensor)) is not None]
        if not read or name in op.FACTORY:
            return result
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        found = None if op.mutated_arguments(function) or len(read) > 1 else self._after(name, function, args, kwargs)
        if found is None:
            self.spoilt |= {(origin.owner, origin.name): name for origin in read}
        else:
            for number, tensor in enumerate(made):
                if not isinstance(tensor, nn.Parameter):
                    self.origins[tensor] = found(number)
        return result

    def _after(
        self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Callable[[int], Origin] | None:
        """What the results of an operation are, by their number; None for no parameter any longer."""
        origins = [self.origins.get(value) if isinstance(value, Tensor) else None for value in args]
        first = origins[0] if origins else None
        if name in _CASTING and first is not None:
            return lambda number: first
        if name in _REARRANGING and first is not None:

            def nth(number: int) -> Origin:
                def rearrange(elements: Tensor) -> Tensor:
                    return tree_leaves(function(elements, *args[1:], **kwargs))[number]

                return replace(first, rearranged=(*first.rearranged, rearrange))

            return nth
        if name == "mul" or (name == "div" and first is not None):
            origin, other = (first, args[1]) if first is not None else (origins[1], args[0])
            factor = None if self.owns(other) else self.factor(other, inverse=name == "div")
            if origin is not None and factor is not None and factor.value:
                value = float(factor.value)
                return lambda number: replace(origin, factor=origin.factor * value)
        return None

    def note(
        self, name: str, args: Sequence[Any], given: tuple[Any, ...], kwargs: dict[str, Any], made: Node | None,
        running: nn.Module | None,
    ) -> None:  # fmt: skip
        """Note the parameters that an operation on activations has read.

        Args:
            name: of the operation.
            args: its arguments.
            kwargs: those with a keyword.
            given: its arguments, activations replaced by their nodes.
            made: the activation it made.
            running: the innermost running module.
        """
        origins = tuple(self.origins.get(value) if isinstance(value, Tensor) else None for value in args)
        nested = [value for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)]
        inner = [self.origins.get(leaf) for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
        for position, origin in [*enumerate(origins), *((None, each) for each in inner)]:
            if origin is not None:
                run, inside = self.runs.get(origin.owner, 0), running is origin.owner
                use = Use(origin, name, given, kwargs, position, origins, made, run, inside)
                self.uses.setdefault(origin.owner, []).append(use)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module has a weight of its own, and is no norm and no layer of torch's in what it computes."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1 and p.is_floating_point()]
    return bool(weights) and not is_norm(module) and base_of(module, fresh=True) is None


def biasless(model: nn.Module) -> list[nn.Module]:
    """The foreign modules that could have a bias, and have none."""
    return [m for m in model.modules() if is_foreign(m) and m._parameters.get("bias", m) is None]


@contextmanager
def zero_biases(modules: list[nn.Module]) -> Iterator[None]:
    """Give modules without a bias one of zeros for a while, so that it shows what their forward does with it."""
    for module in modules:
        weight = next(p for p in module._parameters.values() if p is not None and p.dim() > 1)
        outputs = getattr(module, "out_channels", getattr(module, "out_features", None))
        zeros = weight.detach().new_zeros(outputs if isinstance(outputs, int) else len(weight))
        module._parameters["bias"] = nn.Parameter(zeros)
    try:
        yield
    finally:
        for module in modules:
            module._parameters["bias"] = None


class MapOutput(TorchDispatchMode):
    """Catches what the convolution or matrix product makes that reads a weight standardized in place.

    Args:
        part: the factors of the module that will run.

    Attributes:
        output: what was made.
    """

    follows_weights = True
    output: Tensor

    def __init__(self, part: Standardization) -> None:
        super().__init__()
        self.part = part
        self.made: Any = WeakTensorKeyDictionary()

    def __enter__(self) -> MapOutput:
        def weight(raw: Tensor) -> Tensor:
            made = type(self.part).weight(self.part, raw)
            self.made[made] = True
            return made

        vars(self.part)["weight"] = weight
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        del vars(self.part)["weight"]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(tensor in self.made for tensor in op.tensors_in(args, kwargs or {})):
            if op.name_of(func) in op.CONVOLUTION | op.LINEAR:
                self.output = result
            else:
                for leaf in tree_leaves(result):
                    if isinstance(leaf, Tensor):
                        self.made[leaf] = True
        return result
