"""Norms that are a scale and a shift per channel in evaluation mode, whatever their class, and these two.

The recorded operations between a module's input and its output are run again in float64, on 0 and on 1: of
y = scale * x + shift the first gives the shift and the second the sum. That says what any class computes (BatchNorm, a
frozen one of any library, one with another gain than its weight) without reading an attribute by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfree.convert.dataflow import Call, Dataflow, Step, passes_unchanged
from normfree.convert.kinds import activation_in, is_layer, is_norm
from normfree.convert.normalization import Normalizations
from normfree.trace.graph import Node

_MODE_OF = {
    "batch_norm": 5,
    "native_batch_norm": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit_no_training": None,
    "_batch_norm_no_update": None,
}
"""Where batch normalization is told to use the statistics of the batch; it never does where that is None."""

_AFFINE = frozenset({"mul", "div", "add", "sub", "rsub", "addcmul", "addcdiv", "neg"})
_READ_OUT = frozenset({"_local_scalar_dense", "item"})


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``y_c = scale_c * x_c + shift_c`` for the channels c of an activation [N, C, …]; both are [C], in float64."""

    scale: Tensor
    shift: Tensor

    def equals(self, other: AffineMap) -> bool:
        """Whether it is the same map."""
        pairs = ((self.scale, other.scale), (self.shift, other.shift))
        return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def affine_map(flow: Dataflow, calls: Iterable[Call]) -> AffineMap | None:
    """The map that all calls of a module compute, its own activation apart; None where they compute no such map."""
    maps = [_map_of(flow, call) for call in calls]
    first = maps[0] if maps else None
    return first if first is not None and all(each is not None and first.equals(each) for each in maps) else None


def has_statistics(module: nn.Module, channels: int) -> bool:
    """Whether a module has buffers with a number for each channel: statistics, which distinguish a norm from a scale.

    A map of parameters alone (a layer scale, an affine layer) normalizes nothing, also not in training.
    """
    buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
    return any(buffer.is_floating_point() and buffer.numel() == channels for buffer in buffers)


def norm_calls(flow: Dataflow, normalizations: Normalizations) -> tuple[dict[str, list[Call]], dict[str, AffineMap]]:
    """The modules that are norms by what they compute, with their calls in running order, and the constants of those.

    A norm is a module of torch's normalization classes; any other that is one normalization of its input; and any that
    is an affine map of statistics in evaluation mode, unless no layer comes before it: then it prepares the input.
    """
    by_name: dict[str, list[Call]] = flow.called(lambda module: not is_layer(module))
    norms, constants = {}, {}
    for name, calls in by_name.items():
        known = is_norm(calls[0].module)
        if not known and any(call.input is None or call.output is None for call in calls):
            continue
        found = affine_map(flow, calls) if known or calls[0].module._buffers else None
        frozen = found is not None and has_statistics(calls[0].module, len(found.scale))
        if found is not None and (known or frozen):
            constants[name] = found
        if known or (frozen and _has_layer_behind(flow, calls)) or all(map(normalizations.is_norm, calls)):
            norms[name] = calls
    return norms, constants


def _has_layer_behind(flow: Dataflow, calls: list[Call]) -> bool:
    inputs = [call.input for call in calls if call.input is not None]
    return any(
        e.step.weighted for node in inputs for e in flow.backwards(node, stop=lambda each: each.step.weighted > 0)
    )


@torch.no_grad()
def _map_of(flow: Dataflow, call: Call) -> AffineMap | None:
    steps = _way(flow, call)
    if not steps:
        return None
    assert call.input is not None
    shape = flow.shapes[call.input]
    if len(shape) < 2:
        return None
    in_layout = all(flow.shapes[step.inputs[0]] == flow.shapes[step.outputs[0]] for step in steps)
    sizes = (1, shape[1], *[1] * (len(shape) - 2)) if in_layout else shape
    ends = []
    for value in (0.0, 1.0):
        x = torch.full(sizes, value, dtype=torch.float64, device="cpu")
        for step in steps:
            x = _repeated(flow, step, x)
        channels = x.transpose(0, 1).flatten(1)
        if x.dim() != len(shape) or len(channels) != shape[1] or not _all_equal(channels):
            return None
        ends.append(channels[:, 0])
    return AffineMap(ends[1] - ends[0], ends[0])


def _all_equal(rows: Tensor) -> bool:
    """Whether each row holds one number, or what is none."""
    return bool(((rows == rows[:, :1]) | rows.isnan()).all())


def _way(flow: Dataflow, call: Call) -> list[Step] | None:
    """The operations that lead from a module's input to its output, its own activation apart; None if in no single way.

    An activation that several norms share runs under the name it has in another.
    """
    own = [f"{call.name}.{name}" for name, _ in activation_in(call.module)]
    node, steps = call.output, []
    while node is not None and node is not call.input:
        step = flow.made_by.get(node)
        if step is None or len(step.inputs) != 1:
            return None
        outside = not f"{step.module}.".startswith(f"{call.name}.")
        if not own or not (outside or step.module.startswith(tuple(own))):
            steps.append(step)
        elif steps:
            return None  # what a part does before is none of its activation, as of an embedding before a table is added
        node = step.inputs[0]
    if node is None or not all(map(_is_affine, steps)):
        return None
    numbers = any(
        isinstance(leaf, float) for s in steps if s.name in _AFFINE for leaf in tree_leaves((s.args, s.kwargs))
    )
    if numbers and any(step.name in _READ_OUT for step in flow.within(call.name)):
        return None  # a number that was read out of an activation is no constant
    return steps[::-1]


def _is_affine(step: Step) -> bool:
    """Whether an operation scales and shifts its one input by constants, or only carries it on."""
    if passes_unchanged(step):
        return True
    if step.name in _MODE_OF:
        mode = _MODE_OF[step.name]
        return step.args[3] is not None and (mode is None or not step.args[mode])
    if step.name not in _AFFINE:
        return False
    places = [place for place, value in enumerate(step.args) if isinstance(value, Node)]
    divides = {"div": 1, "addcdiv": 2}.get(step.name)
    return len(places) == 1 and places[0] != divides and not any(isinstance(v, Node) for v in step.kwargs.values())


def _repeated(flow: Dataflow, step: Step, x: Tensor) -> Tensor:
    """What an operation makes of other values, in float64."""
    if passes_unchanged(step) and step.name not in ("permute", "transpose", "t"):
        shape = flow.shapes[step.outputs[0]]
        return (
            x
            if flow.shapes[step.inputs[0]] == shape
            else x.expand(shape)
            if step.name == "expand"
            else x.reshape(shape)
        )
    if step.name in _MODE_OF:
        weight, bias, mean, variance = (None if each is None else _double(each) for each in step.args[1:5])
        eps = step.args[7 if step.name == "batch_norm" else -1]  # torch's own is not decomposed in inference mode
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, float(eps))
    args, kwargs = tree_map(
        lambda value: x.clone() if isinstance(value, Node) else _double(value), (step.args, step.kwargs)
    )
    return step.function(*args, **kwargs)


def _double(value: Any) -> Any:
    return value.detach().cpu().double() if isinstance(value, Tensor) else value
