"""The command line. It imports the module of the command that is asked for, and no other."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import normfree
from normfree import terminal
from normfree.commands import COMMANDS, command_class
from normfree.common.text import LONGEST, all_lines, one_line, printable, shortened
from normfree.terminal import closed_output, drop_output

WIDTH = 110
"""Columns of what is not read on a terminal."""

NARROWEST = 20
"""Columns at least; in fewer than about eight the parser never ends to break the lines of a help."""

COMPLETION = "--tyro-print-completion"
Shell = Literal["bash", "zsh", "fish"]
"""Shells that the parser writes completions for."""

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO}
"""Where nothing more can be written; of a file, the error names it."""

_NO_MEMORY = re.compile("can't allocate memory|out of memory")
"""In what torch's allocators say, of the CPU as a RuntimeError."""

_PYTHONS_FORMAT = warnings.formatwarning

DESCRIPTION = "Design, inspect, train and ship networks without normalizers."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after ``normfree``; those of the process by default.

    Returns:
        0 (or what the command returns: 1 where ``doctor`` finds a model not healthy), or 2 for an error the user
        can mend, stated in one line on standard error; 1 if the output was closed; 3 for our own errors.
    """
    terminal.raise_interrupts()
    _open_streams()
    if shutil.get_terminal_size((WIDTH, 0)).columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _format_warning
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what both log of a file they then raise
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    os.environ["MPLBACKEND"] = "agg"  # figures are files; another, of no name or of no display, may not be imported
    try:
        try:
            command = _parse(words)
        except SystemExit:  # help, which has been printed
            sys.stdout.flush()
            raise
        code = _run(command)
        sys.stdout.flush()
        return _fail("", code) if terminal.was_interrupted() else code  # a library may have caught the interrupt
    except BrokenPipeError:  # `| head` has read enough
        drop_output()
        return 1
    except ValueError as error:
        if closed_output(error):
            drop_output()
            return 1
        return _fail(shortened(_in_options(all_lines(error, LONGEST), words), LONGEST), 2)
    except (OSError, ImportError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL and error.filename is None
        return _fail(f"{'what is printed could not be written: ' if full else ''}{all_lines(error, LONGEST)}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", terminal.INTERRUPTED)
    except Exception as error:
        if os.environ.get("NORMFREE_TRACEBACK"):
            raise
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return _fail(f"memory ran out ({one_line(error)}); give a smaller model, batch or images", 2)
        said = f"{one_line(error)}; if no argument explains it, report it with what NORMFREE_TRACEBACK=1 prints"
        return _fail(said, 2 if isinstance(error, OverflowError) else 3)
    finally:
        warnings.formatwarning = _PYTHONS_FORMAT


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours in a line without its place in the code; others as Python has them."""
    if Path(filename).is_relative_to(Path(__file__).parent) and category in (UserWarning, RuntimeWarning):
        return printable(f"note: {message}") + "\n"
    return printable(_PYTHONS_FORMAT(message, category, filename, lineno, line), keep="\n")


def _run(command: Any) -> int:
    """Run a command; the code of a model that it runs may raise what ends a process without a word.

    The end of a data worker raises PyTorch's error wherever the command is just then, also within a model's forward.

    Raises:
        ValueError: it did, or a worker was killed.
    """
    from normfree.commands.shared import Terminal

    try:
        return command.run(Terminal(width=None if sys.stdout.isatty() else WIDTH)) or 0
    except KeyboardInterrupt:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and "DataLoader worker (pid" not in one_line(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            if place := _own_place_of(error):
                raise ValueError(f"model: {place} failed with {one_line(error)}") from error
            raise
        raise ValueError(
            "workers: a process that decodes images was killed, as the system does where memory runs out; pass "
            "workers=0, which decodes in the command's own process, or fewer, or smaller images or batches"
        ) from error
    except BaseException as error:
        raise ValueError(f"model: its code ended the program with {one_line(error)}; have it raise an error") from error


def _own_place_of(error: Exception) -> str | None:
    """Where in the person's own FILE.py an error was raised that no code of this package has answered for."""
    from normfree.common.process import OWN_FILE

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(OWN_FILE):
            return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}, in {frame.f_code.co_name},"
        if name.partition(".")[0] == "normfree":
            return None
    return None


def _open_streams() -> None:
    """Have streams to print to that take any character, whatever their encoding, also where they were closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(said: str, code: int) -> int:
    if terminal.was_interrupted():  # in an import, say, which then failed in another way
        said, code = "interrupted", terminal.INTERRUPTED
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
    try:
        print(f"normfree: {said}", file=sys.stderr, flush=True)
    except OSError:
        drop_output(sys.stderr)
    return code


def _in_options(message: str, words: list[str]) -> str:
    """An error's message with the options of the command that is asked for."""
    if not words or words[0] not in COMMANDS:
        return message
    from normfree.commands.shared import with_option_names

    try:
        command = command_class(words[0])
    except ImportError:  # as the message says: a package is imported once
        return message
    return with_option_names(message, command)


