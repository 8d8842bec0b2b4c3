"""``normfree demo``: three ResNet-50s on photographs, side by side; then three small ones that learn digits."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from normfree.commands.shared import Folder, Seed, Terminal, check_folder, check_options
from normfree.commands.signals import print_signal, write_signals
from normfree.commands.spp import Spp
from normfree.common.checks import check_integer, require
from normfree.data import open_evaluation
from normfree.models import create_model
from normfree.models.registry import parse_overrides
from normfree.signal import SignalPropagation, spp
from normfree.train import RECIPES, NonFiniteLossError, TrainConfig, train

MODELS = {
    "ResNet-50, BatchNorm": "resnetv2_50",
    "ResNet-50, normalizers deleted": "resnetv2_50:norm=None",
    "NF-ResNet-50": "nf_resnet50",
}

BELOW_THE_PLAN = (
    "NF-ResNet-50 lies below its plan on photographs, and on it on noise (normfree spp nf_resnet50): neighbouring "
    "pixels are alike, and standardized weights, whose mean is zero, pass on only what differs among them."
)

_LAYOUT = "depths=(8,8,8,8),widths=(32,64,128,128),stem=cifar,drop_rate=0,stochdepth_rate=0"
NETWORKS = {
    "BatchNorm": f"resnetv2_50:{_LAYOUT}",
    "normalizers deleted": f"resnetv2_50:{_LAYOUT},norm=None",
    "normalizer-free": f"nf_resnet50:{_LAYOUT},alpha=0.5,skipinit_gain=1",
}
"""98 layers, an eighth of a ResNet-50's widths: deep enough that the unnormalised signal grows a thousandfold."""
EPOCHS = 12
RATE = 0.06
"""Of a batch of 64, twice the recipe's for 14 layers; nothing is clipped, so that what the signal does is seen."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Plot ResNet-50 with BatchNorm, without, and normalizer-free, on photographs; train small ones on digits.

    Writes spp.json, spp.png and report.html of the three on real photographs; and into digits/ the same of three
    narrow ones of 98 layers, with the accuracy each reached by the same recipe in the legend.
    """

    out: Folder = Path("out/demo")
    seed: Seed = 0
    epochs: int = EPOCHS
    """Epochs of training on the digits; 0: none."""

    def __post_init__(self) -> None:
        check_options(self)
        check_integer("epochs", self.epochs, 0)
        check_folder(self.out)

    def run(self, console: Terminal) -> None:
        """Measure, train, print, write."""
        for package in ("matplotlib", "torchvision", "sklearn", "lightning", "torchmetrics", "tensorboard"):
            require(package, "the demo")
        console.say("Three ResNet-50s at initialisation, on random crops of two photographs.")
        command = Spp(models=tuple(MODELS.values()), input="photos", seed=self.seed, out=self.out)
        signals = [s.renamed(name) for s, name in zip(command.measure(console), MODELS, strict=True)]
        paths = write_signals(signals, self.out)
        for signal in signals:
            print_signal(console, signal)
        console.say(BELOW_THE_PLAN)
        if self.epochs:
            paths += self._digits(console)
        console.say("Written, the pages to be opened in a browser:")
        for path in paths:
            console.say(f"  {path}")

    def _digits(self, console: Terminal) -> list[Path]:
        console.say(f"Three of 98 layers, narrower, learn scikit-learn's digits: {self.epochs} epochs of one recipe.")
        table = Table("network", "variance after the last block", "test accuracy", "seconds")
        signals = []
        for name in NETWORKS:
            with console.status(f"training: {name}"):
                learned = learn(name, self.seed, self.epochs)
            variance = learned.signal.curve("avg_channel_var")[-1]
            seconds = "" if learned.seconds is None else f"{learned.seconds:.1f}"
            table.add_row(name, f"{variance:.3g}", learned.outcome, seconds)
            signals.append(learned.signal.renamed(f"{name} ({learned.outcome})"))
        paths = write_signals(signals, self.out / "digits")
        console.print(table)
        return paths


@dataclass(frozen=True)
class Learned:
    """What came of one network.

    Attributes:
        signal: its plot at initialisation, on the digits.
        accuracy: on the test images after the last epoch; None if it diverged.
        diverged: steps it took before a loss or a gradient was not finite; None if all were.
        seconds: of training.
    """

    signal: SignalPropagation
    accuracy: float | None
    diverged: int | None
    seconds: float | None

    @property
    def outcome(self) -> str:
        """Accuracy, or why there is none."""
        if self.accuracy is not None:
            return f"{100 * self.accuracy:.1f} % correct"
        return "stopped" if self.diverged is None else f"diverged at step {self.diverged}"


def learn(name: str, seed: int, epochs: int = EPOCHS) -> Learned:
    """Measure a fresh network's signal on the digits, then train it by the ``digits`` recipe at a larger rate.

    Args:
        name: of :data:`NETWORKS`.
        seed: of initialisation, order and shifts.
        epochs: to train.
    """
    recipe = RECIPES["digits"]()
    changes = {"learning_rate": RATE, "warmup_epochs": 1, "clip_norm": None, "classifier_lr_scale": 0.3}
    optimizer = dataclasses.replace(recipe.optimizer, **changes)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            recipe,
            model=NETWORKS[name],
            optimizer=optimizer,
            epochs=epochs,
            seed=seed,
            signal_every=0,
            out=Path(folder),
        )
        signal = _signal(config).renamed(name)
        try:
            summary = train(config)
        except NonFiniteLossError as error:
            return Learned(signal, None, error.step, None)
        return Learned(signal, summary.accuracy, None, summary.metrics["seconds"])


def _signal(config: TrainConfig) -> SignalPropagation:
    """The plot of the network as training begins with it, on images that it is tested on."""
    data = open_evaluation(config.data)
    images, _ = next(iter(data))
    name, _, overrides = config.model.partition(":")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        model = create_model(
            name, num_classes=data.num_classes, in_channels=images.shape[1], **parse_overrides(overrides)
        )
        return spp(model, data.standardization()(images[:64]), gradient=True, input_description={"kind": "digits"})
