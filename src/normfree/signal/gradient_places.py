"""Where the gradient of each point arrives in the autograd graph, also through views, in place, and in second runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from normfree.common.checks import available_memory
from normfree.trace.graph import Residual
from normfree.trace.recorder import Recorder


@dataclass(frozen=True)
class Place:
    """Where the gradient of a point arrives.

    Attributes:
        edge: of the tensor whose memory the point is.
        part: the gradient of the point from that of the tensor.
        shape, options: of that tensor; the latter are its type and device.
    """

    edge: GradientEdge
    part: Callable[[Tensor], Tensor]
    shape: torch.Size
    options: dict[str, Any]


def _place_of(tensor: Tensor) -> Place:
    """The place of a tensor, taken after the operation that made it and before the next.

    What has been written in place through a view is known to autograd as a value of the whole tensor behind the view:
    a later write leads the gradient there, and no longer through the view. So a view's gradient is its part of the
    gradient of the whole.
    """
    options = {"dtype": tensor.dtype, "device": tensor.device}
    whole = tensor._base if tensor._is_view() else None
    if whole is None or not whole.requires_grad or whole.dtype != tensor.dtype:
        return Place(get_gradient_edge(tensor), lambda gradient: gradient, tensor.shape, options)
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset() - whole.storage_offset()
    whole_size, whole_stride = whole.size(), whole.stride()

    def part(gradient: Tensor) -> Tensor:
        laid_out = gradient.new_empty_strided(whole_size, whole_stride).copy_(gradient)
        return laid_out.as_strided(size, stride, offset)

    return Place(get_gradient_edge(whole), part, whole_size, options)


class PlaceRecorder(Recorder):
    """Notes each point's place in the autograd graph, and keeps no activation alive.

    Autograd attaches that place only after an operation has been dispatched, and a later operation in place would
    move it; so it is taken when the next operation, or the end of the pass, comes.

    An autograd function runs its forward without gradients. If its backward runs that forward again with gradients (a
    re-entrant checkpoint, a reversible block), its points have their places in that second run. Autograd numbers its
    nodes as they are made and runs them in falling order; so the points of a function are the first of their names
    that were made after its node and have no place yet.

    Attributes:
        places: one a point, None while no gradient can arrive.
        on_place: given each point's index and place as it becomes known.
    """

    follows_weights = False  # the same kernels as in the backward pass, where checkpoints run the model again

    def __init__(self, *args: Any, on_place: Callable[[int, Place], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_place = on_place
        self.names: list[str] = []
        self.hidden: list[tuple[int, int]] = []  # the number of the next node, and the point
        self.waiting: tuple[int, Tensor, int] | None = None
        self.unchecked = self.largest = 0

    def note_point(self, result: Tensor) -> None:
        """Note that ``result`` is a point, whose place is taken at the next operation."""
        node = _running_function()
        if node is None:
            index = len(self.names)
            self.names.append(self.stack.name)
        else:
            number = node._sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
            again = ((n, i) for n, i in self.hidden if n > number and self.names[i] == self.stack.name)
            found = next(again, None)
            if found is None:
                return
            self.hidden.remove(found)
            index = found[1]
        self.waiting = index, result, torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]

    def take(self) -> None:
        """Take the place of the last point."""
        if self.waiting is None:
            return
        index, tensor, sequence = self.waiting
        self.waiting = None
        if tensor.requires_grad:
            self.on_place(index, _place_of(tensor))
        else:
            self.hidden.append((sequence, index))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.take()
        if _in_backward() and _running_function() is None:
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._check_memory(result)
        return result

    def _check_memory(self, result: Any) -> None:
        """Stop before the activations kept for the backward pass fill the memory: the system would end the process."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.nbytes)
                self.unchecked += tensor.nbytes
        if self.unchecked > CHECK_EVERY:
            self.unchecked = 0
            free = available_memory()
            if free is not None and free < CHECK_EVERY + 2 * self.largest:
                raise MemoryError(f"{free / 2**30:.2f} GiB are free while activations are kept for the backward pass")


# The available memory is read (about 50 microseconds) each time this many bytes of results have been made; so many must
# be free beyond the two gradients of the largest activation that the backward pass holds at once.
CHECK_EVERY = 2**28


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None  # pyright: ignore[reportAttributeAccessIssue]


def _running_function() -> BackwardCFunction | None:
    """The autograd function, written in Python, whose backward is running."""
    node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
    return node if isinstance(node, BackwardCFunction) else None


class ResidualPlaces(PlaceRecorder):
    """The points are residual additions."""

    def on_addition(self, found: Residual, operands: Sequence[Tensor], run: Callable[[], Tensor]) -> Tensor:
        """Note the sum."""
        result = run()
        self.note_point(result)
        return result


class LayerPlaces(PlaceRecorder):
    """The points are the outputs of weighted operations."""

    def on_weighted(self, x: Tensor, result: Tensor) -> None:
        """Note the output."""
        if result.dim() >= 2 and result.is_floating_point():
            self.note_point(result)
