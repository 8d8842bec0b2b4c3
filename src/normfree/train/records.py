"""What a run records: its curves as CSV files and by its loggers, and where it came from."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from normfree.common.files import file_error, kind_of, read_bytes, refused, write_atomically
from normfree.common.text import first_line
from normfree.train.loggers import Loggers

TRAINING = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "clip_fraction", "images_per_second", "seconds")
EVALUATION = ("step", "epoch", "loss", "top1", "top5", "examples", "seconds")

Row = dict[str, float | None]


class Records:
    """The curves of a run, on disk for good when the context ends.

    Args:
        folder: of the run.
        step: at which it goes on; 0 at its beginning.
        loggers: that take the curves too.

    Attributes:
        training: a row every few steps.
        evaluation: a row for each evaluation.
    """

    def __init__(self, folder: Path, step: int, loggers: Loggers) -> None:
        self.training = Curve(folder / "train.csv", TRAINING, step)
        self.evaluation = Curve(folder / "eval.csv", EVALUATION, step)
        self.loggers = loggers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loggers.close()

    def log_training(self, row: Row) -> None:
        """Record a stretch of training."""
        self.training.add(row)
        self._pass_on("train", row)

    def log_evaluation(self, row: Row) -> None:
        """Record an evaluation."""
        self.evaluation.add(row)
        self._pass_on("eval", row)

    def _pass_on(self, kind: str, row: Row) -> None:
        scalars = {f"{kind}/{name}": value for name, value in row.items() if name != "step" and value is not None}
        self.loggers.log(scalars, int(row["step"] or 0))


class Curve:
    """Rows of numbers in a CSV file, one for each recorded step; a resumed run goes on in the same file.

    Args:
        path: of the file.
        columns: of it, "step" first.
        step: rows after this step are dropped: the run goes on from there, and takes those steps again.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], step: int) -> None:
        self.path, self.columns = path, columns
        self.rows = [row for row in read_rows(path) if (row.get("step") or 0) <= step]
        write_atomically(path, self._text(self.rows, header=True))

    def add(self, row: Mapping[str, float | None]) -> None:
        """Append a row; it is in the file when this returns."""
        kept = {name: row.get(name) for name in self.columns}
        self.rows.append(kept)
        try:
            with self.path.open("a", newline="") as file:
                file.write(self._text([kept], header=False))
        except OSError as error:
            raise file_error(error, self.path) from error

    def _text(self, rows: list[Row], *, header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a curve's file, none if there is no file; a row that was cut off is left out.

    Raises:
        ValueError: it is no file of a curve: no text, or without a column of steps.
    """
    if kind_of(path) == "nothing":
        return []
    content = read_bytes(path, "run")
    try:
        # What follows the last end of a line was cut off, wherever: 0.2 may have been 0.25.
        text = content[: content.rfind(b"\n") + 1].decode() if b"\n" in content else content.decode()
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if content and "step" not in (reader.fieldnames or ()):
            raise ValueError("its first line names no column 'step'")
        return [row for cells in reader if (row := _numbers(cells)) is not None]
    except (ValueError, csv.Error) as error:
        rule = f"is no sound file of a run's curve ({first_line(error)})"
        raise refused("run", path, rule, "restore it from a copy, or remove it") from error


def _numbers(cells: Mapping[str | None, Any]) -> Row | None:
    """The cells as numbers, an empty one as None; None of a row of another length than the first, or no numbers."""
    if None in cells or None in cells.values():
        return None
    try:
        return {str(name): _number(cell) for name, cell in cells.items()}
    except ValueError:
        return None


def _number(cell: str) -> float | None:
    """A cell's number, which is written again as it was read."""
    if not cell:
        return None
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


PACKAGES = ("normfree", "torch", "torchvision", "lightning", "datasets", "numpy", "safetensors")


def provenance() -> dict[str, Any]:
    """Return what is needed to do a run again: command, versions, commit and hardware."""
    return {
        "command": shlex.join(["normfree", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def commit() -> str | None:
    """Return the commit of the working tree this package lies in, "-dirty" if changed; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        described = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(described, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def version(package: str) -> str | None:
    """Return the installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
