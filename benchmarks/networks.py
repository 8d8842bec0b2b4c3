"""Our networks beside torchvision's, timm's and their own limit: time and memory, training and inference.

``python -m benchmarks.networks [--set cpu|gpu] [--only PATTERN] [--quick] [--out DIR]`` writes a file of JSON per
comparison, raw times included, and a table, ``README.md``. Each comparison runs in a process of its own, all its
contenders in turns, and is written as soon as it is done; one that fails or takes too long costs no other. Without
``--out`` the results go to ``$OUT`` if that is set, else to ``results/<machine>``.

The *limit* of a network is the same graph with plain convolutions and activations only: no normalizer, no
standardization, no factor, the same biases.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.sets import SETS, Comparisons, quick
from normfree.benchmark import Part, machine_name, markdown, measure
from normfree.signal import write_atomically


def run_all(comparisons: Comparisons, options: argparse.Namespace, out: Path) -> int:
    """Run the parts one after the other, the table anew after each; return how many are missing."""
    start, missing = time.monotonic(), {}
    for part in comparisons.parts:
        if not fnmatch.fnmatch(part.name, options.only):
            continue
        (out / f"{part.name}.json").unlink(missing_ok=True)
        left = comparisons.total_limit - (time.monotonic() - start)
        reason = "no time was left"
        if left > 0:
            run = run_together if options.quick else run_apart
            reason = run(part, options, out, min(left, comparisons.part_limit))
        if reason:
            missing[part.name] = reason
        print(f"{part.name}: {reason or 'done'}, {time.monotonic() - start:.0f} s since the start", flush=True)
        write_page(comparisons, out, missing)
    write_page(comparisons, out, missing)  # also where nothing was to be measured anew
    return len(missing)


def run_apart(part: Part, options: argparse.Namespace, out: Path, limit: float) -> str:
    """Run one part in a process of its own; return why it failed, or nothing."""
    words = ["--set", options.set, "--device", options.device, "--part", part.name, "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.networks", *words]
    try:
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"given up after {limit:.0f} s"
    if finished.returncode == 0:
        return ""
    return (finished.stderr.strip().splitlines() or [f"it ended with code {finished.returncode}"])[-1]


def run_together(part: Part, options: argparse.Namespace, out: Path, limit: float) -> str:
    """Run one part in this process, where a rehearsal has no need of another; as ``run_apart``."""
    try:
        run_here(part, options, out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_here(part: Part, options: argparse.Namespace, out: Path) -> None:
    """Measure one part in this process and write its file."""
    result = measure(part, device=options.device, lenient=True)
    result["quick"] = options.quick
    write_atomically(out / f"{part.name}.json", json.dumps(result, indent=1) + "\n")
    print(f"{part.name}: {_verdict(result)}", flush=True)


def write_page(comparisons: Comparisons, out: Path, missing: dict[str, str]) -> None:
    """Write the table of all parts that have been measured, and what is missing."""
    results = [
        json.loads(file.read_text()) for part in comparisons.parts if (file := out / f"{part.name}.json").exists()
    ]
    if not results:
        return
    page = markdown(results, comparisons.title, comparisons.remarks)
    if missing:
        listed = "\n".join(f"- {name}: {reason}" for name, reason in missing.items())
        page += f"\n## Not measured\n\n{listed}\n"
    write_atomically(out / "README.md", page)


def _verdict(result: dict[str, Any]) -> str:
    """How many targets are met, in words."""
    met = [target["met"] for target in result["targets"]]
    return f"{met.count(True)} of {len(met)} targets met"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, the device and the folder of results decided."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--set", choices=sorted(SETS), default="cpu")
    parser.add_argument("--device", help="where to run; the set's own by default", default="")
    parser.add_argument("--only", default="*", help="shell pattern of parts, such as 'resnet50-*'")
    parser.add_argument("--part", default="", help="run this part in this process")
    parser.add_argument("--quick", action="store_true", help="small networks, one round: does it run at all?")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    options.device = options.device or {"cpu": "cpu", "gpu": "cuda"}[options.set]
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("benchmarks.networks: there is no GPU here; give --device cpu to rehearse")
    default = os.environ.get("OUT") or Path("results") / machine_name(options.device)
    options.out = options.out or Path(default)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a set, or one part of it; return 0 if all of it was measured."""
    options = parsed(arguments)
    comparisons = SETS[options.set]()
    if options.part:
        run_here(next(part for part in comparisons.parts if part.name == options.part), options, options.out)
        return 0
    return 1 if run_all(quick(comparisons) if options.quick else comparisons, options, options.out) else 0


if __name__ == "__main__" and (code := main()):
    sys.exit(code)
