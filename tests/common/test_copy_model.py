"""Copies of models that hold computed tensors."""

import sys
import threading

import pytest
import torch
from torch import nn

import normfree
from normfree.common.torch_compat import copy_model

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reparametrize", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("copied", [copy_model, normfree.fold])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm.*is deprecated:FutureWarning")
def test_a_model_whose_hook_has_computed_its_weight_is_copied(reparametrize, copied):
    model = nn.Sequential(reparametrize(nn.Linear(6, 3)), nn.ReLU())
    model(X).sum().backward()
    model.eval()
    wanted, computed = model(X), model[0].weight
    copy = copied(model)
    assert model[0].weight is computed
    torch.testing.assert_close(copy(X), wanted)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(-2)
    torch.testing.assert_close(model(X), wanted)
    assert not torch.allclose(copy(X), wanted), "the hook computes the copy's weight from the copy's parameters"


def test_tensors_in_containers_are_copied_too():
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.computed = {"twice": [self.scale * 2]}

    model = Holding()
    copy = copy_model(model)
    assert copy.computed["twice"][0].tolist() == [2.0] and copy.computed["twice"][0].is_leaf
    assert copy.scale is not model.scale


@pytest.mark.parametrize("copied", [copy_model, normfree.fold])
@pytest.mark.parametrize("attribute", [threading.Lock(), (number for number in "12"), sys.stdout])
def test_what_cannot_be_copied_is_one_line(copied, attribute):
    model = nn.Linear(6, 3)
    model.attribute = attribute
    with pytest.raises(ValueError, match=r"^model: Linear cannot be copied \(\w+: .*\); take off"):
        copied(model)
