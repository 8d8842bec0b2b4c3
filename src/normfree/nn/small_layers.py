"""Layers without filters: gates and stochastic depth of a branch, and what conversion leaves of a normalizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.common.checks import check_integer, check_number, check_rate
from normfree.nn.fold import Foldable
from normfree.nn.scaled_ws import BranchEnd


class SqueezeExcite(BranchEnd):
    """Gate the channels of a map by a small network of their means.

    ``y = x * alpha * s * gate``, ``gate = 2 * sigmoid(linear1(relu(linear0(mean_HW(x)))))``

    The 2 restores what a sigmoid around 1/2 takes, so that the branch keeps its variance.

    Args:
        channels: C.
        ratio: hidden units per channel; the hidden width is ``max(1, int(channels * ratio))``.
        alpha: constant factor of the output, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor of the output; None for none. Like alpha it multiplies
            the [N, C] gate, never the map.

    Raises:
        ValueError: channels below 1; a ratio that is not above 0; a factor that is no finite number.

    Source: Hu et al. 2018 (arXiv 1709.01507); the 2 is Brock et al. 2021's.
    """

    def __init__(
        self, channels: int, ratio: float = 0.25, *, alpha: float = 1.0, skip_gain: float | None = None
    ) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        check_number("ratio", ratio, 0.0, exclusive=True)
        hidden = max(1, int(channels * ratio))
        self.linear0 = nn.Linear(channels, hidden)
        self.linear1 = nn.Linear(hidden, channels)
        self.set_branch_scale(alpha, skip_gain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both weights from N(0, 1/fan_in) and set both biases to zero."""
        for linear in (self.linear0, self.linear1):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gate [N, C, H, W]."""
        gate = 2 * torch.sigmoid(self.linear1(F.relu(self.linear0(x.mean((2, 3))))))
        return x * self.apply_branch_scale(gate)[:, :, None, None]


class BranchScale(BranchEnd):
    """Scale the input by ``correction * alpha * s``: for a branch whose end no layer's weight can scale.

    Behind the sigmoid of a gate it stands on [N, C] numbers; behind an activation it multiplies the map.

    Args:
        correction: what belongs to the branch itself: 2 for a gate of one half; 1 otherwise.
        alpha: constant factor, at least 0.
        skip_gain: initial value of s, a learnable 0-d factor; None for none.

    Raises:
        ValueError: a factor that is no finite number, or a negative alpha.
    """

    def __init__(self, *, correction: float = 1.0, alpha: float = 1.0, skip_gain: float | None = None) -> None:
        super().__init__()
        self.correction = check_number("correction", correction, 0.0)
        self.set_branch_scale(alpha, skip_gain)

    def forward(self, input: Tensor) -> Tensor:
        return self.apply_branch_scale(input if self.correction == 1 else input * self.correction)

    def extra_repr(self) -> str:
        return f"correction={self.correction:g}, alpha={self.alpha:g}"


class StochasticDepth(nn.Module):
    """Drop the branch of each example independently with probability ``rate``.

    ``y_n = m_n * x_n, m_n ~ Bernoulli(1 - rate)`` in training; ``y = x`` in evaluation or at rate 0.

    As in the official code, the survivors are **not** divided by ``1 - rate``.

    Args:
        rate: probability of dropping, in [0, 1).

    Raises:
        ValueError: a rate outside [0, 1).

    Source: Huang et al. 2016 (arXiv 1603.09382); Brock et al. 2021, appendix.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = check_rate("rate", rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [N, ...] with the examples that were dropped set to zero."""
        if not self.training or self.rate == 0:
            return x
        # Drawn in float32 whatever x is: bfloat16 has too few steps in [0, 1) for a small rate.
        draw = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device, dtype=torch.float32)
        return x * (draw >= self.rate).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.rate:.4g}"


class ChannelAffine(nn.Module):
    """Scale and shift every channel of an input x [N, C, …]: ``y = weight_c * x + bias_c``.

    It normalizes nothing: examples stay independent, and training and evaluation are one function. It does
    multiply an activation, which a layer with the factor in its weight spares; it is for the places no layer reaches.

    Args:
        channels: C.

    Attributes:
        weight, bias: [C], learnable, start at 1 and 0.

    Raises:
        ValueError: channels below 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("channels", channels, 1)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        shape = [-1] + [1] * (input.dim() - 2)
        output = torch.addcmul(self.bias.view(shape), input, self.weight.view(shape))
        return output.to(input.dtype)  # as BatchNorm's, also where its own numbers are of another precision


class ChannelConstants(nn.Module):
    """Take the mean and the standard deviation of an example out of every channel of an input x [N, C, …].

    ``y = (x - mean_c) / deviation_c``

    Both are constants that were measured once: it normalizes nothing.

    Args:
        channels: C.

    Attributes:
        mean, deviation: [C], 0 and 1 until they are set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        shape = [-1] + [1] * (input.dim() - 2)
        return ((input - self.mean.view(shape)) / self.deviation.view(shape)).to(input.dtype)


class ChannelUnits(nn.Sequential):
    """Give every channel of an input x [N, C, …] the units of an example.

    ``y = weight_c * (x - mean_c) / deviation_c + bias_c``

    Examples stay independent, and training and evaluation are one function. A step of gradient descent moves the output
    as far as behind a normalizer, whatever the input's units are: with the deviation in the weight it would be farther
    or shorter by its square. Constants and map are two modules, for Opacus takes no buffers in a layer that learns.

    Args:
        channels: C.

    Raises:
        ValueError: channels below 1.
    """

    def __init__(self, channels: int) -> None:
        check_integer("channels", channels, 1)
        super().__init__(ChannelConstants(channels), ChannelAffine(channels))


class Copy(nn.Module):
    """Give a copy: in place of a normalizer whose output is written in place while its input is still needed."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()


class OutputCopy(Copy, Foldable):
    """Give a copy of a layer's output that would be written in place: hooks and per-example gradients keep the output.

    Nothing else reads it, so what folding leaves, for inference, is no copy.
    """

    def folded(self) -> nn.Module:
        """Return what passes its input on."""
        return nn.Identity()
