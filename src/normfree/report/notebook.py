"""What a notebook shows of a result: what came of it, its findings, a still plot and its numbers.

``_repr_html_`` of the results gives this HTML to Jupyter, VS Code and Colab. It takes the colours of the page around it
and requests nothing; ``notebook.css`` is its style. Without matplotlib the plot is left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import TypeVar

from normfree.report.page import finding_item, findings_list, numbers_tables, page_file
from normfree.report.plot import plot_signals
from normfree.signal.monitor import SignalHistory
from normfree.signal.propagation import SignalPropagation

Row = TypeVar("Row")

MOST_ROWS = 100
"""Rows of a table in a notebook, which keeps them in its file; of more the first and the last are shown."""

FEW_ROWS = 12
"""Of a table of texts that is not folded away."""

MOST_RECORDS = 4
"""Curves of a history that are told apart in one still plot."""

DPI = 144
"""Of the plot, for screens with two pixels to the one of CSS: 80 kB for five panels."""


def signal_html(signal: SignalPropagation) -> str:
    """One measurement: verdict, findings, plot, and the numbers folded away (open where there is no plot)."""
    items = [finding_item(found, escape(_place(signal, found.block))) for found in signal.findings]
    picture = _picture([signal], f"Signal propagation plot of {signal.model}")
    told = f"{signal.size}, mode {signal.mode}: {signal.verdict}"
    told += f" ({signal.not_measured})" if signal.unmeasured else ""
    return _frame(signal.model, told, findings_list(items), picture, _numbers(signal, folded=bool(picture)))


def history_html(history: SignalHistory) -> str:
    """The signal through training: findings with their steps, a few records in one plot, the last one's numbers."""
    if not history:
        return _frame("Signal through training", "no record yet")
    items = [finding_item(one.finding, escape(one.span)) for one in history.episodes()]
    records = [signal.renamed(f"step {step}") for step, signal in history.thinned(MOST_RECORDS)]
    last = history.signals[-1]
    picture = _picture(records, f"Signal propagation plots of {last.model} at {len(records)} steps of its training")
    numbers = _numbers(records[-1], folded=bool(picture))
    return _frame(last.model, history.extent, findings_list(items), picture, numbers)


def table_html(
    title: str, told: str, label: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A table of texts.

    Args:
        title: what it is of.
        told: what came of it, in a line.
        label: what the rows are, after their number.
        heads: of the columns.
        rows: their cells; folded away where there are many.
        notes: a line each, above the table.
    """
    shown, left_out = _ends(rows)
    noted = "".join(f"<li>{escape(note)}</li>" for note in [*notes, *left_out])
    head = "".join(f"<th scope=col class=text>{escape(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in shown)
    table = f"<table class=numbers><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'
    opened = " open" if len(rows) <= FEW_ROWS else ""
    folded = f"<details{opened}><summary>{len(rows)} {escape(label)}</summary>{scroll}</details>"
    return _frame(title, told, f"<ul>{noted}</ul>" if noted else "", folded if rows else "")


def _cell(text: str) -> str:
    return f'<td class="text{" long" if len(text) > 40 else ""}">{escape(text)}</td>'


def _frame(title: str, told: str, *parts: str) -> str:
    head = f"<p><strong>{escape(title)}</strong>: {escape(told)}</p>"
    return f'<div class="normfree"><style>{page_file("notebook.css")}</style>{head}{"".join(parts)}</div>'


def _picture(signals: Sequence[SignalPropagation], alternative: str) -> str:
    """The plot as an image within the page; nothing where matplotlib is missing."""
    try:
        figure = plot_signals(signals, title="")
    except ImportError:
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    return f'<img width="{width}" alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def _numbers(signal: SignalPropagation, *, folded: bool) -> str:
    (blocks, left_out), (layers, others) = _ends(signal.blocks), _ends(signal.layers)
    tables = numbers_tables(replace(signal, blocks=tuple(blocks), layers=tuple(layers)))
    said = "".join(f"<p>{escape(line)}</p>" for line in [*left_out, *others])
    return said + (tables if folded else tables.replace("<details>", "<details open>", 1))


def _ends(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The first and last of many rows, and a line that says how many are left out."""
    if len(rows) <= MOST_ROWS:
        return list(rows), []
    half = MOST_ROWS // 2
    return [*rows[:half], *rows[-half:]], [f"{len(rows) - 2 * half} rows in the middle are left out"]


def _place(signal: SignalPropagation, block: int | None) -> str:
    """Where a finding shows, of the plot as a whole or of one block."""
    return "whole model" if block is None else signal.blocks[block].place
