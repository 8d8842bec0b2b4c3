"""What listening costs: time and memory of ``spp`` beside a plain forward pass and beside timm's hooks.

``python -m benchmarks.spp_cost [--quick] [--out results/spp_cost]`` writes ``spp_cost.json`` and ``README.md``.

Four questions, each answered in the same process or in fresh ones, interleaved:

1. Time. torchvision's ResNet-50 on 16×3×224×224 in float32 with two threads: A, a plain forward pass without
   gradients, normalizers on batch statistics; B, ``spp`` with ``gradient=False`` (preserving, findings and all); C, the
   same numbers by ``timm.utils.model.extract_spp_stats``, whose hooks are given the names of the blocks. The rounds are
   A B C, A B C, …; ratios are taken within a round, so that a drift of the machine cancels.
2. Memory. Each of the three alone in fresh processes: the peak of resident memory during the call above what the
   idle model holds (VmHWM, reset before the call), with every block above 64 KiB mapped by itself, so that what
   is freed is gone.
3. Depth. The overhead of ``spp`` per block for networks of 16 to 200 blocks: constant if the cost is linear.
4. Other networks. The time of ``spp`` without and with the gradient by that of a plain pass, in turns, for the networks
   of :mod:`benchmarks.spp_networks`: segmentation, language, volumes, detection, unrolled cells, sums of everything.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.spp_networks import NETWORKS, QUICK
from normfree.benchmark import hardware, interleaved, ratios, seconds, shown, spread
from normfree.models import create_model
from normfree.signal import spp, write_atomically

THREADS = 2
ROUNDS, MEMORY_ROUNDS, DEPTH_ROUNDS, NETWORK_ROUNDS = 21, 5, 7, 9
SHAPE = (16, 3, 224, 224)
QUICK_SHAPE = (2, 3, 64, 64)
DEPTHS = {16: "50", 33: "101", 50: "152", 66: "200", 96: "288", 200: "600"}
TARGETS = {"time": 1.10, "memory": 1.10}


def plain(model: nn.Module, x: Tensor) -> None:
    """A forward pass in the mode ``spp`` measures in."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    with torch.no_grad():
        model(x)


def listened(model: nn.Module, x: Tensor) -> None:
    """``spp`` without the gradient, which takes a forward and a backward pass more."""
    assert len(spp(model, x, gradient=False).blocks) == 16


def hooked(model: nn.Module, x: Tensor) -> None:
    """Hooks of timm, told where the blocks of this network and their last norms are; taken off afterwards."""
    from timm.utils import model as timm_model

    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = True
    functions = [timm_model.avg_sq_ch_mean, timm_model.avg_ch_var, timm_model.avg_ch_var_residual]
    with torch.no_grad():
        stats = timm_model.extract_spp_stats(model, ["layer?.?", "layer?.?", "layer?.?.bn3"], functions, list(x.shape))
    assert all(len(values) == 16 for values in stats.values())
    for module in model.modules():
        module._forward_hooks.clear()


CALLS: dict[str, Callable[[nn.Module, Tensor], None]] = {"plain": plain, "spp": listened, "timm": hooked}


def resnet50() -> nn.Module:
    """The network of the comparison, drawn anew."""
    torch.manual_seed(0)
    return torchvision.models.resnet50()


