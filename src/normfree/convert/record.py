"""The record of a conversion: every change and everything left alone, for people and for machines.

It is also the recipe: :func:`normfree.convert.apply.rewrite` makes the converted model of the original and this.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from normfree.common.checks import invalid
from normfree.common.files import Stored, parse_dataclass, parse_json, read, write_atomically
from normfree.common.text import first_line, short_repr, shortened
from normfree.nn import WeightLayout

SCHEMA = 1

NOTE = "normfree.conversion"
"""The note in a file of :func:`normfree.save` that holds the record, as JSON."""

Start = Literal["fresh", "pretrained"]
"""Weights drawn anew for a variance-preserving start, or the function of the trained model kept."""

Beta = Literal["plan", "measured"]
"""Where input scales come from: closed forms where there are any and the example elsewhere, or the example for all."""

STARTS: tuple[Start, ...] = get_args(Start)
BETAS: tuple[Beta, ...] = get_args(Beta)


BARE, WITH_ACTIVATION, COPY, OUTPUT_COPY = "Identity", "Activation", "Copy", "OutputCopy"
OUT_OF_PLACE = "OutOfPlace"
AFFINE, UNITS, SCALED = "ChannelAffine", "ChannelUnits", "BranchScale"
"""What stands in the place of what is no layer."""

STANDARDIZED, KEPT_MEAN = "standardized", "kept-mean"
"""Before the class of a module that stays and whose weight was standardized in place."""

RESCALED = "scaled"
"""Before the class of a module that stays with its weight, which got a constant factor (the input scale)."""


HEADS = ("module", "before", "after", "why")
"""Of the columns of a record's table."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One module exchanged.

    Attributes:
        name: of the module.
        was: its class.
        now: the class in its place; "Activation" for a norm's own, which stays.
        reason: why, in words.
        into: the layer that a norm's constants were folded into (*pretrained*).
        carried_by: what carries the variance that a norm gave: standardized layers before it or after it (the nearest
            four at most), a norm that stays, or the norm's own place, where an affine map or a factor stands (*fresh*).
        within: the module in which alone it was exchanged, of several that hold it; None for everywhere.
        input_scale: constant factor of a layer's input (γ / β); None for what is no layer.
        alpha: constant factor of the output of what ends a residual branch.
        skip_gain: initial value of its learnable factor; None for none.
        correction: factor that restores what a gate takes, on the gate or within a layer's input scale; in a norm's
            place, one over the standard deviation that the example has there; None for none.
        bias: that a layer starts with, for the function after it to be nearly linear; None for 0.
        weight: how the module reads its weight, where that is standardized or scaled in place; None elsewhere.
    """

    name: str
    was: str
    now: str
    reason: str
    input_scale: float | None = None
    alpha: float | None = None
    skip_gain: float | None = None
    correction: float | None = None
    into: str | None = None
    bias: float | None = None
    weight: WeightLayout | None = None
    carried_by: tuple[str, ...] = ()
    within: str | None = None

    def __repr__(self) -> str:
        return short_repr(self, f"of {shortened(self.name, 120) or 'the model'}: {self.was} to {describe(self)}")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One module (or functional operation) that conversion left alone, and why."""

    name: str
    was: str
    reason: str
    norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What :func:`normfree.convert` did to a model.

    Attributes:
        model: class of the original.
        start, alpha, beta, seed: the arguments.
        input_shapes: of the example input's tensors.
        input_mean_squares: of their values; None of what is not dense, real and finite.
        source: how to build the original again, where that is known: a name the command line takes.
        original: what each module of the original was, by its name (:func:`modules_of`); empty in older records.
        output_error: largest difference of the example's outputs, in evaluation mode, from the original's, over the
            largest of their values (*pretrained*).
        changes: in the order the modules ran.
        kept: what was left alone.
        notes: what else a reader should know, such as a branch that could not be scaled.
    """

    model: str
    start: Start
    alpha: float
    beta: Beta
    seed: int
    input_shapes: tuple[tuple[int, ...], ...] = ()
    input_mean_squares: tuple[float | None, ...] = ()
    source: str | None = None
    original: Mapping[str, str] = field(default_factory=dict)
    output_error: float | None = None
    changes: tuple[Change, ...] = ()
    kept: tuple[Kept, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def norms_left(self) -> tuple[Kept, ...]:
        """The normalizers the converted model still has."""
        return tuple(kept for kept in self.kept if kept.norm)

    @property
    def replaces_norms(self) -> bool:
        """Whether a normalizer went, or something else stands in its place; a model without any has none to replace."""
        return any(change.carried_by or change.into or change.now in (AFFINE, UNITS) for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """The record in plain types, ``{"schema": 1, …}``."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self, path: str | Path) -> Path:
        """Write :meth:`to_dict`; the file is whole or not there; returns the path."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Conversion:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: it is no such record, or one of another schema.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            schema = document.get("schema") if isinstance(document, Mapping) else None
            raise invalid("schema", schema, f"must be {SCHEMA}", "use the version that wrote it")
        try:
            return parse_dataclass(cls, {key: value for key, value in document.items() if key != "schema"})
        except ValueError as error:
            rule = f"document: it is no record of a conversion ({first_line(error)})"
            raise ValueError(f"{rule}; give one of to_dict") from error

    def summary(self) -> str:
        """One line: what was exchanged for what, and what is left."""
        counts: dict[str, int] = {}
        for change in self.changes:
            counts[change.now] = counts.get(change.now, 0) + 1
        made = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
        count = len(self.norms_left)
        none = (
            "no normalizer left that is recognised"
            if self.replaces_norms
            else "it had no normalizer that is recognised"
        )
        left = f"{count} normalizer{'s' if count > 1 else ''} left" if count else none
        error = self.output_error
        kept = "" if error is None else f"; outputs differ from the original's by at most {error:.1e} of the largest"
        return f"{self.model} converted ({self.start}): {made}; {left}{kept}"

    def different_notes(self) -> list[str]:
        """Every note once, with the number of times it stands in the record."""
        return [f"{note} ({count} times)" if count > 1 else note for note, count in Counter(self.notes).items()]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table's rows: module, before, after, why; what is kept has "kept" for after."""
        changed = [(one.name, one.was, describe(one), one.reason) for one in self.changes]
        return changed + [(one.name, one.was, "kept", one.reason) for one in self.kept]

    def __repr__(self) -> str:
        return short_repr(self, f"of {self.summary()}")

    def _repr_html_(self) -> str:
        from normfree.report.notebook import table_html

        label = "modules, and why they changed or stayed"
        return table_html("Conversion", self.summary(), label, HEADS, self.rows(), self.different_notes())

    def __str__(self) -> str:
        rows = [HEADS, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [self.summary(), ""]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
            lines.append("  ".join([*cells, row[3]]).rstrip())
        return "\n".join([*lines, *(f"note: {note}" for note in self.different_notes())])


class _IsConverted(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return conversion_of(instance) is not None


class Converted(nn.Module, metaclass=_IsConverted):
    """Any module with the record of its conversion: what :func:`normfree.convert` returns, to type checkers.

    A converted model keeps its own class; ``isinstance(model, Converted)`` asks for the record.
    """

    conversion: Conversion


LONGEST_SETTINGS = 120
"""Characters of a module's settings that a record keeps."""


def modules_of(model: nn.Module) -> dict[str, str]:
    """The class and the settings (``extra_repr``) of each module, by its name; of the model itself by ""."""
    found = {}
    for name, module in model.named_modules():
        try:
            settings = shortened(" ".join(module.extra_repr().split()), LONGEST_SETTINGS)
        except Exception:  # of somebody else's class
            settings = ""
        found[name] = f"{type(module).__name__}({settings})"
    return found


def first_difference(record: Conversion, original: nn.Module) -> tuple[str, bool]:
    """Where a model differs from the one that was converted, in words, and whether a leaf is of another class.

    Their forwards are not compared: two of one class and settings may compute different things. Classes of containers
    may have been renamed, and settings are printed in another way by other versions.

    Returns:
        ("", False) where nothing is seen to differ.
    """
    given, leaves = modules_of(original), {name for name, m in original.named_modules() if not m._modules}
    differences = [
        (f"{name or 'it'} was {was} and is {given.get(name, 'missing')}", name)
        for name, was in record.original.items()
        if given.get(name) != was
    ]
    differences += [(f"it has {name} as well", "") for name in given if record.original and name not in record.original]
    for words, name in differences:
        if name in leaves and given[name].partition("(")[0] != record.original[name].partition("(")[0]:
            return words, True
    return (differences[0][0], False) if differences else ("", False)


def describe(change: Change) -> str:
    """What stands in a module's place now, with its factors."""
    factors = {name: getattr(change, name) for name in ("input_scale", "correction", "alpha", "skip_gain", "bias")}
    shown = [f"{name}={value:.4g}" for name, value in factors.items() if value is not None]
    return f"{change.now}({', '.join(shown)})" if shown else change.now


def conversion_of(model: Any) -> Conversion | None:
    """The record of a converted model; None for any other."""
    found = getattr(model, "conversion", None)
    return found if isinstance(found, Conversion) else None


def stored_conversion(path: str | Path) -> Conversion | None:
    """The record in a file of :func:`normfree.save`; None if the model in it was not converted.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    stored = read(path)
    return noted_conversion(stored) if NOTE in stored.notes else None


def noted_conversion(stored: Stored) -> Conversion:
    """The record that a file of a converted model notes.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return Conversion.from_dict(parse_json(stored.notes[NOTE]))
    except ValueError as error:
        raise stored.error(f"has a damaged record ({first_line(error)})", "take an undamaged copy") from error
