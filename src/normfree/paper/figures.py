"""The paper's figures 1 and 2: networks to measure, what is predicted of them, and a note that holds both together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, pi, prod
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch

from normfree.common.checks import check_choices, check_integer, require
from normfree.models import create_model
from normfree.report.plot import plot_signals
from normfree.signal import SignalPropagation, spp, write_atomically, write_json

Scale = Literal["quick", "full"]

DEPTHS: dict[Scale, tuple[int, ...]] = {"quick": (6, 6, 6, 6), "full": (50, 50, 50, 50)}
"""Blocks per stage: the paper's 600 layers, or 72 for a look."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One curve of a figure.

    Attributes:
        label: its name in the legend.
        name: of the model.
        overrides: of the model.
        apart: drawn in a picture of its own, whose name ends in this: its scale would flatten the others.
    """

    label: str
    name: str
    overrides: dict[str, Any]
    apart: str = ""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One prediction, and how to take the number it is held against.

    Attributes:
        text: what is expected, and why.
        label: of the network it is about.
        low: the least the measurement may be.
        high: the most.
        measure: takes the number from that network's plot.
    """

    text: str
    label: str
    low: float
    high: float
    measure: Callable[[SignalPropagation], float]

    @property
    def interval(self) -> str:
        """The bounds in words."""
        if self.high == inf:
            return f"≥ {self.low:.4g}"
        return f"≤ {self.high:.4g}" if self.low == 0 else f"{self.low:.4g} … {self.high:.4g}"


@dataclass(frozen=True, kw_only=True)
class FigureSetting:
    """How a figure is made.

    Attributes:
        scale: "full", the paper's 600 layers (minutes), or "quick", 72 layers (seconds).
        image_size: of the gaussian input.
        batch_size: of the gaussian input.
        seeds: each draws new weights and a new input; the plot shows the first.
    """

    scale: Scale = "full"
    image_size: int = 128
    batch_size: int = 8
    seeds: int = 3

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in (("image_size", 32), ("batch_size", 2), ("seeds", 1)):
            check_integer(name, getattr(self, name), least)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return DEPTHS[self.scale]

    @property
    def sampling_share(self) -> float:
        """What a mean over the last stage's few values has of a squared mean by chance: one over their number."""
        return 1 / (self.batch_size * (self.image_size / 32) ** 2)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the paper.

    Attributes:
        name: "figure1", …
        title: above the plot.
        networks: what is drawn.
        predictions: what is held against it, given how it is made.
    """

    name: str
    title: str
    networks: Sequence[Network]
    predictions: Callable[[FigureSetting], Sequence[Prediction]]


def measure_network(network: Network, setting: FigureSetting, seed: int) -> SignalPropagation:
    """Build one network from a seed and measure it on gaussian noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(network.name, num_classes=0, depths=setting.depths, **network.overrides)
        x = torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size)
    return spp(
        model,
        x,
        name=network.label,
        gradient=False,
        seed=seed,
        input_description={"kind": "gaussian"},
        configuration={"model": network.name, **network.overrides, **vars(setting)},
    )


