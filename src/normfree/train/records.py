"""A run's curves, kept three ways: CSV files to read again, TensorBoard to watch, and in memory for the report."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfree.common.files import kind_of, read_bytes, refused, write_atomically
from normfree.common.packages import required
from normfree.common.text import first_line

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
