"""The kernels for a GPU, run by Triton's interpreter, against float64; the tests on a GPU are in tests/gpu."""

import os
import subprocess
import sys

import pytest
import torch

from normfree.nn import scaled_ws

pytest.importorskip("triton")

CODE = """
import torch
from normfree.nn.gpu_standardization import FusedStandardization, takes, try_out
from normfree.nn.standardization import standardize_by_equation

def derivatives(function, dtype, shape, layout):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[0] = 0.3  # constant
    weight[1] *= 1e-4  # below the floor
    factors = torch.randn(shape, generator=generator).to(dtype)
    weight = weight.to(dtype).contiguous(memory_format=layout).requires_grad_()
    gain = torch.linspace(0.5, 2, shape[0], dtype=dtype).requires_grad_()
    result = function(weight, gain, 1.3)
    assert result.stride() == weight.stride() and (dtype == torch.float64) != takes(weight, gain)
    loss = (result * factors).sum()
    plain = torch.autograd.grad(loss, (weight, gain), retain_graph=True)
    first = torch.autograd.grad(loss, (weight, gain), create_graph=True)
    second = torch.autograd.grad(1e-8 * first[0].square().sum() + first[1].square().sum(), (weight, gain))
    return result, *plain, *first, *second

for shape in ((5, 3, 3, 3), (7, 1, 3, 3), (4, 30), (3, 8, 1, 1), (3, 4, 5)):
    for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
        found = derivatives(FusedStandardization.apply, torch.float32, shape, layout)
        wanted = derivatives(standardize_by_equation, torch.float64, shape, layout)
        errors = []
        for one, other in zip(found, wanted, strict=True):
            errors.append(float((one - other).abs().max() / other.abs().max()))
        print(max(errors[:3]), max(errors[3:]))

weight, gain = torch.randn(4, 30), torch.rand(4)
half = FusedStandardization.apply(weight.bfloat16(), gain, 1.3)
assert half.dtype == torch.bfloat16
torch.testing.assert_close(half.float(), standardize_by_equation(weight, gain, 1.3), rtol=0.02, atol=0.02)
for wide in (torch.rand(1).expand(4), torch.rand(8)[::2]):  # a gain that does not lie in one piece
    found = FusedStandardization.apply(weight, wide, 1.3)
    torch.testing.assert_close(found, standardize_by_equation(weight, wide, 1.3))
assert not takes(weight, torch.ones(1)) and not takes(weight, torch.ones(4, dtype=torch.float64))
with torch.inference_mode():
    try_out(torch.device("cpu"))
"""


CHOICE = """
import warnings
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from normfree import create_model, spp
from normfree.common.torch_compat import operations_are_followed
from normfree.nn import ScaledWSConv2d, ScaledWSConvTranspose2d, scaled_ws, standardize
from normfree.nn.standardization import standardize_by_equation

warnings.simplefilter("error", UserWarning)
torch.manual_seed(0)
weight, gain = torch.randn(4, 3, 3, 3).requires_grad_(), torch.rand(4).requires_grad_()
images = torch.randn(2, 3, 8, 8)
native = standardize(weight, gain, 1.3)
scaled_ws.on_gpu = lambda weight: True
chosen = lambda: scaled_ws.kernels_for(weight, gain) is not None

class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch = ScaledWSConv2d(3, 8, 3), ScaledWSConv2d(8, 8, 3)

    def forward(self, x):
        x = checkpoint(self.stem, x, use_reentrant=False)
        for _ in range(2):
            x = x + checkpoint(lambda x: self.branch(x.relu()), x, use_reentrant=False)
        return x

# The first use of all is inside a checkpoint, and its tensors are saved twice.
net = Checkpointed()
net(images).square().mean().backward()
assert chosen() and "Fused" in type(standardize(weight, gain, 1.3).grad_fn).__name__
torch.testing.assert_close(standardize(weight, gain, 1.3), native)
assert len(spp(net, images, gradient=True).blocks) == 2
with FlopCounterMode(display=False):
    loss = net(images).square().mean()
loss.backward()

# Whoever follows the operations gets the native ones.
assert torch.compile(lambda: chosen(), backend="eager")() is False
torch.func.vmap(lambda w: standardize(w, gain, 1.3))(weight.detach()[None])
with torch.autograd.forward_ad.dual_level():
    assert not chosen()
assert not operations_are_followed(weight)
torch.fx.symbolic_trace(net.branch)
torch.export.export(net.branch, (torch.randn(2, 8, 8, 8),))
muted = create_model("nf_resnet50", depths=(1, 1, 1, 1), width=0.25, num_classes=2)
scaled_ws.on_gpu = lambda weight: False
expected = spp(muted, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
scaled_ws.on_gpu = lambda weight: True
found = spp(muted, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
assert any(block.woken for block in found.blocks)
for mine, theirs in zip(found.blocks, expected.blocks, strict=True):
    assert mine.woken == theirs.woken
    assert abs(mine.residual_avg_channel_var / theirs.residual_avg_channel_var - 1) < 1e-3

# Gradients in batches, twice, and of a gain that was computed from the weight.
both = [standardize(weight, gain, 1.3), standardize_by_equation(weight, gain, 1.3)]
many = torch.randn(5, *weight.shape)
for one, other in zip(*(torch.autograd.grad(r, (weight, gain), many, is_grads_batched=True) for r in both)):
    torch.testing.assert_close(one, other)
norm = lambda: weight.square().sum((1, 2, 3)).sqrt()
results = [f(weight, norm(), 1.3) for f in (standardize, standardize_by_equation)]
firsts = [torch.autograd.grad((r * many[0]).sum(), weight, create_graph=True)[0] for r in results]
torch.testing.assert_close(*firsts)
seconds = [torch.autograd.grad(first.square().sum(), weight)[0] for first in firsts]
torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-4)

# A transposed convolution's filters do not lie in one piece; other numbers are refused as they were.
up, x = ScaledWSConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5)
up(x).square().mean().backward()
gradient = up.weight.grad.clone()
up.weight.grad = None
scaled_ws.on_gpu = lambda weight: False
up(x).square().mean().backward()
torch.testing.assert_close(gradient, up.weight.grad)
scaled_ws.on_gpu = lambda weight: True
for wrong in (torch.ones(4, 30, dtype=torch.int32), torch.randn(4, 30, dtype=torch.complex64), torch.randn(0, 30)):
    assert scaled_ws.kernels_for(wrong, torch.ones(len(wrong))) is None
"""


def interpreted(code):
    """What a program prints whose kernels run on the CPU, a statement at a time."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_kernels_agree_with_float64_forward_backward_and_twice():
    errors = [tuple(map(float, line.split())) for line in interpreted(CODE).splitlines()]
    assert len(errors) == 8
    assert max(first for first, _ in errors) < 1e-6
    assert max(second for _, second in errors) < 1e-3  # differences of much larger numbers, in float32


def test_they_are_chosen_where_nobody_has_to_see_the_operations():
    interpreted(CHOICE)


def test_where_they_cannot_be_built_a_warning_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scaled_ws.gpu_kernels.cache_clear()
    with pytest.warns(UserWarning, match="several calls each: no kernels here"):
        assert scaled_ws.gpu_kernels(torch.device("cpu")) is None
    assert scaled_ws.gpu_kernels(torch.device("cpu")) is None  # and is told once
