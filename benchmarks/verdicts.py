"""Does the verdict of ``spp`` say which nets learn? Forty small nets, each measured and trained.

``python -m benchmarks.verdicts [--out results/verdicts] [--verdicts-only] [--calibration] [--nets NAME ...]`` writes
``verdicts.json`` (a net at a time, and goes on where it was stopped) and ``README.md``. ``--verdicts-only`` keeps the
training results and measures again. ``--calibration`` takes the nets that the thresholds rest on, and
writes ``calibration.json`` and ``CALIBRATION.md``.

*Verdict*: ``spp`` of the net at initialisation on 64 training images, as ``assert_healthy`` takes it: "error" if a
finding is one, "healthy" otherwise. *Training*: 300 steps of Adam at batch 64, at the rates 3e-3, 1e-3, 1e-2 and 3e-4
in this order until one ends at a test accuracy of 90 %; the best counts. *Learned*: at least half of the way from
chance (10 %) to the best net of the family. The data are scikit-learn's digits, 1437 for training and 360 for testing.
Weights are drawn with seed 0, the split with 0, batches with 1.

The thresholds were not chosen on these nets, but from the derivations beside them and on others, of other
depths and gains: ``CALIBRATION.md``. That of likeness alone lies between a net of the one and a net of the other table:
six and eight layers with biases of 100.
"""

from __future__ import annotations

import argparse
import json
import time
from math import log10, prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.digits import digits
from benchmarks.verdict_nets import CALIBRATION, CLASSES, NETS
from normfree import spp
from normfree.benchmark import hardware, versions
from normfree.signal import write_atomically

RATES = (3e-3, 1e-3, 1e-2, 3e-4)
STEPS, BATCH, TRAINING, ENOUGH = 300, 64, 1437, 0.9
CHANCE = 1 / CLASSES

# Why the verdict misses the nets that it misses, for the table.
MISSES: dict[str, str] = {
    "relu, a third of He, 15": (
        "signal and gradient fade by more than ten powers of ten, and Adam divides that out: 64 % at its largest rate, "
        "below 36 % at the three others."
    ),
    "conv, relu, a quarter of He, 10": "as the one above: 73 % and 51 % at two rates, chance at the two others.",
    "relu, He, 8, zero head": "the outputs of the zero head are taken for a signal that has faded.",
    "attention alone, 4": "an error of mean_shift, at a squared mean of 2.4 times the variance.",
}


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and classes, test images and classes."""
    images, classes = digits(8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[order], classes[order]
    return images[:TRAINING], classes[:TRAINING], images[TRAINING:], classes[TRAINING:]


def built(name: str) -> nn.Module:
    """The net, with weights drawn from seed 0."""
    torch.manual_seed(0)
    return (NETS | CALIBRATION)[name][1]()


def verdict(name: str, images: Tensor) -> dict[str, Any]:
    """The verdict and what it rests on."""
    signal = spp(built(name), images[:BATCH])
    points = [block for block in signal.blocks if block.avg_sq_gradient and block.avg_channel_var > 0]
    ends = (points[0], points[-1]) if points else ()
    power = [prod(block.shape[1:]) * (block.avg_sq_gradient or 0.0) for block in ends]
    sensitivity = [g * block.avg_channel_var for g, block in zip(power, ends, strict=True)]
    inner = [block for block in signal.blocks if block.kind == "residual" or not block.last]
    found = {severity: sorted({f.kind for f in signal.findings if f.severity == severity}) for severity in SEVERE}
    return {
        "verdict": "error" if found["error"] else "healthy",
        "findings": found,
        "gradient": signal.configuration["gradient"],
        "ratios": {name: first / last for name, (first, last) in (("S", sensitivity), ("G", power))} if ends else {},
        "variance": min(block.avg_channel_var for block in inner) / signal.entry.avg_channel_var,
        "difference": min(1 - (block.input_correlation or 0.0) for block in inner),
    }


SEVERE = ("error", "warning")


def accuracy_after(name: str, rate: float, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Test accuracy after training at one rate; chance if the loss stops being finite."""
    images, classes, test_images, test_classes = data
    model = built(name).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[rows]), classes[rows])
        if not torch.isfinite(loss):
            return CHANCE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model.eval()(test_images).argmax(1) == test_classes).float().mean())


