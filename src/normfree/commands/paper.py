"""``normfree paper``: one command for each figure and table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markdown import Markdown
from rich.markup import escape

from normfree.commands.shared import Folder, Terminal, check_folder
from normfree.common.checks import invalid, require

FIGURES = ("figure1", "figure2")
TABLES = ("figure3", "table1", "table2", "normalizers", "ablation")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Make a figure or a table of the paper: what was expected and what was measured, side by side."""

    what: Annotated[
        Literal["figure1", "figure2", "figure3", "table1", "table2", "normalizers", "ablation", "gamma", "properties"],
        tyro.conf.Positional,
    ]
    """figure1: BN-ReLU-Conv, ReLU-BN-Conv and unnormalised at He initialisation. figure2: α/β scaling with
    plain and with standardized weights, for ReLU, SiLU and identity. figure3: NF-RegNet beside EfficientNet over
    budgets of computation, cost and, but for quick, accuracy. table1: depth × method × regularisation.
    table2: batch sizes. normalizers: one network with each. ablation: one part changed at a time. gamma: exact
    constants beside the official ones. properties: independence of examples and the like, BatchNorm beside."""
    scale: Literal["quick", "small", "full"] | None = None
    """Figures: full (600 layers, the default) or quick (72). Tables: quick (digits, minutes, the default), small
    (CIFAR-10, two cores) or full (CIFAR-10, a GPU)."""
    image_size: int | None = None
    """Figures: of the gaussian input, 128 by default."""
    batch_size: int | None = None
    """Figures: of the gaussian input, 8 by default."""
    seeds: int | None = None
    """Of each network; 3 for figures, the scale's for tables by default."""
    data: str | None = None
    """Tables of trainings: CIFAR-10 as a folder of parquet files; hub:uoft-cs/cifar10 by default."""
    limit_train_steps: int | None = None
    """Tables of trainings: a rehearsal of so many steps each."""
    out: Folder = Path("out/paper")
    """Folder to write to; finished trainings are kept there and not repeated."""

    def __post_init__(self) -> None:
        check_folder(self.out)
        allowed = {"scale", "image_size", "batch_size", "seeds"} if self.what in FIGURES else set[str]()
        if self.what in TABLES:
            allowed = {"scale", "seeds", "data", "limit_train_steps"}
        for name in ("scale", "image_size", "batch_size", "seeds", "data", "limit_train_steps"):
            if getattr(self, name) is not None and name not in allowed:
                raise invalid(name, getattr(self, name), f"{self.what} takes none", "leave it out")

    def run(self, console: Terminal) -> None:
        """Make it."""
        if self.what in TABLES:
            require("torchmetrics", "training")
            console.announce(
                f"finished trainings are kept in {self.out}; after an interruption the same command goes on"
            )
        with console.status(self.what) as status:

            def show(text: str) -> None:
                status.update(escape(f"{self.what}: {text}"))
                if not console.is_terminal:
                    console.announce(f"{self.what}: {text}")

            paths = self._make(show)
        console.print(Markdown(paths[-1].read_text()))
        console.say_written(paths)

    def _make(self, on_progress: Callable[[str], Any]) -> list[Path]:
        if self.what == "gamma":
            from normfree.paper.properties import make_gamma

            return make_gamma(self.out)
        if self.what == "properties":
            from normfree.paper.properties import make_properties

            return make_properties(self.out, on_progress)
        if self.what in FIGURES:
            from normfree.paper import figures

            drawn = figures.FigureSetting(**self._given(("scale", "image_size", "batch_size", "seeds")))
            return figures.make(figures.FIGURES[self.what], drawn, self.out, on_progress)
        from normfree.benchmark import hardware
        from normfree.paper import tables
        from normfree.train.records import commit

        setting = tables.TableSetting(**self._given(("scale", "seeds", "data")), limit=self.limit_train_steps)
        provenance = {**hardware(), "commit": commit()}
        if self.what == "figure3":
            from normfree.paper.budgets import make_figure3

            return make_figure3(setting, self.out, provenance, on_progress)
        return tables.make(tables.TABLES[self.what], setting, self.out, provenance, on_progress)

    def _given(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
