"""Where a loss or a gradient that is not finite began."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfree.signal.nonfinite import check_finite, first_non_finite
from normfree.trace.preserve import untouched
from normfree.train.session import Batch, Session


class NonFiniteLossError(ValueError):
    """Training has diverged: a loss or a gradient is not finite.

    Attributes:
        step: optimizer steps taken before.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


REMEDY = "lower the learning rate, lengthen the warm-up or clip; --on-nonfinite skip goes on without such steps"


def blamed(session: Session, batches: Sequence[Batch], loss: float) -> str:
    """Run the step's batches again and say where the first value that is not finite came from.

    Args:
        session: as it was before the step, gradients aside.
        batches: of the step, on this rank.
        loss: of the step, over all ranks.
    """
    where = f"loss at step {session.step} (epoch {session.epoch})"
    gradients = {name: p.grad for name, p in session.network.named_parameters() if p.grad is not None}
    if session.sharded:
        return f"{where}: {_described(loss)}, in a network whose shards are not searched; {REMEDY}"
    try:
        check_finite(session.network)
    except ValueError as error:
        return f"{where}: {_described(loss)}: {str(error).partition(';')[0]}; {REMEDY}"
    for number, batch in enumerate(batches):
        if told := _of_batch(session, session.prepared(batch, number)):
            return f"{where}: {_described(loss)}: {told}; {REMEDY}"
    if found := _last_non_finite(gradients):
        return f"{where}: it is {loss:g}, but the gradient is not finite, from {found!r} backwards; {REMEDY}"
    if session.fabric.world_size > 1:
        return f"{where}: {_described(loss)}, on another rank; {REMEDY}"
    name, largest = max(((n, float(g.abs().max())) for n, g in gradients.items()), key=lambda one: one[1])
    told = f"it is {loss:g}, and the gradient's norm overflows: it reaches {largest:.3g} in {name!r}"
    return f"{where}: {told}; {REMEDY}"


def _of_batch(session: Session, batch: Batch) -> str | None:
    """What of a batch's way to the loss is not finite, first."""
    images, targets = batch
    if bad := int((~torch.isfinite(images)).sum()):
        return f"the images themselves have {bad} values that are not finite"
    network, state = session.network, torch.get_rng_state()
    with untouched(network, "train") as preserved, torch.no_grad(), session.fabric.autocast():
        loss = session.criterion(network(images), targets)
        if torch.isfinite(loss):
            return None
        torch.set_rng_state(state)
        found = first_non_finite(network, images, preserved)
    if found is None:
        return "all outputs are finite, and the loss of them is not"
    place = f"{found.module!r}" if found.module else "the network itself"
    return (
        f"first in {place} ({found.operation}): {found.count} of {found.total} values, from inputs of at most "
        f"{found.largest:.3g}"
    )


def _last_non_finite(gradients: dict[str, Tensor]) -> str | None:
    """The parameter nearest to the output whose gradient is not finite."""
    names = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    return names[-1] if names else None


def _described(loss: float) -> str:
    return "it is not finite" if loss != loss else f"it is {loss:g}"
