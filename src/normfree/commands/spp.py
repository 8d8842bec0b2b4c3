"""``normfree spp``: measure the signal of models, and write the plot, the numbers and the report."""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import Progress

import normfree
from normfree.commands.shared import (
    Device,
    Folder,
    ImageSize,
    Input,
    Mean,
    Models,
    Original,
    Seed,
    Std,
    Terminal,
    check_folder,
    check_options,
    command_line,
)
from normfree.commands.signals import (
    InputSource,
    device_named,
    no_picture,
    precision_of,
    print_signal,
    write_signals,
)
from normfree.signal import Mode, Points, SignalPropagation, spp
from normfree.sources import build, check_sources, place_on, takes_original


@dataclass(frozen=True, kw_only=True)
class Spp:
    """Draw the signal propagation plot of any models, one over the other.

    Writes spp.json (the numbers), spp.png (in the paper's style; where matplotlib is installed) and report.html
    (interactive, opens offline). Models need no annotation: blocks are found in the recorded dataflow.
    """

    models: Models
    original: Original = None
    input: Input = None
    mean: Mean = None
    std: Std = None
    image_size: ImageSize = None
    batch_size: int = 8
    """Examples in a batch."""
    batches: int = 1
    """Batches, merged in one pass as if they were one."""
    seed: Seed = 0
    mode: Mode = "batch-statistics"
    """batch-statistics: normalizers use the batch, as in the first training step, and dropout is silent."""
    points: Points = "auto"
    """auto: residual additions, or weighted layers where there are none."""
    gradient: bool = True
    """Measure and check the gradient at each block too, which takes a forward and a backward pass more."""
    wake: bool = True
    """Measure branches silenced by a zero gain as if the gain were one."""
    device: Device = None
    out: Folder = Path("out/spp")

    def __post_init__(self) -> None:
        check_options(self)
        InputSource.of(self)
        check_folder(self.out)

    def run(self, console: Terminal) -> None:
        """Measure all models first, then write: a failure leaves no file."""
        signals = self.measure(console)
        paths = write_signals(signals, self.out)
        for signal in signals:
            print_signal(console, signal)
        sick = [source for source, signal in zip(self.models, signals, strict=True) if signal.verdict != "healthy"]
        if sick:
            given = {"original": self.original, "input": self.input, "image-size": self.image_size}
            options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
            command = shlex.join(["normfree", "doctor", sick[0], *options])
            console.say(f"what conversion would change: {command}")
        console.say_written(paths)

    def measure(self, console: Terminal) -> list[SignalPropagation]:
        """Return one measurement a model, in the order given; a model given twice gets a number."""
        check_sources(self.models, self.original)
        inputs, device = InputSource.of(self).open(), device_named(self.device)
        if missing := no_picture():
            console.announce(missing)
        signals = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("measuring", total=len(self.models))
            for source in self.models:
                progress.update(task, description=f"measuring {escape(source)}")
                signals.append(self._measure_one(console, source, inputs, device))
                progress.advance(task)
        total, count = Counter(self.models), Counter[str]()
        for index, signal in enumerate(signals):
            count[signal.model] += 1
            if total[signal.model] > 1:
                signals[index] = signal.renamed(f"{signal.model} ({count[signal.model]})")
        return signals

    def _measure_one(
        self, console: Terminal, source: str, inputs: InputSource, device: torch.device
    ) -> SignalPropagation:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            built = build(source, self.original if takes_original(source) else None)
        model = place_on(device, built.model)
        batch, described = inputs.draw(built, source, console, count=self.batches)
        if isinstance(batch, Iterator):
            batch = (one.to(device, precision_of(model)) for one in batch)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        configuration = {
            "command": command_line("spp", self, self.models, without=("models", "out")),
            "normfree": normfree.__version__,
            "python": platform.python_version(),
            "device": f"{device} ({name})",
        }
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
                configuration=configuration,
            )
        except ValueError as error:
            remedy = "let FACTORY of FILE.py return (model, batch) if the model takes something else"
            raise ValueError(str(error).replace("give a batch that the model's forward takes", remedy)) from error
