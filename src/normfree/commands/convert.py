"""``normfree convert`` and ``normfree doctor``: a model without its normalizers, and its examination."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape as escape_markup
from torch import nn

from normfree.commands.shared import (
    Device,
    Folder,
    ImageSize,
    Input,
    Mean,
    Model,
    Original,
    Seed,
    Std,
    Terminal,
    check_folder,
    check_options,
    command_line,
)
from normfree.commands.signals import (
    COLOURS,
    InputSource,
    count_findings,
    device_named,
    is_healthy,
    no_picture,
    precision_of,
    print_conversion,
    print_signal,
    write_signals,
)
from normfree.common.checks import invalid
from normfree.common.files import check_place, notes_of, read_json
from normfree.convert import ALPHA, BY_HAND, SKIP_GAIN, Beta, Conversion, Start, conversion_of, convert
from normfree.convert.verify import BatchStatistics, statistics_of_batch
from normfree.signal import SignalPropagation, spp
from normfree.sources import build, is_word, load_weights, names_factory, place_on, word_of
from normfree.trace.inputs import tensors_of
from normfree.trace.preserve import Mode
from normfree.train.trained import preprocessing_of
from normfree.weights import save

# Conversion keeps the classifier and brings what is before it to unit variance; weights and pools of one network
# account for a factor of ten either way. At a hundred the logits are ten times as large, or as small, and the first
# steps of the original's recipe are lost.
OUTPUT_FACTOR = 100.0

# Inputs whose mean square is further from one have units of their own, which outputs of a network may carry.
UNITS_FACTOR = 4.0

# Of a norm's input beside its running variance: less than this does not make outputs a hundred times as large.
STATISTICS_FACTOR = 4.0

NOTHING_TO_DO = "it has no normalizer that is recognised, and nothing was found that conversion would mend"


@dataclass(frozen=True)
class _Refusal:
    """Why a model was not converted, and what to do instead, as lines of Python; both empty where it was."""

    reason: str = ""
    code: str = ""

    @staticmethod
    def of(error: ValueError) -> _Refusal:
        """The refusal that an error of conversion states."""
        reason = (
            str(error).removeprefix("model: ").removesuffix(f"; {BY_HAND}").replace('start="fresh"', "--start fresh")
        )
        return _Refusal(reason, next((note for note in getattr(error, "__notes__", ()) if "import" in note), ""))


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """What both commands take: a model, how to convert it, and what to run it with."""

    model: Model
    original: Original = None
    start: Start = "fresh"
    """fresh: new, variance-preserving weights; pretrained: the function of the trained model, kept."""
    weights: Path | None = None
    """State dict of the model before conversion: .safetensors, or a .pth of torch.save(model.state_dict(), …). Of a
    checkpoint of several, averaged weights are taken, and FILE:KEY takes those of that key."""
    alpha: float = ALPHA
    """Factor of the residual branches (fresh)."""
    skip_gain: float = SKIP_GAIN
    """Initial value of their learnable factor (fresh)."""
    beta: Beta = "plan"
    """plan: closed forms of input scales where there are any; measured: all on the input (fresh)."""
    input: Input = None
    mean: Mean = None
    std: Std = None
    image_size: ImageSize = None
    batch_size: int = 8
    """Examples in the batch."""
    seed: Seed = 0
    device: Device = None

    def prepare(self, console: Terminal) -> tuple[nn.Module, Any, dict[str, Any]]:
        """Return the model with its weights, on its device; a batch (a factory's stays as it is); what that is.

        Pretrained conversion of random weights is said on the console.

        Raises:
            ValueError: no such model, weights, device or input; an option that a factory's batch leaves no room for.
        """
        inputs, device = InputSource.of(self).open(), device_named(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            built = build(self.model, self.original)
        if self.weights is not None:
            load_weights(built.model, self.model, self.weights)
        elif built.own and self.start == "pretrained":
            console.say(f"note: weights as {self.model} made them; --weights FILE takes others")
        elif built.random and self.start == "pretrained":
            named = {"torchvision": ":weights=DEFAULT", "timm": ":pretrained=True"}.get(self.model.partition(":")[0])
            also = "" if named is None else f" or {self.model}{named}"
            console.say(f"note: the weights of {self.model} are random (seed {self.seed}); give --weights FILE{also}")
        model = place_on(device, built.model)
        if built.batch is not None and self.input is None and self.image_size is not None:
            rule = f"{self.model} gives a batch of its own"
            raise invalid("image_size", self.image_size, rule, "leave it out, or give --input too")
        batch, described = inputs.draw(built, self.model, console)
        if isinstance(batch, Iterator):
            batch = next(batch).to(device, precision_of(model))
        return model, batch, described

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
            source=word_of(self.model),
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
    """Checkpoint to write, *.safetensors; an earlier one of that name is replaced."""

    def __post_init__(self) -> None:
        check_options(self)
        InputSource.of(self)
        if self.out.is_dir() or self.out.suffix != ".safetensors":
            raise invalid("out", str(self.out), "is no checkpoint's name", "give one that ends in .safetensors")
        check_place("out", self.out)
        self._check_replaced()

    def run(self, console: Terminal) -> None:
        """Build, convert, write, and say what was changed."""
        model, batch, _ = self.prepare(console)
        replaced = [path for path in (self.out, self.out.with_suffix(".json")) if path.exists()]
        with console.status(f"converting {escape_markup(self.model)}"):
            converted, conversion = self.convert(model, batch)
        said = None if is_word(self.model) else preprocessing_of(Path(self.model))
        metadata = None if said is None else said.to_metadata()
        paths = [save(converted, self.out, metadata=metadata), conversion.to_json(self.out.with_suffix(".json"))]
        print_conversion(console, conversion)
        console.say_written(paths, replaced)
        named = self.original or word_of(self.model)
        original = f" --original {shlex.quote(named)}" if names_factory(named) else ""
        console.say(f"to train it: normfree train RECIPE --model {shlex.quote(str(self.out))}{original}")

    def _check_replaced(self) -> None:
        """Refuse to write over what is no earlier checkpoint of ours, or over what the model is read from.

        Raises:
            ValueError: naming the file.
        """
        record = self.out.with_suffix(".json")
        rule = ""
        for given in (self.weights, Path(self.model)):
            if given is not None and self.out.exists() and given.exists() and given.samefile(self.out):
                rule = "is what the model is read from"
        if self.out.exists() and not any(note.startswith("normfree") for note in notes_of(self.out) or ()):
            rule = "exists, and is no checkpoint of normfree.save"
        if rule:
            raise invalid("out", str(self.out), rule, "give another name")
        if record.exists():
            try:
                Conversion.from_dict(read_json(record, "out"))
            except ValueError as error:
                rule = f"the record goes to {str(record)!r}, which exists and is no record of a conversion"
                raise invalid("out", str(self.out), rule, "give another name") from error


@dataclass(frozen=True, kw_only=True)
class Doctor(_Conversion):
    """Examine a model: its signal, what is wrong with it, and the same model converted.

    Says first what it will do, and then what it found, with the remedy of each finding. Of a model without normalizers
    conversion is proposed where something was found. Writes report.html (both signals overlaid, findings, every
    change), spp.json, spp.png and conversion.json. The exit code is 0 if no finding about the model as it is given is
    an error and, with a fresh start, the converted model's outputs in training mode have a mean square within a factor
    of 100 of the original's (or of one, where the original's carry the size of inputs of other units), and 1 otherwise,
    so that it can gate a CI. A pretrained start keeps what the model
    computes in evaluation mode, so both are measured in it; where its norms' running statistics are not those of the
    batch, a warning says so.
    """

    gradient: bool = True
    """Measure and check the gradient at each block too, which takes a forward and a backward pass more."""
    out: Folder = Path("out/doctor")

    def __post_init__(self) -> None:
        check_options(self)
        InputSource.of(self)
        check_folder(self.out)

    def run(self, console: Terminal) -> int:
        """Say what will be done, examine, convert, examine again, write, say what was found; return the exit code."""
        model, batch, described = self.prepare(console)
        if missing := no_picture():
            console.announce(missing)
        self._announce(console, batch, described)
        conversion, refusal, changed = None, _Refusal(), list[Changed]()
        with console.status(f"measuring {escape_markup(self.model)}") as status:
            signals = [self._measure(model, self.model, batch, described)]
            status.update(f"converting {escape_markup(self.model)}")
            try:
                converted, conversion = self.convert(model, batch)
            except ValueError as error:
                refusal = _Refusal.of(error)
                signals[0] = _without_conversion(signals[0], refusal.code)
            else:
                if not conversion.replaces_norms and not _calls_for_action(signals[0]):
                    conversion, refusal = None, _Refusal(NOTHING_TO_DO)
                    signals[0] = _without_conversion(signals[0], "")
                else:
                    status.update("measuring the converted model")
                    again = self._measure(converted, f"{self.model}, converted", batch, described)
                    signals.append(_without_conversion(again, ""))
                    if self.start == "pretrained" or not _changes_size(signals[0]):
                        changed = self._changed_outputs(model, converted, batch)
        # Before anything is printed: whoever stops reading has the files all the same.
        title = f"Examination of {self.model}"
        paths = write_signals(signals, self.out, title=title, appendix=changes_section(conversion, refusal, changed))
        if conversion is not None:
            paths.insert(2, conversion.to_json(self.out / "conversion.json"))
        console.print("[bold]What was found[/bold]")
        print_signal(console, signals[0])
        if conversion is not None:
            console.print("[bold]What conversion changes[/bold]")
            print_conversion(console, conversion)
            console.print("[bold]What was found in the converted model[/bold]")
            print_signal(console, signals[1])
        for one in changed:
            colour = COLOURS[one.severity]
            head = f"[{colour}]{one.severity}: {one.kind}[/{colour}]"
            console.print(f"{head} — {escape_markup(one.message)}", highlight=False)
            console.print(f"    [dim]{escape_markup(one.remedy)}[/dim]", highlight=False)
        self._conclude(console, signals, refusal, changed)
        console.say_written(paths)
        failed = not is_healthy(signals[0]) or any(one.severity == "error" for one in changed)
        return int(failed)

    def _announce(self, console: Terminal, batch: Any, described: dict[str, Any]) -> None:
        """Say what will be done, before it is."""
        shapes = ", ".join(" × ".join(map(str, tensor.shape)) for tensor in tensors_of(batch))
        start = {
            "fresh": "fresh start: new weights that hold the variance without normalizers",
            "pretrained": "pretrained start: its normalizers folded into its weights",
        }[self.start]
        mode = ", in evaluation mode, which that start keeps" if self._mode == "eval" else ""
        console.announce(
            f"Examining {self.model}:\n"
            f"  1. measure it on one batch, {described['kind']}, {shapes}{mode}\n"
            f"  2. convert a copy of it, if there is something to convert ({start})\n"
            "  3. measure the converted copy on the same batch\n"
            f"The model stays as it is. The report goes to {self.out}.\n"
        )

    def _conclude(
        self, console: Terminal, signals: list[SignalPropagation], refusal: _Refusal, changed: list[Changed]
    ) -> None:
        """Say what came of it, and what to do next."""
        found = (signals[0].findings, (*signals[-1].findings, *changed))
        counts = [
            f"{name}: {count_findings(each)}" for name, each in zip(("as given", "converted"), found, strict=True)
        ]
        console.say("; ".join(counts[: len(signals)]) + ".")
        if len(signals) > 1:
            line = command_line("convert", self, [self.model], without=("model", "out", "gradient"))
            console.say(f"To write the converted model: {line} --out model.safetensors")
        else:
            console.say(f"Not converted: {refusal.reason}.")

    def _measure(self, model: nn.Module, name: str, batch: Any, described: dict[str, Any]) -> SignalPropagation:
        return spp(
            model,
            batch,
            name=name,
            mode=self._mode,
            gradient=self.gradient,
            seed=self.seed,
            input_description=described,
            configuration={"command": command_line("doctor", self, [self.model], without=("model", "out"))},
        )

    @property
    def _mode(self) -> Mode:
        """That in which both models are measured: a pretrained start keeps the function of evaluation mode."""
        return "eval" if self.start == "pretrained" else "batch-statistics"

    def _changed_outputs(self, model: nn.Module, converted: nn.Module, batch: Any) -> list[Changed]:
        """What there is to say of outputs whose size in training mode conversion has changed too much."""
        try:
            before, after = (spp(one, batch, mode="train", seed=self.seed) for one in (model, converted))
        except ValueError:  # what takes targets in training has no outputs to compare
            return []
        changes = changed_outputs(before, after)
        if self.start == "pretrained":
            prepared_as = self.mean is not None or self.input in (None, "gaussian")
            return [statistics_differ(changes[0], statistics_of_batch(model, batch), prepared_as)] if changes else []
        record = conversion_of(converted)
        size = max(record.input_mean_squares if record else (), key=_off_unit, default=None)
        if changes and _off_unit(size) > UNITS_FACTOR and _are_of_unit_size(after):
            why = f"the original's carry the size of its inputs (mean square {size:.3g}), the converted model's do not"
            remedy = "Nothing, if a loss reads them: a classifier then starts as one of standardized inputs does."
            return [Changed("warning", "output", f"{change}: {why}.", remedy) for change in changes]
        if self.beta == "measured":
            remedy = "See the notes of the conversion; --alpha scales the branches."
        else:
            remedy = "See the notes of the conversion, or use --beta measured."
        beyond = f"beyond a factor of {OUTPUT_FACTOR:g}"
        return [Changed("error", "output", f"{change}, {beyond}.", remedy) for change in changes]


@dataclass(frozen=True)
class Changed:
    """What conversion changes of the outputs in training mode.

    Attributes:
        severity: "error", or "warning" where it is the original's statistics that do not fit the batch, or its outputs
            carry the size of its inputs.
        kind: "output" or "statistics".
        message: what was found.
        remedy: what to do.
    """

    severity: str
    kind: str
    message: str
    remedy: str


def statistics_differ(change: str, found: list[BatchStatistics], from_elsewhere: bool) -> Changed:
    """The finding where a pretrained start, which keeps running statistics, meets a batch that has others.

    Conversion has kept what the model computes in evaluation mode, which it checks to rounding. In training mode the
    original normalizes by the batch, and gives other outputs than in evaluation mode, too.

    Args:
        change: of an output.
        found: the norms' statistics and the batch's.
        from_elsewhere: whether the batch is noise or was standardized as asked, so not by default.
    """
    kept = "The function in evaluation mode is kept; in training mode the original normalizes by the batch instead"
    off = max(found, key=lambda one: abs(math.log(one.ratio)), default=None)
    if off is None or 1 / STATISTICS_FACTOR <= off.ratio <= STATISTICS_FACTOR:
        where = ""
    else:
        where = (
            f": the input of {off.name} has a mean square about its running mean of {off.ratio:.3g} times its running "
            "variance, so the batch is not like the data that the statistics are of"
        )
    if found and not any(one.trained for one in found):
        remedy = "Its statistics are those of a new norm: give trained ones by --weights FILE, or choose --start fresh."
    elif from_elsewhere:
        remedy = "Examine it on its own images, prepared as in its training: --input FOLDER --mean … --std …."
    else:
        remedy = "Prepare the images as in its training: --mean and --std (ImageNet's were taken where no run says it)."
    return Changed("warning", "statistics", f"{change}. {kept}{where}.", remedy)


def changed_outputs(before: SignalPropagation, after: SignalPropagation) -> list[str]:
    """A line for each output whose mean square differs by more than OUTPUT_FACTOR; one that was zero has none."""
    lines = []
    for old, new in zip(before.outputs, after.outputs, strict=False):
        was, now = (one.avg_channel_var + one.avg_channel_sq_mean for one in (old, new))
        if was > 0 and not 1 / OUTPUT_FACTOR <= now / was <= OUTPUT_FACTOR:
            lines.append(
                f"in training mode the mean square of {old.name} is {now:.3g} after conversion and {was:.3g} before"
            )
    return lines


def _off_unit(mean_square: float | None) -> float:
    """By what factor a mean square is above or below one; 1 where it is not known, or zero."""
    return max(mean_square, 1 / mean_square) if mean_square else 1.0


def _are_of_unit_size(signal: SignalPropagation) -> bool:
    """Whether no output is beyond a factor of OUTPUT_FACTOR of a mean square of one."""
    squares = [one.avg_channel_var + one.avg_channel_sq_mean for one in signal.outputs]
    return all(_off_unit(square) <= OUTPUT_FACTOR for square in squares)


def _without_conversion(signal: SignalPropagation, code: str) -> SignalPropagation:
    """A measurement whose findings have other lines of Python where conversion is not, or no longer, the remedy."""
    findings = (replace(f, code=code) if "normfree.convert" in f.code else f for f in signal.findings)
    return replace(signal, findings=tuple(findings))


def _calls_for_action(signal: SignalPropagation) -> bool:
    """Whether there is a finding that is more than a note."""
    return any(finding.severity != "info" for finding in signal.findings)


def _changes_size(signal: SignalPropagation) -> bool:
    """Whether a signal explodes, fades or breaks, so that outputs of another size are what conversion is for."""
    kinds = ("explosion", "attenuation", "non_finite")
    return any(finding.kind in kinds and finding.severity != "info" for finding in signal.findings)


def changes_section(conversion: Conversion | None, refusal: _Refusal, changed: Sequence[Changed] = ()) -> str:
    """The report's section on the conversion: every change and what was left alone; or why there is none."""
    if conversion is None:
        why = f"<p>Not converted: {escape(refusal.reason)}.</p>"
        return f'<section id="conversion"><h2>Conversion</h2>{why}</section>'
    heads = "".join(f"<th scope=col class=text>{head}</th>" for head in ("module", "before", "after", "why"))
    rows = "".join(
        "<tr>" + "".join(f"<td class=text>{escape(cell)}</td>" for cell in row) + "</tr>" for row in conversion.rows()
    )
    told = [f"{one.severity}: {one.kind} — {one.message} {one.remedy}" for one in changed]
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*told, *conversion.different_notes()))
    label = "every change and what was left alone"
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    scroll = f'<div class="scroll settings changes" tabindex="0" role="region" aria-label="{label}">{table}</div>'
    return (
        f'<section id="conversion"><h2>Conversion</h2><p>{escape(conversion.summary())}</p>'
        + (f"<ul>{notes}</ul>" if notes else "")
        + f"<details><summary>{label}</summary>{scroll}</details></section>"
    )
