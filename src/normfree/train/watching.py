"""What is seen of a run while it goes: the curves on disk, and a line of progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.train.evaluation import Evaluation
from normfree.train.records import Records, Row
from normfree.train.session import Session
from normfree.train.stepping import Outcome

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
