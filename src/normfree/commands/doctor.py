"""``normfree doctor``: is a model's signal healthy, and what would it be without normalizers?"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape as escape_markup
from torch import nn

from normfree.commands.again import command_line
from normfree.commands.convert import check_sizes, converted_as, prepared
from normfree.commands.outputs import check_folder
from normfree.commands.tables import print_conversion, print_signal
from normfree.convert import ALPHA, SKIP_GAIN, Conversion, conversion_of
from normfree.report.plot import plot_signals
from normfree.report.signal_page import write_report
from normfree.signal import SignalPropagation, spp, write_json
from normfree.sources import Built

# Conversion keeps the classifier and brings what is before it to unit variance; weights and pools of one network
# account for a factor of ten either way. At a hundred the logits are ten times as large, or as small, and the first
# steps of the original's recipe are lost.
OUTPUT_FACTOR = 100.0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examine a model: its signal, what is wrong with it, and the same model converted.

    Writes report.html (both signals overlaid, findings, every change), spp.json, spp.png and conversion.json. The exit
    code is 0 if no finding about the model as it is given is an error and the converted model's outputs in training
    mode have a mean square within a factor of 100 of the original's, and 1 otherwise, so that it can gate a CI.
    """

    model: Annotated[str, tyro.conf.Positional]
    """torchvision:NAME, timm:NAME, FILE.py:FACTORY (which may return (model, batch)), a name of `normfree models`,
    or a checkpoint of normfree.save."""
    original: str | None = None
    """Of a converted checkpoint, what builds the model it was made of: FILE.py:FACTORY, which is run, or another MODEL.
    Needed where that is no name of ours, torchvision's or timm's."""
    start: Literal["fresh", "pretrained"] = "fresh"
    """How the converted model begins."""
    weights: Path | None = None
    """State dict of the model, as safetensors."""
    alpha: float = ALPHA
    """Factor of the residual branches after conversion."""
    skip_gain: float = SKIP_GAIN
    """Initial value of their learnable factor."""
    beta: Literal["plan", "measured"] = "plan"
    """plan: closed forms of input scales where there are any; measured: all on the input."""
    input: str = "gaussian"
    """gaussian, photos, or a folder of images."""
    image_size: int | None = None
    """Height and width; what the model suggests by default, 224 if it does not."""
    batch_size: int = 8
    """Examples in the batch."""
    seed: int = 0
    """Of initialisation and input."""
    gradient: bool = True
    """Measure and judge the gradient at each block too, which takes a forward and a backward pass more."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one by default."""
    out: Path = Path("out/doctor")
    """Folder to write to."""

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.image_size, self.seed)
        check_folder(self.out)

    def run(self, console: Console) -> int:
        """Examine, convert, examine again, write; the exit code."""
        built, described = prepared(self)
        before = self._signal(built.model, self.model, built.batch, described)
        print_signal(console, before)
        signals, conversion, reason, changed = [before], None, "", list[str]()
        try:
            converted = converted_as(self, built)
        except ValueError as error:
            reason = str(error)
            console.print(f"not converted: {reason}", highlight=False, markup=False)
        else:
            conversion = conversion_of(converted)
            assert conversion is not None, "convert leaves its record"
            signals.append(self._signal(converted, f"{self.model}, converted", built.batch, described))
            print_conversion(console, conversion)
            print_signal(console, signals[1])
            changed = self._changed_outputs(built, converted)
            for line in changed:
                console.print(f"[bold red]error: output[/bold red] — {escape_markup(line)}", highlight=False)
        paths = self._write(signals, conversion, reason)
        console.print("wrote " + " ".join(str(path) for path in paths), highlight=False, markup=False, soft_wrap=True)
        return int(bool(changed) or not is_healthy(before))

    def _changed_outputs(self, built: Built, converted: nn.Module) -> list[str]:
        """A line for each output whose size in training mode conversion has changed too much."""
        try:
            pair = [spp(model, built.batch, mode="train", seed=self.seed) for model in (built.model, converted)]
        except ValueError:  # what takes targets in training has no outputs to compare
            return []
        return changed_outputs(*pair)

    def _signal(self, model: nn.Module, name: str, batch: Any, described: dict[str, Any]) -> SignalPropagation:
        configuration = {"command": command_line("doctor", self, [self.model], without=("model", "out"))}
        return spp(
            model,
            batch,
            name=name,
            gradient=self.gradient,
            seed=self.seed,
            input_description=described,
            configuration=configuration,
        )

    def _write(self, signals: list[SignalPropagation], conversion: Conversion | None, reason: str) -> list[Path]:
        self.out.mkdir(parents=True, exist_ok=True)
        plot_signals(signals, self.out / "spp.png")
        paths = [write_json(self.out / "spp.json", signals), self.out / "spp.png"]
        if conversion is not None:
            paths.append(conversion.to_json(self.out / "conversion.json"))
        appendix = changes_section(conversion, reason)
        title = f"Examination of {self.model}"
        return [*paths, write_report(signals, self.out / "report.html", title=title, appendix=appendix)]


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


def is_healthy(signal: SignalPropagation) -> bool:
    """Whether no finding is an error."""
    return not any(finding.severity == "error" for finding in signal.findings)


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
