"""The paper's tables of accuracies: sets of trainings, at three scales.

Every table is a list of arms, each a network with its optimizer's settings. An arm is trained with one seed at each
learning rate of a grid, which is the same number of trials for all; then at its best rate with the other seeds. Runs
are those of ``normfree.train``: each has a folder, goes on where it was interrupted, and is not repeated.

``quick`` trains on scikit-learn's digits, which tell methods that train from those that do not and no more; ``small``
and ``full`` on CIFAR-10. The paper's numbers are of ImageNet: what is compared is the claim, not the number.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from normfree.common.checks import check_choices, check_integer, invalid
from normfree.common.files import read_json, write_atomically
from normfree.sources import network_factory
from normfree.train import RECIPES, NonFiniteLossError, TrainConfig, train
from normfree.train.checkpoint import CONFIG, METRICS, differences, read_metrics

Verdict = Literal["agrees", "does not agree", "cannot be tested at this scale"]

NOT_AT_HAND = "not at hand"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: the claim.
        paper: the paper's own number, in words, or "not at hand".
        ours: the number measured here, in words.
        verdict: whether it agrees.
    """

    text: str
    paper: str
    ours: str
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of measurements.

    Attributes:
        title: above it.
        columns: headings; the first is that of the rows' names.
        rows: one cell a column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """The table as Markdown."""
        head = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        title = [f"## {self.title}", ""] if self.title else []
        return [*title, *head, *(f"| {' | '.join(row)} |" for row in self.rows), ""]


def write_table(
    out: Path,
    name: str,
    *,
    title: str,
    about: Sequence[str],
    claims: Sequence[Claim],
    grids: Sequence[Grid],
    data: Any,
) -> list[Path]:
    """Write ``NAME.md`` and ``NAME.json``, each as a whole or not at all.

    Args:
        out: folder, made if it is missing.
        name: of the table, such as "table1".
        title: of the page.
        about: lines that say how it was measured: command, hardware, versions, seeds.
        claims: in the order of the page.
        grids: the numbers behind them.
        data: everything measured, as JSON takes it.

    Returns:
        The paths, the page last.
    """
    lines = [f"# {title}", "", *about, ""]
    if claims:
        lines += ["| claim | the paper (ImageNet) | here | |", "|---|---|---|---|"]
        lines += [f"| {claim.text} | {claim.paper} | {claim.ours} | {claim.verdict} |" for claim in claims]
        lines += [""]
    for grid in grids:
        lines += grid.lines()
    stored = write_atomically(out / f"{name}.json", json.dumps(data, indent=1) + "\n")
    return [stored, write_atomically(out / f"{name}.md", "\n".join(lines).rstrip() + "\n")]


FAILS = 0.5
"""A network fails if it reaches less than this share of what the best arm of its column reaches."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is trained.

    Attributes:
        recipe: whose data, augmentation, batch and schedule are taken.
        depths: blocks per stage, by the number of layers.
        widths: channels of the four stages.
        epochs: of each run.
        rates: learning rates tried, as factors of the recipe's.
        seeds: of each arm at its best rate.
        batches: of the table of batch sizes.
        batch_share: of the training images that this table trains on, for a step of one image costs as much as one
            of sixteen.
        decides: whether accuracies at this scale can decide a claim about them.
    """

    recipe: str
    depths: Mapping[int, tuple[int, int, int, int]]
    widths: tuple[int, int, int, int]
    epochs: int
    rates: Sequence[float]
    seeds: int
    batches: Sequence[int]
    batch_share: float
    decides: bool

    def layout(self, depths: tuple[int, int, int, int]) -> dict[str, Any]:
        """Return the overrides of a ResNet of these depths."""
        return {"depths": depths, "widths": self.widths, "stem": "cifar"}


ScaleName = Literal["quick", "small", "full"]

