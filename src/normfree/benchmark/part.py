"""A comparison as data: who takes part, at what, and which ratio is promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from normfree.benchmark.contender import Contender
from normfree.benchmark.timing import ratios, spread
from normfree.common.checks import check_choice, check_integer, check_number, invalid

TASKS = ("training", "inference")
PRECISIONS = ("float32", "bfloat16")
ONLY_INFERENCE = ("folded", "onnx")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise: the ratio of two contenders, in time or in memory.

    Attributes:
        of, over: names of the contenders, numerator and denominator.
        at_most: the ratio promised.
        quantity: "time" or "memory".
    """

    of: str
    over: str
    at_most: float
    quantity: Literal["time", "memory"] = "time"

    def judged(self, contenders: dict[str, Any]) -> dict[str, Any]:
        """Return the promise, the spread of what was measured and whether it is kept; None where one is missing."""
        above, below = (contenders.get(name, {}) for name in (self.of, self.over))
        measured = None
        if self.quantity == "time" and "raw_seconds" in above and "raw_seconds" in below:
            measured = spread(ratios(above["raw_seconds"], below["raw_seconds"]))
        elif self.quantity == "memory" and "peak_bytes" in above and "peak_bytes" in below:
            measured = spread([above["peak_bytes"] / below["peak_bytes"]])
        met = None if measured is None else measured["median"] <= self.at_most
        return {**vars(self), "measured": measured, "met": met}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison.

    Args:
        name: of its file.
        title: of its table.
        task: "training" (one step, and its peak memory) or "inference".
        contenders: who takes turns; names are unique.
        batch_size, image_size: of the images, three channels.
        precision: "float32" or "bfloat16".
        rounds: most to run.
        budget: seconds for all rounds.
        targets: ratios promised.

    Raises:
        ValueError: a value that breaks its rule.
    """

    name: str
    title: str
    task: str
    contenders: Sequence[Contender]
    batch_size: int
    image_size: int
    precision: str = "float32"
    rounds: int = 21
    budget: float = 60.0
    targets: Sequence[Target] = ()

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "image_size", "rounds"):
            check_integer(name, getattr(self, name), 1)
        check_number("budget", self.budget, 0.0)
        labels = [contender.label for contender in self.contenders]
        if not labels or len(set(labels)) < len(labels):
            raise invalid("contenders", labels, "must be at least one, each once", "leave the repeated one out")
        if self.task == "training":
            for step in (step for contender in self.contenders for step in contender.steps if step in ONLY_INFERENCE):
                raise invalid("steps", step, "has no training step", 'compare it with task="inference"')
        unknown = {name for target in self.targets for name in (target.of, target.over)} - set(labels)
        assert not unknown, f"{self.name}: targets name {unknown}, who take no part"
