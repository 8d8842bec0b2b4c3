"""The kinds of file: ONNX and PyTorch's own programs. How a model is traced for both, written, and read back."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from normfree.common.checks import required
from normfree.common.process import one_thread_at_a_time
from normfree.common.text import one_line
from normfree.common.torch_compat import tree_map
from normfree.export.comparison import Answer, Arguments

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
        write: writes a program to a path; the last argument names its outputs.
        read: opens such a file.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    write: Callable[[ExportedProgram, Path, Sequence[str]], None]
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
    return f"model: torch.export cannot trace it: {one_line(error)}{where}; see docs/export.md, limits"


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


def _write_onnx(program: ExportedProgram, path: Path, output_names: Sequence[str]) -> None:
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
    onnx, onnxruntime = required("onnx", "ONNX"), required("onnxruntime", "ONNX")
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


def _write_program(program: ExportedProgram, path: Path, output_names: Sequence[str]) -> None:
    """Save a program; it keeps the outputs' structure, and so needs no names for them."""
    # By way of memory: PyTorch's own writer ends the process (std::terminate) when a disk is full.
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
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