SCALES: dict[ScaleName, Scale] = {
    "quick": Scale(
        recipe="digits",
        depths={14: (1, 1, 1, 1), 26: (2, 2, 2, 2)},
        widths=(16, 32, 32, 32),
        epochs=5,
        rates=(1.0, 4.0),
        seeds=2,
        batches=(4, 16, 64),
        batch_share=1.0,
        decides=False,
    ),
    "small": Scale(
        recipe="cifar",
        depths={14: (1, 1, 1, 1), 56: (4, 4, 4, 6)},
        widths=(32, 64, 128, 128),
        epochs=1,
        rates=(1.0,),
        seeds=3,
        batches=(1, 2, 4, 8, 32, 128, 1024),
        batch_share=0.4,
        decides=True,
    ),
    "full": Scale(
        recipe="cifar",
        depths={29: (2, 2, 2, 3), 56: (4, 4, 4, 6), 110: (9, 9, 9, 9)},
        widths=(64, 128, 256, 256),
        epochs=30,
        rates=(0.5, 1.0, 2.0),
        seeds=3,
        batches=(1, 2, 4, 8, 32, 128, 1024),
        batch_share=1.0,
        decides=True,
    ),
}


Method = tuple[str, dict[str, Any], dict[str, Any]]
"""A network: its model, its overrides, and what of the recipe's optimizer is its own."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One cell of a table.

    Attributes:
        row, column: its place.
        model: as ``normfree train --model`` takes it.
        overrides: of the model.
        optimizer: fields of the recipe's optimizer that are its own.
        batch_size: images a step; the recipe's by default. The learning rate grows linearly with it.
        epochs: of each run; the scale's by default.
        share: of the training images.
    """

    row: str
    column: str
    model: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    epochs: int | None = None
    share: float = 1.0

    @classmethod
    def of(cls, row: str, column: str, method: Method, layout: Mapping[str, Any], **others: Any) -> Arm:
        """Return the arm of a method in a layout; the arguments in ``others`` that are overrides go before its own."""
        model, own, optimizer = method
        overrides = {**layout, **own, **others.pop("overrides", {})}
        optimizer = {**optimizer, **others.pop("optimizer", {})}
        return cls(row=row, column=column, model=model, overrides=overrides, optimizer=optimizer, **others)


@dataclass(frozen=True, kw_only=True)
class TableSetting:
    """How a table is made.

    Attributes:
        scale: "quick", "small" or "full".
        data: CIFAR-10 for "small" and "full": a folder of parquet files, or hub:uoft-cs/cifar10.
        seeds: of each arm; the scale's by default.
        limit: steps of each run, for a rehearsal; None for all.
    """

    scale: ScaleName = "quick"
    data: str | None = None
    seeds: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.data is not None and SCALES[self.scale].recipe != "cifar":
            raise invalid("data", self.data, f"scale {self.scale!r} trains on digits", "leave it out, or scale='small'")
        for name in ("seeds", "limit"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)

    def describe(self) -> dict[str, Any]:
        """Return what the results depend on, as JSON takes it; not the path of the data."""
        return {"scale": self.scale, "seeds": self.seeds, "limit": self.limit}


PLAIN = {"clip_norm": None, "classifier_lr_scale": 1.0}
"""What networks with normalizers are better with: no clipping, the classifier as fast as the rest."""

NF = {"alpha": 0.5, "skipinit_gain": 1, "drop_rate": 0, "stochdepth_rate": 0}
REGULARISED = {"drop_rate": 0.25, "stochdepth_rate": 0.1}

METHODS: dict[str, Method] = {
    "BatchNorm": ("resnetv2_50", {"drop_rate": 0, "stochdepth_rate": 0}, PLAIN),
    "NF": ("nf_resnet50", NF, {}),
    "SkipInit": ("skipinit_resnet50", {"drop_rate": 0, "stochdepth_rate": 0}, {}),
    "FixUp": ("fixup_resnet50", {"drop_rate": 0, "stochdepth_rate": 0}, {}),
    "unnormalised": ("resnetv2_50", {"norm": None, "drop_rate": 0, "stochdepth_rate": 0}, PLAIN),
    "unnormalised, clipped": ("resnetv2_50", {"norm": None, "drop_rate": 0, "stochdepth_rate": 0}, {}),
}
"""Networks by the name of their method; the one whose normalizers are deleted as its twin trains, and as NF does."""

