"""What the loader adds to decoding: its throughput on JPEGs beside a bare loop that decodes and crops.

``python -m benchmarks.loader FOLDER [--quick] [--out results/loader]`` writes ``loader.json`` and ``README.md``;
FOLDER holds class folders of images (``../shared/data/imagenet-sample`` by default).

Both read the same files in the same processes' number and make 224×224 uint8 inception crops by bicubic
interpolation. The bare loop opens each file with Pillow, converts to RGB, crops with torchvision's transform and
puts the pixels into a batch; with workers it runs in that many processes, each on its part of the files, and gives
nothing back but a count. The loader does what training needs besides: a permutation and draws from
(seed, epoch, image), checks for damage, EXIF orientation, labels, and the way of each batch into the training
process. The rounds are A B, A B, …, a pass over all images each; ratios are taken within a round. Where the bare loop
does not itself grow with the workers, other programs had the cores: such a row is marked, and shows nothing.

Sets in memory have no decoding; there the cost is that of a batch: rows of one tensor, then shift, flip and mixing
in one go. It is measured at CIFAR's shape, 128 images of 32×32, against a training step of 100 ms.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from normfree.benchmark import hardware, interleaved, ratios, shown, spread
from normfree.data import Augmentation, AugmentationConfig, DataConfig, TrainingData, open_training
from normfree.data.pipeline import Pixels
from normfree.signal import write_atomically

FOLDER = Path("../shared/data/imagenet-sample")
SIZE, BATCH, ROUNDS = 224, 50, 7
WORKERS = (0, 2)
TARGET = 0.9
FREE = 0.8
"""Of the workers, as many times as fast as one process the bare loop must be for its row to count."""
STEP, SHARE = 100.0, 3.0
"""Milliseconds of a training step that a batch from memory is held against, and the percentage it may cost."""
VARIED = {
    "standardized only": AugmentationConfig(crop="none", flip=False),
    "shift and flip": AugmentationConfig(crop="shift"),
    "shift, flip, MixUp and CutMix": AugmentationConfig(crop="shift", mixup=0.2, cutmix=1.0),
}


def bare(files: Sequence[str]) -> int:
    """Decode and crop files into batches; return how many images."""
    crop = v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC)
    for first in range(0, len(files), BATCH):
        pixels = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
        for place, file in enumerate(files[first : first + BATCH]):
            with Image.open(file) as image:
                pixels[place] = np.asarray(crop(image.convert("RGB")))
        torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return len(files)


def loaded(data: TrainingData) -> int:
    """One epoch of the loader; return how many images."""
    return sum(len(images) for images, _ in data)


def measured(config: DataConfig, files: list[str], workers: int, rounds: int) -> dict[str, Any]:
    """Throughput of both with so many workers, the pool and the loader's workers being there already."""
    data = open_training(replace(config, workers=workers))
    if workers:
        parts = [files[first::workers] for first in range(workers)]
        with get_context("fork").Pool(workers) as pool:
            calls = {"bare": partial(pool.map, bare, parts, 1), "loader": partial(loaded, data)}
            return _in_turns(calls, len(files), rounds)
    return _in_turns({"bare": partial(bare, files), "loader": partial(loaded, data)}, len(files), rounds)


def _in_turns(calls: dict[str, Any], images: int, rounds: int) -> dict[str, Any]:
    for call in calls.values():
        call()
    times = interleaved(calls, rounds=rounds)
    rates = {name: spread([images / seconds for seconds in values]) for name, values in times.items()}
    share = ratios(times["bare"], times["loader"])
    return {"images_per_second": rates, "ratio": spread(share), "raw_seconds": times}


def from_memory(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a batch from memory, by augmentation, ten batches a round."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10_000, 32, 32, 3), generator=draws, dtype=torch.uint8)
    pixels = Pixels(images, torch.arange(10_000) % 10, tuple("0123456789"))
    batches = torch.randperm(10_000, generator=draws)[:1280].view(10, 128).tolist()

    def ten(augmentation: Augmentation) -> None:
        for step, indices in enumerate(batches):
            augmentation(*pixels.batch(indices), step=step)

    half = (0.5, 0.5, 0.5)
    calls = {
        name: partial(ten, Augmentation(config, mean=half, std=half, num_classes=10)) for name, config in VARIED.items()
    }
    for call in calls.values():
        call()
    times = interleaved(calls, rounds=rounds)
    return {name: spread([100 * seconds for seconds in values]) for name, values in times.items()}


def verdict(found: dict[str, Any], workers: str) -> str:
    """Whether the ratio meets the target, or that the cores were not free."""
    alone, together = (found[count]["images_per_second"]["bare"]["median"] for count in ("0", workers))
    if together < FREE * max(int(workers), 1) * alone:
        return f"void: the bare loop is only {together / alone:.2f} times as fast as in one process"
    return "met" if found[workers]["ratio"]["median"] >= TARGET else "missed"


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = result["hardware"]
    lines = [
        "# What the loader adds to decoding",
        "",
        f"{where['cpu']}, {where['cores']} cores, load {where['load'][0]:.2f} at the start; Python {where['python']}, "
        f"torch {where['torch']}, torchvision {where['torchvision']}. {result['images']} JPEGs, inception crops of "
        f"{SIZE}×{SIZE}, {result['rounds']} interleaved passes, median (quartiles). "
        f"Target: a ratio of at least {TARGET}.",
        "",
        "| workers | bare loop, images/s | loader, images/s | loader / bare | target |",
        "|---|---|---|---|---|",
    ]
    for workers, found in result["workers"].items():
        rates = (shown(found["images_per_second"][name], 0) for name in ("bare", "loader"))
        met = verdict(result["workers"], workers)
        lines.append(f"| {workers} | {' | '.join(rates)} | {shown(found['ratio'])} | {met} |")
    lines += [
        "",
        f"A batch of 128 images of 32×32 from memory; target: shift and flip below {SHARE:g} % of a step of "
        f"{STEP:g} ms, the numbers being milliseconds and per cent at once.",
        "",
        "| augmentation | ms a batch | target |",
        "|---|---|---|",
    ]
    for name, found in result["from_memory"].items():
        met = "met" if found["median"] < SHARE * STEP / 100 else "missed"
        lines.append(f"| {name} | {shown(found, 2)} | {met} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure with each number of workers, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="class folders of images")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("results/loader"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = DataConfig(source=str(options.folder), batch_size=BATCH, image_size=SIZE, in_memory=False)
    files = sorted(str(file) for file in options.folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    rounds = 2 if options.quick else ROUNDS
    files = files[: len(files) // BATCH * BATCH]
    load = list(os.getloadavg())
    result = {
        "quick": options.quick,
        "hardware": {**hardware(), "load": load},
        "images": len(files),
        "rounds": rounds,
        "workers": {str(workers): measured(config, files, workers, rounds) for workers in WORKERS},
        "from_memory": from_memory(rounds * 3),
    }
    write_atomically(options.out / "loader.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
