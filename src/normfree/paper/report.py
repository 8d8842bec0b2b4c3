"""A table of the paper as a page: what was measured, and each claim beside the paper's number and ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normfree.common.files import write_atomically

Verdict = Literal["agrees", "does not agree", "cannot be tested at this scale"]

NOT_AT_HAND = "not at hand"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: the claim.
        paper: the paper's own number, in words, or "not at hand".
        ours: the number measured here, in words.
        verdict: whether it agrees.
    """

    text: str
    paper: str
    ours: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of measurements.

    Attributes:
        title: above it.
        columns: headings; the first is that of the rows' names.
        rows: one cell a column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """The table as Markdown."""
        head = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        title = [f"## {self.title}", ""] if self.title else []
        return [*title, *head, *(f"| {' | '.join(row)} |" for row in self.rows), ""]


def write_table(
    out: Path,
    name: str,
    *,
    title: str,
    about: Sequence[str],
    claims: Sequence[Claim],
    grids: Sequence[Grid],
    data: Any,
) -> list[Path]:
    """Write ``NAME.md`` and ``NAME.json``, each as a whole or not at all.

    Args:
        out: folder, made if it is missing.
        name: of the table, such as "table1".
        title: of the page.
        about: lines that say how it was measured: command, hardware, versions, seeds.
        claims: in the order of the page.
        grids: the numbers behind them.
        data: everything measured, as JSON takes it.

    Returns:
        The paths, the page last.
    """
    lines = [f"# {title}", "", *about, ""]
    if claims:
        lines += ["| claim | the paper (ImageNet) | here | |", "|---|---|---|---|"]
        lines += [f"| {claim.text} | {claim.paper} | {claim.ours} | {claim.verdict} |" for claim in claims]
        lines += [""]
    for grid in grids:
        lines += grid.lines()
    stored = write_atomically(out / f"{name}.json", json.dumps(data, indent=1) + "\n")
    return [stored, write_atomically(out / f"{name}.md", "\n".join(lines).rstrip() + "\n")]
