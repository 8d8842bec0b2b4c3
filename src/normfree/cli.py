"""The command line: the only place that knows all commands."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console

import normfree
from normfree.commands.benchmark import Benchmark
from normfree.commands.convert import Convert
from normfree.commands.demo import Demo
from normfree.commands.doctor import Doctor
from normfree.commands.evaluate import Evaluate
from normfree.commands.export import Export
from normfree.commands.models import Models
from normfree.commands.paper import Paper
from normfree.commands.predict import Predict
from normfree.commands.spp import Spp
from normfree.commands.train import Train
from normfree.nn.checks import suggestion

WIDTH = 110
"""Columns of what is not read on a terminal."""

COMMANDS = {
    "spp": Spp,
    "models": Models,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "convert": Convert,
    "doctor": Doctor,
    "export": Export,
    "benchmark": Benchmark,
    "paper": Paper,
    "demo": Demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after ``normfree``; those of the process by default.

    Returns:
        0 (or what the command returns: 1 where ``doctor`` finds a model not healthy), or 2 for an error the user
        can mend, told in one line on standard error.
    """
    try:
        command = _parsed(arguments)
        return command.run(Console(width=None if sys.stdout.isatty() else WIDTH)) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"normfree: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130


def _parsed(arguments: Sequence[str] | None) -> Any:
    """The command the words ask for; a ValueError of one line where they ask for none."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"normfree {normfree.__version__}")
        raise SystemExit(0)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise ValueError(f"there is no command {words[0]!r}; {suggestion(words[0], COMMANDS)}")
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="normfree",
                description="Design, inspect, train and ship networks without normalizers.",
                args=words or ["--help"],
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_first_sentence(told.getvalue())) from None


def _first_sentence(framed: str) -> str:
    """What a framed message of the parser says, without the frame and the repetition of the help below it."""
    lines = [re.sub(r"[^\x00-\u24ff\u2600-\uffff]", "", line).strip() for line in framed.splitlines()[1:]]
    first = " ".join(lines[: lines.index("")] if "" in lines else lines).rstrip(".")
    own = re.sub(r"^Error parsing (?!--)[\w.-]+: ", "", first)  # a command's own check says its remedy itself
    return own if own != first else f"{first}; see normfree --help"


if __name__ == "__main__":
    sys.exit(main())