def training(name: str, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Accuracy by rate, and seconds."""
    began, reached = time.perf_counter(), dict[str, float]()
    for rate in RATES:
        reached[str(rate)] = round(accuracy_after(name, rate, data), 4)
        if reached[str(rate)] >= ENOUGH:
            break
    return {"accuracy": reached, "seconds": round(time.perf_counter() - began, 1)}


def rated(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every net with its best accuracy, whether that is learned, and whether the verdict said so."""
    best = {name: max(row["accuracy"].values()) for name, row in rows.items() if "accuracy" in row}
    families = {name: NETS[name][0] for name in best}
    top = {family: max(best[n] for n in best if families[n] == family) for family in families.values()}
    found = []
    for name in (name for name in NETS if name in best):
        share = (best[name] - CHANCE) / (top[families[name]] - CHANCE)
        row = {"net": name, "family": families[name], "best": best[name], "learned": share >= 0.5, **rows[name]}
        found.append({**row, "right": row["learned"] == (row["verdict"] == "healthy")})
    return found


def readme(document: dict[str, Any]) -> str:
    """The table of all nets, and why it missed where it did."""
    rows = rated(document["nets"])
    right = sum(row["right"] for row in rows)
    lines = [
        "# Does the verdict say which nets learn?",
        "",
        f"`python -m benchmarks.verdicts`: the verdict at initialisation is right for **{right}** of {len(rows)} nets.",
        f"Made with {versions(document['hardware'])}.",
        "",
        (__doc__ or "").split("\n\n", 2)[2].replace("``", "`"),
        "| net | family | verdict | errors (warnings) | best accuracy, % | learned | right |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        errors, warnings = (", ".join(row["findings"][severity]) for severity in SEVERE)
        told = " ".join(part for part in (errors, f"({warnings})" if warnings else "") if part) or "–"
        learned, right_ = ("yes" if row[key] else "no" for key in ("learned", "right"))
        cells = (row["net"], row["family"], row["verdict"], told, f"{100 * row['best']:.1f}", learned, right_)
        lines.append("| " + " | ".join(cells) + " |")
    missed = [row["net"] for row in rows if not row["right"]]
    if missed:
        lines += ["", "## What it missed", ""]
        lines += [f"- **{name}**: {MISSES.get(name, 'not explained yet.')}" for name in missed]
    return "\n".join(lines) + "\n"


def calibration(document: dict[str, Any]) -> str:
    """The table of the nets that the thresholds rest on."""
    lines = [
        "# What the thresholds rest on",
        "",
        "`python -m benchmarks.verdicts --calibration`: chains of width 32, convolutions of 12, trained as those of",
        "the README. Powers of ten: S and G (see `signal/gradients.py`) of the first point over those of the last; the",
        "least variance before the classifier over the input's; the least difference of two examples, 1 less the mean",
        "cosine similarity of their features.",
        f"Made with {versions(document['hardware'])}.",
        "",
        "| net | S, first / last | G, first / last | variance | difference | verdict | best accuracy, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in document["nets"].items():
        numbers = (row["ratios"]["S"], row["ratios"]["G"], row["variance"], row["difference"])
        powers = " | ".join(f"{log10(number):.1f}" for number in numbers)
        lines.append(f"| {name} | {powers} | {row['verdict']} | {100 * max(row['accuracy'].values()):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, and write after every net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/verdicts"))
    parser.add_argument("--verdicts-only", action="store_true", help="keep the training results, measure again")
    parser.add_argument("--calibration", action="store_true", help="the nets that the thresholds rest on")
    parser.add_argument("--nets", nargs="*", metavar="NAME", help="these alone")
    arguments = parser.parse_args()
    chosen = CALIBRATION if arguments.calibration else NETS
    if unknown := set(arguments.nets or ()) - set(chosen):
        parser.error(f"--nets: {sorted(unknown)} are not known; known are {list(chosen)}")
    file = arguments.out / ("calibration.json" if arguments.calibration else "verdicts.json")
    earlier: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    nets: dict[str, Any] = earlier.get("nets", {})
    trained_on = earlier["hardware"] if arguments.verdicts_only and earlier else hardware()
    data = split()
    for name in arguments.nets or chosen:
        row = nets.get(name, {})
        if "accuracy" not in row and arguments.verdicts_only:
            continue
        if "verdict" not in row or arguments.verdicts_only:
            row = {**row, **verdict(name, data[0])}
        if "accuracy" not in row:
            row = {**row, **training(name, data)}
        nets[name] = row
        document = {"hardware": trained_on, "nets": {known: nets[known] for known in chosen if known in nets}}
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(document, indent=1) + "\n")
        print(f"{name}: {row['verdict']} {row['findings']} {row['accuracy']}", flush=True)
    page, text = ("CALIBRATION.md", calibration) if arguments.calibration else ("README.md", readme)
    write_atomically(arguments.out / page, text(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
