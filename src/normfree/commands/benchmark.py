"""``normfree benchmark``: models side by side, and beside their limit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from torch import nn

from normfree.benchmark import Contender, Part, markdown, measure
from normfree.commands.devices import device_named
from normfree.commands.outputs import check_folder
from normfree.nn import has_foldable
from normfree.signal import input_shape, write_atomically
from normfree.sources import build, check_original, takes_original

TITLES = {"training": "One training step", "inference": "Inference"}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Time models side by side, in turns in one process: a training step with its peak memory, and inference.

    A model of ours is joined by its limit, the same graph with plain convolutions and activations only, and in
    inference by its folded self. Writes benchmark.json (every raw time) and benchmark.md. The committed comparisons
    with peers are `make bench` and, on a GPU, `make gpu`.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A name of `normfree models` (overrides after a colon: nf_resnet50:width=1), torchvision:NAME,
    timm:NAME, FILE.py:FACTORY (a classifier of images), or a checkpoint of normfree.save."""
    original: str | None = None
    """Of converted checkpoints, what builds the model they were made of: FILE.py:FACTORY, which is run, or another
    MODEL. Needed where that is no name of ours, torchvision's or timm's."""
    task: Literal["both", "training", "inference"] = "both"
    """What to time."""
    batch_size: int = 16
    """Images in a batch."""
    image_size: int | None = None
    """Height and width; what the first model suggests by default, 224 if it does not."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast in training; weights and images in inference."""
    compile: bool = False
    """Also time each model compiled by torch.compile."""
    onnx: bool = False
    """Also time inference by ONNX Runtime, of the exported folded model (CPU, float32)."""
    rounds: int = 11
    """Most rounds of a comparison; each runs every model once."""
    seconds: float = 120.0
    """After which no further round of a comparison starts."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; a GPU if there is one by default."""
    seed: int = 0
    """Of models and images."""
    out: Path = Path("out/benchmark")
    """Folder to write to."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: none given; for example: normfree benchmark nf_resnet50 torchvision:resnet50")
        for name in ("batch_size", "image_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is too few; give at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds: {self.seconds} is no time; give more than 0, such as 60")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is no integer from 0 to 2**63 - 1; give one such as 0")
        if self.onnx and (self.precision != "float32" or self.task == "training"):
            raise ValueError("onnx: ONNX Runtime runs inference in float32 on a CPU; leave --onnx out")
        check_folder(self.out)

    def run(self, console: Console) -> None:
        """Measure every comparison first, then print and write."""
        device = device_named(self.device)
        if self.onnx and device.type != "cpu":
            raise ValueError("onnx: ONNX Runtime is timed on the CPU; give --device cpu, or leave --onnx out")
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
        console.print(page, markup=False, highlight=False, soft_wrap=True)
        console.print("wrote " + " ".join(map(str, written)), highlight=False, markup=False, soft_wrap=True)

    def parts(self) -> list[Part]:
        """Return the comparisons asked for."""
        check_original(self.original, self.models)
        models = {source: _built(source, self.original) for source in dict.fromkeys(self.models)}
        size = self.image_size or _size(next(iter(models.values())))
        ours = {name for name, model in models.items() if has_foldable(model)}
        shared: dict[str, Any] = {
            "batch_size": self.batch_size,
            "image_size": size,
            "precision": self.precision,
            "rounds": self.rounds,
            "budget": self.seconds,
        }
        tasks = ("training", "inference") if self.task == "both" else (self.task,)
        return [
            Part(name=task, title=TITLES[task], task=task, contenders=self._contenders(task, ours), **shared)
            for task in tasks
        ]

    def _contenders(self, task: str, ours: set[str]) -> list[Contender]:
        """Each model as it is, then what else it can be."""
        found = []
        for source in dict.fromkeys(self.models):
            steps: list[tuple[str, ...]] = [()]
            plain: tuple[str, ...] = ()
            if source in ours:
                plain = ("folded",) if task == "inference" else ()
                steps += [("limit",)] if task == "training" else [("folded",)]
            if self.compile:
                steps.append((*plain, "compiled"))
            if self.onnx and task == "inference":
                steps.append((*plain, "onnx"))
            found += [Contender(source, each) for each in steps]
        return found


def _built(source: str, original: str | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return build(source, original if takes_original(source) else None).model


def _size(model: nn.Module) -> int:
    try:
        return input_shape(model)[-1]
    except ValueError:
        return 224
