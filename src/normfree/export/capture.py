"""A model as one graph of operations, by torch.export, without the noise on the way."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from normfree.common.text import one_line
from normfree.export.arguments import Arguments

BATCH = "batch"
"""Name of the dynamic axis."""


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
        raise ValueError(_reason(error, dynamic_batch=dynamic_batch)) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from printing, logging and warning; what matters they raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: Exception, *, dynamic_batch: bool) -> str:
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
