"""Which slices of a parameter are its units, and which parameters are left alone."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from normfree.optim import AdaptiveGradientClipping, clip_grad_adaptive_
from normfree.optim.clipping import units_of


def names(model, **options):
    return {one.name for one in units_of(model, **options)}


def test_only_the_final_weight_is_left_alone_not_its_bias():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert names(model) == {"0.weight", "0.bias", "2.bias"}
    assert names(model, exclude=()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert names(model, exclude=["0"]) == {"2.weight", "2.bias"}
    assert names(model, exclude=["0.bias"]) == {"0.weight", "2.weight", "2.bias"}


def test_every_head_is_left_alone_and_a_network_without_one_is_said_to_have_none():
    trunk = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    heads = nn.ModuleDict({"policy_head": nn.Linear(4, 2), "value_head": nn.Conv1d(4, 1, 1)})
    assert names(nn.ModuleDict({"trunk": trunk, "heads": heads})) == {
        "trunk.0.weight", "trunk.0.bias", "heads.policy_head.bias", "heads.value_head.bias",
    }  # fmt: skip
    backbone = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 4))
    with pytest.warns(UserWarning, match=r"exclude: .*exclude=\(\)"):
        assert names(backbone) == {name for name, _ in backbone.named_parameters()}


def test_a_parametrized_final_weight_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    assert names(model) == {"0.weight", "0.bias", "1.bias"}


def test_a_weight_tied_to_the_final_layer_is_left_alone_and_shared_ones_come_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["embedding"].weight = model["head"].weight
    assert names(model) == {"head.bias"}
    assert len(units_of(model, ())) == 2


def test_units_of_transposed_convolutions_also_behind_a_parametrization():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    assert {one.name: (one.count, one.kept) for one in units_of(layer, ())} == {"weight": (4, (0, 2)), "bias": (1, ())}
    wrapped = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(6, 4, 3))
    assert {one.name: one.count for one in units_of(wrapped, ())} == {"bias": 1, "parametrizations.weight.original": 4}


def test_wrappers_are_looked_through():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert names(torch.compile(model)) == names(nn.DataParallel(model)) == names(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: clip_grad_adaptive_(m, 0.0), "clip_factor=0.0.*above 0"),
        (lambda m: clip_grad_adaptive_(m, eps=-1.0), "eps=-1.0"),
        (lambda m: clip_grad_adaptive_(m, exclude="weight"), r"exclude='weight'.*exclude=\['weight'\]"),
        (lambda m: clip_grad_adaptive_(m, exclude=["wight"]), "exclude='wight'.*did you mean weight"),
        (lambda m: clip_grad_adaptive_(m.named_parameters()), "exclude=None.*pass the model"),
        (lambda m: clip_grad_adaptive_(m.parameters(), exclude=()), "parameters='Parameter'.*named_parameters"),
        (lambda m: clip_grad_adaptive_(SGD(m.parameters())), "^parameters='SGD': must be a module.*; pass the model"),
        (lambda m: AdaptiveGradientClipping(m, SGD(m.parameters())), "^optimizer='Linear': .*; swap the first two"),
        (lambda m: AdaptiveGradientClipping(m, 0.01), "^optimizer='Linear': .*optimizer first and the model second"),
        (lambda m: AdaptiveGradientClipping(SGD(m.parameters()), 0.01), "^parameters='float': must be a module"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Linear(3, 2))


def test_parameters_that_fsdp1_flattened_are_refused():
    layer = nn.Linear(3, 2)
    layer.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="fully_shard"):
        clip_grad_adaptive_(layer, exclude=())