def make(figure: Figure, setting: FigureSetting, out: Path, on_progress: Callable[[str], None]) -> list[Path]:
    """Measure a figure's networks over all seeds and write its PNG, JSON and note.

    Args:
        figure: which.
        setting: how.
        out: folder to write to.
        on_progress: told before each measurement.

    Returns:
        The paths written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "a figure")  # before the measurements, which take minutes
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, list[SignalPropagation]] = {}
    for network in figure.networks:
        for seed in range(setting.seeds):
            on_progress(f"{network.label}, seed {seed}")
            measured.setdefault(network.label, []).append(measure_network(network, setting, seed))
    pictures = []
    for apart in dict.fromkeys(network.apart for network in figure.networks):
        drawn = [measured[network.label][0] for network in figure.networks if network.apart == apart]
        pictures.append(out / f"{figure.name}{apart}.png")
        plot_signals(drawn, pictures[-1], title=figure.title)
    flat = [signal for signals in measured.values() for signal in signals]
    predictions = figure.predictions(setting)
    note = write_atomically(out / f"{figure.name}.md", _note(figure, setting, predictions, measured))
    return [*pictures, write_json(out / f"{figure.name}.json", flat), note]


def _note(
    figure: Figure,
    setting: FigureSetting,
    predictions: Sequence[Prediction],
    measured: dict[str, list[SignalPropagation]],
) -> str:
    layers = 3 * sum(setting.depths)
    lines = [
        f"# {figure.title}",
        "",
        f"{layers}-layer networks at initialisation on unit Gaussian noise, {setting.batch_size} × 3 × "
        f"{setting.image_size} × {setting.image_size}, seeds 0–{setting.seeds - 1}, float32, "
        f"torch {torch.__version__}. Made by `normfree paper {figure.name} --scale {setting.scale} --image-size "
        f"{setting.image_size} --batch-size {setting.batch_size} --seeds {setting.seeds}`.",
        "",
        "| network | expected | predicted | measured (mean ± deviation over seeds) | |",
        "|---|---|---|---|---|",
    ]
    for prediction in predictions:
        values = [prediction.measure(signal) for signal in measured[prediction.label]]
        spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        value = mean(values)
        verdict = "agrees" if prediction.low <= value <= prediction.high else "**differs**"
        lines.append(
            f"| {prediction.label} | {prediction.text} | {prediction.interval} | {value:.4g}{spread} | {verdict} |"
        )
    lines += ["", "Findings of the first seed:", ""]
    for label, signals in measured.items():
        told = [f"{f.kind.replace('_', ' ')} ({f.severity}): {f.message}" for f in signals[0].findings]
        lines += [f"- {label}: {' '.join(told) or 'healthy, nothing to report.'}"]
    return "\n".join(lines) + "\n"


def blocks_inside(signal: SignalPropagation, stage: int) -> list[int]:
    """Indices of the blocks of one stage (0–3), its transition first."""
    starts = [block.index for block in signal.blocks if block.transition] + [len(signal.blocks)]
    return list(range(starts[stage], starts[stage + 1]))


def mean_branch_variance(signal: SignalPropagation, stage: int) -> float:
    """Mean over one stage's blocks (less its first) of the branch variance."""
    values = [signal.blocks[i].residual_avg_channel_var for i in blocks_inside(signal, stage)[1:]]
    return mean(value for value in values if value is not None)


def last_variance(signal: SignalPropagation, stage: int) -> float:
    """Variance after the last block of a stage."""
    return signal.blocks[blocks_inside(signal, stage)[-1]].avg_channel_var


def second_moment_growth(signal: SignalPropagation) -> float:
    """Geometric mean over all blocks of the second moment's (squared mean plus variance) ratio from block to block."""
    first, last = (b.avg_channel_sq_mean + b.avg_channel_var for b in (signal.blocks[0], signal.blocks[-1]))
    return (last / first) ** (1 / (len(signal.blocks) - 1))


def padding_share(image_size: int, stage: int) -> float:
    """The share of a 3×3 convolution's taps that zero padding leaves on a stage's map: ((3S − 2) / (3S))²."""
    size = image_size / (4 * 2**stage)
    return ((3 * size - 2) / (3 * size)) ** 2


def mean_padding_growth(depths: Sequence[int], image_size: int) -> float:
    """Geometric mean over all blocks of 1 + padding share: what an unnormalised block multiplies the signal by."""
    growths = [1 + padding_share(image_size, stage) for stage, depth in enumerate(depths) for _ in range(depth)]
    return prod(growths[1:]) ** (1 / (len(growths) - 1))


def largest_ratio(signal: SignalPropagation) -> float:
    """Largest ratio of squared mean to variance at any block whose maps have more than one pixel.

    On one pixel a padded 3×3 filter has one weight inside, which does not sum to zero alone.
    """
    return max(
        block.avg_channel_sq_mean / block.avg_channel_var for block in signal.blocks if prod(block.shape[2:]) > 1
    )


# Figure 1: what normalisation does to the signal of a deep pre-activation ResNet, and what its lack does.

BN_FIRST, RELU_FIRST, WITHOUT = "BN-ReLU-Conv", "ReLU-BN-Conv", "unnormalised"
RECTIFIED = 1 - 1 / pi
"""Share of a rectified Gaussian's second moment that is variance."""


