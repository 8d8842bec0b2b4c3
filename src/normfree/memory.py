"""What an argument would take of memory, compared with what the machine has before it is taken."""

from __future__ import annotations

import os

from normfree.nn.checks import invalid


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
