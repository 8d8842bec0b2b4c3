"""Names of torch that have no public form, in one place; ``tests/common/test_torch_compat.py`` calls each of them.

All are in torch 2.9 to 2.12.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserve_version_counters
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from normfree.common.process import one_thread_at_a_time
from normfree.common.text import one_line, quoted

__all__ = [
    "ConvNd",
    "ConvTransposeNd",
    "DispatchMode",
    "NormBase",
    "argument_name",
    "base_of_view",
    "cpu_multiplies_bf16",
    "current_autograd_node",
    "end_workers",
    "import_tracer",
    "in_forward_mode",
    "in_function_transform",
    "is_jit_tracing",
    "memory_of",
    "next_sequence_number",
    "operations_are_followed",
    "preserve_version_counters",
    "sequence_number",
    "tree_leaves",
    "tree_map",
    "unwrapped",
    "without_gradient_hooks",
    "written_positions",
]


class DispatchMode(TorchDispatchMode):
    """A dispatch mode whose own code is not compiled, and that imports no compiler to see to it.

    torch's own mode imports ``torch._dynamo`` with the first operation, which takes a second, and fails where a lazy
    module of another package does. What was not imported compiles nothing.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # done here

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dispatch = cls.__dict__.get("__torch_dispatch__")
        if dispatch is None:
            return
        not_compiled = torch._disable_dynamo(dispatch)  # pyright: ignore[reportPrivateImportUsage]

        @wraps(dispatch)
        def outside_compiler(*args: Any, **kwargs: Any) -> Any:
            return (not_compiled if "torch._dynamo" in sys.modules else dispatch)(*args, **kwargs)

        cls.__torch_dispatch__ = outside_compiler


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def in_function_transform() -> bool:
    """Return whether a transform of ``torch.func`` (grad, vmap, jvp, …) is running."""
    return torch._C._are_functorch_transforms_active()


def is_jit_tracing() -> bool:
    """Return whether ``torch.jit.trace`` or the TorchScript ONNX exporter is running."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def operations_are_followed(*tensors: Tensor) -> bool:
    """Return whether something other than eager autograd follows the operations on tensors one by one.

    A kernel of our own would be missing from what it sees: compilers and tracers, the transforms of ``torch.func``,
    forward mode, batches of gradients, subclasses of tensors, and dispatch modes that stand for tensors or, as the
    recorder of ``spp``, have an attribute ``follows_weights``.
    """
    return (
        torch.compiler.is_compiling()
        or is_jit_tracing()
        or in_function_transform()
        or in_forward_mode()
        or (torch._C._len_torch_dispatch_stack() > 0 and any(map(_follows, _get_current_dispatch_mode_stack())))
        or not all(map(_is_plain, tensors))
    )


def _follows(mode: Any) -> bool:
    return getattr(mode, "_mode_key", None) is not None or getattr(mode, "follows_weights", False)


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not (_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))


def import_tracer() -> None:
    """Import what torch itself imports with the first compilation, export or step of an optimizer.

    That import looks through all modules there are, and fails where a lazy one among them does: call it before a file
    of a model is imported, if any of these comes after it.
    """
    importlib.import_module("torch._dynamo")


def written_positions(function: Any) -> tuple[int, ...]:
    """Return the positions of the arguments that an ATen operator writes to."""
    if not function._schema.is_mutable:
        return ()
    arguments = enumerate(function._schema.arguments)
    return tuple(i for i, each in arguments if each.alias_info is not None and each.alias_info.is_write)


def argument_name(function: Any, position: int) -> str:
    """Return the name of an ATen operator's argument."""
    return function._schema.arguments[position].name


def base_of_view(tensor: Tensor) -> Tensor | None:
    """Return the tensor that a view looks at, None for one that is no view."""
    return tensor._base if tensor._is_view() else None


def current_autograd_node() -> Any:
    """Return the autograd node whose backward is running in this thread; None outside a backward pass."""
    return torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]


def next_sequence_number() -> int:
    """Return the number that the next autograd node will have; they rise in the order of the forward pass."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


def sequence_number(node: Any) -> int:
    """Return the number of an autograd node."""
    return node._sequence_nr()


@contextmanager
def without_gradient_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Leave no gradient on leaf tensors, and run none of the hooks they have, while the context is open."""
    kept = [(t, t.grad, t._backward_hooks, t._post_accumulate_grad_hooks) for t in leaves]
    for leaf in leaves:
        leaf.grad = leaf._backward_hooks = None
        leaf._post_accumulate_grad_hooks = OrderedDict()  # None would leave those that are there
    try:
        yield
    finally:
        for leaf, gradient, hooks, accumulated in kept:
            leaf.grad, leaf._backward_hooks, leaf._post_accumulate_grad_hooks = gradient, hooks, accumulated


