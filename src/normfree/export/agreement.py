"""How far two models differ, and how far they may."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfree.export.arguments import Arguments

Answer = Callable[[Arguments], list[Tensor]]
"""A model, in whatever form, as what it does: arguments in, tensors out."""

AWAKE = 0.2
"""Standard deviation of what a silent weight is drawn from: a branch's share of the variance in the papers (alpha)."""


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


def silent_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are zero throughout: they hide what an exporter does around them."""
    return [name for name, p in model.named_parameters() if p.is_floating_point() and not bool(p.any())]


def awake(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy with its silent parameters drawn from N(0, 0.2^2 / fan_in), where fan_in is 1 of vectors."""
    woken = copy.deepcopy(model)
    with torch.no_grad():
        for name in silent_parameters(woken):
            parameter = woken.get_parameter(name)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (AWAKE / math.sqrt(fan_in)))
    return woken
