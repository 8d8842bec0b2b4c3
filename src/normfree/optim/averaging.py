"""Exponential moving average of a network's weights, with the official warm-up.

    average <- d * average + (1 - d) * weights,    d = min(decay, (1 + t) / (10 + t))

t       averages taken before this one, from 0

Source: Brock et al. 2021 (arXiv 2101.08692 and 2102.06171); the warm-up is TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from normfree.common.checks import check_rate, invalid
from normfree.common.text import all_lines, first_line
from normfree.common.torch_compat import copy_model, unwrapped

HALF = (torch.float16, torch.bfloat16)


class WeightAverage:
    """Keeps the average above of a model's parameters, and its buffers as they are.

    ``torch.optim.swa_utils.AveragedModel`` fixes its decay and takes the first weights for the average; the warm-up
    allows neither, so of that module only the fused update is used. Averages of half-precision weights are kept
    in float32: at a decay of 0.99999 a bfloat16 number would never move.

    Args:
        model: the model; wrappers are looked through.
        decay: largest d, in [0, 1); 0.99999 in the papers, for runs of 10^5 steps.
        module: what is to hold the averages, by default a copy of the model. A model that ``fully_shard`` has sharded
            cannot be copied: give another, built and sharded in the same way.

    Attributes:
        module: the averaged network, in evaluation mode, without gradients.
        updates: t.

    Raises:
        ValueError: for a decay outside [0, 1), a model that cannot be copied, and a ``module`` of other shapes.

    Source: Brock et al. 2021, appendix on training.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99999, *, module: nn.Module | None = None) -> None:
        self.decay = check_rate("decay", decay)
        self.model = unwrapped(model)
        self.updates = 0
        copied = _copy(self.model) if module is None else unwrapped(module)
        copied.eval()
        self.module = copied.requires_grad_(False)
        for tensor in self._tensors(self.module):
            tensor.grad = None
            if tensor.dtype in HALF:
                tensor.data = tensor.data.float()
        if module is not None:
            self._start(module)

    @torch.no_grad()
    def _start(self, module: nn.Module) -> None:
        """Begin at the model's weights, in a module that was given."""
        averages, present = [list(self._tensors(one)) for one in (self.module, self.model)]
        if [tensor.shape for tensor in averages] != [tensor.shape for tensor in present]:
            rule = "its parameters and buffers must have the shapes of the model's"
            raise invalid("module", type(module).__name__, rule, "build it as the model was built")
        for averaged, own in zip(averages, present, strict=True):
            averaged.copy_(own)

    def next_decay(self) -> float:
        """Return d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average; call it after each optimizer step.

        Raises:
            ValueError: the model has got or lost parameters since the average was made.
        """
        averaged_ones, present_ones = list(self.module.parameters()), list(self.model.parameters())
        if len(averaged_ones) != len(present_ones):
            rule = f"has {len(present_ones)} parameters, and had {len(averaged_ones)} when the average was made"
            remedy = "make the average when the model is complete, after InputCentring or another change of its layers"
            raise invalid("model", type(self.model).__name__, rule, remedy)
        average = get_ema_multi_avg_fn(self.next_decay())
        groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for averaged, present in zip(averaged_ones, present_ones, strict=True):
            averages, weights = groups.setdefault((averaged.device, averaged.dtype, type(averaged.data)), ([], []))
            averages.append(averaged)
            weights.append(present.to(averaged.dtype))
        for averages, weights in groups.values():
            average(averages, weights, None)  # type: ignore[arg-type]
        for averaged, present in zip(self.module.buffers(), self.model.buffers(), strict=True):
            averaged.copy_(present)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Put the averages into the model itself while the context is open; its own weights come back bit for bit."""
        pairs = [*zip(self._tensors(self.model), self._tensors(self.module), strict=True)]
        with torch.no_grad():
            kept = [present.clone() for present, _ in pairs]
            try:
                for present, averaged in pairs:
                    present.copy_(averaged)
                with torch.enable_grad():
                    yield self.model
            finally:
                for (present, _), own in zip(pairs, kept, strict=True):
                    present.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and t: all it takes to resume exactly."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is another model's.
        """
        if set(state) != {"updates", "module"}:
            remedy = "pass what WeightAverage.state_dict returned"
            raise invalid("state", sorted(state), "must have the keys 'module' and 'updates'", remedy)
        try:
            self.module.load_state_dict(state["module"])
        except RuntimeError as error:
            raise invalid("state", "module", all_lines(error), "load it beside the model it was saved with") from error
        self.updates = int(state["updates"])

    @staticmethod
    def _tensors(model: nn.Module) -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy_model(model)
    except ValueError as error:  # fully_shard's, for one
        remedy = "pass module=, another network built (and sharded) in the same way"
        raise invalid("model", type(model).__name__, f"cannot be copied: {first_line(error)}", remedy) from error
