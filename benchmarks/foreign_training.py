"""Six architectures of other libraries, trained as they are, converted, and with their norms deleted.

``python -m benchmarks.foreign_training [--steps 200] [--only PATTERN ...] [--out results/foreign_training]`` writes
``table.json`` and ``README.md``. The libraries are those of ``benchmarks.foreign``. The data are scikit-learn's digits:
as tables of pixels, as sequences of pixels, as mosaics of four whose inked pixels are classified (segmentation) or that
are found and classified (detection), and as nodes of a graph that mostly joins digits of one class.

Each of the three twins is trained at each learning rate with the same batches and the same seed, gradients clipped to a
norm of 1, a linear rise of 50 steps and a cosine fall. A loss is the mean of the last tenth of the steps; that of a
classifier at chance is ln 10 = 2.30. *As well* is a converted network whose lowest loss is at most 1.1 times the
original's plus 0.02; *apart* are the rates at which the converted one ends below half of chance and the deleted one
does not.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, log, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.convert_training import COLOUR, Optimizing, adam, momentum, run, without_norms
from benchmarks.digits import digits
from benchmarks.foreign_case import load
from normfree.benchmark import hardware
from normfree.convert import conversion_of, convert
from normfree.signal import spp, write_atomically

RULES: tuple[tuple[str, Optimizing, float], ...] = (
    *(("SGD", momentum, rate) for rate in (0.03, 0.1, 0.3)),
    *(("Adam", adam, rate) for rate in (0.001, 0.003, 0.01)),
)
"""Optimizers and learning rates of every twin."""

CLASSES = 10
AS_WELL, MARGIN = 1.1, 0.02
TWINS = ("original", "converted", "deleted")

Batch = tuple[Any, Any]
"""What a model is called with (a tensor, or a tuple of arguments), and the target."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One architecture and what it learns.

    Attributes:
        name: ``library:architecture``.
        build: the model at random initialisation, for a seed that is already set.
        batch: the batch of a step, deterministic.
        loss: of a model, an input and a target, to be minimised.
        chance: the loss of a model that knows nothing; None takes the untrained original's.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Any, Any], Tensor]
    chance: float | None = log(CLASSES)


def classification(model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
    """Cross-entropy of logits [N, classes] or [N, classes, H, W]; targets of -100 are ignored."""
    return F.cross_entropy(model(*inputs), target)


def _choice(step: int, count: int, size: int) -> Tensor:
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(step))


def _table_batch(step: int, size: int = 64) -> Batch:
    """Three categories (five levels of ink in thirds of the image) and 64 pixels; [64] classes."""
    images, labels = digits(8)
    chosen = _choice(step, len(labels), size)
    pixels = images[chosen].flatten(1)
    ink = pixels[:, :63].reshape(size, 3, 21).mean(2)
    return ((ink * 4 + 2).round().clamp(0, 4).long(), pixels), labels[chosen]


def _sequence_batch(step: int, size: int = 32) -> Batch:
    """[32, 1, 64] pixels as a sequence; [32] classes."""
    images, labels = digits(8)
    chosen = _choice(step, len(labels), size)
    return (images[chosen].flatten(2),), labels[chosen]


@cache
def _graph() -> Batch:
    """600 digits as nodes; 4 edges each, 9 of 10 to a digit of the same class; [600] classes."""
    images, labels = digits(8)
    generator = torch.Generator().manual_seed(0)
    count = 600
    labels = labels[:count]
    others = torch.randint(count, (count, 4), generator=generator)
    same = torch.rand(count, 4, generator=generator) < 0.9
    for node in range(count):
        alike = (labels == labels[node]).nonzero()[:, 0]
        picked = alike[torch.randint(len(alike), (4,), generator=generator)]
        others[node] = torch.where(same[node], picked, others[node])
    edges = torch.stack([torch.arange(count).repeat_interleave(4), others.flatten()])
    return (images[:count].flatten(1), torch.cat([edges, edges.flip(0)], 1)), labels