def predictions_of_figure1(setting: FigureSetting) -> list[Prediction]:
    """What He initialisation predicts.

    He's weights double what they are fed: a rectified unit Gaussian (second moment ½) leaves with second
    moment 1, of which 1 − 1/π is variance; a normalised rectified signal (variance 1, mean 0) with variance 2.
    """
    stage, depth = 1, setting.depths[1]
    growth = mean_padding_growth(setting.depths, setting.image_size)
    return [
        Prediction(
            text="branch variance 1 − 1/π: He initialisation keeps the second moment, the mean takes 1/π of it",
            label=BN_FIRST,
            low=RECTIFIED - 0.02,
            high=RECTIFIED + 0.02,
            measure=lambda signal: mean_branch_variance(signal, stage),
        ),
        Prediction(
            text=f"variance after {depth} blocks grows linearly, to {depth + 1} · (1 − 1/π), and resets at transitions",
            label=BN_FIRST,
            low=0.9 * (depth + 1) * RECTIFIED,
            high=1.1 * (depth + 1) * RECTIFIED,
            measure=lambda signal: last_variance(signal, stage),
        ),
        Prediction(
            text="squared mean stays below the variance, near its share (1/π) / (1 − 1/π) = 0.467",
            label=BN_FIRST,
            low=0.4,
            high=0.6,
            measure=largest_ratio,
        ),
        Prediction(
            text="branch variance 2: the normalizer has removed the mean, and He initialisation doubles",
            label=RELU_FIRST,
            low=1.95,
            high=2.05,
            measure=lambda signal: mean_branch_variance(signal, stage),
        ),
        Prediction(
            text="no mean shift: the convolution sees a mean of zero (2 %, and what sampling the last maps adds)",
            label=RELU_FIRST,
            low=0.0,
            high=0.02 + setting.sampling_share,
            measure=largest_ratio,
        ),
        Prediction(
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
    predictions=predictions_of_figure1,
)


# Figure 2: analytic scaling alone leaves a mean shift; scaled weight standardization removes it.

ALPHA = 0.2
PLAIN, STANDARDIZED = "plain weights", "Scaled WS"
ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "identity": "identity"}


def _label(weights: str, activation: str) -> str:
    """Name of one curve."""
    return f"{weights}, {ACTIVATIONS[activation]}"


def predictions_of_figure2(setting: FigureSetting) -> list[Prediction]:
    """What the analysis predicts, zero padding's share of the 3×3 convolution included.

    Padding leaves a share p of a branch's variance (a little more with an activation of positive mean, whose
    offset no longer cancels at the border), and the ladder of block variances climbs by α²·p instead of α².
    """
    depths, sampling = setting.depths, setting.sampling_share
    share = padding_share(setting.image_size, 0)
    ladder = 1 + ALPHA**2 * share * depths[0]
    ours = _label(STANDARDIZED, "relu")
    found = [
        Prediction(
            text=f"branch variance 1, times zero padding's {share:.3f} on the first stage's maps",
            label=ours,
            low=share - 0.05,
            high=1.05,
            measure=lambda signal: mean_branch_variance(signal, 0),
        ),
        Prediction(
            text=f"block variance climbs by α² a block: {ladder:.3f} after {depths[0]}",
            label=ours,
            low=0.93 * ladder,
            high=1.07 * ladder,
            measure=lambda signal: last_variance(signal, 0),
        ),
        Prediction(
            text="α and β keep the variance from exploding with plain weights too",
            label=_label(PLAIN, "identity"),
            low=0.0,
            high=2 * (1 + ALPHA**2 * max(depths)),
            measure=lambda signal: max(block.avg_channel_var for block in signal.blocks),
        ),
    ]
    for activation in ("relu", "silu"):
        found.append(
            Prediction(
                text="mean shift: the squared mean overtakes the variance",
                label=_label(PLAIN, activation),
                low=1.0,
                high=inf,
                measure=largest_ratio,
            )
        )
    for activation in ACTIVATIONS:
        found.append(
            Prediction(
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
            overrides={"conv": conv, "activation": activation, "skipinit_gain": 1},  # the branches are what is drawn
        )
        for weights, conv in ((PLAIN, "scaled"), (STANDARDIZED, "scaled_ws"))
        for activation in ACTIVATIONS
    ),
    predictions=predictions_of_figure2,
)


FIGURES = {figure.name: figure for figure in (FIGURE1, FIGURE2)}
"""By name."""
