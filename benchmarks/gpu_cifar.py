"""The ``cifar`` recipe at full length on one GPU: NF and BatchNorm twins of 50 layers, three seeds each.

``python -m benchmarks.gpu_cifar --data DIR [--quick] [--minutes 9] [--out results/gpu_cifar]`` writes
``gpu_cifar.json`` and ``README.md`` (into $OUT where that is set). DIR holds CIFAR-10 as train.parquet and
test.parquet. It needs torch, torchvision, numpy, pandas and pyarrow alone, so that it runs on a bare GPU machine.

Everything but the network is the recipe's: optimizer, schedule, weight decay, batch, augmentation. All images lie on
the GPU and are shifted and flipped there; the networks are compiled, in bf16 under autocast, channels last. What is
measured: test accuracy after the last epoch, seconds of training without compilation and evaluation, peak memory of
training. Twins and seeds take turns, so that a drift of the machine hits both alike. What does not fit the minutes is
left out and said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfree.benchmark import hardware
from normfree.models import create_model
from normfree.optim import AdaptiveGradientClipping, nesterov_sgd, warmup_cosine
from normfree.signal import write_atomically
from normfree.train.recipes import cifar

SEEDS = (0, 1, 2)
TWINS = {
    "NF-ResNet-50": "nf_resnet50:stem=cifar,width=1,alpha=0.5,skipinit_gain=1,drop_rate=0,stochdepth_rate=0",
    "BN-ResNet-50": "resnetv2_50:stem=cifar,width=1,drop_rate=0,stochdepth_rate=0",
}
"""Blocks 3 4 6 3, stages of 64, 128, 256 and 512 channels, a 3x3 stem."""

RESERVE = 20.0
"""Seconds kept for writing the results."""


def read(folder: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Decode one parquet file: uint8 images [N, 3, 32, 32] and labels [N]."""
    import pandas
    from PIL import Image

    (file,) = sorted(folder.glob(f"*{split}*.parquet"))[:1] or [folder / f"{split}.parquet"]
    frame = pandas.read_parquet(file).iloc[:limit]
    images, labels = (next(name for name in names if name in frame) for names in (("image", "img"), ("label", "fine")))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in frame[images]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(frame[labels].to_numpy())


