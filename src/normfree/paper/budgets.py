"""Figure 3: NF-RegNets beside EfficientNets over budgets of computation, at sizes that two cores can train.

A budget is a number of multiplications for one image of CIFAR-10. For each there are an EfficientNet-B0 of some width,
and a normalizer-free and a batch-normalised RegNet-B0 of the width that brings them to the same number. The middle
budget has an EfficientNet whose normalizers are converted away, too: the paper found such a network worse than its
original, and blames the standardization of depthwise filters, which have nine or 25 weights.

What a network costs is measured first: parameters, multiplications, a training step's time beside the EfficientNet's
(all take turns) and its peak memory. Then each is trained for as many epochs, and the NF-RegNet also for as long as the
EfficientNet takes.

``normfree train`` builds the EfficientNets by the factories of this file.

Source: Brock, De, Smith, ICLR 2021, figure 3; the layers of EfficientNet-B0: Tan and Le 2019 (arXiv 1905.11946).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from normfree.benchmark import Contender, Part, ratios, shown, spread
from normfree.benchmark import measure as measure_costs
from normfree.common.checks import require
from normfree.common.files import read_json, write_atomically
from normfree.convert import convert
from normfree.paper.tables import (
    NOT_AT_HAND,
    PLAIN,
    SCALES,
    Arm,
    Claim,
    Grid,
    Method,
    TableSetting,
    about,
    accuracies,
    accuracy,
    compare_accuracies,
    measure_all,
    write_table,
)
from normfree.sources import build

SIZE, CLASSES, BATCH = 32, 10, 128
"""Pixels and classes of CIFAR-10; images of a timed step."""

ROUNDS = {"quick": 3, "small": 9, "full": 21}
"""Of timed steps, by scale."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Networks of about as many multiplications, which their widths bring them to.

    Attributes:
        efficientnet, regnet: width multipliers of the B0 variants.
        factory: of this file, that builds the EfficientNet.
    """

    efficientnet: float
    regnet: float
    factory: str


BUDGETS = (
    Budget(efficientnet=0.4, regnet=0.275, factory="small_efficientnet"),
    Budget(efficientnet=0.7, regnet=0.45, factory="medium_efficientnet"),
    Budget(efficientnet=1.0, regnet=0.61, factory="large_efficientnet"),
)

_LAYERS = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
"""Of EfficientNet-B0: expansion, kernel, stride, input and output channels and blocks of each stage."""


def efficientnet(width: float) -> nn.Module:
    """Return an EfficientNet-B0 of a width for ten classes, without dropout and stochastic depth."""
    require("torchvision", "EfficientNets")
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    stages = [MBConvConfig(*layers, width_mult=width, depth_mult=1.0) for layers in _LAYERS]
    return EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES)


def small_efficientnet() -> nn.Module:
    """Return the EfficientNet of the first budget."""
    return efficientnet(BUDGETS[0].efficientnet)


def medium_efficientnet() -> nn.Module:
    """Return the EfficientNet of the second budget."""
    return efficientnet(BUDGETS[1].efficientnet)


def large_efficientnet() -> nn.Module:
    """Return the EfficientNet of the third budget."""
    return efficientnet(BUDGETS[2].efficientnet)


def converted_efficientnet() -> nn.Module:
    """Return the EfficientNet of the second budget, its normalizers converted away."""
    return convert(medium_efficientnet(), torch.randn(BATCH, 3, SIZE, SIZE))


EFFICIENT, BN, NF, NF_AS_LONG, CONVERTED = (
    "EfficientNet",
    "BN-RegNet",
    "NF-RegNet",
    "NF-RegNet, trained as long as EfficientNet",
    "EfficientNet, converted",
)
UNREGULARISED = {"drop_rate": 0, "stochdepth_rate": 0}
_CONVERTED_AT = 1
"""Position of the budget that has a converted EfficientNet."""


def networks(position: int) -> dict[str, Method]:
    """Return the networks of a budget by name."""
    budget = BUDGETS[position]

    def of_this_file(factory: str) -> str:
        return f"{Path(__file__)}:{factory}"

    width = {"width": budget.regnet, **UNREGULARISED}
    found: dict[str, Method] = {
        EFFICIENT: (of_this_file(budget.factory), {}, PLAIN),
        BN: ("bn_regnet_b0", width, PLAIN),
        NF: ("nf_regnet_b0", {**width, "alpha": 0.5, "skipinit_gain": 1}, {}),
    }
    if position == _CONVERTED_AT:
        found[CONVERTED] = (of_this_file("converted_efficientnet"), {}, {})
    return found


def multiplications(model: nn.Module, size: int) -> float:
    """Return the millions of multiplications of a forward pass for one image [3, size, size]."""
    counted = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        counted(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e6


def cost(position: int, setting: TableSetting, on_progress: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Return what each network of a budget costs: parameters and multiplications in millions, a step's time and memory.

    "milliseconds" and "ratio", to the EfficientNet's in the same round, are spreads.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = {name: _source(model, overrides) for name, (model, overrides, _) in networks(position).items()}
    part = Part(
        name=f"budget {position + 1}",
        title="",
        task="training",
        contenders=[Contender(source, name=name) for name, source in sources.items()],
        batch_size=BATCH,
        image_size=SIZE,
        precision="bfloat16",
        rounds=ROUNDS[setting.scale],
    )
    timed = measure_costs(part, device=device, say=on_progress)["contenders"]
    found: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        model = build(source).model
        raw = timed[name]["raw_seconds"]
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            "multiplications": multiplications(model, SIZE),
            "milliseconds": spread([1000 * value for value in raw]),
            "ratio": spread(ratios(raw, timed[EFFICIENT]["raw_seconds"])),
            "peak_mib": timed[name]["peak_bytes"] / 2**20,
        }
    return found


def _source(model: str, overrides: Mapping[str, Any]) -> str:
    if not overrides:
        return model
    return f"{model}:" + ",".join(f"{name}={value}" for name, value in {**overrides, "num_classes": CLASSES}.items())


def arms(costs: Sequence[Mapping[str, Mapping[str, Any]]], epochs: int) -> list[Arm]:
    """Return the trainings of all budgets, given what their networks cost."""
    found: list[Arm] = []
    for position, at_this in enumerate(costs):
        column = f"budget {position + 1}"
        for name, method in networks(position).items():
            found.append(Arm.of(name, column, method, {}))
            if name == NF:
                longer = max(1, int(epochs / at_this[NF]["ratio"]["median"]))
                found.append(Arm.of(NF_AS_LONG, column, method, {}, epochs=longer))
    return found


def claims(cells: Sequence[dict[str, Any]]) -> list[Claim]:
    """Return NF-RegNet beside EfficientNet, in the same time and in as many epochs, and what conversion costs."""
    columns = [f"budget {position + 1}" for position in range(len(BUDGETS))]
    converted = f"budget {_CONVERTED_AT + 1}"

    def over(row: str, other: str, where: Sequence[str]) -> list[float]:
        return [accuracy(cells, row, column) - accuracy(cells, other, column) for column in where]

    return [
        compare_accuracies(
            "trained as long, NF-RegNet is at or above EfficientNet",
            NOT_AT_HAND,
            over(NF_AS_LONG, EFFICIENT, columns),
            0.0,
        ),
        compare_accuracies(
            "trained for as many epochs, NF-RegNet is within 1.2 points of EfficientNet",
            "76.8 78.6 79.6 80.6 81.7 82.5 (NF-RegNet-B0 to B5) beside 77.1 79.1 80.1 81.6 82.9 83.6 (EfficientNet)",
            over(NF, EFFICIENT, columns),
            -1.2,
        ),
        compare_accuracies(
            "an EfficientNet without normalizers loses more than a point",
            "about 3.2 points, blamed on depthwise filters (quoted from secondary notes)",
            over(EFFICIENT, CONVERTED, [converted]),
            1.0,
        ),
    ]


def make_figure3(
    setting: TableSetting, out: Path, provenance: Mapping[str, Any], on_progress: Callable[[str], None]
) -> list[Path]:
    """Measure the costs, train what is missing, and write the page: the figure as a table.

    Args:
        setting: how; at scale "quick" only costs are measured.
        out: folder; its ``runs`` keeps costs and runs, so that an interruption costs one run's rest.
        provenance: hardware, versions and commit, for the page.
        on_progress: called with a line before each network.

    Returns:
        The paths written, the page last.

    Raises:
        ImportError: torchvision is not installed.
    """
    require("torchvision", "EfficientNets")
    scale, folder = SCALES[setting.scale], out / "runs" / f"figure3-{setting.scale}"
    costs = _kept_costs(folder / "costs.json", setting, on_progress)
    cells: list[dict[str, Any]] = []
    if scale.recipe == "cifar":
        cells = measure_all(arms(costs, scale.epochs), setting, folder, on_progress)
    columns = ("", "parameters, M", "multiplications, M", "step, ms", "step / EfficientNet's", "peak memory, MiB")
    grids = [
        Grid(title=f"Cost of budget {number}", columns=columns, rows=[_cost_row(*one) for one in at_this.items()])
        for number, at_this in enumerate(costs, 1)
    ]
    step = (
        f"A step is one of {BATCH} images of {SIZE} px in bf16; all take turns: median (quartiles). Multiplications "
        "are those of a forward pass for one image."
    )
    return write_table(
        out,
        f"figure3-{setting.scale}",
        title="NF-RegNet beside EfficientNet",
        about=[*about("figure3", setting, provenance, trains=bool(cells)), "", step],
        claims=claims(cells) if cells else [],
        grids=[*([accuracies(cells)] if cells else []), *grids],
        data={"setting": setting.describe(), "provenance": dict(provenance), "costs": costs, "cells": cells},
    )


def _kept_costs(
    file: Path, setting: TableSetting, on_progress: Callable[[str], None]
) -> list[dict[str, dict[str, Any]]]:
    """The costs of all budgets; measured once, for they say how long the NF-RegNets are trained."""
    if not file.exists():
        found = [cost(position, setting, on_progress) for position in range(len(BUDGETS))]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"budgets": found}, indent=1) + "\n")
    return read_json(file)["budgets"]


def _cost_row(name: str, found: Mapping[str, Any]) -> list[str]:
    sizes = [f"{found['parameters']:.2f}", f"{found['multiplications']:.2f}"]
    return [name, *sizes, shown(found["milliseconds"], 0), shown(found["ratio"], 2), f"{found['peak_mib']:.0f}"]
