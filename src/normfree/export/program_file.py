"""PyTorch's own programs, ``*.pt2``: run without the model's code, compiled ahead of time if so wished."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from normfree.common.text import one_line
from normfree.export.arguments import ExampleInput
from normfree.export.capture import quiet
from normfree.export.exported import Exported, Format, Opened, export


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
    kind = Format(suffix=".pt2", check=lambda: None, write=_write, read=_read)
    return export(kind, model, example_input, path, dynamic_batch=dynamic_batch, tolerance=tolerance)


def _write(program: ExportedProgram, path: Path, output_names: Sequence[str]) -> None:
    """Save a program; it keeps the outputs' structure, and so needs no names for them."""
    # By way of memory: PyTorch's own writer ends the process (std::terminate) when a disk is full.
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def _read(path: Path) -> Opened:
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
