"""``normfree demo``: three ResNet-50s on photographs, side by side, and what becomes of them in training."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from normfree.commands.outputs import check_folder, write_signals
from normfree.commands.spp import Spp
from normfree.commands.tables import print_signal

MODELS = {
    "ResNet-50, BatchNorm": "resnetv2_50",
    "ResNet-50, normalizers deleted": "resnetv2_50:norm=None",
    "NF-ResNet-50": "nf_resnet50",
}

SMALL = "stem=cifar,widths=(32,64,64,64),drop_rate=0,stochdepth_rate=0"
"""What makes a network of 50 layers small enough for 8x8 digits: narrow, and a stem that keeps the resolution."""

TRAINED = {
    "ResNet-50, BatchNorm": f"resnetv2_50:{SMALL}",
    "ResNet-50, normalizers deleted": f"resnetv2_50:norm=None,{SMALL}",
    "NF-ResNet-50": f"nf_resnet50:alpha=0.5,skipinit_gain=1,{SMALL}",
}
EPOCHS = 8


@dataclass(frozen=True)
class Accuracy:
    """What came of training one network.

    Attributes:
        model: its name.
        top1: share of the test digits it gets right.
        skipped: steps left out because the loss or its gradient was not finite.
        steps: all of them.
        seconds: of training.
    """

    model: str
    top1: float
    skipped: int
    steps: int
    seconds: float

    @property
    def cells(self) -> tuple[str, str, str]:
        """Accuracy, what happened, and the time, in words."""
        told = f"{self.skipped} of {self.steps} steps not finite" if self.skipped else "trains"
        return f"{100 * self.top1:.1f} %", told, f"{self.seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Listen to a ResNet-50 with BatchNorm, without, and normalizer-free, on photographs; then train all three."""

    out: Path = Path("out/demo")
    """Folder to write to."""
    seed: int = 0
    """Of initialisation, crops and training."""

    def __post_init__(self) -> None:
        check_folder(self.out)

    def run(self, console: Console) -> None:
        """Measure, train, print, write."""
        console.print("Three ResNet-50s at initialisation, on random crops of two photographs.", highlight=False)
        command = Spp(
            models=tuple(MODELS.values()),
            input="photos",
            batch_size=8,
            gradient=True,
            seed=self.seed,
            out=self.out,
        )
        signals = [s.renamed(name) for s, name in zip(command.measure(console), MODELS, strict=True)]
        for signal in signals:
            print_signal(console, signal)
        found = []
        for name, model in TRAINED.items():
            with console.status(f"training {name} on digits"):
                found.append(trained(name, model, self.seed))
        console.print(_table(found))
        paths = write_signals(signals, self.out, title="Three ResNet-50s", appendix=_section(found))
        console.print("Written, the last to be opened in a browser:", highlight=False)
        for path in paths:
            console.print(f"  {path}", highlight=False, soft_wrap=True)


def trained(name: str, model: str, seed: int) -> Accuracy:
    """Train a network by the ``digits`` recipe, with fewer epochs, and forget all but its accuracy."""
    from normfree.train.recipes import RECIPES
    from normfree.train.run import train

    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            RECIPES["digits"](),
            model=model,
            seed=seed,
            epochs=EPOCHS,
            evaluate_every=EPOCHS,
            signal_every=0,
            on_nonfinite="skip",
            out=Path(folder) / "run",
        )
        summary = train(config)
    metrics = summary.metrics
    assert summary.accuracy is not None
    return Accuracy(name, summary.accuracy, metrics["skipped_steps"], metrics["step"], metrics["seconds"])


CAPTION = (
    f"Networks of the same 50 layers, narrow, trained on scikit-learn's digits: the digits recipe, {EPOCHS} epochs"
)


def _table(found: list[Accuracy]) -> Table:
    table = Table(title=CAPTION, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("network")
    for head in ("test accuracy", "", "time"):
        table.add_column(head, justify="right")
    for each in found:
        table.add_row(each.model, *each.cells)
    return table


def _section(found: list[Accuracy]) -> str:
    """The report's section on training."""
    heads = "".join(f"<th class=text>{head}</th>" for head in ("network", "test accuracy", "", "time"))
    rows = "".join(
        "<tr>" + "".join(f"<td class=text>{escape(cell)}</td>" for cell in (each.model, *each.cells)) + "</tr>"
        for each in found
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f'<section id="training"><h2>Training</h2><p>{escape(CAPTION)}.</p><div class="scroll">{table}</div></section>'
    )
