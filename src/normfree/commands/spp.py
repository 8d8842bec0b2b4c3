"""``normfree spp``: listen to models, and write the plot, the numbers and the report."""

from __future__ import annotations

import math
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import nn

import normfree
from normfree.commands.again import command_line
from normfree.commands.devices import device_named
from normfree.commands.outputs import check_folder, write_signals
from normfree.commands.tables import print_signal
from normfree.common.checks import check_memory
from normfree.data import GaussianNoise, Probe, probe_named
from normfree.signal import SignalPropagation, input_shape, spp
from normfree.sources import build, check_original, takes_original


@dataclass(frozen=True, kw_only=True)
class Spp:
    """Draw the signal propagation plot of any models, one over the other.

    Writes spp.json (the numbers), spp.png (in the paper's style) and report.html (interactive, opens
    offline). Models need no annotation: blocks are found in the recorded dataflow.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A name of `normfree models` (overrides after a colon: nf_resnet50:width=1), torchvision:NAME,
    timm:NAME, FILE.py:FACTORY (which may return (model, batch)), or a checkpoint of normfree.save."""
    original: str | None = None
    """Of converted checkpoints, what builds the model they were made of: FILE.py:FACTORY, which is run, or another
    MODEL. Needed where that is no name of ours, torchvision's or timm's."""
    input: str = "gaussian"
    """gaussian, photos (random crops of scikit-learn's two photographs), or a folder of images."""
    image_size: int | None = None
    """Height and width; what the model suggests by default, 224 if it does not."""
    batch_size: int = 8
    """Examples in a batch."""
    batches: int = 1
    """Batches, merged in one pass as if they were one."""
    seed: int = 0
    """Of initialisation and input."""
    mode: Literal["batch-statistics", "train", "eval"] = "batch-statistics"
    """batch-statistics: normalizers use the batch, as in the first training step, and dropout is silent."""
    points: Literal["auto", "residual", "layers"] = "auto"
    """auto: residual additions, or weighted layers where there are none."""
    gradient: bool = True
    """Measure and judge the gradient at each block too, which takes a forward and a backward pass more."""
    wake: bool = True
    """Measure branches silenced by a zero gain as if the gain were one."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; a GPU if there is one by default."""
    out: Path = Path("out/spp")
    """Folder to write to."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: none given; for example: normfree spp nf_resnet50 torchvision:resnet50")
        for name in ("batch_size", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too few; give at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is no integer from 0 to 2**63 - 1; give one such as 0")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: {self.image_size} is no size; give at least 1, usually 32 to 256")
        check_folder(self.out)

    def run(self, console: Console) -> None:
        """Measure all models first, then write: a failure leaves no file."""
        signals = self.measure(console)
        paths = write_signals(signals, self.out)
        for signal in signals:
            print_signal(console, signal)
        console.print("wrote " + " ".join(str(path) for path in paths), highlight=False, markup=False, soft_wrap=True)

    def measure(self, console: Console) -> list[SignalPropagation]:
        """One measurement a model, in the order given."""
        check_original(self.original, self.models)
        probe = probe_named(self.input)
        device = device_named(self.device)
        signals = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("measuring", total=len(self.models))
            for source in self.models:
                progress.update(task, description=f"measuring {escape(source)}")
                signals.append(self._measure_one(source, probe, device))
                progress.advance(task)
        return _told_apart(signals)

    def _measure_one(self, source: str, probe: Probe, device: torch.device) -> SignalPropagation:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model, batch = build(source, self.original if takes_original(source) else None)
        model = model.to(device)
        described: dict[str, Any] = {"kind": "the factory's own"}
        if batch is None:
            shape = batch_shape(model, probe, image_size=self.image_size, batch_size=self.batch_size)
            dtype = precision_of(model)
            drawn = probe.batches(shape, count=self.batches, seed=self.seed)
            batch, described = (one.to(device, dtype) for one in drawn), probe.describe()
        command = command_line("spp", self, self.models, without=("models", "out"))
        try:
            return spp(
                model,
                batch,
                name=source,
                mode=self.mode,
                points=self.points,
                gradient=self.gradient,
                wake=self.wake,
                seed=self.seed,
                input_description=described,
                configuration={"command": command, **_versions(device)},
            )
        except ValueError as error:
            remedy = "let FACTORY of FILE.py return (model, batch) if the model takes something else"
            raise ValueError(str(error).replace("give a batch that the model's forward takes", remedy)) from error


def batch_shape(model: nn.Module, probe: Probe, *, image_size: int | None, batch_size: int) -> tuple[int, ...]:
    """The shape of a batch: as the model suggests, unless an image size is asked for."""
    try:
        shape = input_shape(model)
    except ValueError:
        if isinstance(probe, GaussianNoise) and image_size is None:
            raise ValueError(
                "model: its input shape cannot be told; let FACTORY of FILE.py return (model, batch)"
            ) from None
        shape = (3, 224, 224)
    if image_size is not None:
        sized = (image_size, image_size)
        shape = (*shape[:-2], *sized) if len(shape) >= 3 else (_image_channels(model), *sized)
    for argument, value, size in (("image_size", image_size, math.prod(shape)), ("batch_size", batch_size, batch_size)):
        check_memory(argument, value, 4 * size)
    check_memory("batch_size", batch_size, 4 * batch_size * math.prod(shape))
    return (batch_size, *shape)


def _told_apart(signals: list[SignalPropagation]) -> list[SignalPropagation]:
    """A model given twice gets a number, for a legend needs two names."""
    seen = Counter[str]()
    for signal in signals:
        seen[signal.model] += 1
    again = Counter[str]()
    named = []
    for signal in signals:
        again[signal.model] += 1
        name = signal.model if seen[signal.model] == 1 else f"{signal.model} ({again[signal.model]})"
        named.append(signal.renamed(name))
    return named


def _image_channels(model: nn.Module) -> int:
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if convolution is None else convolution.in_channels


def precision_of(model: nn.Module) -> torch.dtype:
    """The precision of a model's parameters."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return torch.float32 if parameter is None else parameter.dtype


def _versions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    python = platform.python_version()
    return {"normfree": normfree.__version__, "python": python, "device": f"{device} ({name})"}
