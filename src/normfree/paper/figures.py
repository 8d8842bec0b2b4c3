"""The paper's figures 1 and 2: which networks, and what is predicted of them."""

from __future__ import annotations

from math import inf, pi

from normfree.paper.figure import (
    Claim,
    Figure,
    Network,
    Setting,
    largest_ratio,
    last_variance,
    mean_branch_variance,
    mean_padding_growth,
    padding_share,
    second_moment_growth,
)

# Figure 1: what normalisation does to the signal of a deep pre-activation ResNet, and what its lack does.

BN_FIRST, RELU_FIRST, WITHOUT = "BN-ReLU-Conv", "ReLU-BN-Conv", "unnormalised"
RECTIFIED = 1 - 1 / pi
"""Share of a rectified Gaussian's second moment that is variance."""


def claims_of_figure1(setting: Setting) -> list[Claim]:
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


FIGURE1 = Figure(
    name="figure1",
    title="Signal propagation of deep ResNets at He initialisation",
    networks=(
        Network(label=BN_FIRST, name="resnetv2_600", overrides={}),
        Network(label=RELU_FIRST, name="resnetv2_600", overrides={"order": "act-norm"}),
        Network(label=WITHOUT, name="resnetv2_600", overrides={"norm": None}, apart="_unnormalised"),
    ),
    claims=claims_of_figure1,
)


# Figure 2: analytic scaling alone leaves a mean shift; scaled weight standardization removes it.

ALPHA = 0.2
PLAIN, STANDARDIZED = "plain weights", "Scaled WS"
ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "identity": "identity"}


def _label(weights: str, activation: str) -> str:
    """Name of one curve."""
    return f"{weights}, {ACTIVATIONS[activation]}"


def claims_of_figure2(setting: Setting) -> list[Claim]:
    """What the analysis predicts, zero padding's share of the 3×3 convolution included.

    Padding leaves a share p of a branch's variance (a little more with an activation of positive mean, whose
    offset no longer cancels at the border), and the ladder of block variances climbs by α²·p instead of α².
    """
    depths, sampling = setting.depths, setting.sampling_share
    share = padding_share(setting.image_size, 0)
    ladder = 1 + ALPHA**2 * share * depths[0]
    ours = _label(STANDARDIZED, "relu")
    found = [
        Claim(
            text=f"branch variance 1, times zero padding's {share:.3f} on the first stage's maps",
            label=ours,
            low=share - 0.05,
            high=1.05,
            measure=lambda signal: mean_branch_variance(signal, 0),
        ),
        Claim(
            text=f"block variance climbs by α² a block: {ladder:.3f} after {depths[0]}",
            label=ours,
            low=0.93 * ladder,
            high=1.07 * ladder,
            measure=lambda signal: last_variance(signal, 0),
        ),
        Claim(
            text="α and β keep the variance from exploding with plain weights too",
            label=_label(PLAIN, "identity"),
            low=0.0,
            high=2 * (1 + ALPHA**2 * max(depths)),
            measure=lambda signal: max(block.avg_channel_var for block in signal.blocks),
        ),
    ]
    for activation in ("relu", "silu"):
        found.append(
            Claim(
                text="mean shift: the squared mean overtakes the variance",
                label=_label(PLAIN, activation),
                low=1.0,
                high=inf,
                measure=largest_ratio,
            )
        )
    for activation in ACTIVATIONS:
        found.append(
            Claim(
                text=f"no mean shift: at most 2 % of the variance, and {sampling:.2g} by chance on the last maps",
                label=_label(STANDARDIZED, activation),
                low=0.0,
                high=0.02 + sampling,
                measure=largest_ratio,
            )
        )
    return found


FIGURE2 = Figure(
    name="figure2",
    title="Signal propagation of NF-ResNets, with plain and with standardized weights",
    networks=tuple(
        Network(
            label=_label(weights, activation),
            name="nf_resnet600",
            overrides={"conv": conv, "activation": activation},
        )
        for weights, conv in ((PLAIN, "scaled"), (STANDARDIZED, "scaled_ws"))
        for activation in ACTIVATIONS
    ),
    claims=claims_of_figure2,
)


FIGURES = {figure.name: figure for figure in (FIGURE1, FIGURE2)}
"""By name."""
