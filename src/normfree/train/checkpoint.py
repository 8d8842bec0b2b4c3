"""Checkpoints that are whole or not there, and that are checked before they are believed.

A checkpoint is a folder ``step_0000001234``: ``model.safetensors``, with ``averaged.safetensors`` where weights
are averaged (each a file of :func:`normfree.save`), ``state.pt`` (optimizer, schedule, data, counters; read with
``weights_only``) and ``manifest.json`` with the SHA-256 of each file and of itself. It is written under another
name, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normfree.common.files import kind_of, read_json, structured, write_atomically
from normfree.common.text import first_line, quoted, shortened

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
STATE = "state.pt"

_STEP, _TEMPORARY, _DAMAGED = "step_", ".step_", "damaged_"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was found sound.

    Attributes:
        folder: where it is.
        step: optimizer steps taken.
        score: accuracy at that step; None where there was no evaluation.
    """

    folder: Path
    step: int
    score: float | None

    @property
    def weights(self) -> Path:
        """The weights to use: the averaged ones where there are any."""
        averaged = self.folder / AVERAGED
        return averaged if averaged.exists() else self.folder / WEIGHTS

    def state(self) -> dict[str, Any]:
        """What it takes to go on, beside the weights; never anything but tensors and plain values."""
        try:
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
        self, step: int, state: Mapping[str, Any], weights: Mapping[str, Callable[[Path], Any]], score: float | None
    ) -> Checkpoint:
        """Write a checkpoint, then remove those no longer kept.

        Args:
            step: optimizer steps taken.
            state: tensors and plain values.
            weights: for each file name a function that writes it to a path.
            score: accuracy, if it was measured.

        Returns:
            The checkpoint.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        place = self.folder / f"{_TEMPORARY}{step:010d}"
        place.mkdir()
        for name, writer in weights.items():
            writer(place / name)
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(place / STATE, buffer.getvalue())
        files = {file.name: _facts(file) for file in sorted(place.iterdir())}
        manifest = {"schema": SCHEMA, "step": step, "score": score, "files": files}
        write_atomically(place / MANIFEST, json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1))
        _flush(place)
        written = Checkpoint(self._place(place, self.folder / f"{_STEP}{step:010d}"), step, score)
        self._prune()
        return written

    def newest(self, *, set_aside: bool = False) -> Checkpoint | None:
        """Return the newest sound checkpoint, with a warning for each newer one that is damaged.

        Args:
            set_aside: rename damaged ones, so that they count no longer.

        Raises:
            ValueError: if there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for folder in reversed(self.folders()):
            try:
                found = verified(folder)
            except ValueError as error:
                damaged.append(str(error))
                if set_aside:
                    self._place(folder, folder.with_name(_DAMAGED + folder.name))
                continue
            for message in damaged:
                warnings.warn(f"{message}; {found.folder.name} is used instead", RuntimeWarning, stacklevel=2)
            return found
        if damaged:
            raise ValueError(
                f"{damaged[0]}, and so are all {len(damaged)} in {str(self.folder)!r}; restore them from a copy, or "
                "start anew in another folder"
            )
        return None

    def best(self) -> Checkpoint | None:
        """Return the sound checkpoint with the highest score, the newest of equals; without scores, the newest."""
        found = []
        for folder in self.folders():
            try:
                found.append(verified(folder))
            except ValueError as error:
                warnings.warn(f"{error}; another is used", RuntimeWarning, stacklevel=2)
        return max(found, key=lambda one: (-1.0 if one.score is None else one.score, one.step), default=None)

    def folders(self) -> list[Path]:
        """All checkpoints, sound or not, the oldest first."""
        return sorted(self.folder.glob(f"{_STEP}*"))

    def clean(self) -> None:
        """Remove what an interruption left half-written."""
        for folder in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(folder)

    def _place(self, source: Path, target: Path) -> Path:
        """Rename a folder; one of that name steps aside first."""
        if target.exists():
            aside = self.folder / f"{_TEMPORARY}replaced_{target.name}"
            os.replace(target, aside)
        os.replace(source, target)
        _flush(self.folder)
        self.clean()
        return target

    def _prune(self) -> None:
        folders = self.folders()
        scores = {folder: _score(folder) for folder in folders}
        best = max(folders, key=lambda folder: (scores[folder], folder))
        for folder in folders[: -self.keep]:
            if folder != best or scores[folder] < 0:
                shutil.rmtree(folder)


def verified(folder: str | Path) -> Checkpoint:
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
        if _hash(file) != facts.sha256:
            raise _damaged(folder, f"{name} has another checksum than when it was written")
    return Checkpoint(folder, manifest.step, manifest.score)


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


def _manifest(folder: Path) -> _Manifest:
    try:
        document = read_json(folder / MANIFEST, most=2**20)
        own = document.pop("sha256", None)
        sound = own == _own_hash(document)
        manifest = structured(_Manifest, document)
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


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _hash(file)}


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Have the names in a folder on disk: a rename is safe from a power cut only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
