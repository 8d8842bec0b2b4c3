"""The report of a training run: curves, the signal through training, confusion, configuration; opens offline.

``training_page.html`` and ``.css`` beside this file are the page's body and its own style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from normfree.report.monitor_page import ROUNDED, episodes_list, records_figure, records_spec
from normfree.report.page import figures_script, fill, flat_settings, page_file, settings_table, write_page
from normfree.report.panels import shorten
from normfree.signal import SignalHistory

Row = Mapping[str, float | None]

GRID = "rgba(128,128,128,0.22)"
COLORS = ("#0b6fb8", "#c8501e")
MOST_NAMED = 40
"""Classes whose names stand at the confusion matrix."""
LONGEST_NAME = 32
"""Characters of such a name."""

UNRECORDED = "The signal was not recorded: --signal-every 0, or a sharded network."
RECORDED = "Drag the slider, move it by the arrow keys, or let it play."
READ_SIGNAL = (
    "The signal: the first images of the evaluation went through the network every so often. After every block the "
    "panels show the squared mean of the activation, its variance, and the variance of the branch before it was scaled "
    "and added. The grey line is the first record, and the axes hold for all of them. "
    f"{ROUNDED} The findings are those that are ill at any step: values that are not finite, a variance that grows "
    "exponentially with depth, channels no input moves, inputs that become alike, and branches that give nothing."
)


def write_training_report(
    path: Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    training: Sequence[Row],
    evaluation: Sequence[Row],
    history: SignalHistory | None,
) -> Path:
    """Write the report of a run, as one file that opens without a network.

    Args:
        path: of the page.
        config: what ``config.json`` holds.
        metrics: what ``metrics.json`` holds.
        training: rows of ``train.csv``.
        evaluation: rows of ``eval.csv``.
        history: of the network's signal, if it was recorded.

    Returns:
        The path.
    """
    figures = curve_figures(training, evaluation)
    labels = {f"{name}_label": escape(_curves_label(figure)) for name, figure in figures.items()}
    if history:
        figures["signal"] = records_spec(history)
    found, confusion = metrics["evaluation"], ""
    if found is not None:
        figures["confusion"] = confusion_figure(found["confusion"], config["derived"]["classes"])
        size = f"{len(config['derived']['classes'])} true classes by as many predicted"
        confusion = f'<div id="confusion" role="figure" aria-label="Confusion matrix: {size}"></div>'
    title = f"Training run {shorten(path.absolute().parent.name, 64)}"
    parts = {
        "title": escape(title),
        "described": escape(_described(config, metrics)),
        "figures": _figures(metrics, training),
        "signal": f"<p>{RECORDED if history else UNRECORDED}</p>"
        + (records_figure(history, "signal") if history else ""),
        "findings": episodes_list(history) if history else f"<p>{UNRECORDED}</p>",
        "read_signal": f"<p>{READ_SIGNAL}</p>" if history else "",
        "confusion": confusion,
        **labels,
        "rate_heading": escape(figures["rate"]["layout"]["yaxis"]["title"]["text"]),
        "confused": escape(_top_confusions(found, config["derived"]["classes"])),
        "configuration": settings_table([("value", flat_settings(config))]),
    }
    return write_page(
        path,
        title=title,
        body=fill(page_file("training_page.html"), parts),
        data=figures,
        script=figures_script(),
        style=page_file("training_page.css"),
    )


def curve_figures(training: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, Any]:
    """Return the four figures of the curves, as plotly's JSON."""
    loss = [_line("training", training, "loss", COLORS[0]), _line("test", evaluation, "loss", COLORS[1])]
    accuracy = [_line("top-1", evaluation, "top1", COLORS[0], 100)]
    if any(row.get("top5") is not None for row in evaluation):
        accuracy.append(_line("top-5", evaluation, "top5", COLORS[1], 100))
    rate = [_line("learning rate", training, "learning_rate", COLORS[0])]
    clips = any(row.get("clip_fraction") is not None for row in training)
    if clips:
        rate.append(_line("clipped fraction", training, "clip_fraction", COLORS[1]))
    speed = [_line("images / s", training, "images_per_second", COLORS[0])]
    speed.append({**_line("gradient norm", training, "gradient_norm", COLORS[1]), "yaxis": "y2"})
    # Plotly would set the ticks of a second axis level with those of the first, at whatever numbers lie there.
    second = {"overlaying": "y", "side": "right", "showgrid": False, "tickmode": "auto", "automargin": True}
    norms = [value for value in speed[1]["y"] if value > 0]
    decades = math.log10(max(norms) / min(norms)) if norms else 0
    # 1, 2 and 5 of each decade, or whole decades; within one decade a linear axis has rounder ticks. Without a format
    # plotly labels what lies between decades by its first digit alone: 6 for 0.006.
    if decades > 1:
        second |= {"type": "log", "tickformat": ".2~g", "dtick": "D2" if decades < 3 else math.ceil(decades / 5)}
    second["title"] = {"text": f"gradient norm{', log scale' if decades > 1 else ''}"}
    return {
        "loss": {"data": loss, "layout": _layout("Loss, nats")},
        "accuracy": {"data": accuracy, "layout": _layout("Accuracy, %")},
        "rate": {"data": rate, "layout": _layout("Learning rate and clipped fraction" if clips else "Learning rate")},
        "speed": {"data": speed, "layout": {**_layout("Images per second"), "yaxis2": second}},
    }


