"""The folder of a run: one process writes to it, and its checkpoints are whole or not there, and checked when read.

A checkpoint is a folder ``step_0000001234``: ``model.safetensors``, with ``averaged.safetensors`` where weights
are averaged (each a file of :func:`normfree.save`), ``state.pt`` (optimizer, schedule, data, counters; read with
``weights_only``) and ``manifest.json`` with the SHA-256 of each file and of itself, and what makes the run's bits: its
settings and conditions. It is written under another name, flushed to disk and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from normfree.common.files import (
    file_error,
    kind_of,
    parse_dataclass,
    read_json,
    refused,
    remove_all,
    remove_stale,
    temporary_path,
    write_atomically,
)
from normfree.common.pickles import check_torch_file
from normfree.common.text import first_line, printable, quoted, shortened
from normfree.common.torch_compat import tree_leaves
from normfree.train.config import FREE, TrainConfig, flatten, to_dict
from normfree.train.records import EVALUATION_CSV, KEYS, TENSORBOARD, TRAINING_CSV, Metrics

CONFIG, METRICS, CHECKPOINTS, MODEL, SIGNAL, REPORT = (
    "config.json",
    "metrics.json",
    "checkpoints",
    "model.safetensors",
    "signal.json",
    "report.html",
)
"""Files of a run."""

WRITTEN: Mapping[str, str] = {
    **dict.fromkeys((".lock", CONFIG, METRICS, MODEL, SIGNAL, REPORT, TRAINING_CSV, EVALUATION_CSV, KEYS), "file"),
    **dict.fromkeys((CHECKPOINTS, TENSORBOARD, "wandb"), "folder"),
}
"""All that a training writes to directly in its folder, and what each is."""

WEIGHTS_HASH = "model_sha256"
"""What ``metrics.json`` says of ``model.safetensors``."""

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
STATE = "state.pt"

_STEP, _DAMAGED = "step_", "damaged_"


@dataclass(frozen=True)
class MadeBy:
    """What makes the bits of a run, as each of its checkpoints says.

    Attributes:
        settings: by their dotted names, those that may not change when the run goes on.
        conditions: of ``CONDITIONS``, lists and mappings as a SHA-256.
    """

    settings: Mapping[str, Any]
    conditions: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was found sound.

    Attributes:
        folder: where it is.
        step: optimizer steps taken.
        score: accuracy at that step; None where there was no evaluation.
        made_by: what makes the bits of its run; None of an earlier version's.
    """

    folder: Path
    step: int
    score: float | None
    made_by: MadeBy | None = None

    @property
    def weights(self) -> Path:
        """The weights to use: the averaged ones where there are any."""
        averaged = self.folder / AVERAGED
        return averaged if averaged.exists() else self.folder / WEIGHTS

    def state(self) -> dict[str, Any]:
        """What it takes to go on, beside the weights; never anything but tensors and plain values."""
        try:
            check_torch_file(self.folder / STATE)
            state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle's, zipfile's and torch's many kinds
            raise _damaged(self.folder, f"{STATE} cannot be read ({first_line(error)})") from error
        if not isinstance(state, dict):
            raise _damaged(self.folder, f"{STATE} holds {type(state).__name__}, no state")
        for leaf in tree_leaves(state):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() < leaf.numel() * leaf.element_size():
                raise _damaged(self.folder, f"{STATE} has a tensor of {leaf.numel():,} numbers that are not there")
        return state


