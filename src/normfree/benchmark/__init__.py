"""Models side by side, and beside their limit: time and memory of a training step and of inference."""

from normfree.benchmark.comparison import Contender, Part, Precision, Step, Target, Task, limit, measure
from normfree.benchmark.tables import markdown
from normfree.benchmark.timing import Clock, hardware, interleaved, machine_name, ratios, seconds, shown, spread

__all__ = [
    "Clock",
    "Contender",
    "Part",
    "Precision",
    "Step",
    "Target",
    "Task",
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
