"""The process's output when nobody reads it any more, as behind ``| head``."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import IO

from normfree.common.text import causes


def drop_output(stream: IO[str] | None = None) -> None:
    """Have what is left in a stream, standard output by default, go nowhere, or Python would complain at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def closed_output(error: BaseException) -> bool:
    """Whether an error comes of code, of a model say, that printed when nobody read any more."""
    if not any(isinstance(one, BrokenPipeError) for one in causes(error)):
        return False
    if not hasattr(select, "poll"):  # Windows
        return True
    try:
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))
    except (OSError, ValueError):  # no file of the system's
        return False
