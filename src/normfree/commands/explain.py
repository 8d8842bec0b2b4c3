"""``normfree explain``: the documentation's page on signal propagation and findings, a section at a time.

The wheel has the page beside the package (``pyproject.toml`` puts it there); a clone reads it where it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from normfree.commands.shared import Terminal
from normfree.common.checks import invalid, suggestion

PACKAGE = Path(__file__).parents[1]
PAGE = "docs/signal.md"


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Print what the documentation says of a kind of finding, or list what it has sections of."""

    section: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FINDING")] = ()
    """Kind of a finding, such as mean_shift, or another heading of the page; without it, all of them are listed."""

    def run(self, console: Terminal) -> None:
        """Print the section."""
        sections = read_sections()
        if not self.section:
            console.say("\n".join(sections))
            return
        word = _slug(" ".join(self.section))
        if word not in sections:
            raise invalid("section", " ".join(self.section), "has no section", suggestion(word, sections))
        console.say(sections[word])


def read_sections() -> dict[str, str]:
    """Return the sections of the page by their headings, in lower case with underscores, each with those below it."""
    places = (PACKAGE / PAGE, PACKAGE.parents[1] / PAGE)  # of a wheel, of a clone
    text = next(place for place in places if place.is_file()).read_text(encoding="utf-8")
    headings = list(re.finditer(r"^(##+) (.+)$", text, re.MULTILINE))
    found = {}
    for number, heading in enumerate(headings):
        behind = (each.start() for each in headings[number + 1 :] if len(each[1]) <= len(heading[1]))
        found[_slug(heading[2])] = text[heading.start() : next(behind, len(text))].strip()
    return found


def _slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")
