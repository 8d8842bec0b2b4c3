"""Measurements and conversions for commands: what a model is run with, the files that are written, tables to print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from textwrap import indent
from typing import Any, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from normfree.commands.shared import Terminal
from normfree.common.checks import check_memory, invalid, require
from normfree.common.text import first_line
from normfree.convert import Conversion
from normfree.data import GaussianNoise, Probe, probe_named
from normfree.data.config import check_statistics, preparation
from normfree.data.probe import Images, SourceImages
from normfree.report.panels import is_layerwise
from normfree.report.plot import plot_signals
from normfree.report.signal_page import write_report
from normfree.signal import BlockSignal, Curve, Finding, SignalPropagation, input_shape, write_json
from normfree.sources import Built, names_factory

ROWS = 24
"""Points shown in full; of deeper networks every stage's edges and an even selection."""

COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def device_named(name: str | None) -> torch.device:
    """Return a device by name; by default a GPU if there is one.

    Raises:
        ValueError: it is not to be had here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise invalid("device", name, f"is not to be had here ({first_line(error)})", "use cpu") from error
    return device


def precision_of(model: nn.Module) -> torch.dtype:
    """Return the precision of a model's parameters."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return torch.float32 if parameter is None else parameter.dtype


@dataclass(frozen=True)
class InputSource:
    """What models are measured with, as the options of a command say.

    Attributes:
        name: "gaussian", "photos", a folder, a source of training images; None for what a factory gives, else noise.
        image_size: height and width, None for what the model or the images suggest.
        batch_size: examples in a batch.
        seed: of all draws.
        mean, std: of the channels, that images are standardized with; None for what the model's run says.
    """

    name: str | None
    image_size: int | None
    batch_size: int
    seed: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, options: Any) -> InputSource:
        """Return what the options of a command ask for.

        Raises:
            ValueError: means and deviations that are none, or that nothing is standardized with.
        """
        mean, std = options.mean, options.std
        check_statistics(mean, std)
        if mean is not None and options.input in (None, "gaussian"):
            remedy = "leave --mean and --std out, or give --input FOLDER"
            raise invalid("mean", mean, "noise is not standardized", remedy)
        return cls(options.input, options.image_size, options.batch_size, options.seed, mean, std)

    @cached_property
    def probe(self) -> Probe:
        """What batches are drawn from."""
        return probe_named(self.name or "gaussian")

    def open(self) -> InputSource:
        """Open what batches are drawn from, so that an error comes before a model is built."""
        self.probe  # noqa: B018
        return self

    def draw(self, built: Built, source: str, console: Terminal, *, count: int = 1) -> tuple[Any, dict[str, Any]]:
        """Return a factory's own batch, or an iterator over so many drawn for a model; and what a record says of it.

        Prints what a model of a file is run with where no option says it.

        Args:
            built: the model.
            source: its name.
            console: to print it on.
            count: of batches.

        Raises:
            ValueError: the shape cannot be inferred, or the batch is larger than the machine's memory.
        """
        if built.batch is not None and self.name is None:
            if self.image_size is not None:
                console.announce(f"note: {source} gives a batch of its own, and --image-size is not for it")
            return built.batch, {"kind": "the factory's own"}
        probe = self._standardized(built, console)
        shape = self._shape(built, probe)
        known = self.image_size is not None or built.batch is not None or isinstance(probe, SourceImages)
        if names_factory(source) and not known:
            console.announce(_note_on_batch(source, probe, shape))
        return probe.batches(shape, count=count, seed=self.seed), probe.describe()

    def _standardized(self, built: Built, console: Terminal) -> Probe:
        """The probe, its images standardized as asked, or as in the model's run; else by themselves or as ImageNet."""
        probe = self.probe
        if not isinstance(probe, (Images, SourceImages)):
            return probe
        if self.mean is not None and self.std is not None:
            return probe.standardized(self.mean, self.std)
        if built.statistics is not None:  # of a run, whose images have as many channels as the model takes
            return probe.standardized(*built.statistics)
        if isinstance(probe, Images):
            console.announce_once(preparation(probe.mean, probe.std))
        return probe

    def _shape(self, built: Built, probe: Probe) -> tuple[int, ...]:
        """The shape of a batch [N, ...]: of a run's images or a factory's, the source's, or what the model suggests."""
        shape = built.shape
        if shape is None and isinstance(built.batch, Tensor):
            shape = tuple(built.batch.shape[1:])
        try:
            shape = shape or input_shape(built.model)
        except ValueError:
            if isinstance(probe, GaussianNoise) and self.image_size is None:
                raise ValueError(
                    "model: its input shape cannot be inferred; let FACTORY of FILE.py return (model, batch)"
                ) from None
            shape = (3, 224, 224)
        if isinstance(probe, SourceImages) and built.shape is None:
            shape = (shape[0] if len(shape) == 3 else probe.shape[0], *probe.shape[1:])
        if self.image_size is not None:
            first = next((module for module in built.model.modules() if isinstance(module, nn.Conv2d)), None)
            images = (3 if first is None else first.in_channels, 0, 0)
            shape = (*(shape if len(shape) >= 3 else images)[:-2], self.image_size, self.image_size)
        sizes = (("image_size", self.image_size, prod(shape)), ("batch_size", self.batch_size, self.batch_size))
        for argument, value, size in sizes:
            check_memory(argument, value, 4 * size)
        check_memory("batch_size", self.batch_size, 4 * self.batch_size * prod(shape))
        return (self.batch_size, *shape)


