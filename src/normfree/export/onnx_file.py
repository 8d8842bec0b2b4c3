"""ONNX files: what ONNX Runtime, TensorRT, OpenVINO and browsers run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from normfree.common.packages import required
from normfree.common.text import one_line
from normfree.export.arguments import Arguments, ExampleInput
from normfree.export.capture import BATCH, quiet
from normfree.export.exported import Exported, Format, Opened, export

OPSET = 20
"""Version of ONNX's operators. The first with Gelu, which older ones spell as six operators a NFNet activation."""

ONE_FILE = 3 * 2**29
"""Bytes of weights up to which one file holds all: protobuf ends at 2 GiB, and PyTorch splits at 1.5."""

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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
    PyTorch on the CPU, on random inputs resampled from the example's values (batches of one example, of the traced
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
    kind = Format(suffix=".onnx", check=check_installed, write=_write, read=_read)
    return export(kind, model, example_input, path, dynamic_batch=dynamic_batch, tolerance=tolerance)


def check_installed() -> None:
    """Refuse to start without the packages that ONNX takes.

    Raises:
        ImportError: naming what to install.
    """
    for package in PACKAGES:
        with quiet():
            required(package, "ONNX", " ".join(PACKAGES))


def _write(program: ExportedProgram, path: Path, output_names: Sequence[str]) -> None:
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
        raise ValueError(_reason(error)) from error
    assert translated is not None
    with quiet():
        translated.save(path, external_data=_bytes(program) > ONE_FILE)


def _bytes(program: ExportedProgram) -> int:
    return sum(tensor.nbytes for tensor in program.state_dict.values())


def _reason(error: Exception) -> str:
    """Say why a program has no ONNX form: the innermost of the errors names the operation."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    remedy = "export it with --format pt2 (normfree.export.to_program), or replace the operation"
    return f"model: it has no ONNX form: {one_line(inner)}; {remedy}"


def _read(path: Path) -> Opened:
    """Check a file and open it with ONNX Runtime, on the CPU."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    try:
        with quiet():
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(str(path), load_external_data=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(_refusal(error)) from error
    names = [each.name for each in session.get_inputs()]

    def answer(arguments: Arguments) -> list[Tensor]:
        fed = dict(zip(names, (tensor.numpy() for tensor in arguments.tensors), strict=True))
        try:
            return [torch.from_numpy(array) for array in session.run(None, fed)]
        except Exception as error:
            raise ValueError(_refusal(error)) from error

    operators = Counter(node.op_type for node in model.graph.node)
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return Opened(answer=answer, operators=dict(operators.most_common()), opset=opset)


def _refusal(error: Exception) -> str:
    remedy = "export a float32 model (normfree.save(normfree.load(FILE).float(), FILE)), or --format pt2"
    return f"model: ONNX Runtime does not run it on a CPU, so it cannot be checked: {one_line(error)}; {remedy}"
