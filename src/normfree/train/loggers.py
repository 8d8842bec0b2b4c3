"""Where a run's curves go besides its CSV files: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfree.common.checks import required
from normfree.common.files import file_error, kind_of, read_json, write_atomically
from normfree.common.text import one_line

KEYS = "loggers.json"
"""File of a run's folder: what the run is called by the loggers that keep theirs elsewhere."""

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""What each logger is imported from."""

PROJECT = "normfree"
"""Of Weights & Biases and MLflow, unless their environment variables name another."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise if a logger's package is not installed.

    Raises:
        ImportError: naming it.
    """
    for name in names:
        required(PACKAGES[name], f"--log {name}")


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
                self._loggers.append(TensorBoard(folder / "tensorboard", step))
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
    wandb: Any = required("wandb", "--log wandb")
    loggers: Any = required("lightning.pytorch.loggers", "--log wandb")
    ours = wandb.run is None  # or somebody's program has one of its own, which the logger takes
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    logger = loggers.WandbLogger(name=folder.name, save_dir=folder, id=key, project=project, resume="allow")
    run: Any = logger.experiment
    return logger, lambda status: run.finish(exit_code=int(status == "failed")) if ours else None


def _start_mlflow(folder: Path, key: str | None) -> tuple[Any, Any]:
    """Lightning's logger, and what ends the run there."""
    mlflow: Any = required("mlflow", "--log mlflow")
    loggers: Any = required("lightning.pytorch.loggers", "--log mlflow")
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
