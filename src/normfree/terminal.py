"""The command at a terminal: Ctrl-C ends it in one line, a reader that has gone in none, and no file beside it is run.

Imported before anything else: Ctrl-C is caught while PyTorch is imported, which takes seconds, and no import looks into
the current folder. So what is needed at the end alone is imported by the function that needs it. ``normfree.cli.main``
takes the handler back.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended."""


def _end(number: int, frame: Any) -> None:
    os.write(2, b"normfree: interrupted\n")
    os._exit(INTERRUPTED)


def is_command(words: list[str]) -> bool:
    """Tell whether a process's words are those of the command: ``normfree …`` or ``python -m normfree …``."""
    module = any(words[i : i + 2] == ["-m", "normfree"] for i in range(len(words)))
    return module or any(Path(word).name == "normfree" for word in words[:2])


def leave_current_folder() -> None:
    """Import nothing that lies in the current folder under the name of a package, as ``python -m`` would.

    The folder of a model may be a stranger's. ``python -m normfree`` itself is looked up there before this runs. Where
    that folder was removed meanwhile, the command ends with a line that says so: imports ask for it, too.
    """
    if not is_command(sys.orig_argv):
        return
    try:
        current = os.path.realpath(os.curdir)
    except OSError:
        os.write(2, b"normfree: the current folder was removed, or cannot be read; change to another (cd)\n")
        os._exit(2)
    if sys.flags.safe_path or not sys.path:
        return
    here, own = os.path.realpath(sys.path[0] or os.curdir), os.path.realpath(Path(__file__).parent.parent)
    if here == current != own:
        del sys.path[0]


def catch_interrupts() -> None:
    """End the process at an interrupt, if it is the command's; until :func:`raise_interrupts`."""
    if is_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


_raised: list[int] = []
"""Interrupts that were raised as KeyboardInterrupt; code that is interrupted in an import may raise something else."""


def _raise(number: int, frame: Any) -> None:
    _raised.append(number)
    raise KeyboardInterrupt


def raise_interrupts() -> None:
    """Have an interrupt raise KeyboardInterrupt, as Python does, and be remembered."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _raise)


def was_interrupted() -> bool:
    """Return whether the command was interrupted, whatever became of the KeyboardInterrupt."""
    return bool(_raised)


def drop_output(stream: IO[str] | None = None) -> None:
    """Have what is left in a stream, standard output by default, go nowhere, or Python would complain at its end."""
    import contextlib

    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def closed_output(error: BaseException) -> bool:
    """Whether an error comes of code, of a model say, that printed when nobody read any more, as behind ``| head``."""
    import select

    from normfree.common.text import causes

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


catch_interrupts()
leave_current_folder()
