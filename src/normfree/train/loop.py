"""The training loop: steps, evaluations and checkpoints, until the end or until asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from normfree.data import EvaluationData
from normfree.train.checkpoint import CheckpointStore
from normfree.train.evaluation import Evaluation, evaluate
from normfree.train.session import Session
from normfree.train.stepping import Outcome, take_step


class Observer(Protocol):
    """Is told what happens."""

    def begin(self) -> None:
        """Training starts, or goes on after something else."""
        ...

    def stepped(self, outcome: Outcome) -> None:
        """A step was taken."""
        ...

    def evaluated(self, found: Evaluation) -> None:
        """The network was evaluated."""
        ...


class StopRequest:
    """Whether the process was asked to stop (SIGTERM), which it does after the step it is at."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signal as a request while the context is open; outside the main thread there are no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: Any) -> None:
        self.asked = True


class Loop:
    """One run from where its session stands.

    Args:
        session: what is trained.
        data: this rank's images to evaluate on.
        store: of checkpoints; rank 0 writes.
        observers: of this rank.
        stop: asks the loop to end early.

    Attributes:
        evaluation: the last one, at the session's step; None before.
    """

    def __init__(
        self,
        session: Session,
        data: EvaluationData,
        store: CheckpointStore,
        observers: list[Observer],
        stop: StopRequest,
    ) -> None:
        self.session, self.data, self.store, self.observers, self.stop = session, data, store, observers, stop
        self.evaluation: Evaluation | None = None

    def run(self) -> bool:
        """Train; returns whether the end was reached, and not a request to stop."""
        session, config = self.session, self.session.config
        while session.step < session.last_step:
            if not self._train_epoch():
                self.checkpoint()
                return False
            ended = session.step >= session.last_step
            if ended or session.epoch % config.evaluate_every == 0:
                self.evaluate()
            self.checkpoint()
        if self.evaluation is None:
            self.evaluate()
        return True

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch or of the run; returns whether no rank was asked to stop."""
        session, every = self.session, self.session.config.checkpoint_every
        self._tell(lambda observer: observer.begin())
        self.evaluation = None
        for batches in session.rest_of_epoch():
            outcome = take_step(session, batches, stop=self.stop.asked)
            self._tell(lambda observer, outcome=outcome: observer.stepped(outcome))
            if outcome.stop:
                return False
            if session.step == session.last_step:
                break
            if every and session.step % every == 0 and session.step % session.steps_per_epoch:
                self.checkpoint()
                self._tell(lambda observer: observer.begin())
        return True

    def evaluate(self) -> None:
        """Evaluate the network, averaged where weights are averaged."""
        session = self.session
        limit = session.config.limit_eval_steps
        found = evaluate(session.judged, self.data, session.fabric, limit=limit, sharded=session.sharded)
        self.evaluation = found
        self._tell(lambda observer: observer.evaluated(found))

    def checkpoint(self) -> None:
        """Write a checkpoint; one with weights that are not finite is refused.

        Raises:
            ValueError: naming the parameter; earlier checkpoints are as they were.
        """
        session = self.session
        for name, parameter in session.network.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"step {session.step}: parameter {name!r} is not finite any more, and no checkpoint was written; "
                    "lower the learning rate or clip, and go on from the last one"
                )
        state, weights = session.state_dict(), session.weights()
        if session.fabric.is_global_zero:
            score = None if self.evaluation is None else self.evaluation.top1
            self.store.write(session.step, state, weights, score)
        session.fabric.barrier()

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            what(observer)