class CheckpointStore:
    """The checkpoints of one run: the newest few and the best.

    Args:
        folder: of all checkpoints; made when the first is written.
        keep: how many of the newest to keep, beside the best.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def write(
        self,
        step: int,
        state: Mapping[str, Any],
        weights: Mapping[str, Callable[[Path], Any]],
        score: float | None,
        made_by: MadeBy | None = None,
    ) -> Checkpoint:
        """Write a checkpoint, then remove those no longer kept.

        Args:
            step: optimizer steps taken.
            state: tensors and plain values.
            weights: for each file name a function that writes it to a path.
            score: accuracy, if it was measured.
            made_by: what makes the bits of the run.

        Returns:
            The checkpoint.

        Raises:
            OSError: naming the checkpoint, such as of a full disk; nothing is left of it.
        """
        target = self.folder / f"{_STEP}{step:010d}"
        place = temporary_path(target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self.folder)
            place.mkdir()
            for name, writer in weights.items():
                writer(place / name)
            buffer = io.BytesIO()
            torch.save(dict(state), buffer)
            write_atomically(place / STATE, buffer.getvalue())
            facts = {file.name: _facts(file) for file in sorted(place.iterdir())}
            manifest = {"schema": SCHEMA, "step": step, "score": score, "files": facts}
            manifest |= {} if made_by is None else {"made_by": asdict(made_by)}
            write_atomically(place / MANIFEST, json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1))
            _flush(place)
            self._rename(place, target)
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, OSError):
                raise file_error(error, target) from error
            raise
        self._prune()
        return Checkpoint(target, step, score, made_by)

    def newest(self, *, set_aside: bool = False) -> Checkpoint | None:
        """Return the newest sound checkpoint, with a warning for each newer one that is damaged.

        Args:
            set_aside: rename damaged ones, so that they count no longer, once a sound one is found.

        Raises:
            ValueError: if there are checkpoints, also such as were set aside, and all are damaged.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(self.folders()):
            try:
                found = verify_checkpoint(folder)
            except ValueError as error:
                damaged[folder] = str(error)
                continue
            for broken, message in damaged.items():
                if set_aside:
                    self._rename(broken, broken.with_name(_DAMAGED + broken.name))
                warnings.warn(f"{message}; {found.folder.name} is used instead", RuntimeWarning, stacklevel=2)
            return found
        aside = sorted(self.folder.glob(f"{_DAMAGED}*"))
        if not damaged and not aside:
            return None
        told = next(iter(damaged.values()), None) or f"checkpoint {quoted(str(aside[-1]))} is damaged"
        raise ValueError(
            f"{told}, and so are all {len(damaged) + len(aside)} in {str(self.folder)!r}; restore them from a copy, "
            "remove that folder to start anew, or start anew in another"
        )

    def best(self) -> Checkpoint | None:
        """Return the sound checkpoint with the highest score, the newest of equals; without scores, the newest."""
        found = []
        for folder in self.folders():
            try:
                found.append(verify_checkpoint(folder))
            except ValueError as error:
                warnings.warn(f"{error}; another is used", RuntimeWarning, stacklevel=2)
        return max(found, key=lambda one: (-1.0 if one.score is None else one.score, one.step), default=None)

    def folders(self) -> list[Path]:
        """All checkpoints, sound or not, the oldest first."""
        return sorted(self.folder.glob(f"{_STEP}*"))

    def clean(self) -> None:
        """Remove what interruptions have left half-written; for the one process that writes here."""
        for folder in self.folder.glob(f".{_STEP}*"):
            remove_all(folder)
        remove_stale(self.folder, locked=True)

    def _rename(self, source: Path, target: Path) -> None:
        """Rename a folder; an existing one of that name is moved away first, and removed."""
        aside = temporary_path(target)
        if os.path.lexists(target):  # also a link that leads nowhere
            os.replace(target, aside)
        os.replace(source, target)
        _flush(self.folder)
        with contextlib.suppress(OSError):
            remove_all(aside)

    def _prune(self) -> None:
        folders = self.folders()
        scores = {folder: _score(folder) for folder in folders}
        best = max(folders, key=lambda folder: (scores[folder], folder))
        for folder in folders[: -self.keep]:
            if folder != best or scores[folder] < 0:
                remove_all(folder)


