"""What a run records and shows: its curves as CSV files and by loggers, where it came from, and how far it is."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from normfree.common.checks import processor, require
from normfree.common.files import file_error, kind_of, read_bytes, read_json, refused, write_atomically
from normfree.common.text import first_line, one_line, quoted

if TYPE_CHECKING:
    from rich.console import Console

TRAINING = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "clip_fraction", "images_per_second", "seconds")
EVALUATION = ("step", "epoch", "loss", "top1", "top5", "examples", "seconds")

TRAINING_CSV, EVALUATION_CSV, TENSORBOARD = "train.csv", "eval.csv", "tensorboard"
"""Where they go in a run's folder."""

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
        self.training = Curve(folder / TRAINING_CSV, TRAINING, step)
        self.evaluation = Curve(folder / EVALUATION_CSV, EVALUATION, step)
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
        rows = [row for row in read_rows(path) if (row.get("step") or 0) <= step]
        self.rows: list[Row] = [{name: row.get(name) for name in columns} for row in rows]
        write_atomically(path, self._text(self.rows, header=True))

    def add(self, row: Mapping[str, float | None]) -> None:
        """Append a row; it is in the file when this returns. A second one of the last step takes the first's place."""
        kept = {name: row.get(name) for name in self.columns}
        if self.rows and self.rows[-1]["step"] == kept["step"]:  # a run that had ended is evaluated again
            self.rows[-1] = kept
            write_atomically(self.path, self._text(self.rows, header=True))
            return
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
    """Return the rows of a curve's file, none if there is no file; a last row that was cut off is left out.

    Raises:
        ValueError: it is no file of a curve: no text, without a column of steps, with a row before the last that is not
            whole, or with steps that do not rise.
    """
    if kind_of(path) == "nothing":
        return []
    content = read_bytes(path, "run")
    try:
        # What follows the last end of a line was cut off, wherever: 0.2 may have been 0.25.
        text = content[: content.rfind(b"\n") + 1].decode() if b"\n" in content else content.decode()
        if '"' in text:  # it could reach over many rows
            raise ValueError("it has a quote, and numbers have none")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if content and "step" not in (reader.fieldnames or ()):
            raise ValueError("its first line names no column 'step'")
        rows = list(map(_numbers, reader))
        if rows and rows[-1] is None:
            rows.pop()
        if None in rows:
            raise ValueError(f"row {rows.index(None) + 1} is not a number for each column")
        return _rising([row for row in rows if row is not None], repeats=path.name == EVALUATION_CSV)
    except (ValueError, csv.Error) as error:
        rule = f"is no sound file of a run's curve ({first_line(error)})"
        raise refused("run", path, rule, "restore it from a copy, or remove it") from error


def _rising(rows: list[Row], *, repeats: bool) -> list[Row]:
    """The rows of a curve, whose steps are counts that rise.

    Args:
        rows: as they were read.
        repeats: whether of rows of one step the last counts: earlier versions evaluated a run that had ended again.

    Raises:
        ValueError: naming a step that does not rise.
    """
    kept: list[Row] = []
    for row in rows:
        step, last = row["step"], kept[-1]["step"] if kept else -1
        if repeats and kept and step == last:
            kept[-1] = row
            continue
        if not isinstance(step, int) or not isinstance(last, int) or step <= last:
            raise ValueError(f"step {step} follows step {last}" if kept else f"its first step is {step}")
        kept.append(row)
    return kept


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
    if "_" in cell or not cell.isascii():  # which Python reads, in numbers, too
        raise ValueError(cell)
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


PACKAGES = ("normfree", "torch", "torchvision", "lightning", "datasets", "numpy", "safetensors")


@dataclass(frozen=True)
class Metrics:
    """What every metrics.json of a finished run says."""

    step: int
    seconds: float
    skipped_steps: int
    bad_images: Mapping[str, str]
    evaluation: Figures


