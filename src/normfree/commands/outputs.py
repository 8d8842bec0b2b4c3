"""The files a command leaves, and the folder it leaves them in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from normfree.report.plot import plot_signals
from normfree.report.signal_page import write_report
from normfree.signal import SignalPropagation, write_json


def check_folder(out: Path) -> None:
    """Refuse a folder that could not be written to, before any work is done; nothing is made yet.

    Raises:
        ValueError: naming the folder and why.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"out: {str(existing)!r} is a file; give a folder")
    if existing.is_relative_to("/proc") or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out: {str(existing)!r} cannot be written to; give another folder")


def write_signals(signals: Sequence[SignalPropagation], out: Path) -> list[Path]:
    """Write spp.json, spp.png and report.html, each whole or not at all; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    plot_signals(signals, out / "spp.png")
    return [write_json(out / "spp.json", signals), out / "spp.png", write_report(signals, out / "report.html")]
