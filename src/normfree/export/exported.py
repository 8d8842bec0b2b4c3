"""Export: fold, trace, write (ONNX or a PyTorch program), read back, compare; a file that differs is not kept."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from normfree.common.checks import check_flag, check_number, invalid, require
from normfree.common.files import check_metadata, check_place, file_error
from normfree.common.process import one_thread_at_a_time
from normfree.common.text import one_line
from normfree.common.torch_compat import copy_model, tree_map
from normfree.export.comparison import (
    Answer,
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
from normfree.nn.fold import fold
from normfree.trace.preserve import check_statistics, preserve_state

OPSET = 20
"""Version of ONNX's operators. The first with Gelu, which older ones spell as six operators a NFNet activation."""

ONE_FILE = 3 * 2**29
"""Bytes of weights up to which one ONNX file holds all: protobuf ends at 2 GiB, and PyTorch splits at 1.5."""

BATCH = "batch"
"""Name of the dynamic axis."""


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
        packages: that have to be installed, beside PyTorch.
        write: writes a program to a path; then come the names of its outputs, and what the file says of itself.
        read: opens such a file.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    write: Callable[[ExportedProgram, Path, Sequence[str], Mapping[str, str]], None]
    read: Callable[[Path], Opened]


def capture(model: nn.Module, arguments: Arguments, *, dynamic_batch: bool) -> ExportedProgram:
    """Trace a model.

    Args:
        model: in evaluation mode, on the CPU.
        arguments: what to trace it with; every axis of a fixed size but, if so asked, the leading one.
        dynamic_batch: whether the leading axis of all inputs may have any size of at least 1.

    Returns:
        The program. It does not say where the source code lies: a file that is given away should not either.

    Raises:
        ValueError: if the model cannot be traced, in one line that says why.
    """
    axes = {0: Dim(BATCH, min=1)}
    shapes = tree_map(lambda _: axes, arguments.positional or arguments.named) if dynamic_batch else None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                model, arguments.positional, arguments.named, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ValueError(_trace_failure(error, dynamic_batch=dynamic_batch)) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _trace_failure(error: Exception, *, dynamic_batch: bool) -> str:
    """Say why a model cannot be traced."""
    told = str(error)
    place = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', told)
    where = f" ({place[-1][0]}, line {place[-1][1]}: {place[-1][2]})" if place else ""
    if "data-dependent" in told:
        remedy = "use torch.where or torch.cond there"
        return f"model: its forward branches on the values of a tensor{where}, which no exported graph can; {remedy}"
    if dynamic_batch and "Constraints violated" in told:
        return (
            "dynamic_batch=True: the model's forward only works for some batch sizes, the traced one among them; "
            "write its reshapes with -1 for the batch, or export a fixed batch"
        )
    return f"model: torch.export cannot trace it: {one_line(error)}{where}; rewrite it, or export a part that traces"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from printing, logging and warning; what matters they raise.

    Streams, warnings and logging are the process's: two threads that changed them at once would leave them changed.
    """
    with (
        one_thread_at_a_time(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _write_onnx(program: ExportedProgram, path: Path, output_names: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Translate a program and write it, its weights to a second file beside it if they are large."""
    dynamic = [{0: Dim(BATCH, min=1)}] * len(program.graph_signature.user_inputs) if program.range_constraints else None
    try:
        with quiet():
            translated = torch.onnx.export(
                program,
                opset_version=OPSET,
                output_names=output_names,
                dynamic_shapes=dynamic,  # names the axis
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ValueError(_no_onnx_form(error)) from error
    assert translated is not None
    translated.model.metadata_props.update(metadata)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with quiet():
        translated.save(path, external_data=size > ONE_FILE)


def _no_onnx_form(error: Exception) -> str:
    """Say why a program has no ONNX form: the innermost of the errors names the operation."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    remedy = "export it with --format pt2 (normfree.export.to_program), or replace the operation"
    return f"model: it has no ONNX form: {one_line(inner)}; {remedy}"


def _read_onnx(path: Path) -> Opened:
    """Check a file and open it with ONNX Runtime, on the CPU."""
    onnx, onnxruntime = require("onnx", "ONNX"), require("onnxruntime", "ONNX")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    try:
        with quiet():
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(str(path), load_external_data=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(_not_run(error)) from error
    names = [each.name for each in session.get_inputs()]

    def answer(arguments: Arguments) -> list[Tensor]:
        inputs = dict(zip(names, (tensor.numpy() for tensor in arguments.tensors), strict=True))
        try:
            return [torch.from_numpy(array) for array in session.run(None, inputs)]
        except Exception as error:
            raise ValueError(_not_run(error)) from error

    operators = Counter(node.op_type for node in model.graph.node)
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return Opened(answer=answer, operators=dict(operators.most_common()), opset=opset)


def _not_run(error: Exception) -> str:
    remedy = "export a float32 model (normfree.save(normfree.load(FILE).float(), FILE)), or --format pt2"
    return f"model: ONNX Runtime does not run it on a CPU, so it cannot be checked: {one_line(error)}; {remedy}"


ONNX = Format(suffix=".onnx", packages=("onnx", "onnxscript", "onnxruntime"), write=_write_onnx, read=_read_onnx)
"""What ONNX Runtime, TensorRT, OpenVINO and browsers run."""


def _write_program(
    program: ExportedProgram, path: Path, output_names: Sequence[str], metadata: Mapping[str, str]
) -> None:
    """Save a program; it keeps the outputs' structure, and so needs no names for them."""
    # By way of memory: PyTorch's own writer ends the process (std::terminate) when a disk is full.
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files=dict(metadata))
    path.write_bytes(buffer.getbuffer())


