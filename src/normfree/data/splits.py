"""Names of splits: what a folder or file name says, and which split a config means."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from normfree.common.checks import invalid
from normfree.data.config import DataConfig

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
EVALUATION = ("validation", "test")
"""Splits to evaluate on where none is named, the first there is."""


def split_of(name: str) -> str | None:
    """The split a file or folder name speaks of, or None: ``"cifar-val.parquet"`` is of validation."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words for split, known in WORDS.items() if word in known), None)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by split; those that speak of none belong to train."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(split_of(re.split(r"[/\\]", name)[-1]) or "train", []).append(name)
    return groups


def chosen_split(splits: Sequence[str], config: DataConfig, *, training: bool) -> str:
    """The split a config asks for, as the source calls it.

    Raises:
        ValueError: if the source has no such split, or none to evaluate on.
    """
    listed = ", ".join(splits)
    wanted = config.training_split if training else config.evaluation_split
    if wanted is None:
        found = [split for name in EVALUATION for split in splits if name in (split, split_of(split))]
        if not found:
            rule = f"the data have no split to evaluate on (splits: {listed})"
            raise invalid("evaluation_split", None, rule, f"pass evaluation_split={splits[0]!r} to evaluate on that")
        return found[0]
    if wanted in splits:
        return wanted
    alike = [split for split in splits if split_of(wanted) in (split, split_of(split))]
    if wanted.lower() not in itertools.chain(*WORDS.values()) or not alike:
        argument = "training_split" if training else "evaluation_split"
        raise invalid(argument, wanted, "the data have no such split", f"choose one of {listed}")
    return alike[0]
