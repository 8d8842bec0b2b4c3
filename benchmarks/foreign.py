"""Other people's architectures: what normfree says of each, and does to it.

``python -m benchmarks.foreign [--only PATTERN ...] [--out results/foreign] [--fresh] [--onnx] [--workers 2]`` writes
``table.json`` and this page. The libraries are installed by ``pip install --no-deps -r constraints-foreign.txt`` beside
the pinned ones of the project; all models have random weights and small sizes, and nothing is downloaded. Each row is
measured in a process of its own, of one thread, that is ended after ten minutes; rows already in ``table.json`` are
kept, so that an interrupted run goes on.

*Blocks* are the residual additions found, and those that the authors' code makes (*+ n*: fusions of two paths, which
may be found or not). *Verdict* is what ``spp`` says at random initialisation: healthy where no finding is an error;
*expected* is what an expert expects, with the reason below. *Pretrained* is the conversion that keeps the function: its
largest error relative to the largest output, with running statistics, gains and biases drawn at random, and the norms
left. *Fresh* is the conversion for training anew: norms before and left, its verdict, and the variance of its output in
training mode beside the original's, of several outputs that which differs most. *Step* is one step of SGD on the mean
square of the outputs, *fold* the largest relative difference of the folded models, fresh and pretrained, *ONNX* that of
the exported file (``--onnx``). *Refused* is an error that names what is wrong, *crash* any other; both are below.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.foreign_case import Case
from benchmarks.foreign_checks import checked, exported
from benchmarks.rows import page, run_forked, stored_rows, where_measured
from normfree.benchmark import hardware, versions
from normfree.signal import write_atomically

LIMIT = 600
"""Seconds for one part of one row."""

QUIET = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "TRANSFORMERS_VERBOSITY": "error"}
"""The environment of all rows: no library asks a hub, or speaks."""

PRELOADED = {"transformers": "transformers.modeling_utils", "diffusers": "diffusers.models.modeling_utils"}
"""What many rows import, which the process that they are forks of imports once."""


def cases() -> list[Case]:
    """Every row of the table, in its order."""
    from benchmarks import foreign_images, foreign_science, foreign_series, foreign_transformers

    parts = (foreign_images, foreign_transformers, foreign_series, foreign_science)
    return [case for part in parts for case in part.CASES]


def is_healthy(findings: list[list[str]]) -> bool:
    """Whether no finding is an error."""
    return all(severity != "error" for severity, _, _ in findings)


def table(rows: list[dict[str, Any]], described: dict[str, Case]) -> str:
    """The Markdown page: totals, one line a model, then the reasons of each."""
    lines = ["# Other people's architectures", "", *__doc__.strip().splitlines()[2:], ""]
    lines += [
        "| total | |",
        "|---|---|",
        *(f"| {what} | {number} |" for what, number in _totals(rows, described).items()),
    ]
    lines += [
        "",
        "| model | field | k param. | blocks: found, made | verdict | expected | pretrained: error | left "
        "| fresh: norms, left | verdict | variance: before, after | step | fold | ONNX |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row, described[row["model"]]) for row in rows),
        "",
        "## Reasons",
        "",
        *(line for row in rows for line in _reasons(row, described[row["model"]])),
        "## Where",
        "",
        *where_measured("Measured", rows),
        "- Versions: "
        + ", ".join(sorted({f"{described[row['model']].package} {row['version']}" for row in rows if "version" in row}))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _totals(rows: list[dict[str, Any]], described: dict[str, Case]) -> dict[str, Any]:
    measured = [row for row in rows if "findings" in row]
    fresh = [row["fresh"] for row in rows if "fresh" in row]
    kept = [row["pretrained"] for row in rows if "pretrained" in row]
    pairs = [one["variances"] for one in fresh if one.get("variances")]
    exports = [row["onnx"] for row in rows if "onnx" in row]
    return {
        "architectures, of libraries": f"{len(rows)}, {len({described[row['model']].package for row in rows})}",
        "measured by `spp`": len(measured),
        "with as many blocks as the authors' code makes": sum(map(_has_stated, measured)),
        "with the verdict that an expert expects": sum(
            is_healthy(row["findings"]) == (described[row["model"]].verdict == "healthy") for row in measured
        ),
        "pretrained conversions, within 1e-4": f"{len(kept)}, {sum(_at_most(one['error'], 1e-4) for one in kept)}",
        "fresh conversions, without a norm left": f"{len(fresh)}, {sum(not one['left'] for one in fresh)}",
        "of the fresh, healthy": sum("findings" in one and is_healthy(one["findings"]) for one in fresh),
        "of the fresh, output variance in training within 10 of the original's": (
            f"{sum(_is_near(*pair) for pair in pairs)} of {len(pairs)}"
        ),
        "of the fresh, one step finite": sum(one.get("step") == "finite" for one in fresh),
        "folds within 1e-4": f"{sum(_at_most(one.get('fold'), 1e-4) for one in fresh + kept)} of {len(fresh + kept)}",
        "ONNX files that agree": f"{sum('error' in one for one in exports)} of {len(exports)}",
    }


def _has_stated(row: dict[str, Any]) -> bool:
    """Whether all residual additions were found, and no others; a fusion may be one."""
    return 0 <= row.get("blocks", -1) - row["stated"] <= row["fusions"]


def _at_most(error: float | None, most: float) -> bool:
    return error is not None and error <= most


def _is_near(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and before / 10 <= after <= 10 * before


def _line(row: dict[str, Any], case: Case) -> str:
    if "spp" not in row.get("seconds", {}):
        why = row.get("aborted") or row["failed"].get("build")
        return f"| {case.name} | {case.field} | {why} |" + " |" * 11
    fresh, kept, onnx = row.get("fresh"), row.get("pretrained"), row.get("onnx")
    found = row.get("blocks", "–")
    cells = [
        case.name,
        case.field,
        row["thousands"],
        f"{found if _has_stated(row) else f'**{found}**'}, {row['stated']}"
        + f" + {row['fusions']}" * bool(row["fusions"]),
        _verdict(row, "spp", row.get("findings")),
        case.verdict,
        _failed(row, "pretrained") if kept is None else _number(kept["error"]),
        "–" if kept is None else _left(kept),
        _failed(row, "fresh") if fresh is None else f"{fresh['norms']}, {_left(fresh)}",
        "–" if fresh is None else _verdict(row, "fresh spp", fresh.get("findings")),
        "–" if fresh is None else _pair(row, fresh),
        "–" if fresh is None else fresh.get("step") or _failed(row, "step"),
        _folds(row, fresh, kept),
        "–" if onnx is None else _number(onnx["error"]) if "error" in onnx else "no",
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _failed(row: dict[str, Any], stage: str) -> str:
    """A short word for what a part raised; the reasons have the message."""
    message = row["failed"].get(stage, "–")
    return "crash" if message.startswith("crash") else "refused" if message != "–" else "–"


def _verdict(row: dict[str, Any], stage: str, found: list[list[str]] | None) -> str:
    if found is None:
        return _failed(row, stage)
    kinds = [f"{kind} ({severity})" for severity, kind, _ in found if severity != "info"]
    return ("healthy" if is_healthy(found) else "sick") + (f": {', '.join(kinds)}" if kinds else "")


def _left(record: dict[str, Any]) -> int:
    return sum(number for number, _, _ in record["left"])


def _pair(row: dict[str, Any], fresh: dict[str, Any]) -> str:
    pair = fresh.get("variances")
    if pair is None:
        return _failed(row, "training")
    return ", ".join(map(_number, pair)) if pair else "constant"


def _folds(row: dict[str, Any], fresh: dict[str, Any] | None, kept: dict[str, Any] | None) -> str:
    parts = [(fresh, "fold"), (kept, "fold pretrained")]
    return (
        ", ".join(
            _number(part["fold"]) if "fold" in part else _failed(row, stage)
            for part, stage in parts
            if part is not None
        )
        or "–"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def _reasons(row: dict[str, Any], case: Case) -> list[str]:
    """One paragraph: how the blocks are counted, what is expected and why, why norms are left, what was refused."""
    lines = [
        f"**{case.name}**",
        "",
        f"- Blocks: {case.counted or 'none'}.",
        f"- Expected to be {case.verdict}: {case.because}.",
    ]
    for start in ("fresh", "pretrained"):
        for number, was, reason in row.get(start, {}).get("left", []):
            lines.append(f"- Left ({start}): {number} {was}: {reason}.")
        lines += [f"- Note ({start}): {note}." for note in row.get(start, {}).get("notes", [])]
    lines += [f"- {stage.capitalize()}: {message}" for stage, message in row.get("failed", {}).items()]
    onnx = row.get("onnx", {})
    if onnx.get("reason") or onnx.get("aborted"):
        lines.append(f"- ONNX: {onnx.get('reason') or onnx.get('aborted')}")
    return [*lines, ""]


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.foreign", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="shell patterns of names, such as 'smp:*'")
    parser.add_argument("--out", type=Path, default=Path("results/foreign"))
    parser.add_argument("--fresh", action="store_true", help="measure again those of --only that table.json has")
    parser.add_argument("--onnx", action="store_true", help="also export each converted model")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, of one thread each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ |= QUIET
    warnings.filterwarnings("ignore")
    _run_all(options, say)


def _run_all(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Measure every row that is not there yet, then export those that were not."""
    path, here = options.out / "table.json", versions({key: value for key, value in hardware().items() if key != "gpu"})
    described = {case.name: case for case in cases()}
    asked = [name for name in described if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    if not asked:
        sys.exit(f"benchmarks.foreign: --only {' '.join(options.only)}: no such row; see benchmarks/foreign_*.py")
    again = set(asked) if options.fresh else set[str]()
    rows = {row["model"]: row for row in stored_rows(path) if row["model"] in described and row["model"] not in again}

    def write(name: str) -> None:
        say(_line(rows[name], described[name]))
        ordered = [rows[each] for each in described if each in rows]
        write_atomically(path, page(ordered))
        write_atomically(options.out / "README.md", table(ordered, described))

    for package in {described[name].package for name in asked} & set(PRELOADED):
        import_module(PRELOADED[package])

    def run(part: Callable[[Case], dict[str, Any]], waiting: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        return run_forked({name: partial(part, described[name]) for name in waiting}, options.workers, LIMIT)

    for name, row in run(checked, [name for name in asked if "aborted" in rows.get(name, {"aborted": ""})]):
        rows[name] = {"model": name, "machine": here} | row
        write(name)
    for name, row in run(exported, [name for name in asked if options.onnx and _is_exportable(rows[name])]):
        rows[name]["onnx"] = row
        write(name)


def _is_exportable(row: dict[str, Any]) -> bool:
    """Whether something was converted that has not been exported yet."""
    return ("fresh" in row or "pretrained" in row) and "aborted" in row.get("onnx", {"aborted": ""})


if __name__ == "__main__":
    main()
