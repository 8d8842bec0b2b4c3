"""Export: fold, trace, write, read back, compare; a file that fails the comparison is not kept."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from normfree.common.checks import check_flag, check_number, invalid, required
from normfree.common.process import one_thread_at_a_time
from normfree.common.torch_compat import copy_model
from normfree.export.comparison import (
    Arguments,
    Difference,
    ExampleInput,
    arguments_of,
    compare,
    default_tolerance,
    output_names,
    silent_parameters,
    wake_silent,
)
from normfree.export.formats import ONNX, PROGRAM, Format, Opened, capture, quiet
from normfree.nn.fold import fold
from normfree.trace.preserve import given_back
from normfree.trace.weights import check_statistics

SEED = 0
"""Of the random inputs that a file is checked with, and of the weights a rehearsal draws."""


def to_onnx(
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
) -> Exported:
    """Fold a model, write it as an ONNX file, read that back with ONNX Runtime, and compare.

    The file appears under its name once it has been checked: by ``onnx.checker``, and against the model run by
    PyTorch on the CPU, on random inputs resample from the example's values (batches of one example, of the traced
    size and of one more if the batch is dynamic). Where parameters are zero, as a fresh model's skip gains and
    biases are, a scratch file with those drawn at random is checked first, for zeros would hide errors.

    Args:
        model: any module whose forward takes and returns tensors, of float32 for ONNX Runtime to run it on a CPU.
            It is exported in evaluation mode and left as it is.
        example_input: what its forward takes, [N, C, H, W] for an image model: a tensor, a tuple of positional or a
            mapping of keyword arguments. All axes but a dynamic batch keep its sizes.
        path: where to, ``*.onnx``; a file of that name is replaced at the end. Weights of more than 1.5 GiB go to
            ``*.onnx.data`` beside it.
        dynamic_batch: whether the file takes any number of examples, on the leading axis of each input.
        tolerance: largest difference from the model, relative to the largest absolute output; by default
            ``sqrt(eps)``, 3.5e-4 in float32.

    Returns:
        Where the file is, what is in it, and how far it differs.

    Raises:
        ValueError: an argument that breaks its rule; a model that cannot be traced or has no ONNX form; a
            difference above the tolerance. No file is left.
        ImportError: a package is not installed.
        OSError: the file cannot be written.
    """
    return export(ONNX, model, example_input, path, dynamic_batch=dynamic_batch, tolerance=tolerance)


def to_program(
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
) -> Exported:
    """Fold a model, write it as a torch.export program, read that back, and compare.

    ``torch.export.load(path).module()`` is the model again, without its code; it needs PyTorch alone. Checked as
    :func:`normfree.export.to_onnx` checks, with PyTorch in the place of ONNX Runtime.

    Args:
        model: any module whose forward takes and returns tensors, in any precision. It is exported in evaluation
            mode, on the CPU, and left as it is.
        example_input: what its forward takes, [N, C, H, W] for an image model: a tensor, a tuple of positional or a
            mapping of keyword arguments. All axes but a dynamic batch keep its sizes.
        path: where to, ``*.pt2``; a file of that name is replaced at the end.
        dynamic_batch: whether the file takes any number of examples, on the leading axis of each input.
        tolerance: largest difference from the model, relative to the largest absolute output; by default
            ``sqrt(eps)``, 3.5e-4 in float32.

    Returns:
        Where the file is, what is in it, and how far it differs.

    Raises:
        ValueError: an argument that breaks its rule; a model that cannot be traced; a difference above the
            tolerance. No file is left.
        OSError: the file cannot be written.
    """
    return export(PROGRAM, model, example_input, path, dynamic_batch=dynamic_batch, tolerance=tolerance)


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


@one_thread_at_a_time()
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
    for package in kind.packages:
        with quiet():
            required(package, "ONNX")
    arguments = arguments_of(example_input, dynamic_batch=dynamic_batch)
    given = _copied(model)
    if tolerance is None:
        tolerance = default_tolerance(chain(given.parameters(), given.buffers(), arguments.tensors))
    check_number("tolerance", tolerance, 0.0)
    check_statistics(given)
    with given_back(given):  # it shares with the original what hooks and functions refer to, which no deep copy copies
        return _export(kind, given, arguments, path, dynamic_batch=dynamic_batch, tolerance=tolerance)


def _export(
    kind: Format, given: nn.Module, arguments: Arguments, path: Path, *, dynamic_batch: bool, tolerance: float
) -> Exported:
    names = output_names(arguments.run(given))
    generator = torch.Generator().manual_seed(SEED)
    traced = arguments.batch_size
    sizes = sorted({1, traced, traced + 1}) if dynamic_batch and traced else [None]
    batches = [arguments.resample(size, generator) for size in sizes]
    # A program keeps the values it was traced with: not the user's.
    example = arguments.resample(None, torch.Generator().manual_seed(SEED))

    def trace(module: nn.Module) -> ExportedProgram:
        return capture(module, example, dynamic_batch=dynamic_batch)

    def write(program: ExportedProgram, module: nn.Module, place: Path, what: str) -> tuple[Opened, Difference]:
        kind.write(program, place, names)
        opened = kind.read(place)
        found = compare(opened.answer, lambda batch: batch.call(module), batches)
        _check_difference(found, tolerance, what)
        return opened, found

    folded = fold(given).requires_grad_(False)
    program = trace(folded)
    folding = compare(lambda batch: batch.call(folded), lambda batch: batch.call(given), batches)
    _check_difference(folding, tolerance, "the folded model")
    silent = silent_parameters(folded)
    rehearsal = None
    with staged(path) as place:
        if silent:  # a zero hides whatever is done to what it multiplies
            woken = wake_silent(folded, torch.Generator().manual_seed(SEED))
            if all(bool(y.isfinite().all()) for batch in batches for y in batch.call(woken)):
                what = "a rehearsal's file, its all-zero weights drawn at random,"
                rehearsal = write(trace(woken), woken, place, what)[1]
                for part in place.parent.iterdir():
                    part.unlink()
        opened, file = write(program, folded, place, "the file, read back,")
        size = sum(part.stat().st_size for part in place.parent.iterdir())
    return Exported(
        path=path,
        size=size,
        operators=opened.operators,
        opset=opened.opset,
        input_shapes=tuple(tuple(tensor.shape) for tensor in arguments.tensors),
        batch_sizes=tuple(n for batch in batches if (n := batch.batch_size) is not None),
        dynamic_batch=dynamic_batch,
        tolerance=tolerance,
        folding=folding,
        file=file,
        silent=tuple(silent),
        rehearsal=rehearsal,
    )


def _check_difference(found: Difference, tolerance: float, what: str) -> None:
    if found.relative > tolerance:
        raise ValueError(
            f"model: {what} differs from it by {found}, more than tolerance={tolerance:.1e}, and was not kept; if the "
            "model is known to amplify rounding errors so, pass a larger tolerance"
        )


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU in evaluation mode: whatever happens here happens to the copy."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is no torch.nn.Module; pass one")
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise ValueError("model: it has no weights yet (meta device); pass one with weights")
    return copy_model(model).cpu().eval()


def check_path(path: str | Path, suffix: str) -> Path:
    """Return where to write to; refuse, before any work is done, what could not be written.

    Raises:
        ValueError: another suffix, a folder of that name, a file where a folder should be, or no permission.
    """
    __tracebackhide__ = True
    if not isinstance(path, (str, os.PathLike)):
        raise invalid("path", path, "must be a path", f"pass one such as 'model{suffix}'")
    path = Path(path)
    if path.suffix != suffix:
        raise invalid("path", str(path), f"must end in {suffix}", f"pass {str(path.with_suffix(suffix))!r}")
    if path.is_dir():
        raise invalid("path", str(path), "is a folder", "pass a file's name")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise invalid("path", str(path), f"{str(existing)!r} is a file, not a folder", "pass another place")
    if existing.is_relative_to("/proc") or not os.access(existing, os.W_OK | os.X_OK):
        raise invalid("path", str(path), f"{str(existing)!r} cannot be written to", "pass another place")
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, in a folder of its own beside ``path``; move it there at the end.

    Whatever else was written into that folder moves along, first: the named file may refer to it. If the body
    raises, nothing is left, and what had been at ``path`` is as it was.

    Raises:
        ValueError: if one of the other files already exists, for two files cannot be replaced at once.
    """
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            for file in files:
                target = path.parent / file.name
                if target.exists() and target.name != path.name:
                    remedy = "remove it, or pass another place"
                    raise invalid("path", str(path), f"its weights go to {str(target)!r}, which exists", remedy)
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            for file in files:
                os.replace(file, path.parent / file.name)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
