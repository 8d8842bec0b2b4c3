"""Converted models as files: how ``normfree.save`` notes the conversion, and ``load`` repeats it on the original."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from normfree.common.checks import invalid
from normfree.common.files import parse_json
from normfree.common.text import all_lines, first_line
from normfree.convert.apply import rewritten
from normfree.convert.pipeline import conversion_of
from normfree.convert.record import Conversion
from normfree.signal.measure import unwrapped
from normfree.weights.checkpoint import Origin, register
from normfree.weights.stored import Stored, read, restored


def stored_conversion(path: str | Path) -> Conversion | None:
    """The record in a file of :func:`normfree.save`; None if the model in it was not converted.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    stored = read(path)
    return _record_in(stored) if CONVERTED.key in stored.notes else None


def _note(model: nn.Module) -> str | None:
    """The record of a converted model, as JSON."""
    conversion = conversion_of(model)
    if conversion is None:
        return None
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    names = [change.name for change in conversion.changes]
    within = {name for name in names if any(name.startswith(f"{one}.") for one in names)}  # a norm's own activation
    missing = [name for name in names if name not in known | within]
    if missing:
        rule = f"{missing[0]} of its conversion's record is gone, so a file could not rebuild it"
        raise invalid("model", type(model).__name__, rule, "convert the model again after changing it")
    return json.dumps(conversion.to_dict())


def _rebuilt(stored: Stored, original: nn.Module | None) -> nn.Module:
    """The original, rewritten as the record says, with the file's weights."""
    conversion = _record_in(stored)
    if original is not None and not isinstance(original, nn.Module):
        raise invalid("original", original, "is no torch.nn.Module", "pass the model itself, with any weights")
    if original is None:
        rule = f"{str(stored.path)!r} holds a converted {conversion.model}"
        raise invalid("original", None, rule, "pass the model it was converted from (with any weights)")
    try:
        model = rewritten(unwrapped(original), conversion)
        for name, tensor in model.state_dict().items():
            if tensor.numel() == 0:  # of a mark, which files of before it lack
                stored.tensors.setdefault(name, tensor)
        return restored(model, stored)
    except Exception as error:  # a forged record makes constructors raise almost anything
        rule = f"it is not the model that {str(stored.path)!r} was converted from ({all_lines(error)})"
        remedy = f"pass a {conversion.model} of the same sizes"
        raise invalid("original", type(original).__name__, rule, remedy) from error


def _record_in(stored: Stored) -> Conversion:
    try:
        return Conversion.from_dict(parse_json(stored.notes[CONVERTED.key]))
    except ValueError as error:
        raise stored.error(f"has a damaged record ({first_line(error)})", "take an undamaged copy") from error


CONVERTED = register(Origin(key="normfree.conversion", note=_note, rebuilt=_rebuilt))
