"""Predictions of the theory against what is measured, averaged over seeds.

Every tolerance is four standard errors of the mean over seeds, which the test computes, plus bounds that are
derived beside it. S is the side of a square map; symmetric zero padding leaves a 3×3 convolution the share
((3S − 2) / 3S)² of its taps.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from normfree.models import create_model
from normfree.nn import ScaledWSConv2d, gamma, variance_plan
from normfree.signal import spp

ERRORS = 4
BN_BRANCH = 1 - 1 / math.pi


def share(side: int) -> float:
    return ((3 * side - 2) / (3 * side)) ** 2


class Sample:
    """Curves of a model drawn anew for every seed, on fresh unit Gaussian noise; [seeds, blocks]."""

    def __init__(self, seeds: int, examples: int, size: int, name: str, **overrides) -> None:
        self.results = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = create_model(name, num_classes=2, **overrides)
            self.results.append(spp(model, torch.randn(examples, 3, size, size)))
        self.variance = self.curve("avg_channel_var")
        self.sq_mean = self.curve("avg_channel_sq_mean")
        self.branch = self.curve("residual_avg_channel_var")

    def curve(self, name: str) -> np.ndarray:
        return np.array([result.curve(name)[1:] for result in self.results])


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds, and its standard error."""
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


DEPTHS = (3, 3, 3, 3)
SIDES = (16, 8, 4, 2)  # of 64 pixels, after the stem's 2 · 2 and a stride of 2 per later stage


@cache
def nf_sample() -> Sample:
    return Sample(8, 8, 64, "nf_resnet50", depths=DEPTHS, widths=(128,) * 4)


@cache
def bn_sample() -> Sample:
    return Sample(8, 8, 64, "resnetv2_50", depths=DEPTHS, widths=(128,) * 4)


def test_bn_relu_conv_keeps_1_minus_1_over_pi():
    """The bottleneck's 3×3 pads, but a norm and a 1×1 follow: the share of the padding is normalised away.

    What is left of it is that border values are smaller than inner ones. With E[z²] = 1 a He convolution of
    relu(z) has variance 1 − E[|z|]²/2, and E[|z|]² = 2/π for a Gaussian. Of a mixture whose standard
    deviation is the root of the taps at hand, it is 2/π · E[σ]²/E[σ²], which gives at most 0.0064 more
    (at S = 4). Values whose σ varies by δ² of itself add δ²/π: the mean square of n rectified Gaussians varies by
    (3/2)/(1/4) − 1 = 5 over n, its root by a quarter of that, and n is at least the 32 inputs of a position.
    """
    tails = 5 / 32 / 4 / math.pi  # 0.012
    stages = bn_sample().branch.reshape(8, 4, 3).mean(2)
    mean, error = mean_and_error(stages)
    bounds = []
    for side in SIDES:
        per_axis = np.array([2 / 3] * 2 + [1.0] * (side - 2))
        bounds.append(1 - np.sqrt(per_axis).mean() ** 4 / share(side) / math.pi)
    assert max(bounds) - BN_BRANCH == pytest.approx(0.0064, abs=1e-4)
    assert (mean > BN_BRANCH - ERRORS * error).all()
    assert (mean < np.array(bounds) + tails + ERRORS * error).all()
    assert (error < 0.01).all()  # so that 0.44 of it, the share at S = 2, could not pass


def test_batch_norm_resets_at_transitions():
    """Inside a stage the variance grows by a branch's a block; the shortcut convolution at its start resets it."""
    sample = bn_sample()
    growth = np.diff(sample.variance.reshape(8, 4, 3), axis=2) - sample.branch.reshape(8, 4, 3)[:, :, 1:]
    mean, error = mean_and_error(growth)
    assert (np.abs(mean) < ERRORS * error).all()  # the sum of two uncorrelated signals
    start, end = sample.variance.mean(0)[[3, 6, 9]], sample.variance.mean(0)[[2, 5, 8]]
    # Shortcut and branch of the first block, 2 · (1 − 1/π), against the end of the stage before: as much again each.
    assert (start < 0.6 * end).all()
    assert (sample.sq_mean.mean(0)[[3, 6, 9]] < 0.6 * sample.sq_mean.mean(0)[[2, 5, 8]]).all()


def test_unnormalised_he_doubles_per_block():
    """x + f(x), f of He convolutions: a branch brings as much energy as there is, less the padding of its 3×3.

    The expectation over the weights is exact at any width: energy e, the mean square over channels at a
    position, becomes e + box(e)/9 with zeros outside. The ratio of successive blocks is linear in the branch
    given the block before, hence unbiased.
    """
    seeds, side, blocks = 16, 8, 8
    shape = {"depths": (blocks, 1, 1, 1), "widths": (256, 8, 8, 8)}
    sample = Sample(seeds, 2, 4 * side, "resnetv2_50", norm=None, **shape)
    energy = (sample.variance + sample.sq_mean)[:, :blocks]
    ratios = energy[:, 1:] / energy[:, :-1]
    field, box, predicted = torch.ones(1, 1, side, side), torch.full((1, 1, 3, 3), 1 / 9), []
    for _ in range(blocks):
        after = field + nn.functional.conv2d(field, box, padding=1)
        predicted.append((after.mean() / field.mean()).item())
        field = after
    assert predicted[0] == pytest.approx(1 + share(side), rel=1e-6)
    mean, error = mean_and_error((ratios - np.array(predicted[1:])).mean(1))
    assert abs(mean) < ERRORS * error
    assert error < 0.06  # doubling is told from a factor of 1.6
    assert all("explosion" in {f.kind for f in result.findings} for result in sample.results)


