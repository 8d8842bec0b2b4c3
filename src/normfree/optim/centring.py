"""Measure the means that centred weights subtract, and move them between optimizer steps."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn

from normfree.common.checks import check_number, invalid
from normfree.nn.centring import centre_weights, move_input_mean
from normfree.nn.scaled_ws import Standardized
from normfree.optim.groups import original

RATE, SHARE = 0.1, 0.25


class InputCentring:
    """Moves the input means of a network's centred weights towards those of its training batches.

    Each training forward pass adds the channel means of every centred layer's input, of a part of the batch; ``step``,
    after the optimizer's, moves the layers' means a share of the way there and their biases along, so that the function
    is the same before and after (:mod:`normfree.nn.centring`). What a step sees is thus one set of means for all the
    micro-batches of its gradient.

    Args:
        model: the network; its standardized layers are centred if they are not yet.
        rate: share of the way that the means move at each step, above 0, at most 1.
        share: part of each batch that is measured, above 0, at most 1: the first examples of it.
        process_group: ranks that train the same network, whose measurements are averaged; None for one.

    Raises:
        ValueError: a share out of range; a network without standardized layers.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float = RATE,
        share: float = SHARE,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        __tracebackhide__ = True
        for name, value in (("rate", rate), ("share", share)):
            if check_number(name, value, 0.0, exclusive=True) > 1:
                raise invalid(name, value, "is a share", "pass at most 1")
        self.rate, self.share, self.process_group = rate, share, process_group
        network = original(model)
        centre_weights(network)
        self.layers = [m for m in network.modules() if isinstance(m, Standardized) and m.input_mean is not None]
        for layer in self.layers:
            layer.measured_share = share

    @torch.no_grad()
    def step(self) -> None:
        """Move the means, once after each optimizer step; without a training forward pass since, nothing moves."""
        layers = [layer for layer in self.layers if layer.measured_mean is not None]
        if not layers:
            return
        sums = [layer.measured_mean for layer in layers if layer.measured_mean is not None]
        means = [each[:-1] / each[-1] for each in sums]
        if self.process_group is not None:
            together = torch.cat(means)
            dist.all_reduce(together, group=self.process_group)
            means = (together / dist.get_world_size(self.process_group)).split([len(mean) for mean in means])
        for layer, mean in zip(layers, means, strict=True):
            assert layer.input_mean is not None
            move_input_mean(layer, torch.lerp(layer.input_mean, mean.to(layer.input_mean.dtype), self.rate))
            layer.measured_mean = None

    def forget(self) -> None:
        """Take back what was measured since the last step."""
        for layer in self.layers:
            layer.measured_mean = None

    def close(self) -> None:
        """Measure no more; the layers keep their means."""
        self.forget()
        for layer in self.layers:
            layer.measured_share = 0.0
