"""Comparisons as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normfree.benchmark.timing import shown, versions


def markdown(results: Sequence[dict[str, Any]], title: str, remarks: str = "") -> str:
    """Return a page: the promises and whether they were kept, then a table per comparison.

    Args:
        results: as ``measure`` returns them; at least one.
        title: of the page.
        remarks: on the promises; below them, in Markdown.
    """
    assert results
    lines = [f"# {title}", "", f"{versions(results[0]['hardware'])}; seed {results[0]['seed']}.", ""]
    if any(result["targets"] for result in results):
        lines += promises(results)
    if remarks:
        lines += ["", remarks.rstrip()]
    for result in results:
        lines += ["", f"## {result['title']}", "", *comparison(result)]
    return "\n".join(lines) + "\n"


def promises(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of all targets, and of what the limit makes of them."""
    head = ["comparison", "ratio", "target", "measured, median (quartiles)", "", "the limit in its place"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        for target in result["targets"]:
            measured = target["measured"]
            verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
            found = "–" if measured is None else _found(measured, target["quantity"])
            ratio = f"{target['of']} / {target['over']}, {target['quantity']}"
            cells = [result["title"], ratio, f"≤ {target['at_most']:.2f}", found, verdict, _bound(result, target)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bound(result: dict[str, Any], target: dict[str, Any]) -> str:
    """Return the ratio of times that no network of this graph can go below here: its limit's; nothing if unknown."""
    contenders = result["contenders"]
    limit = next((found for found in contenders.values() if "limit" in found["steps"] and "seconds" in found), None)
    over = contenders.get(target["over"], {})
    if target["quantity"] != "time" or limit is None or "seconds" not in over or "limit" in over["steps"]:
        return ""
    of = contenders[target["of"]]
    same = {*limit["steps"]} - {"limit"} == {*of["steps"]} - {"folded"}
    if not same or limit["source"] != of["source"]:
        return ""
    return f"{limit['seconds']['median'] / over['seconds']['median']:.3f}"


def comparison(result: dict[str, Any]) -> list[str]:
    """Return the lines of one comparison's table."""
    training = result["task"] == "training"
    head = ["", "milliseconds, median (quartiles)", "first / this"] + ["peak memory, MiB"] * training
    size = result["image_size"]
    setting = f"{result['batch_size']}×{result.get('channels', 3)}×{size}×{size}, {result['precision']}"
    lines = [
        f"{setting}, on {result['device']}; {result['rounds']} interleaved rounds, "
        f"load {result['hardware']['load']:.2f} at the start.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    first = next((c["seconds"]["median"] for c in result["contenders"].values() if "seconds" in c), None)
    for label, found in result["contenders"].items():
        if "failed" in found:
            lines.append(f"| {label} | {found['failed']} " + "| – " * (len(head) - 2) + "|")
            continue
        milliseconds = {key: 1e3 * value for key, value in found["seconds"].items()}
        cells = [label, shown(milliseconds, 2), f"{first / found['seconds']['median']:.3f}"]
        if training:
            cells.append(f"{found['peak_bytes'] / 2**20:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _found(measured: dict[str, float], quantity: str) -> str:
    """Return a ratio in words: memory is counted, and has no spread."""
    return shown(measured) if quantity == "time" else f"{measured['median']:.3f}"
