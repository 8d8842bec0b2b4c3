"""``normfree convert`` and ``normfree doctor``: a model without its normalizers, and its examination."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.markup import escape as escape_markup
from torch import nn

from normfree.commands.shared import (
    Device,
    Folder,
    ImageSize,
    Model,
    Original,
    Seed,
    Terminal,
    check_folder,
    check_options,
    command_line,
)
from normfree.commands.signals import (
    batch_shape,
    device_named,
    is_healthy,
    no_picture,
    precision_of,
    print_conversion,
    print_signal,
    write_signals,
)
from normfree.common.checks import invalid
from normfree.common.text import all_lines
from normfree.convert import ALPHA, SKIP_GAIN, Beta, Conversion, Start, conversion_of, convert
from normfree.data import probe_named
from normfree.signal import SignalPropagation, spp
from normfree.sources import build
from normfree.weights import save
from normfree.weights.matching import read_state_dict

# Conversion keeps the classifier and brings what is before it to unit variance; weights and pools of one network
# account for a factor of ten either way. At a hundred the logits are ten times as large, or as small, and the first
# steps of the original's recipe are lost.
OUTPUT_FACTOR = 100.0


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """What both commands take: a model, how to convert it, and what to run it with."""

    model: Model
    original: Original = None
    start: Start = "fresh"
    """fresh: new, variance-preserving weights; pretrained: the function of the trained model, kept."""
    weights: Path | None = None
    """State dict of the model before conversion: a .safetensors file, or one of torch.save (.pth)."""
    alpha: float = ALPHA
    """Factor of the residual branches (fresh)."""
    skip_gain: float = SKIP_GAIN
    """Initial value of their learnable factor (fresh)."""
    beta: Beta = "plan"
    """plan: closed forms of input scales where there are any; measured: all on the input (fresh)."""
    input: Annotated[str, tyro.conf.arg(metavar="gaussian|photos|FOLDER")] = "gaussian"
    """What to run and measure with: unit Gaussian noise, crops of two photographs, or a folder of images."""
    image_size: ImageSize = None
    batch_size: int = 8
    """Examples in the batch."""
    seed: Seed = 0
    device: Device = None

    def prepare(self, console: Terminal) -> tuple[nn.Module, Any, dict[str, Any]]:
        """Return the model with its weights, on its device; a batch (a factory's stays as it is); what that is.

        Pretrained conversion of random weights is said on the console.

        Raises:
            ValueError: no such model, weights or device; an option that a factory's batch leaves no room for.
        """
        device = device_named(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            built = build(self.model, self.original)
        if self.weights is not None:
            try:
                built.model.load_state_dict(read_state_dict(self.weights, "weights"))
            except RuntimeError as error:
                rule = f"are not this model's ({all_lines(error)})"
                raise invalid("weights", str(self.weights), rule, "give its own state dict") from error
        elif built.random and self.start == "pretrained":
            named = {"torchvision": ":weights=DEFAULT", "timm": ":pretrained=True"}.get(self.model.partition(":")[0])
            also = "" if named is None else f" or {self.model}{named}"
            console.say(f"note: the weights of {self.model} are random (seed {self.seed}); give --weights FILE{also}")
        model = built.model.to(device)
        if built.batch is not None:
            if self.input != "gaussian" or self.image_size is not None:
                rule = f"{self.model} gives a batch of its own"
                raise invalid("input", self.input, rule, "leave out --input and --image-size")
            return model, built.batch, {"kind": "the factory's own"}
        probe = probe_named(self.input)
        shape = batch_shape(built, probe, image_size=self.image_size, batch_size=self.batch_size)
        batch = next(iter(probe.batches(shape, count=1, seed=self.seed)))
        return model, batch.to(device, precision_of(model)), probe.describe()

    def convert(self, model: nn.Module, batch: Any) -> tuple[nn.Module, Conversion]:
        """Return the model converted, and the record of it."""
        converted = convert(
            model,
            batch,
            start=self.start,
            alpha=self.alpha,
            skip_gain=self.skip_gain,
            beta=self.beta,
            seed=self.seed,
            source=self.model,
        )
        conversion = conversion_of(converted)
        assert conversion is not None, "convert leaves its record"
        return converted, conversion


@dataclass(frozen=True, kw_only=True)
class Convert(_Conversion):
    """Take the normalizers out of a model, and write it as a checkpoint with the record of every change.

    The checkpoint is a MODEL to all other commands. Beside it, .json has the record alone.
    """

    out: Path
    """Checkpoint to write; by custom *.safetensors."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.out.is_dir() or self.out.suffix != ".safetensors":
            raise invalid("out", str(self.out), "is no checkpoint's name", "give one that ends in .safetensors")
        check_folder(self.out.parent)

    def run(self, console: Terminal) -> None:
        """Build, convert, write, and say what was changed."""
        model, batch, _ = self.prepare(console)
        with console.status(f"converting {escape_markup(self.model)}"):
            converted, conversion = self.convert(model, batch)
        paths = [save(converted, self.out), conversion.to_json(self.out.with_suffix(".json"))]
        print_conversion(console, conversion)
        console.say_written(paths)


@dataclass(frozen=True, kw_only=True)
class Doctor(_Conversion):
    """Examine a model: its signal, what is wrong with it, and the same model converted.

    Writes report.html (both signals overlaid, findings, every change), spp.json, spp.png and conversion.json. The exit
    code is 0 if no finding about the model as it is given is an error and the converted model's outputs in training
    mode have a mean square within a factor of 100 of the original's, and 1 otherwise, so that it can gate a CI.
    """

    gradient: bool = True
    """Measure and check the gradient at each block too, which takes a forward and a backward pass more."""
    out: Folder = Path("out/doctor")

    def __post_init__(self) -> None:
        check_options(self)
        check_folder(self.out)

    def run(self, console: Terminal) -> int:
        """Examine, convert, examine again, write, print; return the exit code."""
        model, batch, described = self.prepare(console)
        if reason := no_picture():
            console.say(reason)
        conversion, reason, changed = None, "", list[str]()
        with console.status(f"measuring {escape_markup(self.model)}") as status:
            signals = [self._measure(model, self.model, batch, described)]
            status.update(f"converting {escape_markup(self.model)}")
            try:
                converted, conversion = self.convert(model, batch)
            except ValueError as error:
                reason = str(error)
            else:
                status.update("measuring the converted model")
                signals.append(self._measure(converted, f"{self.model}, converted", batch, described))
                changed = self._changed_outputs(model, converted, batch)
        # Before anything is printed: whoever stops reading has the files all the same.
        title = f"Examination of {self.model}"
        paths = write_signals(signals, self.out, title=title, appendix=changes_section(conversion, reason))
        if conversion is not None:
            paths.insert(2, conversion.to_json(self.out / "conversion.json"))
        print_signal(console, signals[0])
        if conversion is None:
            console.print(f"not converted: {reason}", highlight=False, markup=False)
        else:
            print_conversion(console, conversion)
            print_signal(console, signals[1])
        for line in changed:
            console.print(f"[bold red]error: output[/bold red] — {escape_markup(line)}", highlight=False)
        console.say_written(paths)
        return int(bool(changed) or not is_healthy(signals[0]))

    def _measure(self, model: nn.Module, name: str, batch: Any, described: dict[str, Any]) -> SignalPropagation:
        return spp(
            model,
            batch,
            name=name,
            gradient=self.gradient,
            seed=self.seed,
            input_description=described,
            configuration={"command": command_line("doctor", self, [self.model], without=("model", "out"))},
        )

    def _changed_outputs(self, model: nn.Module, converted: nn.Module, batch: Any) -> list[str]:
        """A line for each output whose size in training mode conversion has changed too much."""
        try:
            before, after = (spp(one, batch, mode="train", seed=self.seed) for one in (model, converted))
        except ValueError:  # what takes targets in training has no outputs to compare
            return []
        return changed_outputs(before, after)


def changed_outputs(before: SignalPropagation, after: SignalPropagation) -> list[str]:
    """A line for each output whose mean square differs by more than OUTPUT_FACTOR; one that was zero has none."""
    lines = []
    for old, new in zip(before.outputs, after.outputs, strict=False):
        was, now = (one.avg_channel_var + one.avg_channel_sq_mean for one in (old, new))
        if was > 0 and not 1 / OUTPUT_FACTOR <= now / was <= OUTPUT_FACTOR:
            lines.append(
                f"in training mode the mean square of {old.name} is {now:.3g} after conversion and {was:.3g} before, "
                f"beyond a factor of {OUTPUT_FACTOR:g}; see the notes of the conversion, or use --beta measured"
            )
    return lines


def changes_section(conversion: Conversion | None, reason: str) -> str:
    """The report's section on the conversion: every change and what was left alone; or why there is none."""
    if conversion is None:
        return f'<section id="conversion"><h2>Conversion</h2><p>{escape(reason)}</p></section>'
    heads = "".join(f"<th class=text>{head}</th>" for head in ("module", "before", "after", "why"))
    rows = "".join(
        "<tr>" + "".join(f"<td class=text>{escape(cell)}</td>" for cell in row) + "</tr>" for row in conversion.rows()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in conversion.different_notes())
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f'<section id="conversion"><h2>Conversion</h2><p>{escape(conversion.summary())}</p>'
        + (f"<ul>{notes}</ul>" if notes else "")
        + "<details><summary>every change and what was left alone</summary>"
        + f'<div class="scroll settings">{table}</div></details></section>'
    )
