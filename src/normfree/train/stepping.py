"""One optimizer step: accumulate the gradient, look whether it is finite, then take the step or refuse it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from normfree.train.blame import NonFiniteLossError, blamed
from normfree.train.session import Batch, Session


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        loss: mean over the batch of all ranks, in nats.
        gradient_norm: Euclidean norm of the whole gradient, before clipping.
        learning_rate: it was taken at.
        images: of the batch, over all ranks.
        stop: whether a rank was asked to stop.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    images: int
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def take_step(session: Session, batches: Sequence[Batch], *, stop: bool = False) -> Outcome:
    """Take one optimizer step: the mean gradient of all batches, of all ranks.

    Args:
        session: what the step changes.
        batches: those of this rank.
        stop: whether this rank was asked to stop; any rank's wish is all ranks'.

    Raises:
        NonFiniteLossError: if the loss or the gradient is not finite, unless such steps are to be skipped; it names the
            module where that began, and the weights are as before.
    """
    model, fabric, optimizer = session.model, session.fabric, session.optimizer
    rate = session.learning_rate()
    model.train()
    # A normalizer's running statistics have heard the batch even if the step is then skipped.
    kept = [buffer.clone() for buffer in session.network.buffers()] if session.config.on_nonfinite == "skip" else []
    losses = []
    for number, batch in enumerate(batches):
        images, targets = session.prepared(batch, number)
        with fabric.no_backward_sync(model, enabled=number + 1 < len(batches)):
            loss = session.criterion(model(images), targets) / len(batches)
            fabric.backward(loss)
        losses.append(loss.detach())
    outcome = _agreed(session, torch.stack(losses).sum(), rate, stop)
    if outcome.finite:
        if (largest := session.config.optimizer.clip_norm) is not None:
            norm = torch.tensor(outcome.gradient_norm, device=fabric.device)
            clip_grads_with_norm_(session.network.parameters(), largest, norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        if session.centring is not None:
            session.centring.step()
        if session.average is not None:
            session.average.update()
    elif session.config.on_nonfinite == "error":
        raise NonFiniteLossError(blamed(session, batches, outcome.loss), session.step)
    else:
        session.skipped += 1
        for buffer, before in zip(session.network.buffers(), kept, strict=True):
            buffer.copy_(before)
    optimizer.zero_grad()
    session.step += 1
    return outcome


def _agreed(session: Session, loss: Tensor, rate: float, stop: bool) -> Outcome:
    """Loss, norm and wish to stop, the same on all ranks: read from the device once, for it waits."""
    norm = session.states.gradient_norm(session.network)
    told = torch.stack([loss.float(), norm.float(), torch.tensor(float(stop), device=loss.device)])
    if (world_size := session.fabric.world_size) > 1:
        told = session.fabric.all_reduce(told, reduce_op="sum") / world_size  # type: ignore[operator]
    mean_loss, norm_value, wishes = told.tolist()
    return Outcome(
        loss=mean_loss,
        gradient_norm=norm_value,
        learning_rate=rate,
        images=session.config.batch_size,
        stop=wishes > 0,
    )