def _parse(words: list[str]) -> Any:
    """The command the words ask for; a ValueError of one line where they ask for none."""
    if words == ["--version"]:
        print(f"normfree {normfree.__version__}")
        raise SystemExit(0)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        raise SystemExit(0)
    if "" in words:
        raise ValueError(f"argument {words.index('') + 1} is empty, as of an unset variable; give a value")
    if words[0].startswith("--tyro-"):
        print(_completion(words))
        raise SystemExit(0)
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        from normfree.common.checks import suggestion

        raise ValueError(f"there is no command {words[0]!r}; {suggestion(words[0], COMMANDS)}")
    import tyro

    from normfree.commands.shared import without_none

    commands: dict[str, Any] = dict.fromkeys(COMMANDS, _Other)
    if words[0] in COMMANDS:
        command = command_class(words[0])
        if hasattr(command, "apply_config_file"):  # a file of settings, which are the defaults then
            commands[words[0]], words = command.apply_config_file(words)
        else:  # an option that is left out is None, which is no value to type
            commands[words[0]] = without_none(command)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(commands, prog="normfree", description=DESCRIPTION, args=words)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_first_sentence(told.getvalue(), words)) from None


def _completion(words: list[str]) -> str:
    """The script that completes commands and options in a shell.

    Raises:
        ValueError: the words ask for something else, or a shell that there is no script for.
    """
    import tyro

    from normfree.common.checks import check_choice

    if words[0] != COMPLETION:
        raise ValueError(f"there is no option {words[0]!r}; write what {COMPLETION} prints to a file")
    shell = check_choice(COMPLETION, words[1] if len(words) > 1 else "", Shell)
    commands: dict[str, Any] = {name: command_class(name) for name in COMMANDS}
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(commands, prog="normfree", args=[COMPLETION, shell])
    # The script tells candidates apart by lines, and a help of several lines would be several of them.
    script = re.sub(
        r"^.*COMPLETION_SPEC = .*$", lambda line: re.sub(r"\\+n", " ", line[0]), told.getvalue(), flags=re.M
    )
    for before, after in (_FILES, *(_FILES_IN_BASH if shell == "bash" else ())):
        assert before in script, f"tyro's completion for {shell} has no line {before!r}"
        script = script.replace(before, after)
    return script


_OUTPUT = "    # Output one completion per line.\n"
_FILES = (
    _OUTPUT,
    "    if not completions and not ''.join(words[current_index : current_index + 1]).startswith('-'):\n"
    f"        completions = ['__TYRO_COMPLETE_FILES__']\n{_OUTPUT}",
)
"""Where no command or choice fits, a model, a run or a file is meant: its name is completed."""
_FILES_IN_BASH = (
    ('COMPREPLY=($(compgen -f -- "$cur"))', "COMPREPLY=()"),  # and by readline, which knows of folders and of spaces
    ("complete -F _tyro", "complete -o bashdefault -o default -F _tyro"),
)


@dataclass(frozen=True)
class _Other:
    """A command that is not asked for, whose module is not imported."""


def _help() -> str:
    """The commands, a line each or more where the terminal is narrow."""
    indent = 2 + max(map(len, COMMANDS)) + 2
    width = max(shutil.get_terminal_size((WIDTH, 0)).columns, 2 * indent)
    lines = [
        textwrap.fill(summary, width, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, summary in COMMANDS.items()
    ]
    usage = "usage: normfree [-h] [--version] COMMAND ..."
    return "\n".join([usage, "", DESCRIPTION, "", *lines, "", "normfree COMMAND --help lists what a command takes."])


def _first_sentence(framed: str, words: list[str]) -> str:
    """What a framed message of the parser says, with the options it suggests, without frame and help."""
    sections: list[list[str]] = [[]]
    for line in framed.splitlines()[1:]:  # the first is a title
        text = re.sub(r"[^\x00-\u24ff\u2600-\uffff]", "", line).strip()
        if text.strip("-"):
            sections[-1].append(text)
        elif sections[-1]:  # a rule, drawn or of hyphens
            sections.append([])
    first = " ".join(sections[0]).rstrip(".")
    own = re.sub(r"^Error parsing (?!--)[\w.-]+: ", "", first)  # a command's own check says its remedy itself
    if own != first:
        return own
    meant = [line.split()[0] for section in sections if section[:1] == ["Perhaps you meant:"] for line in section[1:]]
    if first.startswith("Unrecognized options: ") and words[0] in COMMANDS:
        from normfree.commands.shared import option_meant

        unknown = first.partition(": ")[2].split(", ")
        guessed = [option_meant(word, command_class(words[0])) for word in unknown if word.startswith("-")]
        meant = list(filter(None, guessed)) or meant
    options = ", ".join(dict.fromkeys(word.rstrip(",") for word in meant if word.startswith("--")))
    if options:
        return f"{first}; perhaps you meant {options}"
    extra = first.rpartition(": ")[2]
    given = words[1 : len(words) - 1 - words[::-1].index(extra)] if extra in words[1:] else []
    option = next((word for word in reversed(given) if word.startswith("--")), None)
    if option is not None and not extra.startswith("-"):  # a value after those that the option takes
        return f"{first}; {option} does not take it as well, see normfree {words[0]} --help"
    return f"{first}; see normfree {words[0]} --help"


if __name__ == "__main__":
    sys.exit(main())