@dataclasses.dataclass
class Resident:
    """A data set on the device, standardized by its training images."""

    images: Tensor
    labels: Tensor
    tests: Tensor
    test_labels: Tensor

    @classmethod
    def opened(cls, folder: Path, device: torch.device, limit: int | None) -> Resident:
        """Read both splits and move them."""
        images, labels = (tensor.to(device) for tensor in read(folder, "train", limit))
        tests, test_labels = (tensor.to(device) for tensor in read(folder, "test", limit))
        values = images.float().div_(255)
        mean, std = values.mean((0, 2, 3), keepdim=True), values.std((0, 2, 3), keepdim=True)
        del values

        def standardized(pixels: Tensor) -> Tensor:
            return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

        return cls(standardized(images), labels, standardized(tests), test_labels)

    def batches(self, size: int, shift: int, generator: torch.Generator) -> Any:
        """One epoch: shuffled, shifted over a border of zeros, half of it mirrored."""
        device = self.images.device
        order = torch.randperm(len(self.images), generator=generator, device=device)
        padded = nn.functional.pad(self.images, (shift,) * 4)
        span = torch.arange(self.images.shape[-1], device=device)
        for first in range(0, len(order) - size + 1, size):
            chosen = order[first : first + size]
            moved = torch.randint(0, 2 * shift + 1, (2, size), generator=generator, device=device)
            columns = torch.where(torch.rand(size, 1, generator=generator, device=device) < 0.5, span, span.flip(0))
            rows = (span + moved[0][:, None])[:, :, None]
            columns = (columns + moved[1][:, None])[:, None, :]
            batch = padded[chosen[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
            yield batch, self.labels[chosen]


def built(model: str, device: torch.device, compiled: bool) -> tuple[nn.Module, nn.Module]:
    """The network, and what trains it."""
    from normfree.models.overrides import parse_overrides

    name, _, overrides = model.partition(":")
    network = create_model(name, num_classes=10, **parse_overrides(overrides)).to(device)
    network = network.to(memory_format=torch.channels_last)
    return network, torch.compile(network) if compiled else network  # type: ignore[return-value]


def trained(model: str, data: Resident, seed: int, epochs: int, compiled: bool) -> dict[str, Any]:
    """Train one network; its accuracy, time, memory and curve."""
    recipe = cifar()
    device = data.images.device
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    network, stepping = built(model, device, compiled)
    size = min(recipe.batch_size, len(data.images))
    steps = epochs * (len(data.images) // size)
    config = recipe.optimizer
    peak = config.peak(size)
    optimizer: torch.optim.Optimizer = nesterov_sgd(network, peak, weight_decay=config.weight_decay, foreach=True)
    if config.clip_factor is not None:
        optimizer = AdaptiveGradientClipping(optimizer, network, config.clip_factor, config.clip_eps)
    warmup = min(steps, round(config.warmup_epochs * (len(data.images) // size)))
    schedule = warmup_cosine(optimizer, steps=steps, warmup_steps=warmup, final_lr=config.final_learning_rate)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    warmed = _compiled_seconds(stepping, optimizer, criterion, data, size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    curve, seconds = [], 0.0
    for _ in range(epochs):
        network.train()
        started, losses = time.perf_counter(), []
        for images, labels in data.batches(size, recipe.data.augmentation.shift, generator):
            with torch.autocast(device.type, torch.bfloat16):
                loss = criterion(stepping(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        curve.append(torch.stack(losses).mean().item())  # waits for the device
        seconds += time.perf_counter() - started
    peak_memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracy(network, data),
        "seconds": seconds,
        "compile_seconds": warmed,
        "peak_mebibytes": None if peak_memory is None else peak_memory / 2**20,
        "loss": curve,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _compiled_seconds(
    stepping: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, data: Resident, size: int, device: Any
) -> float:
    """Compile by one forward and backward pass that changes nothing of the weights."""
    started = time.perf_counter()
    buffers = [(buffer, buffer.clone()) for buffer in stepping.buffers()]
    with torch.autocast(device.type, torch.bfloat16):
        criterion(stepping(data.images[:size]), data.labels[:size]).backward()
    optimizer.zero_grad()
    for buffer, before in buffers:
        buffer.copy_(before)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def accuracy(network: nn.Module, data: Resident) -> float:
    """Share of the test images that are recognised."""
    network.eval()
    correct = 0
    with torch.no_grad(), torch.autocast(data.tests.device.type, torch.bfloat16):
        for images, labels in zip(data.tests.split(1000), data.test_labels.split(1000), strict=True):
            correct += int((network(images).argmax(1) == labels).sum())
    return correct / len(data.tests)


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = result["hardware"]
    lines = [
        "# CIFAR-10 at full length on one GPU",
        "",
        f"{where.get('gpu', where['cpu'])}, torch {where['torch']}; the `cifar` recipe, {result['epochs']} epochs, "
        f"batch {result['batch_size']}, bf16, {'compiled' if result['compiled'] else 'not compiled'}; median (least to "
        "most) over the seeds.",
        "",
        "| network | seeds | test accuracy, % | seconds of training | peak memory, MiB | final training loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in result["networks"].items():
        if not runs:
            lines.append(f"| {name} | 0 | – | – | – | – |")
            continue
        cells = [_shown([100 * run["accuracy"] for run in runs], 2), _shown([run["seconds"] for run in runs], 1)]
        memory = [run["peak_mebibytes"] for run in runs if run["peak_mebibytes"] is not None]
        cells += [_shown(memory, 0) if memory else "–", _shown([run["loss"][-1] for run in runs], 4)]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    lines += ["", f"Left out for want of time: {', '.join(result['left_out']) or 'nothing'}."]
    return "\n".join(lines) + "\n"


def _shown(values: list[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return "not finite"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Train them all, and write what came out after each run: an interruption loses one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--quick", action="store_true", help="512 images, one epoch, not compiled: does it run?")
    parser.add_argument("--minutes", type=float, default=9, help="all of it, reading and compiling too")
    parser.add_argument("--epochs", type=int, default=None, help="the recipe's by default")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "results/gpu_cifar"))
    options = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    epochs = 1 if options.quick else options.epochs or cifar().epochs
    data = Resident.opened(options.data, device, 512 if options.quick else None)
    result: dict[str, Any] = {
        "quick": options.quick,
        "hardware": hardware(),
        "epochs": epochs,
        "batch_size": cifar().batch_size,
        "compiled": not options.quick,
        "models": TWINS,
        "networks": {name: [] for name in TWINS},
        "left_out": [],
    }
    longest = 0.0
    for seed in SEEDS[:1] if options.quick else SEEDS:
        for name, model in TWINS.items():
            started = time.perf_counter()
            if started - began + longest + RESERVE > 60 * options.minutes:
                result["left_out"].append(f"{name} with seed {seed}")
                continue
            run = trained(model, data, seed, epochs, not options.quick)
            longest = max(longest, time.perf_counter() - started)
            result["networks"][name].append(run)
            print(f"{name} seed {seed}: {100 * run['accuracy']:.2f} % in {run['seconds']:.1f} s", flush=True)
            write_atomically(options.out / "gpu_cifar.json", json.dumps(result, indent=1) + "\n")
            write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
