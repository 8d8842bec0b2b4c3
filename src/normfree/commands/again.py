"""The command line that does again what a command did, for the records it writes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any


def command_line(name: str, options: Any, positional: Sequence[str], *, without: Sequence[str]) -> str:
    """A command's line in a shell, with the options that are not at their defaults.

    Args:
        name: of the command.
        options: the command, a dataclass.
        positional: its words that need no name.
        without: fields to leave out: those the words are of, and where results go.
    """
    words = ["normfree", name, *positional]
    for field in fields(options):
        value, option = getattr(options, field.name), "--" + field.name.replace("_", "-")
        if field.name in without or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        else:
            words += [option, str(value)]
    return shlex.join(words)
