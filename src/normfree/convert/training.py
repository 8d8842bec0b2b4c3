"""The structure of a model in training mode, its norms at rest: it shows what evaluation hides, such as dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from normfree.convert.dataflow import record
from normfree.convert.kinds import is_norm
from normfree.convert.structure import Structure
from normfree.trace.inputs import Batch
from normfree.trace.preserve import Preserved, untouched


def training_structure(model: nn.Module, structure: Structure, batch: Batch) -> Structure | None:
    """What the model does in training mode with the statistics of its norms frozen; None where it does not run so.

    Some models want targets in training: then all but the outermost module train, and if that fails, too, those
    without children, which dropout layers are.

    Args:
        model: the model.
        structure: of it in evaluation mode.
        batch: its input.
    """
    norms = {calls[0].module for calls in structure.norms.values()} | set(filter(is_norm, model.modules()))
    attempts: tuple[Callable[[nn.Module], bool], ...] = (
        lambda module: module not in norms,
        lambda module: module not in norms and module is not model,
        lambda module: module not in norms and next(module.children(), None) is None,
    )
    for trains in attempts:
        try:
            return Structure(record(model, batch, state=partial(_training, model, trains)))
        except ValueError:
            continue
    return None


@contextmanager
def _training(model: nn.Module, trains: Callable[[nn.Module], bool]) -> Iterator[Preserved]:
    with untouched(model, "train") as preserved:
        for module in model.modules():
            module.training = trains(module)
        yield preserved