def verify_checkpoint(folder: str | Path) -> Checkpoint:
    """Return a checkpoint whose every byte is as it was written.

    Args:
        folder: the checkpoint's.

    Raises:
        ValueError: naming the first file that is not.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if missing := {WEIGHTS, STATE} - set(manifest.files):
        raise _damaged(folder, f"{MANIFEST} does not list {min(missing)}")
    for name, facts in manifest.files.items():
        file = folder / name
        if Path(name).name != name or kind_of(file) != "file":
            raise _damaged(folder, f"{shortened(name, 80)} is missing")
        if file.stat().st_size != facts.bytes:
            raise _damaged(folder, f"{name} has {file.stat().st_size} bytes instead of {facts.bytes}")
        if hash_of(file) != facts.sha256:
            raise _damaged(folder, f"{name} has another checksum than when it was written")
    return Checkpoint(folder, manifest.step, manifest.score, manifest.made_by)


@dataclass(frozen=True)
class _Facts:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """What a manifest says of a checkpoint."""

    schema: int
    step: int
    score: float | None
    files: Mapping[str, _Facts]
    made_by: MadeBy | None = None


def _manifest(folder: Path) -> _Manifest:
    try:
        document = read_json(folder / MANIFEST, most=2**20)
        own = document.pop("sha256", None)
        sound = own == _own_hash(document)
        manifest = parse_dataclass(_Manifest, document)
    except ValueError as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({first_line(error)})") from error
    if not sound or manifest.schema != SCHEMA:
        raise _damaged(folder, f"{MANIFEST} has another checksum than when it was written")
    return manifest


def _score(folder: Path) -> float:
    """The score a checkpoint claims; -1 without one, or where it cannot be read."""
    try:
        score = _manifest(folder).score
    except ValueError:
        return -1.0
    return -1.0 if score is None else float(score)


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(shortened(f"checkpoint {quoted(str(folder))} is damaged: {what}"))


def hash_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _facts(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": hash_of(file)}


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Have the names in a folder on disk: a rename is safe from a power cut only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunFolder:
    """A run's folder, which one process has to itself for as long as the context is open.

    The file ``.lock`` in it says who; the lock itself is the kernel's (``flock``), which ends with the process however
    that ends. Processes that are forked meanwhile do not hold it. What interruptions have left half-written is removed.

    Args:
        config: of the run.
        folder: its folder, made if it is missing.

    Raises:
        ValueError: on entering, if another process or thread has the folder, which the message names; if it holds
            another run; or as of :func:`check_written`.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._made = False
        self._file: int | None = None

    def __enter__(self) -> Self:
        __tracebackhide__ = True
        check_written(self.folder)
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        while self._file is None:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # it is written to, and could be any file
                    raise refused("out", path, "is no lock of a run", "remove it")
                self._lock(file)
            except BaseException:
                os.close(file)
                raise
            if _leads_to(path, file):
                self._file = file
            else:  # its last holder has removed it between our opening and locking it
                os.close(file)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        try:
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {platform.node()} since {since}\n".encode())
            remove_stale(self.folder, locked=True)
            CheckpointStore(self.folder / CHECKPOINTS).clean()
            check_same_run(self.config, self.folder)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError) and error.filename is None:
                raise file_error(error, path) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / ".lock").unlink(missing_ok=True)
        self._close()
        if self._made:
            with contextlib.suppress(OSError):  # something is in it
                self.folder.rmdir()

    def _lock(self, file: int) -> None:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            rule = f"{printable(holder)} is writing to it"
            raise refused("out", self.folder, rule, "wait until it ends, or give another folder") from None
        except (ImportError, OSError) as error:
            warnings.warn(
                f"out={quoted(str(self.folder))}: it cannot be locked ({first_line(error)}); take care that no other "
                "process writes to it",
                RuntimeWarning,
                stacklevel=4,
            )

    def _close(self) -> None:
        """Close the file: where no other process has it open, the lock ends."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def check_written(folder: Path) -> None:
    """Raise unless all that a training writes or removes lies in the run's folder itself; the folder may be a link.

    Raises:
        ValueError: naming a link in the place of a file or folder of the run, or anything else that is there instead.
    """
    __tracebackhide__ = True
    for name, wanted in WRITTEN.items():
        place = folder / name
        if place.is_symlink():
            rule = "is a link, and a run writes to its own folder alone"
            raise refused("out", place, rule, "remove the link")
        if (kind := kind_of(place).removeprefix("a ")) not in (wanted, "nothing"):
            kind = f"a {kind}" if kind != "no regular file" else kind
            raise refused("out", place, f"is {kind}, and a run has a {wanted} there", "move it elsewhere")


def _leads_to(path: Path, file: int) -> bool:
    """Tell whether a path leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def find_folder(config: TrainConfig) -> Path:
    """Return the folder of a run: ``config.out``, else the first of runs/NAME, runs/NAME-2, … without another run.

    Raises:
        ValueError: as of :func:`differences`.
    """
    folder = config.folder
    if config.out is None:
        number = 2
        while differences(config, folder):
            folder, number = config.folder.with_name(f"{config.name}-{number}"), number + 1
    return folder


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise if a folder holds another run.

    Raises:
        ValueError: naming the fields that differ; or as of :func:`differences`.
    """
    __tracebackhide__ = True
    if changed := differences(config, folder):
        rule = f"holds a run with other settings ({', '.join(changed)})"
        raise refused("out", folder, rule, "pass another --out, or the run's own settings to go on with it")


def read_metrics(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the metrics of a run that came to its end at a step; None where it did not, or by an older version.

    Raises:
        ValueError: they are damaged.
    """
    path = folder / METRICS
    if kind_of(path) == "nothing":
        return None
    metrics = read_json(path, "run")
    if metrics.get("status") != "finished" or metrics.get("step") != step:
        return None
    try:
        parse_dataclass(Metrics, {one.name: metrics[one.name] for one in fields(Metrics)})
    except KeyError:
        return None
    except ValueError as error:
        rule = f"is damaged ({first_line(error)})"
        raise refused("run", path, rule, "remove it, and it is written again") from error
    return metrics


