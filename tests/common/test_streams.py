"""Whether an error comes of an output that nobody reads any more."""

import os
import sys
from contextlib import contextmanager
from itertools import pairwise

from normfree.common.streams import closed_output


@contextmanager
def unread():
    """Have a standard output whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    before = sys.stdout
    with os.fdopen(writer, "w") as sys.stdout:
        try:
            yield
        finally:
            sys.stdout = before


def chained(*errors):
    """Errors, each of which came of the next."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def test_a_broken_pipe_is_found_wherever_it_stands_in_the_chain():
    handled = ValueError()
    handled.__context__ = chained(RuntimeError(), BrokenPipeError())
    with unread():
        assert closed_output(BrokenPipeError())
        assert closed_output(chained(ValueError(), RuntimeError(), BrokenPipeError()))
        assert closed_output(handled)
        assert not closed_output(chained(ValueError(), RuntimeError()))


def test_a_chain_may_be_a_ring():
    first, second = ValueError(), RuntimeError()
    first.__cause__, second.__context__ = second, first
    with unread():
        assert not closed_output(first)
        second.__cause__ = BrokenPipeError()
        assert closed_output(first)


def test_an_output_that_is_read_is_open():
    assert not closed_output(BrokenPipeError())