def _note_on_batch(source: str, probe: Probe, shape: tuple[int, ...]) -> str:
    """What a model of a file is run with."""
    kind = "Gaussian noise" if isinstance(probe, GaussianNoise) else str(probe.describe()["kind"])
    options = "" if len(shape) < 4 else "; or pass --image-size"
    options += ", --input" if options and isinstance(probe, GaussianNoise) else ""
    return f"note: {source} gives no batch; it is run on {kind} {list(shape)}: return (model, batch) from it{options}"


def write_signals(
    signals: Sequence[SignalPropagation],
    out: Path,
    *,
    title: str | None = None,
    appendix: str = "",
) -> list[Path]:
    """Write spp.json, spp.png and report.html, each whole or not at all; returns their paths.

    Where :func:`no_picture` says why, there is no spp.png, nor one that an earlier run left.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "spp.png"
    if no_picture() is None:
        plot_signals(signals, picture)
    else:
        picture.unlink(missing_ok=True)
    page = write_report(signals, out / "report.html", title=title, appendix=appendix)
    return [write_json(out / "spp.json", signals), *([picture] if picture.exists() else []), page]


def no_picture() -> str | None:
    """Return why spp.png cannot be drawn here, to be said before a measurement; None where it can."""
    try:
        require("matplotlib", "spp.png")
    except ImportError as error:
        return f"note: {error}; the numbers and the page are written without it"
    return None


@dataclass(frozen=True)
class _Column:
    """A column of numbers.

    Attributes:
        title: above it.
        curve: of the signal.
        cosine: whether the numbers lie in -1 … 1.
    """

    title: str
    curve: Curve
    cosine: bool = False


_COLUMNS = (
    _Column("sq. mean", "avg_channel_sq_mean"),
    _Column("variance", "avg_channel_var"),
    _Column("expected", "expected_var"),
    _Column("branch", "residual_avg_channel_var"),
    _Column("correl.", "input_correlation", cosine=True),
    _Column("gradient", "avg_sq_gradient"),
)


def print_signal(console: Terminal, signal: SignalPropagation) -> None:
    """Print a measurement's table and its findings."""
    table = Table(
        title=escape(signal.model),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", justify="right", no_wrap=True)
    unit = "layer" if is_layerwise(signal) else "block"
    table.add_column(unit, overflow="fold", min_width=12)
    optional = {"expected_var", "avg_sq_gradient"}
    curves = {column: signal.curve(column.curve) for column in _COLUMNS}
    shown = {c: v for c, v in curves.items() if c.curve not in optional or any(x is not None for x in v)}
    for title in ("shape", *(column.title for column in shown)):
        table.add_column(title, justify="right", no_wrap=True)
    rows = select_points(signal.blocks)
    entry = signal.entry
    places = [("", escape(entry.title) + " [dim]in[/dim]", entry.shape)]
    places += [(str(block.index), escape(block.title), block.shape) for block in signal.blocks]
    for index, (number, name, shape) in enumerate(places):
        if index == 0 or index - 1 in rows:
            numbers = [_number(values[index], column, is_entry=index == 0) for column, values in shown.items()]
            table.add_row(number, name, "×".join(map(str, shape[1:])), *numbers)
    console.print(table)
    if len(rows) < len(signal.blocks):
        console.print(f"[dim]{len(rows)} of {len(signal.blocks)} points; all are in spp.json[/dim]")
    note = signal.configuration.get("gradient")
    if isinstance(note, str):
        console.print(f"[cyan]gradient[/cyan] {escape(note)}", highlight=False)
    if signal.unmeasured:
        console.print(f"[cyan]note[/cyan] {escape(signal.not_measured)}", highlight=False)
    print_findings(console, signal.findings)
    colour, verdict = COLOURS["error"], "not healthy"
    if is_healthy(signal):
        colour, verdict = COLOURS["warning"], "not quite healthy"
    if signal.verdict == "healthy":
        colour, verdict = "green", "healthy"
    console.print(f"[{colour}]{verdict}[/{colour}]: {count_findings(signal.findings)}", highlight=False)
    console.print()


def print_findings(console: Terminal, findings: Sequence[Finding]) -> None:
    """Print what was found: each finding with its remedy and its place in the documentation, the code of each once."""
    shown = set[str]()
    for finding in findings:
        colour = COLOURS[finding.severity]
        kind = finding.kind.replace("_", " ")
        console.print(f"[{colour}]{finding.severity}: {kind}[/{colour}] — {escape(finding.message)}", highlight=False)
        console.print(f"    [dim]{escape(finding.remedy)}[/dim]", highlight=False)
        console.say(f"    See normfree explain {finding.kind}")
        if finding.code in shown:
            console.say("    In Python: the same lines")
        elif finding.code:
            shown.add(finding.code)
            console.say(f"    In Python, with your model and its batch:\n\n{indent(finding.code, '        ')}")


class Counted(Protocol):
    """What has a severity and a kind."""

    @property
    def kind(self) -> str: ...
    @property
    def severity(self) -> str: ...


def count_findings(findings: Sequence[Counted]) -> str:
    """Return the errors and warnings among findings, counted and named."""
    counts = []
    for severity in ("error", "warning"):
        kinds = [finding.kind.replace("_", " ") for finding in findings if finding.severity == severity]
        if kinds:
            counts.append(f"{len(kinds)} {severity}{'s' if len(kinds) > 1 else ''} ({', '.join(kinds)})")
        elif severity == "error":
            counts.append("no error")
    return ", ".join(counts)


def is_healthy(signal: SignalPropagation) -> bool:
    """Whether no finding is an error."""
    return not any(finding.severity == "error" for finding in signal.findings)


def select_points(blocks: tuple[BlockSignal, ...]) -> set[int]:
    """Indices of the points to show: all of few, else transitions, the ends and an even selection."""
    if len(blocks) <= ROWS:
        return {block.index for block in blocks}
    ends = {0, len(blocks) - 1}
    turns = {index for block in blocks if block.transition for index in (block.index - 1, block.index) if index >= 0}
    chosen = ends | turns if len(ends | turns) < ROWS // 2 else ends
    return chosen | set(range(0, len(blocks), max(1, len(blocks) // (ROWS - len(chosen)))))


def _number(value: float | None, column: _Column, *, is_entry: bool) -> str:
    if value is None:
        return "" if is_entry and not column.cosine else "–"
    if column.cosine:
        return f"{value:.3f}"
    if not isfinite(value):
        return "[red]non-finite[/red]"
    if value == 0:
        return "0"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.2e}"


def _one_of_each_kind(rows: Sequence[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """The first row of each kind, in order, with how many more there are: of a class and its factors, for a reason.

    Reasons that differ in a number or a name of a place are one; where there are too many, the classes alone count.
    """

    def kind(row: tuple[str, str, str, str], *, whole: bool) -> tuple[str, ...]:
        made, _, factors = row[2].partition("(")
        names = " ".join(re.findall(r"(\w+)=", factors))
        reason = re.sub(r"[-+.\d]+", "", row[3].partition(";")[0])
        return (row[1], made, names, reason) if whole else (row[1], made)

    for whole in (True, False):
        groups: dict[tuple[str, ...], list[tuple[str, str, str, str]]] = {}
        for row in rows:
            groups.setdefault(kind(row, whole=whole), []).append(row)
        if len(groups) <= ROWS:
            break
    shown = []
    for found in groups.values():
        name, *rest = found[0]
        shown.append((name + (f", {len(found)} in all" if len(found) > 1 else ""), *rest))
    return shown


def print_conversion(console: Terminal, conversion: Conversion) -> None:
    """Print what a conversion changed, as a table; of many changes the first of each kind, and how many there are."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in ("module", "before", "after", "why"):
        table.add_column(head, overflow="fold")
    rows = shown = conversion.rows()
    if len(rows) > ROWS:
        shown = _one_of_each_kind(rows)
    for row in shown:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"[dim]one of each kind; all {len(rows)} are in the record[/dim]")
    for note in conversion.different_notes():
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(conversion.summary(), highlight=False, markup=False)
    console.print()
