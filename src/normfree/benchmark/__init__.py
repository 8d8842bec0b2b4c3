"""Models side by side, and beside their limit: time and memory of a training step and of inference."""

from normfree.benchmark.contender import Contender
from normfree.benchmark.limit import limit
from normfree.benchmark.machine import hardware, machine_name
from normfree.benchmark.part import Part, Target
from normfree.benchmark.running import measure
from normfree.benchmark.tables import markdown
from normfree.benchmark.timing import Clock, interleaved, ratios, seconds, shown, spread

__all__ = [
    "Clock",
    "Contender",
    "Part",
    "Target",
    "hardware",
    "interleaved",
    "limit",
    "machine_name",
    "markdown",
    "measure",
    "ratios",
    "seconds",
    "shown",
    "spread",
]
