"""The demo's second half: three networks of 50 layers learn scikit-learn's digits, all by one recipe."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from normfree.data import open_evaluation
from normfree.models import create_model
from normfree.models.registry import parse_overrides
from normfree.signal import SignalPropagation, spp
from normfree.train import RECIPES, NonFiniteLossError, TrainConfig, train

_LAYOUT = "depths=(3,4,6,3),widths=(32,64,128,128),stem=cifar,drop_rate=0,stochdepth_rate=0"
NETWORKS = {
    "BatchNorm": f"resnetv2_50:{_LAYOUT}",
    "normalizers deleted": f"resnetv2_50:{_LAYOUT},norm=None",
    "normalizer-free": f"nf_resnet50:{_LAYOUT},alpha=0.5,skipinit_gain=1",
}
"""The depths of a ResNet-50, an eighth of its widths."""
EPOCHS = 12
RATE = 0.3
"""Of a batch of 64, ten times the recipe's for 14 layers: clipping and a slower classifier allow it."""


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


def config_of(source: str, seed: int, folder: Path) -> TrainConfig:
    """The ``digits`` recipe, for fewer epochs at a larger rate."""
    recipe = RECIPES["digits"]()
    changes = {"learning_rate": RATE, "warmup_epochs": 1, "clip_norm": 1.0, "classifier_lr_scale": 0.3}
    optimizer = dataclasses.replace(recipe.optimizer, **changes)
    return dataclasses.replace(
        recipe, model=source, optimizer=optimizer, epochs=EPOCHS, seed=seed, signal_every=0, out=folder
    )


def learn(name: str, seed: int, epochs: int = EPOCHS) -> Learned:
    """Listen to a fresh network, then train it.

    Args:
        name: of :data:`NETWORKS`.
        seed: of initialisation, order and shifts.
        epochs: to train.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config_of(NETWORKS[name], seed, Path(folder)), epochs=epochs)
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
