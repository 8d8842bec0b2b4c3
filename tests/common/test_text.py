"""What others said, as one printable line: the law holds for any text and any error."""

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.common.checks import invalid
from normfree.common.text import LONGEST, LONGEST_PART, all_lines, first_line, one_line, printable, quoted, shortened

ANY = st.text(alphabet=st.characters(max_codepoint=sys.maxunicode), max_size=700)


def acts(letter):
    """Whether a terminal acts on a character, or shows what follows in another order."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in (
        *("RLE", "LRE", "RLO", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"),
    )


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ANY)
def test_any_text_becomes_one_bounded_line_that_no_terminal_acts_on(text):
    for said in (first_line(ValueError(text)), one_line(ValueError(text)), all_lines(ValueError(text)), quoted(text)):
        assert said and len(said) <= LONGEST_PART + len("ValueError: ") and not any(map(acts, said))
        said.encode()
    assert not any(map(acts, printable(text)))
    assert len(str(invalid("argument", text, text, text))) <= LONGEST


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, AssertionError, MemoryError, OSError])
def test_an_error_without_a_message_is_its_class(kind):
    for error in (kind(), kind("")) if kind is not KeyError else (kind(),):
        assert first_line(error) == one_line(error) == all_lines(error) == kind.__name__


def test_an_error_that_cannot_be_said_is_its_class():
    class Silent(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert first_line(Silent()) == one_line(Silent()) == all_lines(Silent()) == "Silent"


def test_values_of_exponential_size_are_quoted_at_once():
    value = ()
    for _ in range(60):
        value = (value, value)
    assert len(quoted(value)) <= LONGEST_PART + 2
    assert len(quoted(10**10000)) <= LONGEST_PART + 2


def test_what_is_short_stays():
    assert first_line(ValueError("a = 1; b\nsecond")) == "a = 1; b"
    assert one_line(ValueError("what failed.\nmore")) == "ValueError: what failed"
    assert all_lines(ValueError("title:\n  a\n  b")) == "title: a b"
    assert printable("π = 3,\t\x1b[31m‮") == "π = 3,\\x09\\x1b[31m\\u202e"
    assert shortened("abc", 3) == "abc" and shortened("abcd", 3) == "ab…"
    assert str(invalid("width", 0, "must be at least 1", "pass 4")) == "width=0: must be at least 1; pass 4"