def timed(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Question 1."""
    model, x = resnet50(), torch.randn(shape)
    for call in CALLS.values():
        call(model, x)
    times = interleaved({name: partial(call, model, x) for name, call in CALLS.items()}, rounds=rounds)
    compared = {
        "spp / plain": ratios(times["spp"], times["plain"]),
        "timm / plain": ratios(times["timm"], times["plain"]),
        "spp / timm": ratios(times["spp"], times["timm"]),
    }
    return {
        "shape": list(shape),
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratios": {name: spread(values) for name, values in compared.items()},
        "raw_seconds": times,
    }


def _status(key: str) -> int:
    """A number of kibibytes in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: the memory measurement needs Linux")


def peak_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Peak of resident memory of one call above the idle process; meant for a fresh process."""
    torch.set_num_threads(THREADS)
    model, x = resnet50(), torch.randn(shape)
    CALLS[name](model, torch.randn(2, 3, 32, 32))  # loads what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    CALLS[name](model, x)
    return _status("VmHWM") - before


def in_fresh_process(name: str, shape: tuple[int, ...]) -> int:
    """``peak_bytes`` there, with memory given back to the system as soon as it is freed."""
    code = f"from benchmarks.spp_cost import peak_bytes; print(peak_bytes({name!r}, {shape!r}))"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout.split()[-1])


def remembered(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Question 2."""
    peaks: dict[str, list[float]] = {name: [] for name in CALLS}
    for _ in range(rounds):
        for name in CALLS:
            peaks[name].append(in_fresh_process(name, shape) / 2**20)
    base = statistics.median(peaks["plain"])
    return {
        "shape": list(shape),
        "rounds": rounds,
        "mebibytes": {name: spread(values) for name, values in peaks.items()},
        "ratios": {f"{name} / plain": statistics.median(peaks[name]) / base for name in ("spp", "timm")},
    }


def deepened(family: str, depths: dict[int, str], rounds: int) -> dict[str, Any]:
    """Question 3: overhead per block, in milliseconds."""
    x = torch.randn(2, 3, 32, 32)
    overhead: dict[int, list[float]] = {blocks: [] for blocks in depths}
    models = {}
    for blocks, depth in depths.items():
        torch.manual_seed(0)
        models[blocks] = create_model(f"{family}{depth}", widths=(32,) * 4, num_classes=2)
        plain(models[blocks], x), spp(models[blocks], x, gradient=False)
    for _ in range(rounds):
        for blocks, model in models.items():
            without = seconds(lambda model=model: plain(model, x))
            listening = seconds(lambda model=model: spp(model, x, gradient=False))
            overhead[blocks].append((listening - without) / blocks * 1e3)
    medians = {blocks: statistics.median(values) for blocks, values in overhead.items()}
    fewest, most = min(medians), max(medians)
    exponent = None  # of too noisy a run
    if min(medians.values()) > 0:
        exponent = 1 + math.log(medians[most] / medians[fewest]) / math.log(most / fewest)
    return {
        "input": list(x.shape),
        "milliseconds_per_block": {str(blocks): spread(values) for blocks, values in overhead.items()},
        "exponent": exponent,
    }


def compared(names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Question 4: seconds of each, and the ratios within each round."""
    rows = {}
    for name in names:
        build, draw, target = NETWORKS[name]
        torch.manual_seed(0)
        model, x = build(), draw()
        ways = {
            "plain": partial(plain, model, x),
            "spp": partial(spp, model, x, gradient=False),
            "with gradient": partial(spp, model, x),
        }
        for run in ways.values():
            run()
        times = interleaved(ways, rounds=rounds)
        rows[name] = {
            "seconds": {way: spread(values) for way, values in times.items()},
            "ratios": {way: spread(ratios(times[way], times["plain"])) for way in ways if way != "plain"},
            "target": target,
        }
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where, timing, memory = result["hardware"], result["time"], result["memory"]
    lines = [
        "# What listening costs",
        "",
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load'][0]:.2f} at the start; "
        f"Python {where['python']}, torch {where['torch']}, torchvision {where['torchvision']}, timm {where['timm']}. "
        f"torchvision ResNet-50, float32, {'×'.join(map(str, timing['shape']))}, batch statistics; "
        f"{timing['rounds']} interleaved rounds, median (quartiles).",
        "",
        "| | seconds | time / plain | peak memory, MiB | memory / plain |",
        "|---|---|---|---|---|",
    ]
    for name in CALLS:
        ratio, share = timing["ratios"].get(f"{name} / plain"), memory["ratios"].get(f"{name} / plain")
        lines.append(
            f"| {name} | {shown(timing['seconds'][name])} | {shown(ratio) if ratio else '1'} | "
            f"{memory['mebibytes'][name]['median']:.0f} | {f'{share:.3f}' if share else '1'} |"
        )
    lines += [
        "",
        f"spp / timm: {shown(timing['ratios']['spp / timm'])}. Targets: at most {TARGETS['time']:.2f} times the time "
        f"and {TARGETS['memory']:.2f} times the peak memory of the plain pass, and faster than timm's hooks.",
        "",
        "Overhead per block, milliseconds (2×3×32×32, 32 channels):",
        "",
    ]
    counts = list(next(iter(result["depth"].values()))["milliseconds_per_block"])
    lines += [f"| blocks | {' | '.join(counts)} | cost ~ blocks^ |", "|---" * (len(counts) + 2) + "|"]
    for family, found in result["depth"].items():
        cells = [f"{found['milliseconds_per_block'][count]['median']:.2f}" for count in counts]
        exponent = "–" if found["exponent"] is None else f"{found['exponent']:.2f}"
        lines.append(f"| {family}… | {' | '.join(cells)} | {exponent} |")
    lines += ["", "| other networks | plain, seconds | spp / plain | target | with the gradient / plain |"]
    lines.append("|---" * 5 + "|")
    for name, row in result["networks"].items():
        measured, backward = (shown(row["ratios"][way]) for way in ("spp", "with gradient"))
        cells = [name, shown(row["seconds"]["plain"]), measured, str(row["target"] or "linear"), backward]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small input and few rounds: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("results/spp_cost"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    shape = QUICK_SHAPE if options.quick else SHAPE
    depths = dict(list(DEPTHS.items())[:2]) if options.quick else DEPTHS
    few = 2 if options.quick else None
    result = {
        "quick": options.quick,
        "hardware": {**hardware(), "load": list(os.getloadavg())},
        "time": timed(shape, few or ROUNDS),
        "memory": remembered(shape, few or MEMORY_ROUNDS),
        "depth": {family: deepened(family, depths, few or DEPTH_ROUNDS) for family in ("nf_resnet", "resnetv2_")},
        "networks": compared(QUICK if options.quick else tuple(NETWORKS), few or NETWORK_ROUNDS),
    }
    write_atomically(options.out / "spp_cost.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
