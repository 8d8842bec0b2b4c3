"""What a norm does beside normalizing, what its removal would overwrite, and norms that are no modules."""

from __future__ import annotations

from torch import nn

from normfree.convert.dataflow import Call, Dataflow
from normfree.convert.kinds import (
    activation_in,
    is_norm,
    is_removable,
)
from normfree.nn.fold import attached_to
from normfree.trace import operations as op

_ACTIVATIONS = op.NONLINEAR - {"pow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "clamp", "clamp_min", "maximum"}
NOT_FOLLOWED = "no recorded operation leads from the input to it"
"""Why a norm stays in a model whose forward copies its input piece by piece, as detectors do."""

_LAYOUT = op.VIEW | op.PARTIAL | {"cat"}
_AFFINE = op.SCALING | op.ADDITION | {"addcmul"}


def why_unknown(flow: Dataflow, call: Call) -> str:
    """Why it is not known what a norm's module does; "" where it normalizes, and runs its own activation at most."""
    if attached := attached_to(call.module):
        return f"it has {attached}"
    if isinstance(call.module, nn.LocalResponseNorm):
        return "it divides by its neighbouring channels, each position by itself: it keeps no statistics"
    if not is_removable(call.module):
        return "what it does beside normalizing is not known"
    weighted = next((name for name, part in activation_in(call.module) if _has_weights(part)), "")
    if weighted:
        return f"its {weighted} has weights, and what it does beside normalizing is not known"
    more = _beside_normalizing(flow, call)
    return f"its forward does more than normalize ({more})" if more else ""


def _has_weights(part: nn.Module) -> bool:
    """Whether a part of a norm has weights that mix channels, or is a norm itself; an activation may have slopes."""
    mixes = any(parameter.dim() > 1 for parameter in part.parameters())
    return mixes or any(is_norm(module) for module in part.modules())


def _beside_normalizing(flow: Dataflow, call: Call) -> str:
    """An operation of a norm's own forward that has no part in normalizing; "" for none."""
    own = tuple(f"{call.name}.{part}" for part, _ in activation_in(call.module))
    leading = set(flow.backwards(call.output, stop=lambda node: node is call.input)) if call.output else set()
    steps = [
        step
        for step in flow.within(call.name)
        if not step.module.startswith(own) and not leading.isdisjoint(step.outputs)
    ]
    at_once = any(step.name in op.NORM for step in steps)
    for step in steps:
        is_affine = step.name in _AFFINE and len(step.inputs) == 1
        if step.name in _ACTIVATIONS or (at_once and not (is_affine or step.name in _LAYOUT | op.NORM)):
            return step.name
    return ""
