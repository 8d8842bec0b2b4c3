"""Whether two models agree: what they are called with, random batches like it, and how far their outputs differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.common.text import one_line
from normfree.common.torch_compat import copy_model, tree_leaves, tree_map

ExampleInput: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor, a tuple of positional arguments, or a mapping of keyword arguments."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of a model, all tensors and all on the CPU.

    Attributes:
        positional: may hold tuples, lists and dicts of tensors.
        named: as ``positional``.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order an exported program takes them."""
        return tree_leaves((self.positional, self.named))

    @property
    def batch_size(self) -> int | None:
        """Examples of the batch; None where tensors are 0-d or disagree."""
        sizes = {tensor.shape[0] if tensor.dim() else None for tensor in self.tensors}
        return sizes.pop() if len(sizes) == 1 else None

    def run(self, model: nn.Module) -> Any:
        """Return what a model returns for copies of these, for some write to their inputs.

        Raises:
            ValueError: if it raises.
        """
        __tracebackhide__ = True
        positional, named = tree_map(torch.clone, (self.positional, self.named))
        try:
            with torch.no_grad():
                return model(*positional, **named)
        except Exception as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self.tensors)
            name, remedy = type(model).__name__, "give an example input that its forward takes"
            raise ValueError(f"model: {name} failed on {shapes} with {one_line(error)}; {remedy}") from error

    def call(self, model: nn.Module) -> list[Tensor]:
        """Return the tensors of what a model returns."""
        return output_tensors(self.run(model))

    def resample(self, batch_size: int | None, generator: torch.Generator) -> Arguments:
        """Return others like these: values drawn from each tensor's own, which keeps indices and ranges valid.

        Floating-point tensors that are constant, such as ``torch.zeros`` for an example, get unit Gaussian noise.

        Args:
            batch_size: of all tensors; None keeps each tensor's shape.
            generator: of the randomness.
        """

        def draw(tensor: Tensor) -> Tensor:
            shape = tensor.shape if batch_size is None else (batch_size, *tensor.shape[1:])
            values = tensor.flatten()
            if tensor.is_floating_point() and bool((values == values[0]).all()):
                return torch.randn(shape, generator=generator, dtype=tensor.dtype)
            return values[torch.randint(len(values), shape, generator=generator)]

        return Arguments(*tree_map(draw, (self.positional, self.named)))


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a model's outputs, whatever holds them.

    Raises:
        ValueError: if there is none, or one that is not dense or has no values.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"model: it returned {type(outputs).__name__} and no tensor; let forward return tensors")
    if any(tensor.is_meta or tensor.layout != torch.strided for tensor in tensors):
        raise ValueError("model: it returned a tensor that is sparse or without values; let forward return dense ones")
    return tensors


def output_names(outputs: Any) -> list[str]:
    """Return a name for each tensor of a model's outputs: a mapping's keys, or ``output``, numbered if several."""
    tensors = output_tensors(outputs)
    if isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values()):
        return [str(key) for key in outputs]
    return ["output"] if len(tensors) == 1 else [f"output_{index}" for index in range(len(tensors))]


def arguments_of(example_input: ExampleInput, *, dynamic_batch: bool) -> Arguments:
    """Return an example as the arguments a model is traced with.

    A batch of one is doubled where the batch is to be dynamic: a size of 1 would be traced as a constant.

    Raises:
        ValueError: no tensor, something else than tensors, an empty tensor, or, with ``dynamic_batch``, tensors
            without a common number of examples.
    """
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        named = {str(name): value for name, value in example_input.items()}
    else:
        positional = example_input if isinstance(example_input, tuple) else (example_input,)
    leaves = tree_leaves((positional, named))
    forms = "pass a tensor, a tuple of positional or a mapping of keyword arguments, all tensors"
    if other := [leaf for leaf in leaves if not isinstance(leaf, Tensor)] or (not leaves and ["nothing"]):
        raise invalid("example_input", other[0], "must hold tensors alone", forms)
    if empty := [tuple(tensor.shape) for tensor in leaves if tensor.numel() == 0]:
        raise invalid("example_input", empty[0], "this shape is empty", "pass at least one example")
    arguments = Arguments(*tree_map(lambda tensor: tensor.detach().cpu(), (positional, named)))
    if dynamic_batch and arguments.batch_size is None:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in leaves)
        rule = f"the inputs {shapes} have no leading axis of one size"
        raise invalid("dynamic_batch", dynamic_batch, rule, "export a fixed batch, or pass inputs [N, ...]")
    if dynamic_batch and arguments.batch_size == 1:
        doubled = tree_map(lambda tensor: torch.cat([tensor, tensor]), (arguments.positional, arguments.named))
        arguments = Arguments(*doubled)
    return arguments


