"""What a model can be given: one batch of any form, or many batches to average over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import DataLoader

from normfree.common.text import first_line, quoted
from normfree.common.torch_compat import current_autograd_node, tree_leaves, tree_map, unwrapped

Batch = Any
"""A tensor (one argument), a tuple (positional arguments) or a mapping (keyword arguments) of tensors."""

SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
"""Layouts of tensors that hold some of their values: adjacencies, masks, bags of words."""


def batches_of(batch: Batch | Iterable[Batch]) -> Iterator[Batch]:
    """One batch, or the batches of an iterable, each a tensor, a tuple of arguments or a mapping of them.

    A :class:`torch.utils.data.DataLoader` of ``(inputs, labels)`` gives its inputs.
    """
    if isinstance(batch, (Tensor, tuple, Mapping)):
        yield dict(batch) if isinstance(batch, Mapping) else batch  # other mappings hide what they hold
        return
    if isinstance(batch, np.ndarray):
        raise ValueError(f"batch: it is a NumPy array; {_FROM_NUMPY}")
    if not isinstance(batch, Iterable):
        raise ValueError(
            f"batch: {type(batch).__name__} is no batch; give a tensor, a tuple of positional or a dict of "
            "keyword arguments, an iterable of those, or None for gaussian noise"
        )
    loaded = isinstance(batch, DataLoader)
    for item in batch:
        if loaded and isinstance(item, (tuple, list)):
            yield _inputs_of(tuple(item))
        elif isinstance(item, Mapping):
            yield dict(item)
        elif isinstance(item, (Tensor, tuple)):
            yield item
        else:
            raise ValueError(
                f"batch: an item of the iterable is of type {type(item).__name__}; each must be a tensor, a tuple of "
                f"positional or a dict of keyword arguments{_if_numpy(item)}"
            )


_FROM_NUMPY = "give torch.from_numpy(array), with .float() where its numbers are float64"


def _if_numpy(batch: Any) -> str:
    """The remedy for NumPy arrays, where there are any among the leaves of a batch."""
    return f"; {_FROM_NUMPY}" if any(isinstance(leaf, np.ndarray) for leaf in tree_leaves(batch)) else ""


def _inputs_of(loaded: tuple[Any, ...]) -> Batch:
    """What a loader's item gives a model: all of it but labels."""
    if len(loaded) == 1:
        return loaded[0]
    labels = loaded[-1]
    if len(loaded) == 2 and isinstance(labels, Tensor) and not labels.is_floating_point():
        return loaded[0]
    return loaded