NORMALIZERS = {
    "NF": METHODS["NF"],
    "BatchNorm": METHODS["BatchNorm"],
    "GroupNorm": ("resnetv2_50", {"norm": "group"}, PLAIN),
    "GroupNorm, standardized weights": ("resnetv2_50", {"norm": "group", "conv": "scaled_ws"}, PLAIN),
    "LayerNorm": ("resnetv2_50", {"norm": "layer"}, PLAIN),
    "InstanceNorm": ("resnetv2_50", {"norm": "instance"}, PLAIN),
    "none": METHODS["unnormalised"],
}


def table1(scale: Scale) -> list[Arm]:
    """Depth × method × regularisation."""
    return [
        Arm.of(f"{method}{suffix}", f"{layers} layers", METHODS[method], scale.layout(depths), overrides=regularised)
        for method in METHODS
        for suffix, regularised in (("", {}), (", regularised", REGULARISED))
        for layers, depths in scale.depths.items()
    ]


def table2(scale: Scale) -> list[Arm]:
    """Batch size × method, for as many images each."""
    layout, share = scale.layout(next(iter(scale.depths.values()))), scale.batch_share
    return [
        Arm.of(method, f"batch {batch}", NORMALIZERS[method], layout, batch_size=batch, share=share)
        for method in ("NF", "BatchNorm", "GroupNorm", "GroupNorm, standardized weights")
        for batch in scale.batches
    ]


def normalizers(scale: Scale) -> list[Arm]:
    """One network with each normalizer, and without; the digits' last maps are one pixel, which has no variance."""
    layers, depths = next(iter(scale.depths.items()))
    named = {name: one for name, one in NORMALIZERS.items() if scale.recipe == "cifar" or name != "InstanceNorm"}
    return [Arm.of(name, f"{layers} layers", method, scale.layout(depths)) for name, method in named.items()]


def ablation(scale: Scale) -> list[Arm]:
    """The normalizer-free network with one part changed at a time."""
    layers, depths = next(iter(scale.depths.items()))
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "NF": ({}, {}),
        "α = 0.2": ({"alpha": 0.2}, {}),
        "α = 1": ({"alpha": 1.0}, {}),
        "skip gain from 0": ({"skipinit_gain": 0}, {}),
        "α = 0.2, skip gain from 0 (the paper's start)": ({"alpha": 0.2, "skipinit_gain": 0}, {}),
        "SiLU": ({"activation": "silu"}, {}),
        "no clipping, classifier as fast": ({}, PLAIN),
        "adaptive clipping, λ = 0.01": ({}, {**PLAIN, "clip_factor": 0.01}),
        "adaptive clipping, λ = 0.04": ({}, {**PLAIN, "clip_factor": 0.04}),
        "plain weights, no γ, no β (SkipInit's network)": ({}, {}),
    }
    arms = []
    for name, (overrides, optimizer) in changes.items():
        method = METHODS["SkipInit"] if name.startswith("plain weights") else METHODS["NF"]
        changed = {"overrides": overrides, "optimizer": optimizer}
        arms.append(Arm.of(name, f"{layers} layers", method, scale.layout(depths), **changed))
    return arms


def config(arm: Arm, scale: Scale, setting: TableSetting, rate: float, seed: int, folder: Path) -> TrainConfig:
    """The run of one arm at a factor of the recipe's learning rate and a seed."""
    recipe = RECIPES[scale.recipe]()
    overrides = ",".join(f"{name}={_literal(value)}" for name, value in arm.overrides.items())
    epochs = arm.epochs or scale.epochs
    name = f"{_word(arm.row)}-{_word(arm.column)}-{rate:g}-{seed}"
    optimizer = dataclasses.replace(
        recipe.optimizer,
        learning_rate=recipe.optimizer.learning_rate * rate,
        warmup_epochs=min(recipe.optimizer.warmup_epochs, epochs / 4),
        **arm.optimizer,
    )
    batch = arm.batch_size or recipe.batch_size
    data = recipe.data
    if setting.data and scale.recipe == "cifar":
        data = dataclasses.replace(data, source=setting.data)
    if arm.share < 1:
        data = dataclasses.replace(data, holdout=1 - arm.share, evaluation_split="test")
    return dataclasses.replace(
        recipe,
        name=name,
        model=f"{arm.model}:{overrides}" if overrides else arm.model,
        data=data,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch,
        evaluate_every=epochs,
        seed=seed,
        signal_every=0,
        limit_train_steps=setting.limit,
        out=folder / name,
    )


