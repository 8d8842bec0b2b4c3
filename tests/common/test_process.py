"""Random states and settings of the process: one thread at a time changes them, and they are put back."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from normfree.common import process
from normfree.common.process import one_thread_at_a_time, put_back_all, seeded


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.fixture
def cuda(monkeypatch):
    """Two generators in the place of CUDA's."""
    generators = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    return generators


@pytest.mark.parametrize("fails", [False, True])
def test_all_generators_are_seeded_and_put_back(cuda, fails):
    before = states(), [g.get_state().tolist() for g in cuda]
    drawn = []
    for _ in range(2):
        try:
            with seeded(5):
                drawn.append((torch.rand(2).tolist(), random.random(), np.random.rand()))
                drawn[-1] += tuple(torch.rand(2, generator=g).tolist() for g in cuda)
                assert not fails
        except AssertionError:
            pass
    assert drawn[0] == drawn[1]
    assert (states(), [g.get_state().tolist() for g in cuda]) == before


def test_no_two_threads_run_at_once_and_each_draws_what_it_would_alone():
    inside, most = [0], [0]

    def draw(seed):
        with seeded(seed), one_thread_at_a_time():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            first = torch.rand(2)
            time.sleep(0.01)
            found = [*first.tolist(), random.random(), *torch.rand(2).tolist(), np.random.rand()]
            inside[0] -= 1
            return found

    before = states()
    alone = [draw(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(draw, range(6))) == alone
    assert most == [1]
    assert states() == before


def held_by_another_thread():
    """A thread that has the turn until the event it gives is set."""
    begun, end = threading.Event(), threading.Event()

    def hold():
        with one_thread_at_a_time():
            begun.set()
            end.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert begun.wait(30)
    return thread, end


def test_a_thread_that_waits_too_long_is_told(monkeypatch):
    monkeypatch.setattr(process, "LONGEST_TURN", 0.05)
    thread, end = held_by_another_thread()
    with pytest.raises(ValueError, match="another thread has been measuring"), one_thread_at_a_time():
        pass
    end.set()
    thread.join()
    with one_thread_at_a_time():
        pass


def test_many_short_turns_are_not_one_long_one(monkeypatch):
    monkeypatch.setattr(process, "LONGEST_TURN", 0.2)

    def hold(_):
        with one_thread_at_a_time():
            time.sleep(0.06)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(hold, range(8)))) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_fork_does_not_wait_for_a_thread_that_it_has_not():
    thread, end = held_by_another_thread()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            with one_thread_at_a_time():
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    end.set()
    thread.join()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_an_interrupt_at_any_moment_ends_the_turn():
    def turns():
        for _ in range(20):
            with one_thread_at_a_time():
                pass

    def interrupt(number, frame):
        while frame is not None and frame.f_code is not turns.__code__:
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt

    before, count, end = signal.signal(signal.SIGALRM, interrupt), 0, time.monotonic() + 1.0
    try:
        while time.monotonic() < end:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-4))
            try:
                turns()
            except KeyboardInterrupt:
                count += 1
            assert process._turn.holder is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count > 50


class Thing:
    def __init__(self, name, *errors):
        self.name, self.errors, self.value = name, list(errors), "changed"

    def put_back(self):
        if self.errors:
            raise self.errors.pop(0)
        self.value = "put back"


def test_one_failure_keeps_nothing_else_from_being_put_back():
    things = [Thing("a"), Thing("b", OSError("full\nand more")), Thing("c"), Thing("d", KeyError("x"), KeyError("x"))]
    assert put_back_all(things) == ["b (OSError: full)", "d (KeyError: 'x')"]
    assert [thing.value for thing in things] == ["put back", "changed", "put back", "changed"]


def test_an_interrupt_waits():
    things = [Thing("a", KeyboardInterrupt()), Thing("b"), Thing("c", SystemExit(1), SystemExit(1)), Thing("d")]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        put_back_all(things)
    assert [thing.value for thing in things] == ["put back", "put back", "changed", "put back"]
