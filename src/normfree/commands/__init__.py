"""The commands of ``normfree``: what a person types, sees and gets."""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = {
    "spp": "Draw the signal propagation plot of any models, one over the other.",
    "models": "List the models that can be built by name, with their parameters and stages.",
    "train": "Train a network by a recipe, or go on with a run that was interrupted: the same command again.",
    "evaluate": "Measure loss, top-1 and top-5 of a trained network, on the data of its run or on other data.",
    "predict": "Name the most probable classes of images.",
    "convert": "Take the normalizers out of a model, and write it as a checkpoint with the record of every change.",
    "doctor": "Examine a model: its signal, what is wrong with it, and the same model converted.",
    "explain": "Print what the documentation says of a kind of finding, or list what it has sections of.",
    "export": "Fold a model into plain convolutions and write it as an ONNX file or a torch.export program.",
    "benchmark": (
        "Time models side by side, in turns in one process: a training step with its peak memory, and inference."
    ),
    "paper": "Make a figure or a table of the paper: what was expected and what was measured, side by side.",
    "demo": (
        "Plot ResNet-50 with BatchNorm, without, and normalizer-free, on photographs; train small ones on digits."
    ),
}
"""Every command with the first line of its help, kept here so that a list of them imports none."""

_FILES = {"predict": "evaluate", "doctor": "convert"}
"""Commands that are in another command's file; all others are in the file of their name."""


def command_class(name: str) -> type[Any]:
    """The class of a command; only now is imported what it needs."""
    return getattr(import_module(f"normfree.commands.{_FILES.get(name, name)}"), name.capitalize())
