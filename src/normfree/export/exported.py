"""Export: fold, trace, write, read back, compare; a file that fails the comparison is not kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from normfree.common.checks import check_flag, check_number
from normfree.common.text import one_line
from normfree.export.agreement import Answer, Difference, awake, compare, default_tolerance, silent_parameters
from normfree.export.arguments import Arguments, ExampleInput, arguments_of, output_names
from normfree.export.capture import capture
from normfree.export.staging import check_path, staged
from normfree.nn.fold import fold

SEED = 0
"""Of the random inputs that a file is checked with, and of the weights a rehearsal draws."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A file, read back.

    Attributes:
        answer: what it does.
        operators: how often it has each operator, the most frequent first.
        opset: version of ONNX's operators; None of other formats.
    """

    answer: Answer
    operators: Mapping[str, int]
    opset: int | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: of its name.
        check: raises ImportError where what it takes is not installed.
        write: writes a program to a path; the last argument names its outputs.
        read: opens such a file.
    """

    suffix: str
    check: Callable[[], None]
    write: Callable[[ExportedProgram, Path, Sequence[str]], None]
    read: Callable[[Path], Opened]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written, read back and found to agree.

    Attributes:
        path: the file.
        size: bytes, of the weights' file too if there is one.
        operators: how often the file has each operator, the most frequent first.
        opset: version of ONNX's operators; None of other formats.
        input_shapes: of the inputs it was traced with.
        batch_sizes: of the batches it was checked with; empty where the inputs have no common number of examples.
        dynamic_batch: whether it takes any number of examples.
        tolerance: the largest relative difference that would have been accepted.
        folding: the folded model against the model as it was given, both run by PyTorch.
        file: the file against the folded model.
        silent: names of the folded model's parameters that are zero throughout, biases included.
        rehearsal: where there are silent ones: a scratch file with these drawn at random against the same model run
            by PyTorch; None where there are none, or where so woken the model does not answer in numbers.
    """

    path: Path
    size: int
    operators: Mapping[str, int]
    opset: int | None
    input_shapes: tuple[tuple[int, ...], ...]
    batch_sizes: tuple[int, ...]
    dynamic_batch: bool
    tolerance: float
    folding: Difference
    file: Difference
    silent: tuple[str, ...]
    rehearsal: Difference | None


def export(
    kind: Format,
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic_batch: bool,
    tolerance: float | None,
) -> Exported:
    """Do for a kind of file what :func:`normfree.export.to_onnx` and ``to_program`` say they do."""
    path = check_path(path, kind.suffix)
    check_flag("dynamic_batch", dynamic_batch)
    kind.check()
    arguments = arguments_of(example_input, dynamic_batch=dynamic_batch)
    given = _copied(model)
    if tolerance is None:
        tolerance = default_tolerance(chain(given.parameters(), given.buffers(), arguments.tensors))
    check_number("tolerance", tolerance, 0.0)
    job = _Job(kind, arguments, dynamic_batch, tolerance, output_names(arguments.run(given)))
    folded = fold(given).requires_grad_(False)
    program = job.trace(folded)
    folding = compare(_answer(folded), _answer(given), job.batches())
    job.check(folding, "the folded model")
    silent = silent_parameters(folded)
    with staged(path) as place:
        rehearsal = job.rehearse(folded, place) if silent else None
        opened, file = job.write(program, folded, place)
        size = sum(part.stat().st_size for part in place.parent.iterdir())
    facts = job.facts(opened, size)
    return Exported(path=path, folding=folding, file=file, silent=tuple(silent), rehearsal=rehearsal, **facts)


@dataclass(frozen=True)
class _Job:
    """What all steps of one export share."""

    kind: Format
    arguments: Arguments
    dynamic_batch: bool
    tolerance: float
    names: Sequence[str]

    def batches(self) -> list[Arguments]:
        """Random inputs: of the traced size, and of one example and one more example where the size is dynamic."""
        generator = torch.Generator().manual_seed(SEED)
        traced = self.arguments.batch_size
        sizes = sorted({1, traced, traced + 1}) if self.dynamic_batch and traced else [None]
        return [self.arguments.resampled(size, generator) for size in sizes]

    def trace(self, folded: nn.Module) -> ExportedProgram:
        """Trace a model, with values that are not the user's, for a program keeps those it was traced with."""
        arguments = self.arguments.resampled(None, torch.Generator().manual_seed(SEED))
        return capture(folded, arguments, dynamic_batch=self.dynamic_batch)

    def write(
        self, program: ExportedProgram, folded: nn.Module, place: Path, what: str = "the file, read back,"
    ) -> tuple[Opened, Difference]:
        """Write a traced model, read the file back, and compare it with what was traced."""
        self.kind.write(program, place, self.names)
        opened = self.kind.read(place)
        file = compare(opened.answer, _answer(folded), self.batches())
        self.check(file, what)
        return opened, file

    def rehearse(self, folded: nn.Module, place: Path) -> Difference | None:
        """Export with silent weights drawn at random, for a zero hides whatever is done to what it multiplies."""
        woken = awake(folded, torch.Generator().manual_seed(SEED))
        if not all(bool(y.isfinite().all()) for batch in self.batches() for y in batch.call(woken)):
            return None
        what = "a rehearsal's file, its all-zero weights drawn at random,"
        found = self.write(self.trace(woken), woken, place, what)[1]
        for part in place.parent.iterdir():
            part.unlink()
        return found

    def check(self, found: Difference, what: str) -> None:
        """Refuse a difference beyond the tolerance."""
        if found.relative > self.tolerance:
            raise ValueError(
                f"model: {what} differs from it by {found}, more than tolerance={self.tolerance:.1e}, and was not "
                "kept; if the model is known to amplify rounding errors so, pass a larger tolerance"
            )

    def facts(self, opened: Opened, size: int) -> dict[str, Any]:
        """Return what is not a difference of :class:`Exported`'s attributes."""
        return {
            "size": size,
            "operators": opened.operators,
            "opset": opened.opset,
            "input_shapes": tuple(tuple(tensor.shape) for tensor in self.arguments.tensors),
            "batch_sizes": tuple(n for batch in self.batches() if (n := batch.batch_size) is not None),
            "dynamic_batch": self.dynamic_batch,
            "tolerance": self.tolerance,
        }


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU in evaluation mode: whatever happens here happens to the copy."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is no torch.nn.Module; pass one")
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise ValueError("model: it has no weights yet (meta device); pass one with weights")
    try:
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:
        remedy = "its attributes must be parameters, buffers and plain values"
        raise ValueError(f"model: it cannot be copied: {one_line(error)}; {remedy}") from error


def _answer(model: nn.Module) -> Answer:
    return lambda arguments: arguments.call(model)
