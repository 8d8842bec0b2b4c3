"""A converted model runs once before it is given back: what conversion could not foresee is an error at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from normfree.convert.dataflow import resting
from normfree.convert.kinds import class_name
from normfree.convert.record import Conversion
from normfree.convert.rewrite import AFFINE
from normfree.signal.inputs import Batch, call

LEAST_ERROR = 1e-2
"""Relative error that is no rounding: TensorFloat-32 makes 1e-3, a norm that was misunderstood 0.1 and more."""

SAMPLE = 4096
"""Values compared of each activation."""

Seen = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def running(converted: nn.Module, conversion: Conversion) -> Iterator[None]:
    """While a converted model runs: its forward must take what was exchanged, and not call what it replaces.

    Raises:
        ValueError: it fails, or it calls a layer or norm that is no submodule.
    """
    inside, exchanged = set(converted.modules()), {change.was for change in conversion.changes}
    outside: list[str] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module not in inside and class_name(module) in exchanged:
            outside.append(class_name(module))

    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"model: {conversion.model} does not run once converted ({type(error).__name__}: {reason}); its forward "
            "asks for something of a module that was exchanged: have it ask something else"
        ) from error
    finally:
        handle.remove()
    if outside:
        raise ValueError(
            f"model: the forward of {conversion.model} calls a {outside[0]} that is no submodule of it (one in a plain "
            "list, for instance), so that exchanging the module has no effect; hold it in an nn.ModuleList"
        )


def check_kept(original: nn.Module, converted: nn.Module, conversion: Conversion, batch: Batch, *, heads: bool) -> None:
    """Compare each exchanged norm, and the layer it went into, with what stands there now, on one batch.

    Raises:
        ValueError: for the same input some place gives another output, by more than rounding; or :func:`running`.
    """
    places = {
        change.name: change.into or change.name
        for change in conversion.changes
        if change.into is not None or change.now == AFFINE
    }
    wanted = _seen(original, places, batch, heads=heads)
    with running(converted, conversion):
        found = _seen(converted, places, batch, heads=heads)
    for name, (given, made) in wanted.items():
        now = found.get(name)
        if now is None or not _relative(now[0], given) <= _tolerance(original):
            continue  # another way through the model, or a place whose input another one has changed
        error = _relative(now[1], made)
        if error > _tolerance(original):
            raise ValueError(
                f"model: {name} does more than its constants say, for without it the same input gives another output "
                f'(relative error {error:.1g}); convert a part of the model without it, or choose start="fresh"'
            )


@torch.no_grad()
def _seen(model: nn.Module, places: dict[str, str], batch: Batch, *, heads: bool) -> Seen:
    """For each norm's place, of its first run: a sample of what went in and of what came out."""
    modules = dict(model.named_modules(remove_duplicate=False))
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        return lambda module, inputs, named: _keep(given, name, (inputs, named))

    def after(name: str) -> Any:
        return lambda module, inputs, output: _keep(made, name, output)

    handles = [modules[p].register_forward_pre_hook(before(name), with_kwargs=True) for name, p in places.items()]
    handles += [modules[name].register_forward_hook(after(name)) for name in places]
    try:
        with resting(model, heads=heads):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (given[name], made[name]) for name in places if name in given and name in made}


def _keep(into: dict[str, Tensor], name: str, value: Any) -> None:
    tensor = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)
    if tensor is not None and name not in into:
        flat = tensor.detach().flatten()
        into[name] = flat[:: max(1, len(flat) // SAMPLE)].clone()


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; infinite where the two have not the same size."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / size if size > 0 else float(found.abs().max())


def _tolerance(model: nn.Module) -> float:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max([LEAST_ERROR, *(torch.finfo(kind).eps ** 0.5 for kind in kinds)])
