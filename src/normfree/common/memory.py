"""What an argument would take of memory, compared with what the machine has before it is taken."""

from __future__ import annotations

import os
from pathlib import Path

from normfree.common.checks import invalid


def check_memory(argument: str, value: object, size: int) -> None:
    """Raise if so many bytes are more than the machine's memory.

    Args:
        argument: that asks for them.
        value: of the argument.
        size: bytes.

    Raises:
        ValueError: they are more.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system says
        memory = 2**48
    if size > memory:
        rule = f"takes {size / 2**30:.4g} GiB, and this machine has {memory / 2**30:.4g}"
        raise invalid(argument, value, rule, "pass less")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that can still be used: of the machine, or of the container if it has less.

    Args:
        root: where the system's own files are.

    Returns:
        None where the system does not say (Linux alone does, in ``/proc/meminfo`` and ``/sys/fs/cgroup``).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0))  # of files, and given up when memory is asked for
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    return min(free, max(limit - used + cached, 0))
