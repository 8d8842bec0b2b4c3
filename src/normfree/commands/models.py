"""``normfree models``: what can be built by name.

The models' numbers stand in ``models.csv`` beside this file, since to build them all takes longer than to read on.
``python -m normfree.commands.models`` writes it anew; a test compares it with the models as they are.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from normfree.commands.shared import Terminal
from normfree.common.checks import invalid

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = ("model", "parameters", "channels", "family")


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models that can be built by name, with their parameters and stages."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """A shell pattern, such as 'nf_*'."""

    def run(self, console: Terminal) -> None:
        """Print a table."""
        with TABLE.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if fnmatchcase(row["model"], self.pattern)]
        if not rows:
            raise invalid("pattern", self.pattern, "matches no model", "`normfree models` lists all")
        table = Table("model", pad_edge=False)
        for name in ("parameters", "channels of the stages", "family"):
            table.add_column(name, justify="left" if name == "family" else "right")
        for row in rows:
            table.add_row(row["model"], f"{int(row['parameters']):,}", row["channels"], row["family"])
        console.print(table)


def built_rows() -> Iterator[tuple[str, int, str, str]]:
    """The table's rows, of the models themselves, built without memory."""
    import torch

    from normfree.models import create_model, list_models

    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        yield name, parameters, " ".join(str(info.channels) for info in model.feature_info), type(model).__name__


def write_table(path: Path) -> None:
    """Write the table of all models as they are."""
    from normfree.signal import write_atomically

    lines = [COLUMNS, *built_rows()]
    write_atomically(path, "".join(",".join(map(str, line)) + "\n" for line in lines))


if __name__ == "__main__":
    write_table(TABLE)