def _mosaic(step: int, size: int, count: int, cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [count, 3, 2 cell, 2 cell] of four digits each; their ink [count, …] as classes; classes [count, 4]."""
    grey, labels = digits(cell)
    chosen = _choice(step, len(labels), 4 * count).view(count, 4)
    rows = [torch.cat([grey[chosen[:, 2 * row + column], 0] for column in range(2)], 2) for row in range(2)]
    image = torch.cat(rows, 1)
    classes = labels[chosen]
    by_pixel = classes.view(count, 2, 2).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    ink = torch.where(image > 0, by_pixel, -100)
    return image[:, None] * torch.tensor(COLOUR)[:, None, None], ink, classes


def _segmentation_batch(step: int) -> Batch:
    """[8, 3, 64, 64] mosaics; [8, 64, 64] classes of the inked pixels."""
    image, ink, _ = _mosaic(step, 64, 8, 32)
    return (image,), ink


def _detection_batch(step: int) -> Batch:
    """[8, 3, 128, 128] mosaics; the four digits of each as the library's batch of boxes."""
    image, _, classes = _mosaic(step, 128, 8, 64)
    centres = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    boxes = torch.cat([centres, torch.full((4, 2), 0.4)], 1).repeat(8, 1)
    found = {"batch_idx": torch.arange(8.0).repeat_interleave(4), "cls": classes.flatten().float(), "bboxes": boxes}
    return (image,), found


def _detection_loss(model: nn.Module, inputs: Any, target: Any) -> Tensor:
    """The library's own loss: boxes, classes and distributions, per image.

    It is zero where all scores have underflowed, so that no box is assigned: then nothing can be learned any more, and
    the answer is not a number.
    """
    loss, _ = load("ultralytics.utils.loss", "v8DetectionLoss")(model)(model(*inputs), target)
    total = loss.sum() / len(inputs[0])
    return total if total else total * nan


def _yolo() -> nn.Module:
    model = load("ultralytics.nn.tasks", "DetectionModel")("yolov8n.yaml", nc=CLASSES, verbose=False)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    return model


class LastStep(nn.Module):
    """A classifier of a sequence by the features [N, channels, T] of its last step."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 10] of [N, 1, T]."""
        return self.head(self.features(x)[:, :, -1])


def _smp(name: str, encoder: str) -> nn.Module:
    return load("segmentation_models_pytorch", name)(encoder, encoder_weights=None, classes=CLASSES)


TASKS = (
    Task(
        name="fastai:TabularModel",
        build=lambda: load("fastai.tabular.model", "TabularModel")([(6, 4)] * 3, 64, CLASSES, [200, 100]),
        batch=_table_batch,
        loss=classification,
    ),
    Task(
        name="pyg:GCN, 12 layers",
        build=lambda: load("torch_geometric.nn", "GCN")(64, 64, 12, CLASSES, norm="batch_norm"),
        batch=lambda step: _graph(),
        loss=classification,
    ),
    Task(
        name="smp:unet-efficientnet-b0",
        build=lambda: _smp("Unet", "efficientnet-b0"),
        batch=_segmentation_batch,
        loss=classification,
    ),
    Task(
        name="smp:linknet-resnet18",
        build=lambda: _smp("Linknet", "resnet18"),
        batch=_segmentation_batch,
        loss=classification,
    ),
    Task(
        name="ultralytics:yolov8n",
        build=_yolo,
        batch=_detection_batch,
        loss=_detection_loss,
        chance=None,
    ),
    Task(
        name="pytorch-tcn:TCN, causal",
        build=lambda: LastStep(
            load("pytorch_tcn", "TCN")(1, [32] * 5, kernel_size=5, use_norm="batch_norm", causal=True), 32
        ),
        batch=_sequence_batch,
        loss=classification,
    ),
)


def measured(task: Task, steps: int) -> dict[str, Any]:
    """One row: the conversion's record and verdict, and the last loss of each twin at each rate."""
    torch.manual_seed(0)
    model = task.build().train()
    inputs, target = task.batch(0)
    converted = convert(model, inputs)
    record = conversion_of(converted)
    assert record is not None
    findings = spp(converted, inputs).findings
    twins = {"original": model, "converted": converted, "deleted": without_norms(model, record)}
    with torch.no_grad():
        chance = task.chance or float(task.loss(copy.deepcopy(model).train(), inputs, target))
    runs = [
        {
            "rule": rule,
            "rate": rate,
            **{name: last_loss(twin, task, optimizing, rate, steps) for name, twin in twins.items()},
        }
        for rule, optimizing, rate in RULES
    ]
    return {
        "model": task.name,
        "norms_left": [[kept.name, kept.reason] for kept in record.norms_left],
        "findings": [[one.severity, one.kind] for one in findings],
        "chance": chance,
        "runs": runs,
    }


def last_loss(twin: nn.Module, task: Task, optimizing: Optimizing, rate: float, steps: int) -> float | None:
    """Train a copy; the mean loss of the last tenth of the steps, None where one was not finite."""
    found = run(copy.deepcopy(twin), task.batch, rate, steps, optimizing, task.loss)
    return None if found["peak"] is None else found["loss"][1]


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The lowest loss of each twin and whether the converted one does as well; the rates that tell two apart."""

    def lowest(twin: str) -> float:
        return min((each[twin] for each in row["runs"] if each[twin] is not None), default=inf)

    half = row["chance"] / 2
    apart = [
        f"{each['rule']} {each['rate']:g}"
        for each in row["runs"]
        if each["converted"] is not None
        and each["converted"] < half
        and not (each["deleted"] is not None and each["deleted"] < half)
    ]
    best = {twin: lowest(twin) for twin in TWINS}
    return {"lowest": best, "as_well": best["converted"] <= AS_WELL * best["original"] + MARGIN, "apart": apart}


def table(rows: Sequence[dict[str, Any]], steps: int, machine: str) -> str:
    """The Markdown page."""
    lines = ["# Other people's architectures, trained", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    lines += [
        f"{steps} steps; one seed; {machine}.",
        "",
        "| model | norms left | verdict | chance | original | converted | deleted | as well | apart at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = verdict(row)
        errors = [kind for severity, kind in row["findings"] if severity == "error"]
        best = said["lowest"]
        lines.append(
            f"| {row['model']} | {len(row['norms_left'])} | {', '.join(errors) or 'healthy'} | {row['chance']:.3g} "
            f"| {best['original']:.3g} | {best['converted']:.3g} | {best['deleted']:.3g} "
            f"| {'yes' if said['as_well'] else 'no'} | {', '.join(said['apart']) or '–'} |"
        )
    lines += ["", "Loss at every rate (original / converted / deleted; – is not finite):", ""]
    lines += [f"| model | {' | '.join(f'{rule} {rate:g}' for rule, _, rate in RULES)} |", "|---|" + "---|" * len(RULES)]
    for row in rows:
        cells = [
            " / ".join(
                "–" if each[twin] is None else f"{each[twin]:.3g}" for twin in ("original", "converted", "deleted")
            )
            for each in row["runs"]
        ]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    lines += ["", *(f"- `{row['model']}`, {name}: {why}" for row in rows for name, why in row["norms_left"])]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure the rows that are asked for, one after another; write the table after each."""
    parser = argparse.ArgumentParser(description="Train architectures of other libraries as they are and converted.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of the models' names")
    parser.add_argument("--out", type=Path, default=Path("results/foreign_training"))
    arguments = parser.parse_args()
    stored = arguments.out / "table.json"
    kept: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"rows": []}
    rows = {row["model"]: row for row in kept["rows"]}
    machine = ", ".join(f"{name} {value}" for name, value in hardware().items())
    for task in TASKS:
        if not any(fnmatch.fnmatch(task.name, pattern) for pattern in arguments.only):
            continue
        rows[task.name] = measured(task, arguments.steps)
        print(task.name, verdict(rows[task.name]), flush=True)
        ordered = [rows[each.name] for each in TASKS if each.name in rows]
        content = {"steps": arguments.steps, "machine": machine, "rows": ordered}
        write_atomically(stored, json.dumps(content, indent=1) + "\n")
        write_atomically(arguments.out / "README.md", table(ordered, arguments.steps, machine))


if __name__ == "__main__":
    main()