def check_batch(batch: Batch, argument: str = "batch") -> None:
    """Refuse a batch that holds no tensor, an empty or nested one, or values that are not finite.

    Args:
        batch: the batch.
        argument: what named it, for messages.

    Raises:
        ValueError: saying which.
    """
    __tracebackhide__ = True
    tensors = tensors_of(batch)
    if not tensors:
        if isinstance(batch, Iterable) and not (isinstance(batch, (Mapping, Sequence)) or hasattr(batch, "__array__")):
            raise ValueError(f"{argument}: it is a {type(batch).__name__}; give one batch of it: next(iter(...))")
        raise ValueError(
            f"{argument}: it holds no tensor; give a tensor, a tuple or a dict of tensors{_if_numpy(batch)}"
        )
    for tensor in tensors:
        if tensor.is_nested:
            raise ValueError(
                f"{argument}: a tensor is nested, but the examples of a batch must be of one shape; give "
                "tensor.to_padded_tensor(0.0), or a batch of examples of one length"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{argument}: a tensor of shape {tuple(tensor.shape)} is empty; give at least one example")
        if tensor.is_meta:
            raise ValueError(
                f"{argument}: a tensor of shape {tuple(tensor.shape)} is on the meta device, without values"
            )
        if tensor.is_floating_point() and (bad := int((~torch.isfinite(values_of(tensor))).sum())):
            raise ValueError(
                f"{argument}: {bad} of {tensor.numel()} input values are not finite; clean the input first"
            )


def values_of(tensor: Tensor) -> Tensor:
    """The values that a tensor stores: of a sparse one those beside its zeros."""
    if tensor.layout not in SPARSE:
        return tensor
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()


def with_values(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of a tensor whose stored values are changed; the zeros of a sparse one stay."""
    if tensor.layout not in SPARSE:
        return change(tensor)
    copy = tensor.coalesce().clone() if tensor.layout == torch.sparse_coo else tensor.clone()
    values = copy.values()
    values.copy_(change(values))
    return copy


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def examples_in(batch: Batch) -> int | None:
    """The number of examples, if all tensors agree on their leading axis."""
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def move_to_device_of(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the device of the model's parameters; tensors without values stay, for :func:`check_batch`."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batch

    def place(leaf: Any) -> Any:
        return leaf.to(parameter.device) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf

    return tree_map(place, batch)


def copy_of(batch: Batch) -> Batch:
    """The batch in memory of its own, for a model that may write into its input."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch of any form."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def gaussian_like_input_of(
    model: nn.Module, *, batch_size: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """Unit Gaussian noise in the shape the model's own description or first layer suggests.

    Args:
        model: the model.
        batch_size: examples.
        generator: to draw with, of the CPU; torch's own of the model's device by default.

    Raises:
        ValueError: if the shape cannot be inferred.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    options = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    if generator is not None:
        return torch.randn(batch_size, *input_shape(model), generator=generator).to(**options)
    return torch.randn(batch_size, *input_shape(model), **options)


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape of one example, as the model's own description or first layer suggests.

    Raises:
        ValueError: if it cannot be inferred.
    """
    shape = _described_shape(model) or _shape_from_first_layer(model)
    if shape is None:
        raise ValueError("batch: the input shape of this model cannot be inferred; give a batch")
    return shape


def _described_shape(model: nn.Module) -> tuple[int, ...] | None:
    described = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if isinstance(described, Mapping) and described.get("input_size"):
        return tuple(described["input_size"])
    channels = _first(model, nn.Conv2d)
    for name in ("image_size", "img_size", "input_size"):
        size: Any = getattr(model, name, None)
        sides = [side for side in (size if isinstance(size, (tuple, list)) else (size, size)) if type(side) is int]
        if channels is not None and len(sides) in (2, 3) and min(sides) > 0:
            return (channels.in_channels, *sides[-2:])
    return None


def _shape_from_first_layer(model: nn.Module) -> tuple[int, ...] | None:
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            return (module.in_channels, 16, 112, 112)
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, 224, 224)
        if isinstance(module, nn.Conv1d):
            return (module.in_channels, 1024)
        if isinstance(module, nn.Linear):
            return (module.in_features,)
    return None


def _first(model: nn.Module, kind: type[nn.Conv2d]) -> nn.Conv2d | None:
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of an output: a tensor, nested tuples, lists and dicts of them, or an object holding some."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not found and hasattr(output, "__dict__"):
        found = [value for value in vars(output).values() if isinstance(value, Tensor)]
    return found


def is_without_values(value: Any) -> bool:
    """Whether there are tensors in what a module takes or gives, and none of them has a value: it ran on no rows."""
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return bool(found) and all(tensor.layout == torch.strided and tensor.numel() == 0 for tensor in found)


def of_this_thread() -> Callable[[], bool]:
    """A test whether what calls it runs in this thread, or in one of autograd's.

    Torch's hooks for all modules are called in all threads, and another may run the same modules meanwhile.
    """
    here = threading.get_ident()
    return lambda: threading.get_ident() == here or current_autograd_node() is not None


class ModuleStack:
    """The modules of one model that are running now, outermost first."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.last_running = ""

    @property
    def name(self) -> str:
        """Qualified name of the innermost running module; "" is the model itself."""
        return self.names[self.running[-1]] if self.running else ""

    @contextmanager
    def follow_modules(self, on_enter: Callable[[nn.Module, tuple[Any, ...]], None] | None = None) -> Iterator[None]:
        """Keep the stack while the context is open; ``on_enter`` sees each module and its inputs."""
        is_here = of_this_thread()

        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module in self.names and is_here():
                self.running.append(module)
                self.last_running = self.name
                if on_enter is not None:
                    on_enter(module, inputs)

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if module in self.names and is_here():
                while self.running and self.running.pop() is not module:
                    pass

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.running.clear()


def run_once(model: nn.Module, batch: Batch, stack: ModuleStack) -> list[Tensor]:
    """Call the model; its output tensors, or one line that says where and why it failed."""
    __tracebackhide__ = True
    try:
        output = call(model, tree_map(lambda leaf: leaf, batch))  # in containers that a model may write into
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a forward that exits, too
        shapes = ", ".join(str(list(t.shape)) for t in tensors_of(batch))
        where = f" in {stack.last_running}" if stack.last_running else ""
        reason = first_line(error).rstrip(".")
        remedy = "give a batch that the model's forward takes"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
            remedy = "give a smaller batch or smaller images"
        if "positional argument" in reason and isinstance(batch, tuple) and not batch[-1].is_floating_point():
            remedy = "if the last of them are labels, give the inputs alone"
        if "does not require grad" in reason and not torch.is_grad_enabled():
            remedy = "it runs without gradients here: write `with torch.enable_grad():` where it differentiates"
        if "more than 1 value per channel" in reason:
            remedy = 'give a batch of two examples or more, or choose mode="eval"'
            if max((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), default=1) > 1:
                rows = "one row, or position, of the batch came to it, and it takes the statistics of what it is given"
                remedy = f'{rows}; give a batch of which two or more come to it, or choose mode="eval"'
        raise ValueError(
            f"model: {type(model).__name__} failed on an input of shape {shapes}{where}: "
            f"{type(error).__name__}: {reason}; {remedy}"
        ) from error
    tensors = tensors_in(output)
    if not tensors:
        raise ValueError(
            f"model: {type(model).__name__} returned {type(output).__name__}, which holds no tensor; "
            "its forward must return what it computes"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"model: {type(model).__name__} returned a tensor on the meta device, without values")
    return tensors


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a wrapper holds; a ValueError where there is none, or its modules are no tree."""
    __tracebackhide__ = True
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {type(model).__name__} is no torch.nn.Module")
    _check_tree(model, "", {})
    return unwrapped(model)


def _check_tree(module: nn.Module, name: str, open_: dict[int, bool]) -> None:
    """Refuse a module that was never set up, holds what is none or is a part of itself: torch's own walks fail on each.

    Args:
        module: with all below it.
        name: its place in the model.
        open_: the modules met so far, by identity, and whether they are above this one.
    """
    __tracebackhide__ = True
    if isinstance(module, torch.jit.ScriptModule):
        return
    kind = type(module).__name__
    if "_modules" not in vars(module):
        raise ValueError(f"model: {name or 'it'} is a {kind} whose __init__ does not call super().__init__() first")
    if type(module).__hash__ is None:
        raise ValueError(f"model: {name or 'it'} is a {kind} without a hash; write __hash__ = torch.nn.Module.__hash__")
    for held, allowed in (("_modules", nn.Module), ("_parameters", Tensor), ("_buffers", Tensor)):
        for own, value in vars(module)[held].items():
            if not isinstance(own, str) or not (value is None or isinstance(value, allowed)):
                what = f"a {type(value).__name__} by the name {quoted(own)}"
                raise ValueError(
                    f"model: {name or 'it'} is a {kind} that holds, in its {held}, {what}; assign it as an attribute"
                )
    open_[id(module)] = True
    for own, child in module._modules.items():
        place = f"{name}.{own}" if name else own
        if child is not None and open_.get(id(child)):
            raise ValueError(
                f"model: {place} is the {type(child).__name__} that holds it; keep a module that is above another out "
                "of its submodules, in a list, say: self.parent = [parent]"
            )
        if child is not None and id(child) not in open_:
            _check_tree(child, place, open_)
    open_[id(module)] = False
