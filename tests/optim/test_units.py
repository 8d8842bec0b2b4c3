"""Which slices of a parameter are its units, and which layer is a network's final linear one."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import normfree
from normfree.optim import AdaptiveGradientClipping, clip_grad_adaptive_, final_linear
from normfree.optim.units import units_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nf_resnet50", "classifier"),
        ("fixup_resnet50", "classifier"),  # a scalar bias is registered after it
        ("nf_regnet_b0", "classifier"),
    ],
)
def test_final_linear_layer_of_our_networks(name, expected):
    with torch.device("meta"):
        assert final_linear(normfree.create_model(name, num_classes=10)) == expected


def test_a_network_without_a_classifier_has_none():
    with torch.device("meta"):
        model = normfree.create_model("nf_resnet50", num_classes=0, use_se=True)  # its last layer is a gate's
    assert final_linear(model) is None
    assert len(units_of(model)) == len(list(model.parameters()))


class Training(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "2"),
        (nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 1, 3)), None),
        (nn.Linear(3, 4), ""),
        (Training(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), "net.2"),
        (nn.Sequential(nn.Linear(3, 4)), "0"),
        (nn.Conv2d(3, 4, 3), None),
    ],
)
def test_final_linear_layer_of_any_network(model, expected):
    assert final_linear(model) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", "fc"), ("vgg11", "classifier.6"), ("vit_b_32", "heads.head")]
)
def test_final_linear_layer_of_torchvision(name, expected):
    import torchvision

    with torch.device("meta"):
        assert final_linear(torchvision.models.get_model(name)) == expected


def names(model, **options):
    return {one.name for one in units_of(model, **options)}


def test_only_the_final_weight_is_left_alone_not_its_bias():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert names(model) == {"0.weight", "0.bias", "2.bias"}
    assert names(model, exclude=()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert names(model, exclude=["0"]) == {"2.weight", "2.bias"}
    assert names(model, exclude=["0.bias"]) == {"0.weight", "2.weight", "2.bias"}


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
    assert {one.name: (one.count, one.kept) for one in units_of(layer)} == {"weight": (4, (0, 2)), "bias": (1, ())}
    wrapped = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(6, 4, 3))
    assert {one.name: one.count for one in units_of(wrapped)} == {"bias": 1, "parametrizations.weight.original": 4}


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
