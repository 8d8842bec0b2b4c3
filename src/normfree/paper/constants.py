"""The table of gamma: the integral beside the constants that the authors sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from normfree.nn import OFFICIAL_GAMMA, gamma
from normfree.paper.report import Claim, Grid, write_table

ACTIVATIONS: dict[str, Any] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "soft_sign": F.softsign,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
"""The elementwise ones, as the authors' code computes them; "glu" and "log_softmax" mix elements."""

FARTHEST = 2e-3
"""Relative: the authors drew samples, whose mean is that far from the integral at most."""


def make(out: Path) -> list[Path]:
    """Integrate every constant and write ``gamma.md`` and ``gamma.json``."""
    rows = []
    for name, activation in ACTIVATIONS.items():
        exact, sampled = gamma(activation), OFFICIAL_GAMMA[name]
        rows.append({"activation": name, "exact": exact, "official": sampled, "relative": sampled / exact - 1})
    farthest = max(rows, key=lambda row: abs(row["relative"]))
    agrees = abs(farthest["relative"]) <= FARTHEST
    claim = Claim(
        text="the published constants are 1 / sqrt(Var[act(z)]) of a standard Gaussian",
        paper="sampled",
        ours=f"within {abs(farthest['relative']):.1e} of the integral ({farthest['activation']} is farthest)",
        verdict="agrees" if agrees else "does not agree",
    )
    cells = [
        [row["activation"], f"{row['exact']:.9f}", f"{row['official']:.9f}", f"{row['relative']:+.1e}"] for row in rows
    ]
    return write_table(
        out,
        "gamma",
        title="γ of each activation",
        about=[
            f"Integrated in float64 to a relative 1e-6, torch {torch.__version__}. Made by `normfree paper gamma`. "
            '"glu" and "log_softmax" mix elements: they have a sampled constant alone.'
        ],
        claims=[claim],
        grids=[Grid(title="", columns=("activation", "integral", "official", "difference"), rows=cells)],
        data=rows,
    )
