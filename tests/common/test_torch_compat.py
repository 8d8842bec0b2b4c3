"""Each private name of torch that is used says what it did: a version of torch without one fails here."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.common.torch_compat import (
    ConvNd,
    ConvTransposeNd,
    NormBase,
    in_forward_mode,
    in_function_transform,
    is_jit_tracing,
    operations_are_followed,
)


class Following(TorchDispatchMode):
    follows_weights = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_base_classes_of_layers():
    assert issubclass(nn.Conv3d, ConvNd) and issubclass(nn.ConvTranspose1d, ConvTransposeNd)
    assert issubclass(nn.BatchNorm2d, NormBase) and not issubclass(nn.Linear, ConvNd)


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
