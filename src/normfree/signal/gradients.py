"""The gradient curve: how large the gradient of a random projection of the output is at every point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from normfree.signal.graph import Residual
from normfree.signal.inputs import Batch, tensors_of
from normfree.signal.listening import run
from normfree.signal.modules import ModuleStack
from normfree.signal.preserve import Preserved
from normfree.signal.recorder import Recorder


class _EdgeRecorder(Recorder):
    """Takes hold of each point's place in the autograd graph, not of the activation itself.

    Autograd attaches that place only after an operation has been dispatched, and a later operation in
    place would move it; so it is taken when the next operation, or the end of the pass, comes.
    """

    follows_weights = False  # the same kernels as in the backward pass, where checkpoints run the model again

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting: Tensor | None = None
        self.edges: list[GradientEdge | None] = []

    def take(self) -> None:
        """Take hold of the last point."""
        if self.waiting is not None:
            self.edges.append(get_gradient_edge(self.waiting) if self.waiting.requires_grad else None)
            self.waiting = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.take()
        return super().__torch_dispatch__(func, types, args, kwargs)


class _ResidualEdges(_EdgeRecorder):
    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        self.waiting = result = run()
        return result


class _LayerEdges(_EdgeRecorder):
    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        if result.dim() >= 2 and result.is_floating_point():
            self.waiting = result


def sq_gradients(model: nn.Module, batch: Batch, preserved: Preserved, *, points: str, seed: int) -> list[float | None]:
    """Mean squared gradient at every point, of ``Σ r·output`` with one draw r ~ N(0, 1), from one backward pass.

    Args:
        model: the model, in its measuring mode, its silenced branches woken by the pass before.
        batch: one batch.
        preserved: told of parameters about to be changed.
        points: "residual" or "layers".
        seed: of the projection.

    Returns:
        One number a point, None where no gradient arrives.
    """
    batch = tree_map(_differentiable, batch)
    stack = ModuleStack(model)
    kind = _ResidualEdges if points == "residual" else _LayerEdges
    recorder = kind(
        model,
        tensors_of(batch),
        stack=stack,
        before_writing=preserved.before_writing,
        examples=None,
        wake=False,
    )
    preserved.seed(seed)  # what the model draws is what it drew for the first batch
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        with stack.followed(), recorder:
            outputs = [t for t in run(model, batch, stack) if t.is_floating_point() and t.requires_grad]
        recorder.take()
        terms = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs]
        edges = [edge for edge in recorder.edges if edge is not None]
        if not terms or not edges:
            return [None] * len(recorder.edges)
        gradients = iter(torch.autograd.grad(sum(terms[1:], terms[0]), edges, allow_unused=True))
    found = [None if edge is None else next(gradients) for edge in recorder.edges]
    return [None if g is None else g.double().square().mean().item() for g in found]


def _differentiable(leaf: Any) -> Any:
    """A copy through which gradients flow even if every parameter is frozen, and which may be changed in place."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().clone().requires_grad_().clone()
    return leaf
