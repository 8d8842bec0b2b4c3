"""Each private name of torch that is used says what it did: a version of torch without one fails here."""

import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from normfree.common.torch_compat import (
    ConvNd,
    ConvTransposeNd,
    NormBase,
    argument_name,
    base_of_view,
    cpu_multiplies_bf16,
    current_autograd_node,
    end_workers,
    import_tracer,
    in_forward_mode,
    in_function_transform,
    is_jit_tracing,
    next_sequence_number,
    operations_are_followed,
    preserve_version_counters,
    sequence_number,
    tree_leaves,
    unwrapped,
    without_gradient_hooks,
    written_positions,
)


class Following(TorchDispatchMode):
    follows_weights = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_the_tracer_is_imported():
    import_tracer()
    assert "torch._dynamo" in sys.modules


def test_base_classes_of_layers():
    assert issubclass(nn.Conv3d, ConvNd) and issubclass(nn.ConvTranspose1d, ConvTransposeNd)
    assert issubclass(nn.BatchNorm2d, NormBase) and not issubclass(nn.Linear, ConvNd)


def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    assert unwrapped(torch.compile(nn.DataParallel(model))) is model and unwrapped(model) is model


def test_workers_end():
    for workers in (0, 1):
        batches = iter(DataLoader([1, 2], num_workers=workers))
        next(batches)
        end_workers(batches)
    assert not any(process.is_alive() for process in batches._workers)


def test_leaves_and_capabilities():
    assert tree_leaves({"a": [1, (2, None)], "b": 3}) == [1, 2, None, 3]
    assert cpu_multiplies_bf16() in (True, False)


def test_what_follows_the_operations():
    x, seen = torch.ones(3), []

    def note(tensor):
        seen.append((in_forward_mode(), in_function_transform(), is_jit_tracing(), operations_are_followed(tensor)))
        return tensor.sum()

    note(x)
    torch.func.grad(note)(x)
    with torch.autograd.forward_ad.dual_level():
        note(x)
    torch.jit.trace(note, x, check_trace=False)
    with Following():
        note(x)
    assert seen == [
        (False, False, False, False),
        (False, True, False, True),
        (True, False, False, True),
        (False, False, True, True),
        (False, False, False, True),
    ]


def test_a_batch_of_gradients_is_followed():
    seen = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            seen.append(operations_are_followed(gradient))
            return 2 * gradient

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Doubled.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]


def test_what_an_operator_writes_to():
    assert written_positions(torch.ops.aten.add_.Tensor) == (0,) and written_positions(torch.ops.aten.add.out) == (3,)
    assert written_positions(torch.ops.aten.add.Tensor) == ()
    assert argument_name(torch.ops.aten.add.out, 3) == "out"


def test_views_and_versions():
    x = torch.zeros(4)
    assert base_of_view(x[:2]) is x and base_of_view(x) is None
    with preserve_version_counters((x,)):
        x.add_(1)
    assert x._version == 0


def test_autograd_nodes_are_numbered_in_the_order_they_are_made():
    x, seen = torch.ones(2, requires_grad=True), []
    first = next_sequence_number()
    y = x * 2
    assert first <= sequence_number(y.grad_fn) < next_sequence_number()
    y.register_hook(lambda gradient: seen.append(current_autograd_node()))
    y.sum().backward()
    assert seen != [None] and current_autograd_node() is None


def test_leaves_without_gradient_hooks():
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(seen.append)
    x.register_post_accumulate_grad_hook(seen.append)
    with without_gradient_hooks([x]):
        x.sum().backward()
    assert seen == [] and x.grad is None
    x.sum().backward()
    assert len(seen) == 2
