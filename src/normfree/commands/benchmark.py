"""``normfree benchmark``: models side by side, and beside their limit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.markup import escape
from torch import nn

from normfree.benchmark import Contender, Part, Precision, Step, Task, markdown, measure
from normfree.commands.shared import (
    Device,
    Folder,
    ImageSize,
    Models,
    Original,
    Seed,
    Terminal,
    check_folder,
    check_options,
)
from normfree.commands.signals import device_named
from normfree.common.checks import EXTRAS, invalid, require
from normfree.common.torch_compat import import_tracer
from normfree.nn import has_foldable
from normfree.signal import input_shape, write_atomically
from normfree.sources import Built, build, check_sources, takes_original

TITLES = {"training": "One training step", "inference": "Inference"}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time models side by side, in turns in one process: a training step with its peak memory, and inference.

    A model of ours is joined by its limit, the same graph with plain convolutions and activations only, and in
    inference by its folded self. Writes benchmark.json (every raw time) and benchmark.md. The committed comparisons
    with peers are `make bench` and, on a GPU, `make gpu`.
    """

    models: Models
    original: Original = None
    task: Task | Literal["both"] = "both"
    """What to time."""
    batch_size: int = 16
    """Images in a batch."""
    image_size: ImageSize = None
    precision: Precision = "float32"
    """bfloat16: autocast in training; weights and images in inference."""
    compile: bool = False
    """Also time each model compiled by torch.compile."""
    onnx: bool = False
    """Also time inference by ONNX Runtime, of the exported folded model (CPU, float32)."""
    rounds: int = 11
    """Most rounds of a comparison; each runs every model once."""
    seconds: float = 120.0
    """After which no further round of a comparison starts."""
    device: Device = None
    seed: Seed = 0
    out: Folder = Path("out/benchmark")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.seconds > 0:
            raise invalid("seconds", self.seconds, "must be more than 0", "give 60, for example")
        if self.onnx and (self.precision != "float32" or self.task == "training"):
            raise invalid("onnx", True, "ONNX Runtime runs inference in float32 on a CPU", "leave --onnx out")
        check_folder(self.out)

    def run(self, console: Terminal) -> None:
        """Measure every comparison first, then print and write."""
        device = device_named(self.device)
        if self.onnx and device.type != "cpu":
            raise invalid("onnx", True, "ONNX Runtime is timed on the CPU", "give --device cpu, or leave --onnx out")
        import_tracer()
        results = []
        with console.status("starting") as status:
            for part in self.parts():
                results.append(
                    measure(part, device=device, seed=self.seed, say=lambda text: status.update(escape(text)))
                )
        page = markdown(results, "Benchmark")
        self.out.mkdir(parents=True, exist_ok=True)
        written = [
            write_atomically(self.out / "benchmark.json", json.dumps({"results": results}, indent=1) + "\n"),
            write_atomically(self.out / "benchmark.md", page),
        ]
        console.say(page)
        console.say_written(written)

    def parts(self) -> list[Part]:
        """Return the comparisons asked for, on images of the shape that the first model takes."""
        for package in EXTRAS["export"] if self.onnx else ():
            require(package, "--onnx")
        check_sources(self.models, self.original)
        built: dict[str, Built] = {}
        for source in dict.fromkeys(self.models):
            with torch.random.fork_rng(devices=[]):
                built[source] = build(source, self.original if takes_original(source) else None)
        ours = {name for name, one in built.items() if has_foldable(one.model)}
        channels, size = _image_shape(next(iter(built.values())))
        shared: dict[str, Any] = {
            "batch_size": self.batch_size,
            "channels": channels,
            "image_size": self.image_size or size,
            "precision": self.precision,
            "rounds": self.rounds,
            "budget": self.seconds,
        }
        tasks: tuple[Task, ...] = ("training", "inference") if self.task == "both" else (self.task,)
        return [
            Part(name=task, title=TITLES[task], task=task, contenders=self._contenders(task, ours), **shared)
            for task in tasks
        ]

    def _contenders(self, task: Task, ours: set[str]) -> list[Contender]:
        """Each model as it is, then what else it can be."""
        found = []
        for source in dict.fromkeys(self.models):
            steps: list[tuple[Step, ...]] = [()]
            plain: tuple[Step, ...] = ()
            if source in ours:
                plain = ("folded",) if task == "inference" else ()
                steps.append(("limit",) if task == "training" else ("folded",))
            if self.compile:
                steps.append((*plain, "compiled"))
            if self.onnx and task == "inference":
                steps.append((*plain, "onnx"))
            found += [Contender(source, each) for each in steps]
        return found


def _image_shape(built: Built) -> tuple[int, int]:
    """Channels and height of the images that a model takes, 3 and 224 where it does not say."""
    try:
        channels, *_, size = built.shape or input_shape(built.model)
    except ValueError:
        first = next((part for part in built.model.modules() if isinstance(part, nn.Conv2d)), None)
        return (3 if first is None else first.in_channels), 224
    return channels, size