def confusion_figure(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix as shares of each true class, as plotly's JSON."""
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    few = len(names) <= MOST_NAMED
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": shares,
        "customdata": [list(row) for row in confusion],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "rgba(11,111,184,0.04)"], [0.02, "rgba(11,111,184,0.25)"], [1, "rgb(11,111,184)"]],
        "hovertemplate": "true %{y}, predicted %{x}: %{customdata} (%{z:.1%})<extra></extra>",
        "colorbar": {"tickformat": ".0%", "thickness": 12, "orientation": "h", "y": 1, "yanchor": "bottom", "len": 0.5},
        "xgap": 1 if few else 0,
        "ygap": 1 if few else 0,
    }
    axis: dict[str, Any] = {"showgrid": False}
    if few:  # not as categories, of which plotly loses those that are called as a property of JavaScript's objects
        named = [escape(name) for name in names]
        counts = [zip(row, named, strict=True) for row in confusion]
        trace["customdata"] = [[(true, *cell) for cell in row] for true, row in zip(named, counts, strict=True)]
        trace["hovertemplate"] = (
            "true %{customdata[0]}, predicted %{customdata[2]}: %{customdata[1]} (%{z:.1%})<extra></extra>"
        )
        labels = [escape(shorten(name, LONGEST_NAME)) for name in names]
        axis |= {"tickangle": 0, "tickvals": list(range(len(names))), "ticktext": labels}
    layout = _layout("")
    layout |= {"height": 560, "showlegend": False}
    layout["xaxis"] = {**axis, "title": {"text": "predicted class"}, "constrain": "domain"}
    layout["yaxis"] = {**axis, "title": {"text": "true class"}, "autorange": "reversed", "automargin": True}
    layout["yaxis"] |= {"scaleanchor": "x", "constrain": "domain"}
    return {"data": [trace], "layout": layout}


def _curves_label(figure: Mapping[str, Any]) -> str:
    """What a figure of curves shows, with the last value of each, for who does not see it."""
    last = [f"{trace['name']} {trace['y'][-1]:.4g} in the end" for trace in figure["data"] if trace["y"]]
    title = figure["layout"]["yaxis"]["title"]["text"]
    return f"{title}, over the optimizer step: {', '.join(last) or 'no values'}"


def _line(name: str, rows: Sequence[Row], column: str, color: str, factor: float = 1) -> dict[str, Any]:
    shown = [(row["step"], value * factor) for row in rows if (value := row.get(column)) is not None]
    finite = [(step, value) for step, value in shown if value - value == 0]
    few = len(finite) <= 60
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": name,
        "x": [step for step, _ in finite],
        "y": [value for _, value in finite],
        "line": {"color": color, "width": 2},
        "marker": {"size": 5},
    }


def _layout(title: str) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zerolinecolor": GRID}
    return {
        "height": 300,
        "margin": {"l": 60, "r": 16, "t": 30, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12},
        "hovermode": "x",
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": "optimizer step"}},
        "yaxis": {**axis, "title": {"text": title}},
    }


def _described(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    derived, chosen = config["derived"], config["config"]
    return (
        f"{chosen['model']}, {derived['parameters']:,} parameters, on {derived['data']['source']}; "
        f"{metrics['step']} of {derived['steps']} steps of {chosen['batch_size']} images, seed {metrics['seed']}; "
        f"{derived['precision']} on {derived['ranks']} × {derived['device']}"
    )


def _figures(metrics: Mapping[str, Any], training: Sequence[Row]) -> str:
    found = metrics["evaluation"] or {}
    speeds = sorted(row["images_per_second"] or 0 for row in training)
    told = {
        "top-1 accuracy": _percent(found.get("top1")),
        "best of all evaluations": _percent(metrics.get("best_top1")),
        "seconds of training": f"{metrics['seconds']:,.1f}",
        "images per second, median": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "–",
        "test loss": "–" if found.get("loss") is None else f"{found['loss']:.4f}",
        "top-5 accuracy": _percent(found.get("top5")),
        "steps skipped": str(metrics["skipped_steps"]),
        "bad images": str(len(metrics["bad_images"])),
    }
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told.items())


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _top_confusions(found: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """The pairs that are taken for each other most often, in words."""
    if found is None:
        return "There was no evaluation at the last step."
    pairs = [
        (count, names[true], names[predicted])
        for true, row in enumerate(found["confusion"])
        for predicted, count in enumerate(row)
        if true != predicted and count
    ]
    worst = [f"{true} for {predicted} ({count})" for count, true, predicted in sorted(pairs, reverse=True)[:5]]
    taken = f" Most often it takes {', '.join(worst)}." if worst else " It makes no mistake."
    return f"{found['examples']:,} images; each row is a true class.{taken}"
