"""What is shown of a run while it runs: a bar on a terminal; elsewhere a line at least every half minute."""

from __future__ import annotations

import math
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

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
