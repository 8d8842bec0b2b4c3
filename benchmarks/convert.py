"""Convert every architecture at hand, and check what the conversion promises.

``python -m benchmarks.convert [--only PATTERN ...] [--out results/convert] [--fresh] [--workers 2] [--steps 200]
[--device cpu]`` writes ``models.json`` and a table, ``README.md``. Each model runs in a process of its own, and models
already in ``models.json`` are kept, so that an interrupted run goes on, on this machine or another: each row says where
it was measured.

For each model: the *fresh* conversion, what normalizers it leaves, its signal on gaussian images and on photographs,
whether an example's output depends on another; the *pretrained* conversion, against the original with randomised
statistics; and training on scikit-learn's digits. The converted model and the one with its norms simply deleted get the
same recipe (SGD, momentum 0.9, batches of 16 images of 32 pixels, 50 steps of warm-up and a cosine to zero, the norm of
the gradient clipped to 1, 10-way classifiers) and the same learning rate: doubled from 0.4 until the deleted model
fails, then found by bisection, so that one of the two trains and the other does not. A run *trains* if its loss ends
below half of chance (ln 10). If not, it *diverges* where it ends above its beginning and chance, was ever above twice
both, or ceased to be finite; else it *learns nothing* (within 5 % of chance) or *little*. Where the converted model
trains at no rate, both are trained with Adam in place of SGD, at 0.01, 0.003, 0.001, 0.0003 and 0.0001, until one tells
them apart. What is trained is converted on 32 of its own images with ``beta="measured"``; the other columns take the
closed forms.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from math import inf
from pathlib import Path
from typing import Any

import torch

from benchmarks.convert_checks import checked, is_trained
from benchmarks.convert_training import trained
from benchmarks.pool import at_once
from benchmarks.rows import page, run_apart, stored_rows, where_measured
from normfree.benchmark import hardware, versions
from normfree.signal import write_atomically

CLASSIFIERS = """
resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d wide_resnet50_2
wide_resnet101_2 regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf
mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 efficientnet_b0
efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7
efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l convnext_tiny convnext_small convnext_base convnext_large
densenet121 densenet161 densenet169 densenet201 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
shufflenet_v2_x2_0 googlenet inception_v3 maxvit_t swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b vit_b_16
vit_b_32 vit_l_16 vit_l_32 vit_h_14
"""

SEGMENTERS = """
fcn_resnet50 fcn_resnet101 deeplabv3_resnet50 deeplabv3_resnet101 deeplabv3_mobilenet_v3_large
lraspp_mobilenet_v3_large
"""

DETECTORS = """
fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_fpn
fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn retinanet_resnet50_fpn retinanet_resnet50_fpn_v2
maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn ssdlite320_mobilenet_v3_large
"""

TIMM = """
resnet26 resnet26d seresnet18 ecaresnext26t_32x4d skresnet18 resnet50_clip resnetblur18 res2net50_14w_8s resnest14d
resnetv2_50 resnetv2_50d_gn resnetv2_50x1_bit regnetz_b16 botnet26t_256 halonet26t lambda_resnet26t repvgg_a0
mobileone_s0 convmixer_768_32 convnext_atto convnextv2_atto cs3darknet_s cspresnet50 darknet53 densenet121 dla34 dpn68
efficientnet_b0 tf_efficientnetv2_b0 mobilenetv1_100 mobilenetv2_050 mixnet_s mobilenetv4_conv_small_035 lcnet_050
efficientvit_b0 fastvit_t8 fasternet_t0 ghostnet_050 hgnetv2_b0 hrnet_w18_small inception_next_atto inception_resnet_v2
inception_v4 mobilevit_xxs poolformer_s12 rdnet_tiny repghostnet_050 repvit_m1 rexnet_100 selecsls42b starnet_s1
tresnet_m ese_vovnet19b_slim_dw vovnet39a xception41 xception41p
"""

PATIENCE = 10800
"""Seconds for one part of one model."""


def names() -> list[str]:
    """Every model of the table, as ``library:name``."""
    torchvision = (CLASSIFIERS + SEGMENTERS + DETECTORS).split()
    return [f"torchvision:{name}" for name in torchvision] + [f"timm:{name}" for name in TIMM.split()]


def apart(part: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a part (``check`` or ``train``) says of a model, in a process of its own; or why it was "aborted"."""
    arguments = [f"--{part}", name, "--steps", str(options.steps), "--device", options.device]
    return run_apart("benchmarks.convert", arguments, PATIENCE)


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown page: totals, then one line a model, then where which was measured."""
    good = [row for row in rows if "changes" in row]
    whole = [row for row in good if not row["norms_left"]]
    runs = [row["training"] for row in good if "converted" in row.get("training", {})]
    told_apart = [run for run in runs if _tells_apart(run)]
    again = {row["model"]: row["training"]["adam"] for row in good if "adam" in row.get("training", {})}
    kept = [row for row in good if row["pretrained"] is not None]
    totals = {
        "models": f"{len(rows)} of {len(names())}",
        "converted": len(good),
        "of these without any norm left": len(whole),
        "healthy on gaussian images / on photographs": f"{_count(good, 'gaussian')} / {_count(good, 'photos')}",
        "no example sees another": sum(row["leak"] == 0 for row in good),
        "trained": len(runs),
        "of these, a rate was found where the converted model trains and the norm-deleted one does not": len(
            told_apart
        ),
        "the same with Adam, of those that do not train with SGD": (
            f"{sum(map(_tells_apart, again.values()))} of {len(again)}"
        ),
        "with SGD, the norm-deleted model diverges / learns little / learns nothing": " / ".join(
            str(sum(run["deleted"]["outcome"] == how for run in told_apart))
            for how in ("diverges", "learns little", "learns nothing")
        ),
        "of all trained, the converted model ends at the lower loss at the rate found": sum(
            _last(run["converted"]) < _last(run["deleted"]) for run in runs
        ),
        "pretrained conversions within 1e-4": f"{sum(row['pretrained'] < 1e-4 for row in kept)} of {len(kept)}",
    }
    lines = [
        "# Every architecture, converted",
        "",
        *__doc__.strip().splitlines()[2:],
        "",
        "Not trained: models above 150 million parameters, of a fixed large image size, or that keep more than a tenth "
        "of their norms (they stand between linear and attention layers); `–` marks what was not run.",
        "",
        "| total | |",
        "|---|---|",
        *(f"| {what} | {number} |" for what, number in totals.items()),
        "",
        "| model | M param. | px | norms: before, left | unscaled branches | gaussian | photos | leak "
        "| pretrained error | rate | norms deleted: loss | converted: loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += map(_line, rows)
    for name, run in again.items():
        lines += [
            "",
            f"With Adam: `{name}`, rate {run['rate']:.2g}, norms deleted {_course(run['deleted'])}, "
            f"converted {_course(run['converted'])}.",
        ]
    done = {row["model"] for row in rows}
    waiting = {
        "Not run yet": [name for name in names() if name not in done],
        "Not trained yet": [row["model"] for row in rows if is_trained(row) and _is_untrained(row)],
    }
    for what, missing in waiting.items():
        if missing:
            lines += ["", f"{what}: {', '.join(f'`{name}`' for name in missing)}."]
    lines += ["", "## Where", ""]
    trainings = [{"model": row["model"]} | row["training"] for row in rows if "training" in row]
    lines += [*where_measured("Checked", rows), *where_measured("Trained", trainings)]
    return "\n".join(lines) + "\n"


def _is_untrained(row: dict[str, Any]) -> bool:
    return "converted" not in row.get("training", {})


def _tells_apart(run: dict[str, Any]) -> bool:
    """Whether the converted model trains where the one with its norms deleted does not."""
    return run["converted"]["outcome"] == "trains" != run["deleted"]["outcome"]


def _last(run: dict[str, Any]) -> float:
    """The loss a training ended with."""
    return inf if run["loss"][1] is None else run["loss"][1]


def _line(row: dict[str, Any]) -> str:
    if "changes" not in row:
        return f"| {row['model']} | {row.get('failure', row.get('aborted'))} |" + " |" * 10
    training = row.get("training", {})
    cells = [
        row["model"],
        row["millions"],
        row["image_size"],
        f"{row['norms']}, {row['norms_left'] or '0'}",
        row["unscaled"] or "0",
        _health(row["gaussian"]),
        _health(row["photos"]),
        "none" if row["leak"] == 0 else f"{row['leak']:.1e}",
        f"{row['pretrained']:.1e}" if row["pretrained"] is not None else row["not_pretrained"],
        f"{training['rate']:.2g}" if "rate" in training else training.get("aborted", "–"),
        _course(training.get("deleted")),
        _course(training.get("converted")),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _course(run: dict[str, Any] | None) -> str:
    """How a training went: the loss it began and ended with, and what that means where it did not train."""
    if run is None:
        return "–"
    first, last = ("inf" if loss is None else f"{loss:.2f}" for loss in run["loss"])
    if run["outcome"] == "trains":
        return f"{first} → {last}"
    peak = "" if run["peak"] is None or run["outcome"] != "diverges" else f" (peak {run['peak']:.1f})"
    return f"{first} → {last}, {run['outcome']}{peak}"


def _health(kinds: list[str] | None) -> str:
    if kinds is None:
        return "–"
    return ", ".join(kinds) or "healthy"


def _count(rows: list[dict[str, Any]], probe: str) -> int:
    return sum(row[probe] == [] for row in rows)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], help="shell patterns of names, such as 'timm:res*'")
    parser.add_argument("--out", type=Path, default=Path("results/convert"))
    parser.add_argument("--fresh", action="store_true", help="measure again those of --only that models.json has")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, of one thread each")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--device", default="cpu", help="to train on, such as cuda")
    parser.add_argument("--check", help="check one model in this process, and print its row")
    parser.add_argument("--train", help="train one model in this process, and print how it went")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.check or options.train:
        warnings.filterwarnings("ignore")
        done = checked(options.check) if options.check else trained(options.train, options.steps, options.device)
        say(json.dumps(done))
        return
    _run_all(options, say)


def _run_all(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Check every model that was not, then train those small enough, the smallest first."""
    path, cpu = options.out / "models.json", {key: value for key, value in hardware().items() if key != "gpu"}
    here = {"check": versions(cpu), "train": versions(cpu if options.device == "cpu" else hardware())}
    before = stored_rows(path)
    asked = [name for name in names() if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    again = set(asked) if options.fresh else set[str]()
    rows = {row["model"]: row for row in before if row["model"] not in again}

    def write(name: str) -> None:
        say(_line(rows[name]))
        ordered = [rows[each] for each in names() if each in rows]
        write_atomically(path, page(ordered))
        write_atomically(options.out / "README.md", table(ordered))

    with at_once(options.workers) as pool:

        def each(part: str, waiting: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
            runs = {pool.submit(apart, part, name, options): name for name in waiting}
            return ((runs[run], run.result()) for run in as_completed(runs))

        for name, row in each("check", [name for name in asked if "aborted" in rows.get(name, {"aborted": ""})]):
            rows[name] = {"model": name, "machine": here["check"]} | row
            write(name)
        waiting = [name for name in asked if is_trained(rows[name]) and _is_untrained(rows[name])]
        for name, run in each("train", sorted(waiting, key=lambda name: rows[name]["millions"])):
            rows[name]["training"] = {"machine": here["train"]} | run
            write(name)


if __name__ == "__main__":
    main()
