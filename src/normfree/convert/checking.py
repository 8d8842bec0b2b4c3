"""A converted model runs before it is given back: what conversion could not foresee is found out at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from normfree.convert.dataflow import resting
from normfree.convert.kinds import class_name
from normfree.convert.record import Conversion
from normfree.convert.rewrite import AFFINE
from normfree.signal.inputs import Batch, call, examples_in
from normfree.signal.outputs import tensors_in
from normfree.signal.preserve import untouched

LEAST_ERROR = 1e-2
"""Relative error that is no rounding: TensorFloat-32 makes 1e-3, a norm that was misunderstood 0.1 and more."""

LEAST_LEAK = 1e-4
"""Relative change of an example's output that the other examples make."""

JITTER = 1e-6
"""Relative change of the input that tells how much a model makes of rounding."""

SAMPLE = 4096
"""Values compared of each activation."""

PRECISE = (torch.float32, torch.float64)
"""What can be compared; half precision rounds too much."""

Pair = tuple[Tensor, Tensor]


@contextmanager
def running(conversion: Conversion, replaced: set[nn.Module]) -> Iterator[None]:
    """While a converted model runs: its forward must take what was exchanged, and not call what was there before.

    Raises:
        ValueError: it fails, or it calls one of the ``replaced`` modules.
    """
    called: list[nn.Module] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module in replaced:
            called.append(module)

    handle = register_module_forward_pre_hook(enter)
    try:
        yield
    except ValueError:
        if not called:
            raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ValueError(
            f"model: {conversion.model} does not run once converted ({type(error).__name__}: {reason}); its forward "
            "asks for something of a module that was exchanged: have it ask something else"
        ) from error
    finally:
        handle.remove()
    if called:
        raise ValueError(
            f"model: the forward of {conversion.model} calls a {class_name(called[0])} that it also holds in a plain "
            "list or dict, so that exchanging the submodule has no effect; hold it in an nn.ModuleList alone"
        )


def misunderstood(
    original: nn.Module, converted: nn.Module, conversion: Conversion, batch: Batch, *, heads: bool
) -> str | None:
    """The first norm in whose place the same input gives another output than in the original, by more than rounding.

    Raises:
        ValueError: every norm's place gives the same, and yet the model does not.
    """
    places = {
        change.name: change.into or change.name
        for change in conversion.changes
        if change.into is not None or change.now == AFFINE
    }
    wanted, outputs = _seen(original, places, batch, heads=heads)
    found, now = _seen(converted, places, batch, heads=heads)
    for name, pair in wanted.items():
        other = found.get(name)
        if other is None or not _relative(other[0], pair[0]) <= LEAST_ERROR:
            continue  # another way through the model, or a place whose input another one has changed
        if _relative(other[1], pair[1]) > LEAST_ERROR:
            return name
    if not all(tensor.dtype in PRECISE for pair in wanted.values() for tensor in pair):
        return None
    error = _largest(now, outputs)
    if error > LEAST_ERROR and error > 10 * _largest(_seen(original, {}, _jittered(batch), heads=heads)[1], outputs):
        raise ValueError(
            f"model: {conversion.model} gives other outputs once converted (relative error {error:.1g}), for something "
            'beside the layers uses what was folded; convert a part of the model without it, or choose start="fresh"'
        )
    return None


@torch.no_grad()
def leaks(model: nn.Module, batch: Batch) -> bool:
    """Whether an example's output depends on the other examples of its batch, in training mode."""
    examples = examples_in(batch)
    if examples is None or examples < 2:
        return False

    def alone(tensor: Any) -> Any:
        return tensor[:1].expand_as(tensor).clone() if isinstance(tensor, Tensor) and tensor.dim() else tensor

    outputs = []
    for each in (batch, tree_map(alone, batch)):
        try:
            with untouched(model, "train"):
                outputs.append([t[:1].clone() for t in tensors_in(call(model, each)) if t.dim() and len(t) == examples])
        except Exception:  # training wants something else, such as targets: nothing can be said
            return False
    return _largest(*outputs) > LEAST_LEAK


@torch.no_grad()
def _seen(
    model: nn.Module, places: dict[str, str], batch: Batch, *, heads: bool
) -> tuple[dict[str, Pair], list[Tensor]]:
    """A sample of what went into each norm's place in its first run, and of what came out; and the model's outputs."""
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
            outputs = tensors_in(call(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (given[name], made[name]) for name in places if name in given and name in made}, outputs


def _keep(into: dict[str, Tensor], name: str, value: Any) -> None:
    tensor = next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)
    if tensor is not None and name not in into:
        flat = tensor.detach().flatten()
        into[name] = flat[:: max(1, len(flat) // SAMPLE)].clone()


@torch.no_grad()
def _jittered(batch: Batch) -> Batch:
    """A batch changed by about as much as rounding changes it."""
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + JITTER * tensor.abs().mean() * noise

    return tree_map(moved, batch)


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of outputs of a model; of those that have not the shapes of before, none."""
    return max((_relative(a, b) for a, b in zip(found, wanted, strict=False) if a.shape == b.shape), default=0.0)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value: 0 for what cannot be compared, infinite for other sizes."""
    if found.shape != wanted.shape:
        return float("inf")
    if found.numel() == 0 or found.dtype not in PRECISE or wanted.dtype not in PRECISE:
        return 0.0
    size = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / size if size > 0 else float(found.abs().max())