Answer: TypeAlias = Callable[[Arguments], list[Tensor]]
"""A model, in whatever form, as what it does: arguments in, tensors out."""


@dataclass(frozen=True)
class Difference:
    """The largest difference between two models' outputs.

    Attributes:
        absolute: the largest ``|actual - expected|``.
        relative: the largest of ``max |actual - expected| / max |expected|`` over outputs and batches, that is, in
            units of the output's scale.
    """

    absolute: float = 0.0
    relative: float = 0.0

    def merged(self, other: Difference) -> Difference:
        """Return the larger of both, number by number."""
        return Difference(max(self.absolute, other.absolute), max(self.relative, other.relative))

    def __str__(self) -> str:
        return f"at most {self.absolute:.1e}, {self.relative:.1e} of the output's scale"


def default_tolerance(tensors: Iterable[Tensor]) -> float:
    """Return the relative difference that rounding may make: half of the digits of the coarsest precision in use.

    ``sqrt(eps)``: 3.5e-4 in float32, where networks of a hundred layers differ by about 1e-6 and a wrong operation
    by 1e-2 or more.
    """
    precisions = {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}
    return math.sqrt(max((torch.finfo(dtype).eps for dtype in precisions), default=0.0))


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """Return how far the outputs of one batch differ; infinite where one of them is not finite and they differ.

    Raises:
        ValueError: another number of outputs or another shape; expected values that are no number.
    """
    if len(actual) != len(expected):
        raise ValueError(f"model: the exported model has {len(actual)} outputs, the model {len(expected)}")
    merged = Difference()
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            shapes = f"{list(one.shape)}, the model's {list(other.shape)}"
            raise ValueError(f"model: an output of the exported model has the shape {shapes}")
        merged = merged.merged(_difference(_wide(one), _wide(other)))
    return merged


def compare(actual: Answer, expected: Answer, batches: Iterable[Arguments]) -> Difference:
    """Return how far two models differ on any of some batches.

    Raises:
        ValueError: as ``difference``'s.
    """
    merged = Difference()
    for batch in batches:
        merged = merged.merged(difference(actual(batch), expected(batch)))
    return merged


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _difference(actual: Tensor, expected: Tensor) -> Difference:
    if bool(expected.isnan().any()):
        remedy = "mend its weights, or pass an example_input that it can take"
        raise ValueError(f"model: its outputs are not numbers (NaN) on random input; {remedy}")
    distance = torch.where(actual == expected, 0.0, (actual - expected).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    absolute = distance.max().item() if distance.numel() else 0.0
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    relative = absolute / scale if scale else (math.inf if absolute else 0.0)
    return Difference(absolute, relative)


AWAKE = 0.2
"""Standard deviation of what a silent weight is drawn from: a branch's share of the variance in the papers (alpha)."""


def silent_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are zero throughout: they hide what an exporter does around them."""
    return [name for name, p in model.named_parameters() if p.is_floating_point() and not bool(p.any())]


def wake_silent(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with its silent parameters drawn from N(0, 0.2^2 / fan_in), where fan_in is 1 of vectors."""
    woken = copy_model(model)
    parameters = dict(woken.named_parameters())
    with torch.no_grad():
        for name in silent_parameters(woken):
            parameter = parameters[name]
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (AWAKE / math.sqrt(fan_in)))
    return woken
