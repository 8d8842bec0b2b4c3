"""Centred weights: a gradient that does not see the mean of a layer's input, in a function that does not change by it.

    y = W (x - m) + b                       m [I]: slowly moving means of the input's channels, no gradient through them
    m <- m + d,   b <- b + W d              a move, between optimizer steps: y stays what it was, for every x

The positive mean of an activation is shared by all inputs, so the gradient with respect to a plain weight,
``dW = sum of delta x^T``, has a part ``(sum of delta) m^T`` of rank one that repeats what the bias learns, and is the
larger the more the inputs are alike. With a centred weight ``dW = sum of delta (x - m)^T``. BatchNorm's backward pass
removes the same part, since it makes the deltas of a channel sum to zero; weight standardization removes only what all
channels of the input share. No statistic of the batch is in the function: training and evaluation are the same, no
example sees another in the forward pass, and folding stores ``b - W m``.

A depthwise filter sums to zero over the one channel it sees, so standardization alone centres it; the more channels a
filter sees, the more is left to centre. Where the input is padded the padded zeros count as ``-m``: the convolution
runs as before, and W m is subtracted at every position.

Source: this project's. Centring the statistics of a layer's input is that of centred Boltzmann machines (Montavon and
Mueller 2012) and of the homogeneous coordinate in K-FAC (Martens and Grosse 2015).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from normfree.common.checks import check_number, invalid
from normfree.common.torch_compat import unwrapped
from normfree.nn.scaled_ws import Standardized

RATE, SHARE = 0.1, 0.25
"""Of the way to a batch's means that a step moves, and of the batch that is measured, by default."""


def centre_weights(model: nn.Module) -> int:
    """Have every standardized layer with a bias keep means of its input's channels, zero to begin with.

    :class:`InputCentring` measures and moves them; until then nothing changes.

    Args:
        model: the network; its layers get a parameter ``input_mean`` [I] that does not require a gradient (so that
            weight averages average it, as they must, and optimizers leave it alone).

    Returns:
        How many layers are centred.

    Raises:
        ValueError: no layer of the model is standardized and has a bias.
    """
    __tracebackhide__ = True
    layers = [layer for layer in model.modules() if isinstance(layer, Standardized) and layer.bias is not None]
    if not layers:
        rule = "has no scaled-weight-standardized layer with a bias"
        raise invalid("model", type(model).__name__, rule, "pass a normalizer-free network")
    for layer in layers:
        if layer.input_mean is None:
            inputs: Any = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            means = torch.zeros(inputs, device=layer.weight.device, dtype=layer.weight.dtype)
            layer.input_mean = nn.Parameter(means, requires_grad=False)
    return len(layers)


@torch.no_grad()
def move_input_mean(layer: Standardized, means: torch.Tensor) -> None:
    """Give a centred layer other means of its input, [I], and the bias under which its outputs stay the same."""
    assert layer.input_mean is not None, "centre_weights comes first"
    move = means - layer.input_mean
    layer.bias.add_(layer.response(layer.scaled_weight(None), move))
    layer.input_mean.copy_(means)


class InputCentring:
    """Moves the input means of a network's centred weights towards those of its training batches.

    Each training forward pass adds the channel means of every centred layer's input, of a part of the batch; ``step``,
    after the optimizer's, moves the layers' means a share of the way there and their biases along, so that the function
    is the same before and after. What a step sees is thus one set of means for all the micro-batches of its gradient.

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
        network = unwrapped(model)
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
