"""What is measured of one architecture of another library; ``benchmarks.foreign`` runs it for each."""

from __future__ import annotations

import math
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convert_checks import randomise
from benchmarks.foreign_case import Case
from benchmarks.rows import one_line
from normfree import fold
from normfree.convert import conversion_of, convert
from normfree.export import to_onnx
from normfree.signal import SignalPropagation, spp
from normfree.trace.inputs import call, copy_of, tensors_in, tensors_of

RATE = 1e-3
"""Of the one step of SGD that a converted model takes."""

PATH = re.compile(r"\b\w+(\.\w+)+\b")
"""A module's name within a reason."""

REFUSAL = re.compile(r"\w+: ")
"""How an error begins that names the argument; any other is a defect."""


class Stages:
    """The parts of a row: each is timed, and what it raises becomes one line of the row."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        row |= {"seconds": {}, "failed": {}}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Run the block as a part: a refusal ("argument: what") is noted as such, anything else with where it rose."""
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:
            if isinstance(error, ValueError) and REFUSAL.match(str(error)):
                self.row["failed"][stage] = one_line(error, 400)
                return
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.row["failed"][stage] = f"crash: {type(error).__name__} in {where}: {one_line(error)}"
        finally:
            self.row["seconds"][stage] = round(time.perf_counter() - begun, 2)


def checked(case: Case) -> dict[str, Any]:
    """One row of the table: everything but the export."""
    row: dict[str, Any] = {"model": case.name, "version": version(case.package), "field": case.field}
    stages = Stages(row)
    with stages("build"):
        model, batch = built(case)
        row["thousands"] = round(sum(p.numel() for p in model.parameters()) / 1e3)
        row["shapes"] = [list(tensor.shape) for tensor in tensors_of(batch)]
        row |= {"stated": case.stated(model), "fusions": case.fusions}
    if "build" in row["failed"]:
        return row
    with stages("spp"):
        signal = spp(model, batch)
        row["blocks"] = sum(block.kind == "residual" for block in signal.blocks)
        row["findings"] = findings(signal)
    with stages("fresh"):
        converted = convert(model, batch)
        row["fresh"] = _record(converted)
    if "fresh" in row:
        _check_fresh(row["fresh"], stages, model, converted, batch)
    with stages("pretrained"):
        original = built(case)[0].eval()  # no copy, which torch refuses of modules with weight norm
        randomise(original)
        kept = convert(original, batch, start="pretrained")
        row["pretrained"] = {**_record(kept), "error": error_between(kept, original, batch)}
    if "pretrained" in row:
        with stages("fold pretrained"):
            row["pretrained"]["fold"] = error_between(fold(kept), kept, batch)
    return row


def _check_fresh(found: dict[str, Any], stages: Stages, model: nn.Module, converted: nn.Module, batch: Any) -> None:
    """Enter into a fresh conversion's part of a row what its signal, fold and training show; trains both."""
    with stages("fresh spp"):
        found["findings"] = findings(spp(converted, batch))
    with stages("fold"):
        found["fold"] = error_between(fold(converted.eval()), converted, batch)
    with stages("training"):
        found["variances"] = variances(model, converted, batch)
    with stages("step"):
        found["step"] = step(converted, batch)


def exported(case: Case) -> dict[str, Any]:
    """The export's part of a row: the converted model folded, written as ONNX, read back and compared.

    The fresh conversion is exported, or the pretrained one where there is no fresh one.
    """
    row: dict[str, Any] = {}
    stages = Stages(row)
    model, batch = built(case)
    with stages("convert"):
        try:
            converted = convert(model, batch)
        except ValueError:
            converted = convert(model.eval(), batch, start="pretrained")
    if "convert" in row["failed"]:
        return {**row, "reason": "nothing is converted"}
    with stages("export"), tempfile.TemporaryDirectory() as folder:
        row["error"] = to_onnx(converted, batch, Path(folder) / "model.onnx").file.relative
    return {**row, "reason": row["failed"].get("export")}


def built(case: Case) -> tuple[nn.Module, Any]:
    """The model of a case and its batch, the same each time."""
    torch.manual_seed(0)
    return case.build()


def findings(signal: SignalPropagation) -> list[list[str]]:
    """Severity, kind and block of each finding."""
    named = [signal.blocks[one.block].name if one.block is not None else "" for one in signal.findings]
    return [[one.severity, one.kind, name] for one, name in zip(signal.findings, named, strict=True)]


def _record(converted: nn.Module) -> dict[str, Any]:
    """The changes of a conversion; the norms before it; those that are left, how many of a class and why.

    Reasons that differ in the names of modules alone are one. A norm was taken where something carries its variance.
    """
    conversion = conversion_of(converted)
    assert conversion is not None
    left: dict[tuple[str, str], list[str]] = {}
    for kept in conversion.norms_left:
        left.setdefault((kept.was, PATH.sub("…", kept.reason)), []).append(kept.reason)
    return {
        "changes": dict(Counter(change.now for change in conversion.changes)),
        "norms": sum(bool(change.carried_by) for change in conversion.changes) + len(conversion.norms_left),
        "left": [[len(reasons), was, reasons[0]] for (was, _), reasons in left.items()],
        "notes": conversion.different_notes(),
    }


@torch.no_grad()
def error_between(model: nn.Module, other: nn.Module, batch: Any) -> float | None:
    """The largest difference of two models' outputs over the largest value; None where it is no number."""
    pairs = list(zip(_outputs(model, batch), _outputs(other, batch), strict=True))
    sizes = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs if b.numel()]
    errors = [distance / size if size else distance for distance, size in sizes]
    return _finite(max(errors, default=0.0)) if not any(map(math.isnan, errors)) else None


@torch.no_grad()
def variances(model: nn.Module, converted: nn.Module, batch: Any) -> list[float | None]:
    """The variance of the output in training mode, of the original and of the converted model.

    Of several outputs, the pair that differs most; what is constant in the original is left out.
    """
    pairs = []
    for one, other in zip(*(_outputs(each.train(), batch) for each in (model, converted)), strict=False):
        before, after = float(one.var(correction=0)), float(other.var(correction=0))
        if before > 0:
            pairs.append((before, after))
    if not pairs:
        return []
    return list(map(_finite, max(pairs, key=lambda pair: abs(math.log(max(pair[1], 1e-300) / pair[0])))))


def step(model: nn.Module, batch: Any) -> str:
    """What one step of SGD does: "finite", or what is not."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = _loss(model, batch)
    before.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    after = _loss(model, batch)
    if not gradients or not any(bool(gradient.any()) for gradient in gradients):
        return "no gradient"
    whole = all(bool(gradient.isfinite().all()) for gradient in gradients)
    named = {"loss": bool(before.isfinite()), "gradient": whole, "loss after it": bool(after.isfinite())}
    return ", ".join(f"{name} not finite" for name, fine in named.items() if not fine) or "finite"


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """The mean square of all outputs that have a gradient."""
    torch.manual_seed(0)
    outputs = [each for each in tensors_in(call(model, copy_of(batch))) if each.requires_grad]
    return torch.stack([(each.abs() if each.is_complex() else each).float().square().mean() for each in outputs]).sum()


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The real outputs of a model, its random draws the same each time."""
    torch.manual_seed(0)
    return [each.double() for each in tensors_in(call(model, copy_of(batch))) if each.is_floating_point()]


def _finite(number: float) -> float | None:
    return float(f"{number:.4g}") if math.isfinite(number) else None
