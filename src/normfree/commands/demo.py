"""``normfree demo``: three ResNet-50s on photographs, side by side; then three small ones that learn digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from normfree.commands import demo_training
from normfree.commands.outputs import check_folder, write_signals
from normfree.commands.spp import Spp
from normfree.commands.tables import print_signal

MODELS = {
    "ResNet-50, BatchNorm": "resnetv2_50",
    "ResNet-50, normalizers deleted": "resnetv2_50:norm=None",
    "NF-ResNet-50": "nf_resnet50",
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Plot ResNet-50 with BatchNorm, without, and normalizer-free, on photographs; train small ones on digits.

    Writes spp.json, spp.png and report.html of the three on real photographs; and into digits/ the same of three
    narrow ones of the same depth, with the accuracy each reached by the same recipe in the legend.
    """

    out: Path = Path("out/demo")
    """Folder to write to."""
    seed: int = 0
    """Of initialisation, crops and training."""
    epochs: int = demo_training.EPOCHS
    """Epochs of training on the digits; 0: none."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs: {self.epochs} is negative; give 0 for no training, or 12")
        check_folder(self.out)

    def run(self, console: Console) -> None:
        """Measure, train, print, write."""
        paths = self._photographs(console)
        if self.epochs:
            paths += self._digits(console)
        console.print("Written, the pages to be opened in a browser:", highlight=False)
        for path in paths:
            console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)

    def _photographs(self, console: Console) -> list[Path]:
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
        paths = write_signals(signals, self.out)
        for signal in signals:
            print_signal(console, signal)
        return paths

    def _digits(self, console: Console) -> list[Path]:
        told = f"Three of 50 layers, narrower, learn scikit-learn's digits: {self.epochs} epochs of one recipe."
        console.print(told, highlight=False)
        table = Table("network", "variance after the last block", "test accuracy", "seconds")
        signals = []
        for name in demo_training.NETWORKS:
            with console.status(f"training: {name}"):
                learned = demo_training.learn(name, self.seed, self.epochs)
            variance = learned.signal.curve("avg_channel_var")[-1]
            seconds = "" if learned.seconds is None else f"{learned.seconds:.1f}"
            table.add_row(name, f"{variance:.3g}", learned.outcome, seconds)
            signals.append(learned.signal.renamed(f"{name} ({learned.outcome})"))
        paths = write_signals(signals, self.out / "digits")
        console.print(table)
        return paths