def _literal(value: Any) -> str:
    return f"({','.join(map(str, value))})" if isinstance(value, tuple) else str(value)


def _word(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, or take what a finished run left: accuracy in percent, seconds; 0 where the loss was no longer finite."""
    found: dict[str, Any] = {"seed": config.seed, "learning_rate": config.optimizer.learning_rate}
    if (metrics := _finished(config)) is not None:
        return {**found, "accuracy": 100 * metrics["evaluation"]["top1"], "seconds": metrics["seconds"]}
    try:
        summary = train(config, network=network_factory(config.model) if config.is_foreign else None)
    except NonFiniteLossError as error:
        return {**found, "accuracy": 0.0, "seconds": None, "failed": str(error)}
    if not summary.finished and config.limit_train_steps is None:
        raise KeyboardInterrupt  # stopped as asked; the same command goes on
    return {**found, "accuracy": 100 * (summary.accuracy or 0.0), "seconds": summary.metrics["seconds"]}


def _finished(config: TrainConfig) -> dict[str, Any] | None:
    """The metrics of a run that has come to its end with these settings, read without opening its data again."""
    path = config.folder / CONFIG
    if not path.exists() or differences(config, config.folder):
        return None
    derived = read_json(path, "run").get("derived")
    steps = derived.get("steps") if isinstance(derived, dict) else None
    if not isinstance(steps, int):
        return None
    return read_metrics(config.folder, min(steps, config.limit_train_steps or steps))


def measure_all(
    arms: Sequence[Arm], setting: TableSetting, folder: Path, on_progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return every run of all arms: each learning rate with the first seed, then the best one with the others.

    Args:
        arms: to train.
        setting: how.
        folder: of the runs; those that are finished are not repeated.
        on_progress: called before each run with its number, how many there are, and the time left at the pace so far.
    """
    scale = SCALES[setting.scale]
    seeds = setting.seeds or scale.seeds
    total = len(arms) * (len(scale.rates) + seeds - 1)
    began, done, trained = time.monotonic(), 0, 0

    def train_one(arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        nonlocal done, trained
        left = f", {_duration((time.monotonic() - began) / trained * (total - done))} left" if trained else ""
        on_progress(f"{arm.row}, {arm.column}: training {done + 1} of {total}{left}")
        chosen = config(arm, scale, setting, rate, seed, folder)
        trained += not (chosen.folder / METRICS).exists()
        found = run(chosen)
        done += 1
        return found

    cells = []
    for arm in arms:
        grid = {rate: train_one(arm, rate, 0) for rate in scale.rates}
        best = max(grid, key=lambda rate: grid[rate]["accuracy"])
        others = [train_one(arm, best, seed) for seed in range(1, seeds)]
        cells.append(_cell_of(arm, best, grid, others))
    return cells


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _cell_of(
    arm: Arm, best: float, grid: Mapping[float, dict[str, Any]], others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "row": arm.row,
        "column": arm.column,
        "model": Path(arm.model).name,
        "epochs": arm.epochs,
        "rate": best,
        "grid": list(grid.values()),
        "runs": [grid[best], *others],
    }


def accuracy(cells: Sequence[dict[str, Any]], row: str, column: str) -> float:
    """The mean accuracy of a cell."""
    found = next(cell for cell in cells if cell["row"] == row and cell["column"] == column)
    return mean(one["accuracy"] for one in found["runs"])


def _columns(cells: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["column"] for cell in cells))


def compare_accuracies(
    text: str, paper: str, differences: Sequence[float], at_least: float, decides: bool = True
) -> Claim:
    """Return the claim that a difference of accuracies is at least so large in every column.

    Args:
        text: the claim.
        paper: the paper's numbers.
        differences: in points, one a column.
        at_least: the smallest that agrees.
        decides: whether accuracies at this scale can decide it.
    """
    holds: Verdict = "agrees" if min(differences) >= at_least else "does not agree"
    ours = ", ".join(f"{difference:+.1f}" for difference in differences) + " points"
    return Claim(text=text, paper=paper, ours=ours, verdict=holds if decides else "cannot be tested at this scale")


def claims_of_table1(cells: Sequence[dict[str, Any]], scale: Scale) -> list[Claim]:
    """NF against BatchNorm, SkipInit and FixUp; the unnormalised network fails."""
    columns = _columns(cells)

    def best(method: str, column: str) -> float:
        return max(accuracy(cells, method, column), accuracy(cells, f"{method}, regularised", column))

    def over(other: str) -> list[float]:
        return [best("NF", column) - best(other, column) for column in columns]

    failing = [best("unnormalised", column) / max(best("NF", column), 1e-9) for column in columns]
    return [
        compare_accuracies(
            "NF reaches BatchNorm's accuracy at every depth (within 0.3 points)",
            "76.8 78.4 79.1 79.6 79.5 (NF, regularised) beside 76.8 78.0 78.6 79.0 78.8 (BN), 50 to 288 layers",
            over("BatchNorm"),
            -0.3,
            scale.decides,
        ),
        compare_accuracies(
            "NF is above SkipInit",
            "75.8 77.3 78.0 78.2 78.7 (SkipInit, regularised)",
            over("SkipInit"),
            0.0,
            scale.decides,
        ),
        compare_accuracies("NF is above FixUp", "75.9 77.6 78.4 78.7 78.4 (FixUp)", over("FixUp"), 0.0, scale.decides),
        Claim(
            text=f"without a normalizer and without a remedy training fails (below {FAILS:.0%} of NF's accuracy)",
            paper=NOT_AT_HAND,
            ours=", ".join(f"{share:.0%}" for share in failing) + " of NF's accuracy",
            verdict="agrees" if max(failing) < FAILS else "does not agree",
        ),
    ]


def claims_of_table2(cells: Sequence[dict[str, Any]], scale: Scale) -> list[Claim]:
    """NF keeps its accuracy as the batch shrinks; BatchNorm does not."""
    columns = _columns(cells)
    usual = [column for column in columns if int(column.split()[1]) <= 128]
    nf = [accuracy(cells, "NF", column) for column in usual]
    small = "batch 2" if "batch 2" in columns else min(columns, key=lambda column: int(column.split()[1]))
    fall = max(accuracy(cells, "BatchNorm", column) for column in columns) - accuracy(cells, "BatchNorm", small)
    falls: Verdict = "agrees" if fall > 10 else "does not agree"
    over = [accuracy(cells, "NF", column) - accuracy(cells, "BatchNorm", column) for column in columns]
    return [
        compare_accuracies(
            f"NF is at least as good as BatchNorm at each batch ({_listed(columns)})",
            "batch 4, 15 epochs: 69.9 beside 55.7 (quoted from secondary notes)",
            over,
            0.0,
            scale.decides,
        ),
        compare_accuracies(
            "NF keeps its accuracy at any batch up to 128 (within 1 point)",
            "batch 4, 15 epochs: 69.9 (quoted from secondary notes)",
            [min(nf) - max(nf)],
            -1.0,
            scale.decides,
        ),
        Claim(
            text=f"BatchNorm loses more than 10 points at {small}",
            paper="batch 4, 15 epochs: 55.7 (quoted from secondary notes)",
            ours=f"{-fall:+.1f} points",
            verdict=falls if scale.decides else "cannot be tested at this scale",
        ),
    ]


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(column.split()[1] for column in columns)


def claims_of_normalizers(cells: Sequence[dict[str, Any]], scale: Scale) -> list[Claim]:
    """NF against the best normalizer."""
    (column,) = _columns(cells)
    rows = {cell["row"] for cell in cells} - {"NF", "none"}
    others = {name: accuracy(cells, name, column) for name in sorted(rows)}
    best = max(others, key=lambda name: others[name])
    return [
        compare_accuracies(
            f"NF reaches the best normalizer, here {best} (within 0.3 points)",
            NOT_AT_HAND,
            [accuracy(cells, "NF", column) - others[best]],
            -0.3,
            scale.decides,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper.

    Attributes:
        name: "table1", …
        title: of its page.
        arms: of a scale.
        claims: of the cells that were measured; none for a table that only shows.
    """

    name: str
    title: str
    arms: Callable[[Scale], list[Arm]]
    claims: Callable[[Sequence[dict[str, Any]], Scale], list[Claim]] = lambda cells, scale: []


TABLES = {
    table.name: table
    for table in (
        Table(name="table1", title="Depth, method and regularisation", arms=table1, claims=claims_of_table1),
        Table(name="table2", title="Batch size", arms=table2, claims=claims_of_table2),
        Table(name="normalizers", title="One network, each normalizer", arms=normalizers, claims=claims_of_normalizers),
        Table(name="ablation", title="What each part of the normalizer-free network does", arms=ablation),
    )
}


def make(
    table: Table, setting: TableSetting, out: Path, provenance: Mapping[str, Any], on_progress: Callable[[str], None]
) -> list[Path]:
    """Train what is missing of a table and write its page.

    Args:
        table: which.
        setting: how.
        out: folder; its ``runs`` keeps every run, so that an interrupted table goes on.
        provenance: hardware, versions and commit, for the page.
        on_progress: told before each cell.

    Returns:
        The paths written, the page last.
    """
    scale = SCALES[setting.scale]
    folder = out / "runs" / f"{table.name}-{setting.scale}"
    arms = table.arms(scale)
    cells = measure_all(arms, setting, folder, on_progress)
    claims = table.claims(cells, scale)
    if setting.limit:
        claims = [dataclasses.replace(claim, verdict="cannot be tested at this scale") for claim in claims]
    shares = [f"{share:.0%} of the training images" for share in {arm.share for arm in arms} if share < 1]
    return write_table(
        out,
        f"{table.name}-{setting.scale}" + ("-rehearsal" if setting.limit else ""),
        title=table.title,
        about=about(table.name, setting, provenance, f"widths {scale.widths}", *shares),
        claims=claims,
        grids=[accuracies(cells)],
        data={"setting": setting.describe(), "provenance": dict(provenance), "cells": cells},
    )


def about(
    name: str, setting: TableSetting, provenance: Mapping[str, Any], *sizes: str, trains: bool = True
) -> list[str]:
    """Return the lines of a page that say how its networks were trained, and by what it is made.

    Args:
        name: of the table.
        setting: how it was made.
        provenance: hardware, versions and commit.
        sizes: of the networks, in words.
        trains: whether networks were trained for it.
    """
    scale, seeds = SCALES[setting.scale], setting.seeds or SCALES[setting.scale].seeds
    command = f"normfree paper {name} --scale {setting.scale}" + (" --data CIFAR10" if scale.recipe == "cifar" else "")
    for option, value in (("seeds", setting.seeds), ("limit-train-steps", setting.limit)):
        command += "" if value is None else f" --{option} {value}"
    data = "CIFAR-10" if scale.recipe == "cifar" else "scikit-learn digits"
    rehearsal = f", at most {setting.limit} steps (a rehearsal)" if setting.limit else ""
    trained = [
        f"{data}, {scale.epochs} epoch{'s' if scale.epochs > 1 else ''}",
        *sizes,
        f"{len(scale.rates)} learning rate(s) with seed 0",
    ]
    training = (
        f"{', '.join(trained)}, then the best with seeds 0 to {seeds - 1}{rehearsal}. Top-1 of the test images in "
        "percent, mean and standard deviation over seeds."
    )
    return [
        f"Scale {setting.scale}: {training if trains else 'nothing is trained.'}",
        "",
        f"Made by `{command}`; {', '.join(f'{name} {value}' for name, value in provenance.items())}.",
    ]


def accuracies(cells: Sequence[dict[str, Any]]) -> Grid:
    """Return the accuracies of all cells, a row for each network."""
    columns = _columns(cells)
    by_place = {(cell["row"], cell["column"]): cell for cell in cells}
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    shown = [[row, *(_cell(by_place.get((row, column))) for column in columns)] for row in rows]
    return Grid(title="Accuracy", columns=("", *columns), rows=shown)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    values = [one["accuracy"] for one in cell["runs"]]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
