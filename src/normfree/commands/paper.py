"""``normfree paper``: one command for each figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markdown import Markdown

from normfree.commands.shared import Folder, Terminal, check_folder
from normfree.paper.figure import Setting, make
from normfree.paper.figures import FIGURES


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Make a figure of the paper: PNG, JSON, and a note of what was expected and what was measured."""

    what: Annotated[Literal["figure1", "figure2"], tyro.conf.Positional]
    """figure1: BN-ReLU-Conv, ReLU-BN-Conv and unnormalised at He initialisation. figure2: α/β scaling with
    plain and with standardized weights, for ReLU, SiLU and identity."""
    setting: tyro.conf.OmitArgPrefixes[Setting] = field(default_factory=Setting)
    """How the figure is made."""
    out: Folder = Path("out/paper")

    def __post_init__(self) -> None:
        check_folder(self.out)

    def run(self, console: Terminal) -> None:
        """Make the figure."""
        blocks = sum(self.setting.depths)
        with console.status(f"{self.what}: {blocks} blocks") as status:
            paths = make(FIGURES[self.what], self.setting, self.out, lambda text: status.update(f"{self.what}: {text}"))
        console.print(Markdown(paths[-1].read_text()))
        console.say_written(paths)
