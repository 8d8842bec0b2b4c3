"""``normfree paper``: one command for each figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown

from normfree.commands.outputs import check_folder
from normfree.paper.figure import Setting, make


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Make a figure of the paper: PNG, JSON, and a note of what was expected and what was measured."""

    what: Annotated[Literal["figure1", "figure2"], tyro.conf.Positional]
    """figure1: BN-ReLU-Conv, ReLU-BN-Conv and unnormalised at He initialisation. figure2: α/β scaling with
    plain and with standardized weights, for ReLU, SiLU and identity."""
    setting: tyro.conf.OmitArgPrefixes[Setting] = field(default_factory=Setting)
    """How the figure is made."""
    out: Path = Path("out/paper")
    """Folder to write to."""

    def __post_init__(self) -> None:
        check_folder(self.out)

    def run(self, console: Console) -> None:
        """Make the figure."""
        from normfree.paper import figure1, figure2

        figure = {"figure1": figure1, "figure2": figure2}[self.what].FIGURE
        blocks = sum(self.setting.depths)
        with console.status(f"{self.what}: {blocks} blocks") as status:
            paths = make(figure, self.setting, self.out, lambda text: status.update(f"{self.what}: {text}"))
        console.print(Markdown(paths[-1].read_text()))
        console.print("wrote " + " ".join(map(str, paths)), highlight=False, markup=False, soft_wrap=True)
