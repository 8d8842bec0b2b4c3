"""What keeping one tensor for an activation and its convolution saves, and what computing the other again costs.

``python -m benchmarks.recompute [--quick] [--out results/recompute]`` writes ``recompute.json`` and ``README.md``.

A training step (forward, sum of the logits, backward) of each network, twice: as it is, and with the notes of
``normfree.nn.recompute`` switched off, so that autograd keeps what it keeps. The two take turns in one process and
swap places each round; ratios are taken within a round. Memory is the storage of all tensors saved for the backward
pass, parameters aside, and the peak of a step beyond what is there before it, gradients included, as the allocator
reports it; time is the processor time of one thread, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from normfree.benchmark import hardware, peak_bytes
from normfree.models import create_model
from normfree.nn import padding, recompute
from normfree.signal import write_atomically

MODELS = {"nf_regnet_b0": "SiLU", "nfnet_f0": "GELU"}
SHAPE, QUICK_SHAPE = (16, 3, 128, 128), (2, 3, 64, 64)
ROUNDS, QUICK_ROUNDS = 15, 2


@contextmanager
def keeping() -> Iterator[None]:
    """Switch the notes off: nothing has a known origin."""
    with (
        mock.patch.object(recompute, "origin_of", return_value=None),
        mock.patch.object(padding, "origin_of", return_value=None),
    ):
        yield


def step(model: nn.Module, x: Tensor) -> float:
    """Processor seconds of a training step."""
    start = time.process_time()
    model(x).sum().backward()
    seconds = time.process_time() - start
    model.zero_grad()
    return seconds


def saved_mebibytes(model: nn.Module, x: Tensor) -> float:
    """The storage of what a forward pass keeps, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters) / 2**20


def measured(name: str, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One network, both ways."""
    torch.manual_seed(0)
    channels_last: dict[str, Any] = {"memory_format": torch.channels_last}
    model, x = create_model(name).to(**channels_last), torch.randn(shape).to(**channels_last)
    ways = {"recomputed": nullcontext, "kept": keeping}
    memory, peaks, seconds = {}, {}, {way: [] for way in ways}
    for way, context in ways.items():
        with context():
            memory[way] = saved_mebibytes(model, x)
            step(model, x)
            peaks[way] = peak_bytes(lambda: step(model, x)) / 2**20
    for turn in range(rounds):
        for way in sorted(ways, reverse=turn % 2 == 1):
            with ways[way]():
                seconds[way].append(step(model, x))
    ratios = [one / other for one, other in zip(seconds["recomputed"], seconds["kept"], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    return {
        "mebibytes": memory,
        "peak_mebibytes": peaks,
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "time_ratio": {"q1": first, "median": median, "q3": third},
    }


def _sizes(memory: dict[str, float]) -> str:
    both, one = memory["kept"], memory["recomputed"]
    return f"{both:.0f} | {one:.0f} | {one / both:.2f}"


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = result["hardware"]
    lines = [
        "# One tensor for an activation and its convolution",
        "",
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores; Python {where['python']}, torch "
        f"{where['torch']}. A training step, float32, channels last, {'×'.join(map(str, result['shape']))}; "
        f"{result['rounds']} interleaved rounds, processor time, median ratio (quartiles).",
        "",
        "| | saved for the backward pass, MiB: both tensors | one | ratio | peak of the step, MiB: both | one | ratio "
        "| step: both, s | one, s | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["models"].items():
        seconds, ratio = found["seconds"], found["time_ratio"]
        lines.append(
            f"| {name} ({MODELS[name]}) | {_sizes(found['mebibytes'])} | {_sizes(found['peak_mebibytes'])} | "
            f"{seconds['kept']:.2f} | {seconds['recomputed']:.2f} | "
            f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both networks, and write what came out."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small input and few rounds: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("results/recompute"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other spend processor time, too
    shape, rounds = (QUICK_SHAPE, QUICK_ROUNDS) if options.quick else (SHAPE, ROUNDS)
    models = {name: measured(name, shape, rounds) for name in MODELS}
    result = {"quick": options.quick, "hardware": hardware(), "shape": shape, "rounds": rounds, "models": models}
    write_atomically(options.out / "recompute.json", json.dumps(result, indent=1) + "\n")
    write_atomically(options.out / "README.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