def check_weights(folder: Path, argument: str, remedy: str) -> None:
    """Raise if a run's weights are not the file that its metrics say it wrote; those of earlier versions do not say it.

    Args:
        folder: of the run, which has both.
        argument: what named it, for messages.
        remedy: ends the message.

    Raises:
        ValueError: they are not, or the metrics are damaged.
    """
    __tracebackhide__ = True
    if kind_of(folder / METRICS) == "nothing":
        return
    said = read_json(folder / METRICS, argument).get(WEIGHTS_HASH)
    if said is not None and said != hash_of(folder / MODEL):
        rule = f"is not the file that this run wrote, by the SHA-256 in its {METRICS}"
        raise refused(argument, folder / MODEL, rule, remedy)


def differences(config: TrainConfig, folder: Path) -> list[str]:
    """Return the fields in which a run in a folder differs from a config, none where there is no run.

    A field that the run's version did not have is at its default, which does what was done before there was a choice.

    Raises:
        ValueError: the folder holds checkpoints, and not what they are of, or a damaged config.
    """
    path = folder / CONFIG
    if kind_of(path) == "nothing":
        if any((folder / CHECKPOINTS).glob("*step_*")):
            rule = f"holds checkpoints and no {CONFIG} that says of what run"
            raise refused("out", folder, rule, f"restore {CONFIG} from a copy, or pass another --out")
        return []
    before = read_json(path, "run").get("config")
    if not isinstance(before, dict):
        raise refused("run", path, "does not say how its run was configured", "restore it from a copy")
    default = TrainConfig(name=config.name, model=config.model)
    before = {**flatten(to_dict(default)), **flatten(before)}
    now = flatten(json.loads(json.dumps(to_dict(config))))
    return [name for name in sorted({*before, *now} - FREE) if before.get(name, ...) != now.get(name, ...)]


