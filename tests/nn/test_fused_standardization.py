"""The kernels for a GPU, run by Triton's interpreter, against float64; the tests on a GPU are in tests/gpu."""

import os
import subprocess
import sys

import pytest
import torch

from normfree.nn import standardization

pytest.importorskip("triton")

CODE = """
import torch
from normfree.nn.fused_standardization import FusedStandardization, takes, try_out
from normfree.nn.standardization import standardized_step_by_step

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
        wanted = derivatives(standardized_step_by_step, torch.float64, shape, layout)
        errors = []
        for one, other in zip(found, wanted, strict=True):
            errors.append(float((one - other).abs().max() / other.abs().max()))
        print(max(errors[:3]), max(errors[3:]))

weight, gain = torch.randn(4, 30), torch.rand(4)
half = FusedStandardization.apply(weight.bfloat16(), gain, 1.3)
assert half.dtype == torch.bfloat16
torch.testing.assert_close(half.float(), standardized_step_by_step(weight, gain, 1.3), rtol=0.02, atol=0.02)
for wide in (torch.rand(1).expand(4), torch.rand(8)[::2]):  # a gain that does not lie in one piece
    wide.requires_grad_(wide.is_leaf)
    found = FusedStandardization.apply(weight, wide, 1.3)
    torch.testing.assert_close(found, standardized_step_by_step(weight, wide, 1.3))
assert not takes(weight, torch.ones(1)) and not takes(weight, torch.ones(4, dtype=torch.float64))
with torch.inference_mode():
    try_out(torch.device("cpu"))
"""


def test_kernels_agree_with_float64_forward_backward_and_twice():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    errors = [tuple(map(float, line.split())) for line in run.stdout.splitlines()]
    assert len(errors) == 8
    assert max(first for first, _ in errors) < 1e-6
    assert max(second for _, second in errors) < 1e-3  # differences of much larger numbers, in float32


def test_where_they_cannot_be_built_a_warning_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    standardization._kernels.cache_clear()
    with pytest.warns(UserWarning, match="several calls each: no kernels here"):
        assert standardization._kernels(torch.device("cpu")) is None
    standardization._kernels.cache_clear()
