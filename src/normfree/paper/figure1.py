"""Figure 1: what normalisation does to the signal of a deep pre-activation ResNet, and what its lack does."""

from __future__ import annotations

from math import pi

from normfree.paper.figure import (
    Claim,
    Figure,
    Network,
    Setting,
    largest_ratio,
    last_variance,
    mean_branch_variance,
    mean_padding_growth,
    second_moment_growth,
)

BN_FIRST, RELU_FIRST, WITHOUT = "BN-ReLU-Conv", "ReLU-BN-Conv", "unnormalised"
RECTIFIED = 1 - 1 / pi
"""Share of a rectified Gaussian's second moment that is variance."""


def claims(setting: Setting) -> list[Claim]:
    """What He initialisation predicts.

    He's weights double what they are fed: a rectified unit Gaussian (second moment ½) leaves with second
    moment 1, of which 1 − 1/π is variance; a normalised rectified signal (variance 1, mean 0) with variance 2.
    """
    stage, depth = 1, setting.depths[1]
    growth = mean_padding_growth(setting.depths, setting.image_size)
    return [
        Claim(
            text="branch variance 1 − 1/π: He initialisation keeps the second moment, the mean takes 1/π of it",
            label=BN_FIRST,
            low=RECTIFIED - 0.02,
            high=RECTIFIED + 0.02,
            measure=lambda signal: mean_branch_variance(signal, stage),
        ),
        Claim(
            text=f"variance after {depth} blocks grows linearly, to {depth + 1} · (1 − 1/π), and resets at transitions",
            label=BN_FIRST,
            low=0.9 * (depth + 1) * RECTIFIED,
            high=1.1 * (depth + 1) * RECTIFIED,
            measure=lambda signal: last_variance(signal, stage),
        ),
        Claim(
            text="squared mean stays below the variance, near its share (1/π) / (1 − 1/π) = 0.467",
            label=BN_FIRST,
            low=0.4,
            high=0.6,
            measure=largest_ratio,
        ),
        Claim(
            text="branch variance 2: the normalizer has removed the mean, and He initialisation doubles",
            label=RELU_FIRST,
            low=1.95,
            high=2.05,
            measure=lambda signal: mean_branch_variance(signal, stage),
        ),
        Claim(
            text="no mean shift: the convolution sees a mean of zero (2 %, and what sampling the last maps adds)",
            label=RELU_FIRST,
            low=0.0,
            high=0.02 + setting.sampling_share,
            measure=largest_ratio,
        ),
        Claim(
            text=f"second moment grows {growth:.3f} times per block: doubling, less what zero padding takes of the 3×3",
            label=WITHOUT,
            low=growth - 0.1,
            high=growth + 0.1,
            measure=second_moment_growth,
        ),
    ]


FIGURE = Figure(
    name="figure1",
    title="Signal propagation of deep ResNets at He initialisation",
    networks=(
        Network(label=BN_FIRST, name="resnetv2_600", overrides={}),
        Network(label=RELU_FIRST, name="resnetv2_600", overrides={"order": "act-norm"}),
        Network(label=WITHOUT, name="resnetv2_600", overrides={"norm": None}, apart="_unnormalised"),
    ),
    claims=claims,
)
