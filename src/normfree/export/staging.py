"""Files that appear under their name only when they have been found right."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normfree.common.checks import invalid


def check_path(path: str | Path, suffix: str) -> Path:
    """Return where to write to; refuse, before any work is done, what could not be written.

    Raises:
        ValueError: another suffix, a folder of that name, a file where a folder should be, or no permission.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise invalid("path", path, "must be a path", f"pass one such as 'model{suffix}'")
    path = Path(path)
    if path.suffix != suffix:
        raise invalid("path", str(path), f"must end in {suffix}", f"pass {str(path.with_suffix(suffix))!r}")
    if path.is_dir():
        raise invalid("path", str(path), "is a folder", "pass a file's name")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise invalid("path", str(path), f"{str(existing)!r} is a file, not a folder", "pass another place")
    if existing.is_relative_to("/proc") or not os.access(existing, os.W_OK | os.X_OK):
        raise invalid("path", str(path), f"{str(existing)!r} cannot be written to", "pass another place")
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, in a folder of its own beside ``path``; move it there at the end.

    Whatever else was written into that folder moves along, first: the named file may refer to it. If the body
    raises, nothing is left, and what had been at ``path`` is as it was.

    Raises:
        ValueError: if one of the other files already exists, for two files cannot be replaced at once.
    """
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            for file in files:
                target = path.parent / file.name
                if target.exists() and target.name != path.name:
                    remedy = "remove it, or pass another place"
                    raise invalid("path", str(path), f"its weights go to {str(target)!r}, which exists", remedy)
                _flush(file)
            for file in files:
                os.replace(file, path.parent / file.name)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
