"""Measurements as tables for a terminal."""

from __future__ import annotations

from math import isfinite

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normfree.convert import Conversion
from normfree.signal import BlockSignal, SignalPropagation

ROWS = 24
"""Points shown in full; of deeper networks every stage's edges and an even selection."""

COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def print_signal(console: Console, signal: SignalPropagation) -> None:
    """Print a measurement's table and its findings."""
    expected = any(block.expected_var is not None for block in signal.blocks)
    gradient = any(block.avg_sq_gradient is not None for block in signal.blocks)
    table = Table(
        title=escape(signal.model),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("block", overflow="fold", min_width=12)
    numbers = [
        "shape",
        "sq. mean",
        "variance",
        *["expected"] * expected,
        "branch",
        "correl.",
        *["gradient"] * gradient,
    ]
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    entry = signal.entry
    start = ["", escape(entry.name or "(the model)") + " [dim]in[/dim]", _shape(entry.shape)]
    start += [_number(entry.avg_channel_sq_mean), _number(entry.avg_channel_var), *[""] * expected]
    table.add_row(*start, "", _cosine(entry.input_correlation), *[""] * gradient)
    shown = selected(signal.blocks)
    for block in signal.blocks:
        if block.index in shown:
            table.add_row(*_row(block, expected=expected, gradient=gradient))
    console.print(table)
    if len(shown) < len(signal.blocks):
        console.print(f"[dim]{len(shown)} of {len(signal.blocks)} points; all are in spp.json[/dim]")
    note = signal.configuration.get("gradient")
    if isinstance(note, str):
        console.print(f"[cyan]gradient[/cyan] {escape(note)}", highlight=False)
    for finding in signal.findings:
        colour = COLOURS[finding.severity]
        kind = finding.kind.replace("_", " ")
        console.print(f"[{colour}]{finding.severity}: {kind}[/{colour}] — {escape(finding.message)}", highlight=False)
        console.print(f"    [dim]{escape(finding.remedy)}[/dim]", highlight=False)
    if not any(finding.severity == "error" for finding in signal.findings):
        console.print("[green]healthy[/green]: no finding is an error", highlight=False)
    console.print()


def selected(blocks: tuple[BlockSignal, ...]) -> set[int]:
    """Indices of the points to show: all of few, else transitions, the ends and an even selection."""
    if len(blocks) <= ROWS:
        return {block.index for block in blocks}
    edges = {
        0,
        len(blocks) - 1,
        *(b.index for b in blocks if b.transition),
        *(b.index - 1 for b in blocks if b.transition),
    }
    chosen = {index for index in edges if index >= 0} if len(edges) < ROWS // 2 else {0, len(blocks) - 1}
    step = max(1, len(blocks) // (ROWS - len(chosen)))
    return chosen | set(range(0, len(blocks), step))


def _row(block: BlockSignal, *, expected: bool, gradient: bool) -> list[str]:
    row = [str(block.index), escape(block.name or "(the model)"), _shape(block.shape)]
    row += [_number(block.avg_channel_sq_mean), _number(block.avg_channel_var)]
    row += [_number(block.expected_var)] if expected else []
    row += [_number(block.residual_avg_channel_var), _cosine(block.input_correlation)]
    return row + ([_number(block.avg_sq_gradient)] if gradient else [])


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape[1:]))


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if not isfinite(value):
        return "[red]non-finite[/red]"
    if value == 0:
        return "0"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.2e}"


def print_conversion(console: Console, conversion: Conversion) -> None:
    """Print what a conversion changed, as a table; of many changes the first of each kind."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in ("module", "before", "after", "why"):
        table.add_column(head, overflow="fold")
    rows = conversion.rows()
    shown = (
        rows if len(rows) <= ROWS else list({(row[1], row[2].partition("(")[0]): row for row in rows[::-1]}.values())
    )
    for row in sorted(shown, key=rows.index):
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"[dim]one of each kind; all {len(rows)} are in the record[/dim]")
    for note in conversion.different_notes():
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(conversion.summary(), highlight=False, markup=False)
    console.print()
