"""A run's curves, kept three ways: CSV files to read again, TensorBoard to watch, and in memory for the report."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normfree.common.files import kind_of, read_bytes, refused, write_atomically
from normfree.common.packages import required
from normfree.common.text import first_line
from normfree.train.evaluation import Evaluation
from normfree.train.trainer import Outcome, Session

TRAINING = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "clip_fraction", "images_per_second", "seconds")
EVALUATION = ("step", "epoch", "loss", "top1", "top5", "examples", "seconds")

Row = dict[str, float | None]


class Curve:
    """Rows of numbers in a CSV file, one for each step that was noted; a resumed run goes on in the same file.

    Args:
        path: of the file.
        columns: of it, "step" first.
        step: rows after this step are dropped: they are of a future that did not come.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], step: int) -> None:
        self.path, self.columns = path, columns
        self.rows = [row for row in read_rows(path) if (row.get("step") or 0) <= step]
        write_atomically(path, self._text(self.rows, header=True))

    def add(self, row: Mapping[str, float | None]) -> None:
        """Append a row; it is in the file when this returns."""
        kept = {name: row.get(name) for name in self.columns}
        self.rows.append(kept)
        with self.path.open("a", newline="") as file:
            file.write(self._text([kept], header=False))

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
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), restval="", restkey="")
        if content and "step" not in (reader.fieldnames or ()):
            raise ValueError("its first line names no column 'step'")
        return [row for cells in reader if (row := _numbers(cells)) is not None]
    except (ValueError, csv.Error) as error:
        rule = f"is no sound file of a run's curve ({first_line(error)})"
        raise refused("run", path, rule, "restore it from a copy, or remove it") from error


def _numbers(cells: Mapping[str, Any]) -> Row | None:
    """The cells as numbers, an empty one as None; None of a row that is longer than the first, or no numbers."""
    try:
        return {name: _number(cell) for name, cell in cells.items()}
    except (AttributeError, ValueError):  # the former: a list, of the cells that have no name
        return None


def _number(cell: str) -> float | None:
    """A cell's number, which is written again as it was read."""
    if not cell:
        return None
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


class Records:
    """What a run notes as it goes.

    Args:
        folder: of the run.
        step: at which it goes on; 0 at its beginning.

    Attributes:
        training: a row every few steps.
        evaluation: a row for each evaluation.
    """

    def __init__(self, folder: Path, step: int) -> None:
        required("tensorboard", "a run's record")
        from torch.utils.tensorboard import SummaryWriter

        self.training = Curve(folder / "train.csv", TRAINING, step)
        self.evaluation = Curve(folder / "eval.csv", EVALUATION, step)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def trained(self, row: Row) -> None:
        """Note a stretch of training."""
        self.training.add(row)
        self._board("train", row)

    def evaluated(self, row: Row) -> None:
        """Note an evaluation."""
        self.evaluation.add(row)
        self._board("eval", row)

    def close(self) -> None:
        """Have everything on disk."""
        self.board.close()

    def _board(self, kind: str, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, int(row["step"] or 0))


# MERGED from train/records.py: What a run was: the versions, the commit, the machine and the command it came from.


PACKAGES = ("normfree", "torch", "torchvision", "lightning", "datasets", "torchdata", "numpy", "safetensors")


def provenance() -> dict[str, Any]:
    """Return what is needed to do a run again: command, versions, commit and hardware."""
    return {
        "command": shlex.join(["normfree", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# MERGED from train/records.py: What is seen of a run while it goes: the curves on disk, and a line of progress on a terminal.


if TYPE_CHECKING:
    from rich.console import Console


class Watcher:
    """Notes steps and evaluations; the bar is drawn on a terminal alone, a line for each evaluation everywhere.

    Args:
        session: what is watched, at the step it goes on from.
        folder: of the run.
        console: to tell; None for silence.

    Attributes:
        records: the curves.
        spikes: greatest loss of a noted stretch over the smallest before it.
    """

    def __init__(self, session: Session, folder: Path, console: Console | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.session, self.console = session, console
        self.records = Records(folder, session.step)
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  {task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console or Console(quiet=True),
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self.progress.add_task("", total=session.last_step, epoch="", figures="")
        self._mark = time.perf_counter()
        if session.monitor is not None:
            session.monitor.writer = self.records.board
        self._start()

    def _start(self) -> None:
        """Begin another stretch."""
        self._losses: list[float] = []
        self._images, self._began = 0, self.session.seconds

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show the progress while the context is open, and have everything on disk at its end."""
        try:
            with self.progress:
                self.progress.update(self._task, completed=self.session.step)
                yield
        finally:
            self.records.close()

    def begin(self) -> None:
        """Start the clock: what comes now is training, and what belongs to it."""
        self._mark = time.perf_counter()
        if self.session.monitor is not None:
            self.session.monitor.start()

    def stepped(self, outcome: Outcome) -> None:
        """Take note of a step."""
        if self.session.monitor is not None:
            self.session.monitor.step(self.session.step)
        now = time.perf_counter()
        session = self.session
        session.seconds += now - self._mark
        self._mark = now
        self._losses.append(outcome.loss)
        self._images += outcome.images
        if session.step % session.config.log_every == 0 or session.step == session.last_step:
            self.records.trained(self._row(outcome))
            self._start()
        self.progress.update(self._task, completed=session.step)

    def _row(self, outcome: Outcome) -> Row:
        session = self.session
        finite = [loss for loss in self._losses if loss - loss == 0]
        clip_fraction = getattr(session.optimizer, "clip_fraction", None)
        row: Row = {
            "step": session.step,
            "epoch": round(session.step / session.steps_per_epoch, 4),
            "loss": sum(finite) / len(finite) if finite else None,
            "learning_rate": outcome.learning_rate,
            "gradient_norm": outcome.gradient_norm,
            "clip_fraction": None if clip_fraction is None else float(clip_fraction),
            "images_per_second": self._images / max(session.seconds - self._began, 1e-9),
            "seconds": round(session.seconds, 3),
        }
        figures = f"loss {row['loss'] or float('nan'):.3f}  {row['images_per_second']:,.0f} images/s"
        epoch = f"{min(session.epoch + 1, session.config.epochs)}/{session.config.epochs}"
        self.progress.update(self._task, figures=figures, epoch=epoch)
        return row

    def evaluated(self, found: Evaluation) -> None:
        """Take note of an evaluation, and tell it."""
        session = self.session
        epoch = round(session.step / session.steps_per_epoch, 4)
        seconds = round(session.seconds, 3)
        self.records.evaluated({"step": session.step, "epoch": epoch, **found.figures(), "seconds": seconds})
        last: dict[str, Any] = self.records.training.rows[-1] if self.records.training.rows else {}
        loss, speed = last.get("loss"), last.get("images_per_second")
        figures = [f"accuracy {100 * found.top1:.2f} %", f"test loss {found.loss:.4f}"]
        figures += [f"training loss {loss:.4f}"] if loss is not None else []
        figures += [f"{speed:,.0f} images/s"] if speed is not None else []
        self.tell(f"epoch {epoch:g}/{session.config.epochs}  step {session.step}  " + "  ".join(figures))

    def tell(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if self.console is not None:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