def end_workers(batches: Any) -> None:
    """End the worker processes of a ``DataLoader``'s iterator; does nothing to one without workers, or ended."""
    if not hasattr(batches, "_shutdown_workers"):
        return
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():  # stuck; it may ignore the SIGTERM that torch has sent
            worker.kill()


def cpu_multiplies_bf16() -> bool:
    """Return whether the CPU multiplies bf16 natively: AVX512-BF16, AMX, or ARM's BF16 extension."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that a compiled, data-parallel or Lightning Fabric wrapper holds; any other is its own."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "_original_module", None))  # torch.compile, Fabric
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


Model = TypeVar("Model", bound=nn.Module)


@one_thread_at_a_time()
def copy_model(model: Model) -> Model:
    """Return a deep copy of a model, which shares no module and no memory of a parameter or buffer with it.

    Hooks such as those of ``torch.nn.utils.weight_norm`` and ``spectral_norm`` leave the weight they have computed as a
    plain attribute, with the graph of its computation, and ``copy.deepcopy`` takes no such tensor. It is copied
    without its graph: the hook, which is copied, too, computes it anew before the next forward.

    A model that another thread measures is copied afterwards, without the hooks and the mode of a measurement. What
    the code by which a module is copied writes to the model's parameters and buffers is taken back.

    Raises:
        ValueError: if it holds what copy.deepcopy does not copy, or a module whose copy shares a part with it.
    """
    held = [leaf for module in model.modules() for leaf in tree_leaves(list(vars(module).values()))]
    computed = {id(leaf): leaf.detach().clone() for leaf in held if isinstance(leaf, Tensor) and not leaf.is_leaf}
    try:
        with _weights_put_back(model):
            copied = copy.deepcopy(model, computed)
    except Exception as error:  # of an attribute's own class
        raise ValueError(
            f"model: {type(model).__name__} cannot be copied ({one_line(error, 120)}); take off what copy.deepcopy "
            "does not copy, such as a lock or a file, or give its class a __deepcopy__"
        ) from error
    _check_separate(model, copied)
    return copied


@contextmanager
def _weights_put_back(model: nn.Module) -> Iterator[None]:
    """Restore parameters and buffers at the end, if a module defines how it is copied (``__deepcopy__``, …)."""
    ways = ("__getstate__", "__reduce__", "__reduce_ex__")
    own = any(hasattr(one, "__deepcopy__") for one in model.modules())
    own = own or any(getattr(type(one), way) is not getattr(nn.Module, way) for one in model.modules() for way in ways)
    tensors = [*model.parameters(), *model.buffers()] if own else []
    tensors = [one for one in tensors if memory_of(one)[0] and one.layout == torch.strided]
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with preserve_version_counters(tuple(tensor for tensor in tensors if not tensor.is_inference())):
        try:
            yield
        finally:
            for tensor, numbers in kept:
                if not torch.equal(tensor, numbers):
                    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                        tensor.copy_(numbers)


def _check_separate(model: nn.Module, copied: nn.Module) -> None:
    """Refuse a copy with a module of the model itself, or with a parameter or buffer in the memory of one.

    Raises:
        ValueError: naming the module.
    """
    __tracebackhide__ = True
    modules = set(model.modules())
    held = [*model.parameters(), *model.buffers()]
    tensors, memory = {id(one) for one in held}, {memory_of(one)[0] for one in held} - {0}
    for name, module in copied.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if module in modules or any(t is not None and (id(t) in tensors or memory_of(t)[0] in memory) for t in own):
            part = f"{quoted(name)} ({type(module).__name__})" if name else type(module).__name__
            raise ValueError(
                f"model: copying it gives {part} itself, or its parameters or buffers, not copies, and what is done to "
                "the copy would be done to the model; have its __deepcopy__ make new ones, or take it off"
            )


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's memory begins, whatever view it is, and its bytes; zeros if it has none of its own."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError, ValueError):  # a sparse, a wrapped, a lazy one
        return 0, 0
