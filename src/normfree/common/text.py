"""Text that comes from outside, as one printable line of bounded length: errors, names in files, paths."""

from __future__ import annotations

import re
import reprlib

LONGEST = 500
"""Characters of an error message at most."""

LONGEST_PART = 240
"""Characters at most of each part that an error message quotes."""

# What a terminal acts on (C0 and C1 controls), what changes the order of reading (bidirectional controls), line
# separators, and halves of surrogate pairs, which no stream can encode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST_PART  # cut in the middle: a path keeps its name
_REPR.maxlevel = 3
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with every control character written as an escape such as ``\x1b``.

    Args:
        text: from anywhere.
        keep: control characters to leave, such as a line's end.
    """

    def escaped(match: re.Match[str]) -> str:
        letter = match[0]
        if letter in keep:
            return letter
        return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"

    return _CONTROL.sub(escaped, text)


def shortened(text: str, most: int = LONGEST) -> str:
    """Return at most so many characters; an ellipsis ends what was cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def short_repr(value: object, told: str) -> str:
    """Return ``<Class told>`` as one printable line of bounded length: the ``repr`` of a result that holds much."""
    return f"<{type(value).__name__} {shortened(printable(told), LONGEST_PART)}>"


def quoted(value: object) -> str:
    """Return ``repr(value)`` of bounded length and effort, for values of any size and nesting."""
    try:
        return shortened(printable(_REPR.repr(value)), LONGEST_PART + 2)
    except Exception:  # a value of somebody else's class
        return f"<{type(value).__name__}>"


def first_line(error: BaseException, most: int = LONGEST_PART) -> str:
    """Return the first line of what an error says, printable; the name of its class where it says nothing."""
    return _said(error, most) or type(error).__name__


def one_line(error: BaseException, most: int = LONGEST_PART) -> str:
    """Return an error's class and the first line of what it says, without the full stop."""
    said = _said(error, most).rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def all_lines(error: BaseException, most: int = LONGEST_PART) -> str:
    """Return all that an error says as one printable line, for errors whose first line is a title."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # as below
        said = ""
    return shortened(printable(said), most) if said else type(error).__name__


def _said(error: BaseException, most: int) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # of somebody else's class, whose __str__ fails
        lines = []
    return shortened(printable(lines[0].strip()), most) if lines else ""


def causes(error: BaseException) -> list[BaseException]:
    """Return an error, what it came of, and so on, each once: an error that is raised again may be in its own chain."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and not any(one is known for known in chain):
        chain.append(one)
        one = one.__cause__ or one.__context__
    return chain
