"""Figure 2: analytic scaling alone leaves a mean shift; scaled weight standardization removes it."""

from __future__ import annotations

from math import inf

from normfree.paper.figure import (
    Claim,
    Figure,
    Network,
    Setting,
    largest_ratio,
    last_variance,
    mean_branch_variance,
    padding_share,
)

ALPHA = 0.2
PLAIN, STANDARDIZED = "plain weights", "Scaled WS"
ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "identity": "identity"}


def label(weights: str, activation: str) -> str:
    """Name of one curve."""
    return f"{weights}, {ACTIVATIONS[activation]}"


def claims(setting: Setting) -> list[Claim]:
    """What the analysis predicts, zero padding's share of the 3×3 convolution included.

    Padding leaves a share p of a branch's variance (a little more with an activation of positive mean, whose
    offset no longer cancels at the border), and the ladder of block variances climbs by α²·p instead of α².
    """
    depths, sampling = setting.depths, setting.sampling_share
    share = padding_share(setting.image_size, 0)
    ladder = 1 + ALPHA**2 * share * depths[0]
    ours = label(STANDARDIZED, "relu")
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
            label=label(PLAIN, "identity"),
            low=0.0,
            high=2 * (1 + ALPHA**2 * max(depths)),
            measure=lambda signal: max(block.avg_channel_var for block in signal.blocks),
        ),
    ]
    for activation in ("relu", "silu"):
        found.append(
            Claim(
                text="mean shift: the squared mean overtakes the variance",
                label=label(PLAIN, activation),
                low=1.0,
                high=inf,
                measure=largest_ratio,
            )
        )
    for activation in ACTIVATIONS:
        found.append(
            Claim(
                text=f"no mean shift: at most 2 % of the variance, and {sampling:.2g} by chance on the last maps",
                label=label(STANDARDIZED, activation),
                low=0.0,
                high=0.02 + sampling,
                measure=largest_ratio,
            )
        )
    return found


FIGURE = Figure(
    name="figure2",
    title="Signal propagation of NF-ResNets, with plain and with standardized weights",
    networks=tuple(
        Network(
            label=label(weights, activation),
            name="nf_resnet600",
            overrides={"conv": conv, "activation": activation},
        )
        for weights, conv in ((PLAIN, "scaled"), (STANDARDIZED, "scaled_ws"))
        for activation in ACTIVATIONS
    ),
    claims=claims,
)
