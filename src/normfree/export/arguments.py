"""What a model is called with: tensors, positional or by name, and others like them in batches of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfree.common.checks import invalid
from normfree.common.text import one_line

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
        positional, named = tree_map(torch.clone, (self.positional, self.named))
        try:
            with torch.no_grad():
                return model(*positional, **named)
        except Exception as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self.tensors)
            remedy = "pass an example that its forward takes"
            raise ValueError(f"example_input: the model fails on {shapes} with {one_line(error)}; {remedy}") from error

    def call(self, model: nn.Module) -> list[Tensor]:
        """Return the tensors of what a model returns."""
        return output_tensors(self.run(model))

    def resampled(self, batch_size: int | None, generator: torch.Generator) -> Arguments:
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
        ValueError: if there is none.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"model: it returned {type(outputs).__name__} and no tensor; let forward return tensors")
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
