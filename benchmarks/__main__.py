"""``python -m benchmarks``: run every benchmark, or the one named first."""

from __future__ import annotations

import runpy
import sys

BENCHMARKS = (
    "faults",
    "finetune",
    "half_precision",
    "loader",
    "loop_overhead",
    "networks",
    "recompute",
    "spp_cost",
    "step_profile",
    "sweep",
    "verdicts",
)

if __name__ == "__main__":
    named = sys.argv[1:2]
    if named and named[0] not in BENCHMARKS:
        sys.exit(f"benchmarks: {named[0]!r} is not known; choose one of {', '.join(BENCHMARKS)}")
    for benchmark in named or BENCHMARKS:
        sys.argv = [f"benchmarks.{benchmark}", *sys.argv[2:]]
        runpy.run_module(f"benchmarks.{benchmark}", run_name="__main__")
