"""Whether an error comes of an output that nobody reads any more."""

import os
import sys

import pytest

from normfree.common.streams import closed_output


@pytest.fixture
def unread(monkeypatch):
    """A standard output whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


def chained(*errors):
    """Errors, each of which came of the next."""
    for error, cause in zip(errors, errors[1:], strict=False):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.usefixtures("unread")
def test_a_broken_pipe_is_found_wherever_it_stands_in_the_chain():
    assert closed_output(BrokenPipeError())
    assert closed_output(chained(ValueError(), RuntimeError(), BrokenPipeError()))
    handled = ValueError()
    handled.__context__ = chained(RuntimeError(), BrokenPipeError())
    handled.__cause__ = KeyError()
    assert closed_output(handled)
    assert not closed_output(chained(ValueError(), RuntimeError()))


@pytest.mark.usefixtures("unread")
def test_a_chain_may_be_a_ring():
    first, second = ValueError(), RuntimeError()
    first.__cause__, second.__context__ = second, first
    assert not closed_output(first)
    second.__cause__ = BrokenPipeError()
    assert closed_output(first)


def test_an_output_that_is_read_is_open():
    assert not closed_output(BrokenPipeError())