@dataclass(frozen=True)
class Figures:
    """What it says of the last evaluation."""

    examples: int
    loss: float | None
    top1: float
    top5: float | None
    confusion: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for name in ("top1", "top5"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is {quoted(share)}, no share")


def provenance() -> dict[str, Any]:
    """Return what is needed to do a run again: command, versions, commit and hardware."""
    return {
        "command": shlex.join(["normfree", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "cpu": processor(),
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


# --- where curves go besides the CSV files: TensorBoard, Weights & Biases, MLflow -------------------------------------


KEYS = "loggers.json"
"""File of a run's folder: what the run is called by the loggers that keep theirs elsewhere."""

LOGGER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""What each logger is imported from."""

PROJECT = "normfree"
"""Of Weights & Biases and MLflow, unless their environment variables name another."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise if a logger's package is not installed.

    Raises:
        ImportError: naming it.
    """
    __tracebackhide__ = True
    for name in names:
        require(LOGGER_PACKAGES[name], f"--log {name}")


class Logger(ABC):
    """Takes scalars by name and step."""

    @abstractmethod
    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Record scalars of one step."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Have everything recorded for good; ``status`` is "finished", "stopped" or "failed"."""


class Loggers:
    """All loggers of a run.

    The signal's scalars come one by one, and are kept until all of their step are there.

    Args:
        names: of the loggers.
        folder: of the run.
        step: at which it goes on; 0 at its beginning.
        settings: of the run, by name.

    Attributes:
        status: how the run ended, as far as is known.

    Raises:
        ImportError: if a logger's package is not installed.
        ValueError: if a logger does not start.
    """

    def __init__(self, names: Sequence[str], folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        check_loggers(names)
        self.status = "failed"
        self._waiting: dict[str, float] = {}
        self._step = step
        path = folder / KEYS
        keys = read_json(path, "run") if step and kind_of(path) == "file" else {}
        self._loggers: list[Logger] = []
        for name in names:
            if name == "tensorboard":
                self._loggers.append(TensorBoard(folder / TENSORBOARD, step))
            else:
                logger = Tracker(name, folder, keys.get(name), settings)
                self._loggers.append(logger)
                keys[name] = logger.key
        if set(names) - {"tensorboard"}:
            write_atomically(path, json.dumps(keys) + "\n")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Record scalars of one step."""
        self._flush()
        for logger in self._loggers:
            logger.log(scalars, step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Record one scalar, as TensorBoard's writer does."""
        if step != self._step:
            self._flush()
        self._step = step
        self._waiting[name] = value

    def close(self) -> None:
        """Have everything recorded for good."""
        self._flush()
        for logger in self._loggers:
            logger.close(self.status)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        if waiting:
            for logger in self._loggers:
                logger.log(waiting, self._step)


class TensorBoard(Logger):
    """Event files in a folder.

    Args:
        folder: of the files.
        step: after which earlier files do not count.

    Raises:
        OSError: naming the folder, such as of a full disk.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            raise file_error(error, self.folder) from error

    def close(self, status: str) -> None:
        try:
            self.writer.close()
        except OSError as error:
            raise file_error(error, self.folder) from error


class Tracker(Logger):
    """Weights & Biases or MLflow, by Lightning's loggers, which its Fabric takes too.

    Once it has started, a failure of it is a warning, and the run goes on without it.

    Args:
        name: wandb or mlflow.
        folder: of the run.
        key: of the run there; None for a new one.
        settings: of the run, by name; written once.

    Raises:
        ValueError: if it does not start.
    """

    def __init__(self, name: str, folder: Path, key: str | None, settings: Mapping[str, Any]) -> None:
        self.name, self.broken = name, False
        try:
            self.logger, self._own = START[name](folder, key)
            self.key: str = self.logger.version
            if key is None:
                self.logger.log_hyperparams(dict(settings))
        except Exception as error:  # of their own kinds, and of the network's
            raise ValueError(f"log={name!r}: it does not start ({one_line(error)}); {REMEDY[name]}") from error

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._try(lambda: self.logger.log_metrics(dict(scalars), step))

    def close(self, status: str) -> None:
        self._try(lambda: self._own(status))

    def _try(self, call: Any) -> None:
        if self.broken:
            return
        try:
            call()
        except Exception as error:  # as above
            self.broken = True
            said = f"log={self.name!r}: it has failed ({one_line(error)}), and the run goes on without it"
            warnings.warn(said, RuntimeWarning, stacklevel=4)


def _start_wandb(folder: Path, key: str | None) -> tuple[Any, Any]:
    """Lightning's logger, and what ends the run there."""
    wandb: Any = require("wandb", "--log wandb")
    loggers: Any = require("lightning.pytorch.loggers", "--log wandb")
    ours = wandb.run is None  # or somebody's program has one of its own, which the logger takes
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    logger = loggers.WandbLogger(name=folder.name, save_dir=folder, id=key, project=project, resume="allow")
    run: Any = logger.experiment
    return logger, lambda status: run.finish(exit_code=int(status == "failed")) if ours else None


def _start_mlflow(folder: Path, key: str | None) -> tuple[Any, Any]:
    """Lightning's logger, and what ends the run there."""
    mlflow: Any = require("mlflow", "--log mlflow")
    loggers: Any = require("lightning.pytorch.loggers", "--log mlflow")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    logger = loggers.MLFlowLogger(name, run_name=folder.name, tracking_uri=mlflow.get_tracking_uri(), run_id=key)
    if key is not None:
        logger.experiment.update_run(key, status="RUNNING")
    words = {"finished": "success", "stopped": "KILLED", "failed": "failed"}
    return logger, lambda status: logger.finalize(words[status])


START = {"wandb": _start_wandb, "mlflow": _start_mlflow}
REMEDY = {
    "wandb": "wandb login, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server, a database or a folder that it can write to",
}


# --- what is shown while it runs: a bar on a terminal; elsewhere a line at least every half minute --------------------


INTERVAL = 30.0
"""Seconds between lines, at most, where there is no terminal."""


class Progress:
    """Where a run is, shown while the context is open.

    The lines come from a thread of their own, so that they also come while a step, an evaluation or a compilation
    takes long.

    Args:
        console: to print to; None for silence.
        step: at which the run goes on; 0 at its beginning.
        last_step: at which it ends.
        epochs: of the whole run.
    """

    def __init__(self, console: Console | None, step: int, last_step: int, epochs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.step, self.last_step, self.epochs = console, step, last_step, epochs
        self._first, self._began = step, time.monotonic()
        self._epoch, self._doing = "", "starting"
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._begin_stretch()
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  {task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console or Console(quiet=True),
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=last_step, completed=step, epoch="", figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        if self.console is not None and not self.console.is_terminal:
            self._thread = threading.Thread(target=self._print_lines, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.console is not None:
            with self._lock:
                self._printed = time.monotonic()
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int, epoch: int, loss: float, images: int) -> None:
        """Note a step.

        Args:
            step: its number, from 1.
            epoch: its number, from 1.
            loss: of the step, in nats.
            images: of its batch.
        """
        with self._lock:
            self.step, self._epoch, self._doing = step, f"{epoch}/{self.epochs}", ""
            self._images += images
            if math.isfinite(loss):
                self._losses.append(loss)
        self._bar.update(self._task, completed=step)

    def show_figures(self, loss: float | None, images_per_second: float) -> None:
        """Show the figures of a stretch of steps beside the bar."""
        self._bar.update(self._task, figures=_figures(loss, images_per_second), epoch=self._epoch)

    def evaluating(self) -> None:
        """Note that no step will be taken for a while."""
        self._doing = "evaluating"

    def _begin_stretch(self) -> None:
        self._printed, self._stretch = time.monotonic(), time.monotonic()
        self._losses: list[float] = []
        self._images = 0

    def _print_lines(self) -> None:
        while not self._ended.wait(max(0.0, self._printed + INTERVAL - time.monotonic())):
            with self._lock:
                if time.monotonic() >= self._printed + INTERVAL:
                    self.say(self._line())
                    self._begin_stretch()

    def _line(self) -> str:
        """Where the run is; loss and speed are of the steps since the last line."""
        now, taken = time.monotonic(), self.step - self._first
        parts = [f"epoch {self._epoch}"] if self._epoch else []
        parts.append(f"step {self.step}/{self.last_step}")
        if self._images:
            loss = sum(self._losses) / len(self._losses) if self._losses else None
            parts.append(_figures(loss, self._images / max(now - self._stretch, 1e-9)))
        if taken:
            parts.append(f"{_time((now - self._began) / taken * (self.last_step - self.step))} left")
        return "  ".join([*parts, self._doing] if self._doing else parts)


def _figures(loss: float | None, images_per_second: float) -> str:
    return f"loss {math.nan if loss is None else loss:.3f}  {images_per_second:,.0f} images/s"


def _time(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:05."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
