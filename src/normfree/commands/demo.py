"""``normfree demo``: three ResNet-50s on photographs, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

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
    """Listen to a ResNet-50 with BatchNorm, without, and normalizer-free, on real photographs."""

    out: Path = Path("out/demo")
    """Folder to write to."""
    seed: int = 0
    """Of initialisation and crops."""

    def __post_init__(self) -> None:
        check_folder(self.out)

    def run(self, console: Console) -> None:
        """Measure, print, write."""
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
        paths = write_signals(signals, self.out)
        console.print("Written, the last to be opened in a browser:", highlight=False)
        for path in paths:
            console.print(f"  {path}", highlight=False, soft_wrap=True)