def test_nf_branches_keep_unit_variance_but_for_padding():
    """Nothing renormalises here: what the 3×3 loses to its padding is missing in the branch.

    A standardized filter sums to zero, but not the part f of its taps that a border position sees: the mean μ
    of relu(z) leaves an offset there, of variance μ²γ²·f(1 − f) = f(1 − f)/(π − 1) over the filters. It adds
    to the variance as far as it differs between positions: between none and all of it.
    """
    stages = nf_sample().branch.reshape(8, 4, 3)[:, :, 1:].mean(2)  # without the strided blocks
    mean, error = mean_and_error(stages)
    for i, side in enumerate(SIDES):
        per_axis = np.array([2 / 3] * 2 + [1.0] * (side - 2))
        taps = np.outer(per_axis, per_axis)
        offset = (taps * (1 - taps)).mean() / (math.pi - 1)
        assert mean[i] > share(side) - ERRORS * error[i]
        assert mean[i] < share(side) + offset + ERRORS * error[i]
    assert (error < 0.03).all()  # shares are 0.918, 0.840, 0.694 and 0.444
    assert share(2) == pytest.approx(0.444, abs=1e-3)


def test_nf_blocks_climb_the_ladder():
    """1.04, 1.08, 1.12: a block adds α² = 0.04 of its branch's variance, and a transition starts again."""
    sample = nf_sample()
    variance, branch = sample.variance.reshape(8, 4, 3), sample.branch.reshape(8, 4, 3)
    mean, error = mean_and_error(np.diff(variance, axis=2) - 0.04 * branch[:, :, 1:])
    assert (np.abs(mean) < ERRORS * error).all()
    assert (error < 0.004).all()
    mean, error = mean_and_error(variance[:, 0])
    plan = np.array([1.04, 1.08, 1.12])
    lost = 0.04 * (1 - share(SIDES[0])) * np.arange(1, 4)  # to the padding of one, two, three branches
    assert (mean < plan + ERRORS * error).all()
    assert (mean > plan - lost - ERRORS * error).all()
    # The next stage starts from its shortcut's variance of 1 again, below the rung the stage before ended on.
    again, error = mean_and_error(variance[:, 1, 0] - variance[:, 0, 2])
    assert again < -ERRORS * error
    first, error = mean_and_error(variance[:, 1, 0])
    assert first == pytest.approx(1.04, abs=0.04 * (1 - share(SIDES[1])) + ERRORS * error)


def test_the_plan_is_what_is_drawn():
    result = nf_sample().results[0]
    plan = [block.expected_var for block in variance_plan(DEPTHS, 0.2)]
    assert [block.expected_var for block in result.blocks] == plan
    assert plan[:4] == pytest.approx([1.04, 1.08, 1.12, 1.04])
    assert [block.transition for block in result.blocks] == [b.transition for b in variance_plan(DEPTHS, 0.2)]


DEEP = {"depths": (50, 50, 50, 50), "widths": (32,) * 4}


@pytest.mark.slow
def test_no_mean_shift_through_200_standardized_blocks():
    """At most 2 % of the variance. 16 examples of 5×5 at the end are 400 values: their own mean is 0.25 %."""
    sample = Sample(2, 16, 160, "nf_resnet50", **DEEP)
    assert sample.branch.shape == (2, 200)
    assert (sample.sq_mean <= 0.02 * sample.variance).all()
    assert all("mean_shift" not in {f.kind for f in result.findings} for result in sample.results)


def test_mean_shift_without_standardization():
    """With plain weights, the same γ and β, the squared mean overtakes the variance in every stage."""
    sample = Sample(2, 4, 64, "nf_resnet50", conv="scaled", **DEEP)
    ratio = (sample.sq_mean / sample.variance).reshape(2, 4, 50)
    assert (ratio.max(2) > 1).all()
    for result in sample.results:  # its skip gains are zero: it starts as its shortcuts
        assert ("mean_shift", "warning") in {(f.kind, f.severity) for f in result.findings}
    awake = Sample(2, 4, 64, "nf_resnet50", conv="scaled", skipinit_gain=1, **DEEP)
    assert awake.sq_mean == pytest.approx(sample.sq_mean)
    for result in awake.results:
        assert ("mean_shift", "error") in {(f.kind, f.severity) for f in result.findings}


def test_gamma_of_relu_keeps_the_variance_of_a_plain_stack():
    """γ = 1/sqrt(Var[relu(z)]) = sqrt(2 / (1 − 1/π)); layers of 1×1 convolutions then keep variance 1."""
    constant = gamma(torch.relu)
    assert constant == pytest.approx(math.sqrt(2 / BN_BRANCH), rel=1e-6)
    assert gamma("relu") == pytest.approx(constant, rel=1e-3)  # the official constant was sampled

    def layers(seed: int) -> list[float]:
        torch.manual_seed(seed)
        convolutions = [ScaledWSConv2d(256, 256, 1, input_scale=constant) for _ in range(4)]
        stack = nn.Sequential(*(layer for conv in convolutions for layer in (nn.ReLU(), conv)))
        result = spp(stack, torch.randn(4, 256, 8, 8))
        return [block.avg_channel_var for block in result.blocks]

    mean, error = mean_and_error(np.array([layers(seed) for seed in range(8)]))
    assert (np.abs(mean - 1) < ERRORS * error).all()
    assert (error < 0.05).all()
