"""The page of a training run's signal: the figure with its slider, findings over the steps, the last numbers.

``monitor_page.html`` beside this file is the page's body.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from normfree.signal.history import Episode, SignalHistory
from normfree.signal.monitor_figure import MOST_FRAMES, slider_figure
from normfree.signal.page import filled, page_file, write_page
from normfree.signal.panels import caption_of
from normfree.signal.report_tables import numbers_table, settings_table


def write_monitor_report(history: SignalHistory, path: str | Path, *, title: str) -> Path:
    """Write the page of a history as one HTML file of about 5 MB that opens without a network.

    Args:
        history: at least one record.
        path: where to write it; an earlier page is replaced as a whole or not at all.
        title: heading of the page.

    Returns:
        The path.

    Raises:
        ValueError: for a history without records.
        ImportError: if plotly is not installed.
    """
    figure = slider_figure(history)
    last = history.signals[-1]
    parts = {
        "title": escape(title),
        "measured": "\n  ".join(f'<p class="measured">{escape(line)}</p>' for line in caption_of([last])),
        "records": escape(_records(history)),
        "findings": _findings(history),
        "tables": numbers_table(last),
        "step": str(history.steps[-1]),
        "configuration": settings_table([last]),
    }
    body = filled(page_file("monitor_page.html"), parts)
    data = {"chart": json.loads(figure.to_json())}
    return write_page(path, title=title, body=body, data=data, script=page_file("figures.js"))


def _records(history: SignalHistory) -> str:
    count, steps = len(history), history.steps
    told = f"{history.signals[-1].model}: {count} record{'' if count == 1 else 's'}, steps {steps[0]} to {steps[-1]}"
    return told if count <= MOST_FRAMES else f"{told}; {MOST_FRAMES} of them, evenly spread, are on the slider"


def _findings(history: SignalHistory) -> str:
    items = "".join(_finding(episode) for episode in history.episodes())
    return f'<ol class="findings-list">{items}</ol>' if items else '<p class="no-finding">Nothing to report.</p>'


def _finding(episode: Episode) -> str:
    found = episode.finding
    span = f"step {episode.first}" if episode.first == episode.last else f"steps {episode.first} to {episode.last}"
    when = f"{span}, the last record" if episode.ongoing else f"{span}, then gone"
    return (
        f'<li class="finding {escape(found.severity)}"><div class="finding-head">'
        f'<span class="severity">{escape(found.severity)}: {escape(found.kind.replace("_", " "))}</span>'
        f"<span>{escape(when)}</span></div>"
        f'<p>{escape(found.message)}</p><p class="remedy">{escape(found.remedy)}</p></li>'
    )