def _read_program(path: Path) -> Opened:
    try:
        with quiet():
            program = torch.export.load(path)  # the file this process has just written
            module = program.module()
    except Exception as error:  # names of modules that PyTorch writes and cannot read
        remedy = "give the model's modules plain names, or write an ONNX file"
        raise ValueError(f"model: PyTorch does not read its own program ({one_line(error)}); {remedy}") from error
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    operators = Counter(getattr(target, "__name__", str(target)).partition(".")[0] for target in targets)
    return Opened(answer=lambda arguments: arguments.call(module), operators=dict(operators.most_common()))


PROGRAM = Format(suffix=".pt2", write=_write_program, read=_read_program)
"""PyTorch's own programs: run without the model's code, compiled ahead of time if so asked."""


SEED = 0
"""Of the random inputs that a file is checked with, and of the weights a rehearsal draws."""


def to_onnx(
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
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
        metadata: text by name that the file keeps, such as the names of the classes: its ``metadata_props``.

    Returns:
        Where the file is, what is in it, and how far it differs.

    Raises:
        ValueError: an argument that breaks its rule; a model that cannot be traced or has no ONNX form; a
            difference above the tolerance. No file is left.
        ImportError: a package is not installed.
        OSError: the file cannot be written.
    """
    __tracebackhide__ = True
    options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "tolerance": tolerance, "metadata": metadata}
    return export(ONNX, model, example_input, path, **options)


def to_program(
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic_batch: bool = False,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
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
        metadata: text by name that the file keeps: its extra files, as ``torch.export.load`` has them.

    Returns:
        Where the file is, what is in it, and how far it differs.

    Raises:
        ValueError: an argument that breaks its rule; a model that cannot be traced; a difference above the
            tolerance. No file is left.
        OSError: the file cannot be written.
    """
    __tracebackhide__ = True
    options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "tolerance": tolerance, "metadata": metadata}
    return export(PROGRAM, model, example_input, path, **options)


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
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Do for a kind of file what :func:`normfree.export.to_onnx` and ``to_program`` say they do."""
    __tracebackhide__ = True
    path = check_path(path, kind.suffix)
    check_flag("dynamic_batch", dynamic_batch)
    notes = check_metadata(metadata)
    for package in kind.packages:
        with quiet():
            require(package, "ONNX")
    arguments = arguments_of(example_input, dynamic_batch=dynamic_batch)
    given = _copied(model)
    if tolerance is None:
        tolerance = default_tolerance(chain(given.parameters(), given.buffers(), arguments.tensors))
    check_number("tolerance", tolerance, 0.0)
    check_statistics(given)
    with preserve_state(
        given
    ):  # it shares with the original what hooks and functions refer to, which no deep copy copies
        return _export(kind, given, arguments, path, dynamic_batch=dynamic_batch, tolerance=tolerance, metadata=notes)


def _export(
    kind: Format,
    given: nn.Module,
    arguments: Arguments,
    path: Path,
    *,
    dynamic_batch: bool,
    tolerance: float,
    metadata: Mapping[str, str],
) -> Exported:
    __tracebackhide__ = True
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
        kind.write(program, place, names, metadata)
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
    with write_then_move(path) as place:
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
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"model: {type(model).__name__} is a scripted module; pass the one that was scripted")
    copied = copy_model(model).cpu()
    copied.eval()
    return copied


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
    check_place("path", path)
    return path


def is_exported(path: Path) -> bool:
    """Tell whether a file is of the kind that its name ends in: an archive, or an ONNX model; nothing of it is run."""
    if path.suffix == ".pt2":
        return zipfile.is_zipfile(path)
    onnx: Any = require("onnx", "an ONNX file")
    try:
        return bool(onnx.load(path, load_external_data=False).graph.node)
    except Exception:  # of protobuf's kinds
        return False


@contextmanager
def write_then_move(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, in a folder of its own beside ``path``; move it there at the end.

    Whatever else was written into that folder moves along, first: the named file may refer to it. If the body
    raises, nothing is left, and what had been at ``path`` is as it was.

    Raises:
        ValueError: if one of the other files already exists, for two files cannot be replaced at once.
        OSError: naming the path, such as of a full disk.
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
    except BaseException as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and error.filename is None:  # a full disk
            raise file_error(error, path) from error
        raise
