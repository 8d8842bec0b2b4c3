"""One architecture of somebody else's library, and what an expert expects of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from torch import nn

Built = tuple[nn.Module, Any]
"""A model at random initialisation, and a batch for it: a tensor, a tuple or a dict of arguments."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table of ``benchmarks.foreign``.

    Attributes:
        name: ``library:architecture``.
        package: the distribution on PyPI, as constraints-foreign.txt pins it.
        field: what the architecture is for.
        build: the model and its batch, for a seed that is already set; nothing is downloaded.
        blocks: how many residual additions the authors' code makes, computed from the model's configuration where it
            depends on one.
        counted: where that number comes from.
        fusions: how many additions join two paths of different depth or resolution (pyramids, additive decoders, sums
            of skip outputs), which are no residual branches and may be points or not.
        because: an expert's reason for the verdict.
        verdict: what the expert expects of the signal at this initialisation: no error ("healthy"), or at least one.
    """

    name: str
    package: str
    field: str
    build: Callable[[], Built]
    blocks: int | Callable[[Any], int]
    counted: str
    because: str
    verdict: Literal["healthy", "sick"] = "healthy"
    fusions: int = 0

    def stated(self, model: nn.Module) -> int:
        """The number of residual additions of a built model."""
        return self.blocks if isinstance(self.blocks, int) else int(self.blocks(model))


def count(model: nn.Module, *classes: str) -> int:
    """The modules of a model whose class has one of these names."""
    return sum(type(module).__name__ in classes for module in model.modules())


def load(module: str, name: str) -> Any:
    """Something of a library, which is imported when a row is built and not before."""
    return getattr(import_module(module), name)