def made_by(config: TrainConfig, description: Mapping[str, Any]) -> MadeBy:
    """Return what makes the bits of a run.

    Args:
        config: of the run, as it was given.
        description: what ``config.json`` holds.
    """
    settings = flatten(json.loads(json.dumps(to_dict(config))))
    conditions: dict[str, Any] = dict(zip(CONDITIONS, map(_digest, _conditions(description)), strict=True))
    return MadeBy({name: value for name, value in settings.items() if name not in FREE}, conditions)


def check_settings(checkpoint: Checkpoint, folder: Path, now: MadeBy) -> None:
    """Raise if a run has other settings than its checkpoint was made with, whatever ``config.json`` says.

    Args:
        checkpoint: of the run; what an earlier version did not write to it is not compared.
        folder: of the run.
        now: of the run that would go on.

    Raises:
        ValueError: naming what differs, both values, and how to go on all the same.
    """
    __tracebackhide__ = True
    before = {} if checkpoint.made_by is None else checkpoint.made_by.settings
    changes = [
        name + _instead(now.settings[name], before[name])
        for name in sorted(before.keys() & now.settings.keys())
        if before[name] != now.settings[name]
    ]
    if changes:
        listed = shortened(", ".join(changes), 200)
        rule = f"its {checkpoint.folder.name} was made with other settings, and would go on to other bits ({listed})"
        raise refused("out", folder, rule, "restore them, or pass --on-changed continue to go on all the same")


def check_conditions(checkpoint: Checkpoint, folder: Path, now: Mapping[str, Any]) -> None:
    """Raise if what makes the bits of a run is not what ``config.json``, or its checkpoint, says it was.

    Args:
        checkpoint: of the run.
        folder: of the run.
        now: what ``config.json`` would hold; what an earlier version did not write is not compared.

    Raises:
        ValueError: naming what differs, and how to go on all the same.
    """
    __tracebackhide__ = True
    began = _conditions(read_json(folder / CONFIG, "run"))
    made = {} if checkpoint.made_by is None else checkpoint.made_by.conditions
    changes = []
    for name, said, is_now in zip(CONDITIONS, began, _conditions(now), strict=True):
        for was, here in ((said, is_now), (made.get(name), _digest(is_now))):
            if was is not None and was != here:
                changes.append(name + ("" if isinstance(is_now, (list, dict)) else _instead(is_now, was)))
                break
    if changes:
        rule = f"the run began with other conditions and would go on to other bits ({', '.join(changes)})"
        raise refused("out", folder, rule, "restore them, or pass --on-changed continue to go on all the same")


def _instead(now: object, was: object) -> str:
    """Two values in words; of long ones that begin alike what differs."""
    words = [printable(str(now)), printable(str(was))]
    alike = next((at for at, (one, other) in enumerate(zip(*words, strict=False)) if one != other), len(min(words)))
    if max(map(len, words)) > 40 and alike > 12:
        words = [f"…{word[alike - 12 :]}" for word in words]
    return " {} instead of {}".format(*(shortened(word, 40) for word in words))


def _digest(value: Any) -> Any:
    """A list or mapping as its SHA-256, anything else as it is: class names and files can be many."""
    if not isinstance(value, (list, dict)):
        return value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


CONDITIONS = ("torch", "precision", "device", "compiled", "threads", "images", "classes")


def _conditions(description: Mapping[str, Any]) -> Iterator[Any]:
    """What makes the bits of a run, in the order of ``CONDITIONS``; None of what is not known."""
    versions, derived = (
        found if isinstance(found := description.get(key), dict) else {} for key in ("versions", "derived")
    )
    device = str(derived["device"]).partition(":")[0] if "device" in derived else None
    yield versions.get("torch")
    yield derived.get("precision")
    yield device
    yield derived.get("compiled")
    yield description.get("threads") if device == "cpu" else None
    yield derived.get("training_data")
    yield derived.get("classes")
