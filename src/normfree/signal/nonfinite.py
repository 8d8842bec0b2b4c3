"""Where a value first stops being finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from normfree.common.torch_compat import DispatchMode, tree_leaves
from normfree.trace import operations as op
from normfree.trace.inputs import Batch, ModuleStack, run_once, tensors_of, values_of
from normfree.trace.operations import written_by
from normfree.trace.preserve import Preserved


@dataclass(frozen=True)
class NonFinite:
    """The operation whose result was the first not to be finite.

    Attributes:
        module: the module that ran it.
        operation: its ATen name.
        count: values that are not finite.
        total: values in all.
        largest: largest finite magnitude among its inputs.
    """

    module: str
    operation: str
    count: int
    total: int
    largest: float


class _Watch(DispatchMode):
    """Follows values that are not finite from the operation that made them.

    An operation is the origin of a NaN if none of its inputs has one, and of an infinity if all of its
    inputs are finite; a masking that softmax turns into zeros has no descendants, and is never reported.
    """

    def __init__(self, stack: ModuleStack, preserved: Preserved) -> None:
        super().__init__()
        self.stack = stack
        self.preserved = preserved
        self.origins: Any = WeakTensorKeyDictionary()
        self.found: list[NonFinite] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for target in written_by(func, args, kwargs):
            self.preserved.before_writing(target)
        inputs = _floating((args, kwargs))
        given = [values_of(tensor) for tensor in inputs]
        had_nan = any(bool(t.isnan().any()) for t in given)
        sound = all(bool(torch.isfinite(t).all()) for t in given)
        largest = max((t.abs().nan_to_num(0, 0, 0).max().item() for t in given if t.numel()), default=0.0)
        inherited = min((self.origins[t] for t in inputs if t in self.origins), default=None)
        result = func(*args, **kwargs)
        name = op.name_of(func)
        for tensor in _floating(result) if name not in op.FACTORY and not name.startswith("empty") else ():
            made = values_of(tensor)
            bad = int((~torch.isfinite(made)).sum())
            if not bad:
                self.origins.pop(tensor, None)
            elif sound or (not had_nan and bool(made.isnan().any())):
                self.origins[tensor] = len(self.found)
                self.found.append(NonFinite(self.stack.name, name, bad, tensor.numel(), largest))
            elif inherited is not None:
                self.origins[tensor] = inherited
        return result


def _floating(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def first_non_finite(model: nn.Module, batch: Batch, preserved: Preserved) -> NonFinite | None:
    """Run the batch again and follow every value that is not finite; the origin of those in the output.

    If the output is finite again, the first origin of any. Deliberate infinities (masks for attention) are
    passed over.

    Args:
        model: the model, in its measuring mode.
        batch: one batch.
        preserved: keeps the values of what is about to be written.
    """
    stack = ModuleStack(model)
    watch = _Watch(stack, preserved)
    with preserved.guarding(tensors_of(batch)), torch.no_grad(), stack.follow_modules(), watch:
        outputs = run_once(model, batch, stack)
    origins = sorted(watch.origins[t] for t in outputs if t in watch.origins)
    unmasked = [found for found in watch.found if found.operation not in _MASKING]
    if origins:
        return watch.found[origins[0]]
    return unmasked[0] if unmasked else None


_MASKING = frozenset({"masked_fill", "fill", "full", "scalar_tensor", "where", "lift_fresh", "copy"})
"""What writes an infinity on purpose."""
