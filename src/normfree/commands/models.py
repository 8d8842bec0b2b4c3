"""``normfree models``: what can be built by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from normfree.models import create_model, list_models


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that can be built by name, with their parameters and stages."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """A shell pattern, such as 'nf_*'."""

    def run(self, console: Console) -> None:
        """Print a table."""
        names = list_models(self.pattern)
        if not names:
            raise ValueError(f"pattern: {self.pattern!r} matches no model; `normfree models` lists all")
        table = Table("model", pad_edge=False)
        for name in ("parameters", "channels of the stages", "family"):
            table.add_column(name, justify="left" if name == "family" else "right")
        for name in names:
            with torch.device("meta"):
                model = create_model(name)
            count = sum(parameter.numel() for parameter in model.parameters())
            channels = " ".join(str(info.channels) for info in model.feature_info)
            table.add_row(name, f"{count:,}", channels, type(model).__name__)
        console.print(table)
