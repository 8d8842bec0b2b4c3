"""What belongs to the whole process and not to one thread: random states and settings of torch.

Who seeds the generators, or sets what all threads see, does so in its turn (:func:`one_thread_at_a_time`) and puts back
what it found. Threads that draw, or read a setting, without a turn are not held up.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from normfree.common.text import one_line

LONGEST_TURN = 600.0
"""Seconds that a thread waits for one turn of another before it is an error: the two may be in a deadlock."""


POLL = 0.005
"""Seconds between two looks at whose turn it is; a turn is a forward pass or more."""

OWN_FILE = "_normfree_source_"
"""What the name of a module begins with that is the ``FILE.py`` of a person."""


class _Turn:
    """Whose turn it is. The lock is held for moments only: no thread waits, and no code of others runs, in it.

    It is one of C: an interrupt can come between the acquisition and the body of a ``with`` where ``__enter__`` is
    written in Python, as a condition's is, and would leave it locked for all other threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None
        self.number = 0


_turn = _Turn()


def _begin_anew() -> None:
    """In the child of a fork runs the thread alone that forked; another that had the turn would never end it."""
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """Have a turn, for which other threads wait; the thread that has it may enter again.

    Raises:
        ValueError: if another thread has one turn for longer than :data:`LONGEST_TURN`.
    """
    turn, me, mine, number, since = _turn, threading.get_ident(), False, -1, 0.0
    try:
        while True:
            with turn.lock:
                if turn.holder is None:
                    turn.number += 1
                    turn.holder, mine = me, True  # an interrupt is raised at calls and jumps, so not between these two
                if turn.holder == me:
                    break
                if turn.number != number:
                    number, since = turn.number, time.monotonic()
            if time.monotonic() - since > LONGEST_TURN:
                raise ValueError(
                    f"model: another thread has been measuring or exporting for {LONGEST_TURN:.0f} s, and this one "
                    "waits for its turn; do so in one thread, and let no model wait for a thread that measures"
                )
            time.sleep(POLL)
        yield
    finally:
        if mine:
            turn.holder = None


class Kept(Protocol):
    """A thing and how it was.

    Attributes:
        name: what an error calls it.
    """

    @property
    def name(self) -> str: ...

    def put_back(self) -> None:
        """Make it what it was; the same again the second time."""
        ...


def put_back_all(kept: Iterable[Kept]) -> list[str]:
    """Put back each, even if others fail; return the names of those that failed, with their reasons.

    An interrupt (Ctrl-C) waits until all is back.
    """
    waiting, failed = list(kept), dict[int, Exception]()
    position, interrupted, interrupt = 0, -1, None
    while position < len(waiting):
        try:
            while position < len(waiting):
                try:
                    waiting[position].put_back()
                except Exception as error:  # of any kind: the others are put back all the same
                    failed[position] = error
                position += 1
        except BaseException as error:
            if position == interrupted:  # no interrupt: it raises that itself
                position += 1
            interrupted, interrupt = position, error
    if interrupt is not None:
        raise interrupt
    return [f"{waiting[position].name} ({one_line(error, 80)})" for position, error in failed.items()]


class _Setting:
    """Something of the process that can be read and set."""

    def __init__(self, name: str, get: Callable[[], Any], set_: Callable[[Any], Any]) -> None:
        self.name, self.get, self.set, self.value = name, get, set_, get()

    def put_back(self) -> None:
        """Set it to what it was; settings that are the same are left alone."""
        now = self.get()
        if isinstance(now, (torch.Tensor, dict)) or now != self.value:
            self.set(self.value)


class RandomStates:
    """The random states of torch, CUDA, Python and NumPy, as they are now.

    Attributes:
        kept: each of them; of CUDA's devices those of a process that has opened CUDA.
    """

    def __init__(self) -> None:
        self.generators = (torch.default_generator, *torch.cuda.default_generators)
        devices = range(len(torch.cuda.default_generators))
        names = ("torch's random state", *(f"the random state of CUDA device {index}" for index in devices))
        self.kept: Sequence[Kept] = [
            *(_Setting(n, g.get_state, g.set_state) for n, g in zip(names, self.generators, strict=True)),
            _Setting("Python's random state", random.getstate, random.setstate),
            _Setting("NumPy's random state", lambda: np.random.get_state(legacy=False), np.random.set_state),
        ]

    def seed(self, seed: int) -> None:
        """Seed every generator that is kept."""
        for generator in self.generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run from a seed, one thread at a time; the random states of the process are afterwards what they were."""
    with one_thread_at_a_time():
        states = RandomStates()
        try:
            states.seed(seed)
            yield
        finally:
            if failed := put_back_all(states.kept):
                raise ValueError(f"seed: {'; '.join(failed)} could not be put back")


def settings_of_torch() -> Sequence[Kept]:
    """The settings of torch that a model may change and that change what it computes, as they are now."""
    cudnn, mha = torch.backends.cudnn, torch.backends.mha
    return [
        _Setting("the gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        _Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        _Setting("the default device", torch.get_default_device, set_default_device),
        _Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
        _Setting("the mode of determinism", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        _Setting("cuDNN's benchmark mode", lambda: cudnn.benchmark, lambda on: setattr(cudnn, "benchmark", on)),
        _Setting("cuDNN's determinism", lambda: cudnn.deterministic, lambda on: setattr(cudnn, "deterministic", on)),
        _Setting("attention's fast path", mha.get_fastpath_enabled, mha.set_fastpath_enabled),
        _Setting("cuDNN itself", lambda: cudnn.enabled, lambda on: setattr(cudnn, "enabled", on)),
        _Setting("autograd's anomaly mode", _anomaly_mode, lambda mode: torch.autograd.set_detect_anomaly(*mode)),
        _Setting("NumPy's handling of errors", lambda: tuple(np.geterr().items()), lambda how: np.seterr(**dict(how))),
        _Setting("Python's limit of recursion", sys.getrecursionlimit, sys.setrecursionlimit),
        *(
            _Setting(
                f"autocast on {device}", partial(torch.is_autocast_enabled, device), partial(_set_autocast, device)
            )
            for device in ("cpu", "cuda")
        ),
        *_precision_of_products(),
    ]


def _anomaly_mode() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _set_autocast(device: str, on: bool) -> None:
    torch.set_autocast_enabled(device, on)
    torch.clear_autocast_cache()


def _precision_of_products() -> list[Kept]:
    """The precision of float32 products; none where torch's newer settings, which have no one name for it, set it."""
    try:
        return [
            _Setting(
                "the precision of products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
            )
        ]
    except RuntimeError:
        return []


def set_default_device(device: torch.device) -> None:
    """Set the device on which torch makes tensors by default."""
    torch.set_default_device(None if device.type == "cpu" else device)  # None takes torch's mode for devices away
