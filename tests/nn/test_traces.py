"""Symbolic traces of every family, folded and not, and TorchScript of the folded: the same outputs."""

from __future__ import annotations

import io

import pytest
import torch
import torch.fx
from small_families import FAMILIES, randomised
from torch import nn

from normfree import nn as ours
from normfree.nn import fold

DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit")
CALLED = {"fixup_resnet50": {"activation": "silu"}}  # ReLU notes nothing


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("name", FAMILIES)
def test_symbolic_traces(name, padding):
    model = randomised(name, padding=padding, **CALLED.get(name, {})).eval()
    x, other = torch.randn(2, 3, 64, 64), torch.randn(1, 3, 65, 47)
    for given in (model, fold(model)):
        traced = torch.fx.symbolic_trace(given)
        assert torch.equal(traced(x), given(x))
        assert torch.equal(traced(other), given(other))  # "same" padding depends on the size


@pytest.mark.parametrize("name", ["nf_resnet50", "nfnet_f0", "fixup_resnet50"])
def test_a_symbolic_trace_trains_alike(name):
    model = randomised(name, drop_rate=0.0, stochdepth_rate=0.0)
    traced = torch.fx.symbolic_trace(model)
    x, gradients = torch.randn(2, 3, 40, 40), []
    for given in (model, traced):
        model.zero_grad()
        given(x).square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in given.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_symbolic_traces_of_other_layouts():
    model = nn.Sequential(
        ours.KeptMeanConv2d(3, 4, 3), ours.ScaledWSConvTranspose2d(4, 6, 2, stride=2), ours.KeptMeanLinear(8, 5)
    )
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@DEPRECATED
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_model_is_scripted_saved_and_read(name):
    folded = fold(randomised(name, **CALLED.get(name, {})))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(folded), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for shape in ((2, 3, 64, 64), (1, 3, 65, 47)):
        x = torch.randn(*shape)
        torch.testing.assert_close(scripted(x), folded(x))
    scripted.train()
    assert scripted(torch.randn(2, 3, 64, 64)).isfinite().all()
