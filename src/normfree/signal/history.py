"""Signal propagation plots of one model over the steps of its training: the record, its findings, its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normfree.common.files import read_json, refused, structured, write_atomically
from normfree.common.text import first_line, one_line, quoted
from normfree.signal.propagation import SEVERITIES, Finding, SignalPropagation

SCHEMA = 1

# Training may shift means, shrink branches and let the signal fade without harm: learnt gains and weights want it
# so, and the thresholds of those findings are of networks at initialisation. These stay illnesses at any step.
TRAINING_KINDS = ("non_finite", "explosion", "dead_channels", "correlation_collapse", "silenced_branch")

_NUMBER = "$float"  # how JSON writes a number that it has no word for


@dataclass(frozen=True)
class Episode:
    """A finding that lasted over some of the recorded steps.

    Attributes:
        first: step at which it was first seen.
        last: last step at which it was seen.
        ongoing: whether that is the last step recorded.
        finding: as it was when it was at its most severe.
    """

    first: int
    last: int
    ongoing: bool
    finding: Finding


class SignalHistory(list[tuple[int, SignalPropagation]]):
    """A list of (step, signal propagation plot), in the order of the steps."""

    @property
    def steps(self) -> list[int]:
        """The recorded steps."""
        return [step for step, _ in self]

    @property
    def signals(self) -> list[SignalPropagation]:
        """The plots."""
        return [signal for _, signal in self]

    def episodes(self) -> list[Episode]:
        """The findings that matter in training, see ``TRAINING_KINDS``, and the steps they lasted; the worst first.

        A branch that is silent at step 0 starts so on purpose, and counts from the next record on. Infos, and what
        the plot at initialisation alone tells (mean shift, branch variance, attenuation), are left to the plots.
        """
        found: list[Episode] = []
        for kind in TRAINING_KINDS:
            open_: Episode | None = None
            for step, signal in self:
                finding = next((f for f in signal.findings if f.kind == kind and f.severity != "info"), None)
                if finding is None or (kind == "silenced_branch" and step == 0):
                    open_ = None
                    continue
                if open_ is None:
                    found.append(Episode(step, step, False, finding))
                else:
                    worst = min(open_.finding, finding, key=lambda f: SEVERITIES.index(f.severity))
                    found[-1] = Episode(open_.first, step, False, worst)
                open_ = found[-1]
            if open_ is not None:
                found[-1] = Episode(open_.first, open_.last, True, open_.finding)
        return sorted(found, key=lambda episode: (SEVERITIES.index(episode.finding.severity), episode.first))

    def thinned(self, most: int) -> SignalHistory:
        """At most so many of the records, evenly spread, the first and the last among them."""
        if len(self) <= most:
            return self
        return SignalHistory(self[round(i * (len(self) - 1) / (most - 1))] for i in range(most))

    def to_dict(self) -> dict[str, Any]:
        """Everything, in dicts, lists, strings and numbers that JSON has; :meth:`from_dict` gives the same back."""
        records = [{"step": step, "signal": _encoded(asdict(signal))} for step, signal in self]
        return {"schema": SCHEMA, "history": records}

    def to_json(self, path: str | Path) -> Path:
        """Write :meth:`to_dict`; never leaves a half-written file. Returns the path."""
        return write_atomically(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> SignalHistory:
        """Take back what :meth:`to_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        try:
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {quoted(document['schema'])} is not {SCHEMA}")
            records = [structured(_Record, _decoded(record), finite=False) for record in document["history"]]
            return cls((record.step, record.signal) for record in records)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"document: it is no signal history ({one_line(error)}); give what to_dict returned"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> SignalHistory:
        """Read what :meth:`to_json` wrote, exactly.

        Raises:
            ValueError: if the file is missing or something else.
        """
        document = read_json(path)
        try:
            return cls.from_dict(document)
        except ValueError as error:
            raise refused("path", path, first_line(error), "give a file of to_json") from error

    def figure(self) -> Any:
        """The plots as one plotly figure with a slider over the steps, to embed in a page of one's own."""
        from normfree.report.monitor_page import slider_figure

        return slider_figure(self)

    def to_html(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write the figure, findings and last numbers as one HTML file that opens offline; returns the path."""
        from normfree.report.monitor_page import write_monitor_report

        return write_monitor_report(self, path, title=title)


@dataclass(frozen=True)
class _Record:
    """One plot, as it is written."""

    step: int
    signal: SignalPropagation


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}
    if isinstance(value, Mapping):
        return {str(key): _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return float(value[_NUMBER]) if set(value) == {_NUMBER} else {key: _decoded(v) for key, v in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, (list, tuple)) else value
