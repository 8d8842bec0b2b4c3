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


class OwnCopies(nn.BatchNorm1d):
    """A layer that is copied by code of its own."""

    def __init__(self, way):
        super().__init__(6)
        self.way = way

    def __deepcopy__(self, memo):
        return self.way(self)


def with_statistics_of(layer):
    other = nn.BatchNorm1d(6)
    other.running_mean = layer.running_mean.view(2, 3).flatten()
    return other


def writing(layer):
    layer.weight.data.fill_(7)
    with torch.no_grad():
        layer.running_mean.fill_(float("nan"))
    return nn.BatchNorm1d(6)


@pytest.mark.parametrize("copied", [copy_model, normfree.fold, normfree.optim.WeightAverage])
@pytest.mark.parametrize("way", [lambda layer: layer, with_statistics_of])
def test_a_copy_that_shares_a_part_with_the_model_is_refused(copied, way):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(OwnCopies(way)))
    with pytest.raises(ValueError, match=r"gives '1\.0' \(\w+\) itself, or its parameters or buffers, not copies"):
        copied(model)


def test_tensors_tied_inside_a_model_stay_tied_in_the_copy():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    copy = copy_model(model)
    assert copy[1].weight is copy[0].weight


def test_what_is_written_while_a_model_is_copied_is_put_back():
    model = nn.Sequential(nn.Linear(6, 6), OwnCopies(writing))
    loss = model(X).square().sum()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy_model(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    loss.backward()
