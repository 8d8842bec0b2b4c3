"""Centred weights: the function does not change by a move of the means, the gradient is that of centred inputs."""

import copy

import pytest
import torch
from nn.test_scaled_ws_layers import LAYERS
from torch import nn

import normfree
from normfree.nn import centre_weights, fold
from normfree.nn.centring import move_input_mean
from normfree.optim import InputCentring, WeightAverage, muon_sgd


def layer_named(name):
    scaled, _, sizes, options, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = scaled(*sizes, input_scale=1.7, alpha=0.3, skip_gain=0.6, **options).double()
    nn.init.normal_(layer.bias), nn.init.normal_(layer.gain)
    return layer, torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_move_of_the_means_does_not_change_the_function(name):
    layer, x = layer_named(name)
    before = layer(x)
    centre_weights(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13)
    for seed in (1, 2):
        means = torch.randn(layer.input_mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        bias = layer.bias.detach().clone()
        move_input_mean(layer, means)
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
        # A depthwise filter sums to zero over the one channel it sees: standardization has centred it already.
        assert torch.allclose(layer.bias, bias) == (name == "depthwise")
    torch.testing.assert_close(fold(nn.Sequential(layer))(x), before, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_linear_layer_is_that_of_centred_inputs():
    """Weights whose gain and scale are such that the standardized weight's gradient can be taken by itself."""
    torch.manual_seed(0)
    layer = normfree.nn.ScaledWSLinear(5, 3).double()
    centre_weights(layer)
    x, delta = torch.rand(7, 5, dtype=torch.float64) + 2, torch.randn(7, 3, dtype=torch.float64)
    move_input_mean(layer, x.mean(0))
    made = layer.scaled_weight
    weights = []

    def kept(scale):
        weights.append(made(scale))
        weights[-1].retain_grad()
        return weights[-1]

    layer.scaled_weight = kept
    (layer(x) * delta).sum().backward()
    torch.testing.assert_close(weights[0].grad, delta.T @ (x - x.mean(0)))
    torch.testing.assert_close(layer.bias.grad, delta.sum(0))


def network():
    torch.manual_seed(0)
    layer = normfree.nn.ScaledWSConv2d
    return nn.Sequential(
        layer(3, 8, 3), nn.ReLU(), layer(8, 8, 3, groups=2, alpha=0.5, skip_gain=0.0), nn.Flatten(), nn.Linear(288, 3)
    )


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)


def test_steps_move_towards_the_means_of_the_batches_and_no_output_changes():
    model, x = network().double(), torch.rand(8, 3, 6, 6, dtype=torch.float64) + 1
    centring = InputCentring(model, rate=0.25, share=1.0)
    wanted = model(x)
    centring.step()
    model.eval()
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].input_mean.detach(), 0.25 * x.mean((0, 2, 3)))
    hidden = model[1](model[0](x))
    torch.testing.assert_close(model[2].input_mean.detach(), 0.25 * hidden.mean((0, 2, 3)))
    model(x + 5)  # evaluation measures nothing
    before = model[0].input_mean.clone()
    centring.step()
    assert torch.equal(model[0].input_mean, before)
    model.train(), centring.close()
    model(x + 5), centring.step()  # nor does anything once it is closed
    assert torch.equal(model[0].input_mean, before)


def test_micro_batches_have_the_gradient_of_the_whole():
    whole, split = network().double(), network().double()
    x, labels = torch.rand(8, 3, 6, 6, dtype=torch.float64) + 1, torch.arange(8) % 3
    for model, parts in ((whole, [x]), (split, [x[:4], x[4:]])):
        centring = InputCentring(model, rate=0.5, share=1.0)
        for _ in range(2):
            model.zero_grad()
            for part, own in zip(parts, labels.split(len(parts[0])), strict=True):
                (nn.functional.cross_entropy(model(part), own) * len(part) / len(x)).backward()
            centring.step()
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_training_centred_goes_another_way_and_an_average_keeps_its_function():
    x = torch.rand(8, 3, 6, 6) + 1
    plain, centred = network(), network()
    centring, average = InputCentring(centred), WeightAverage(centred, 0.5)
    for model in (plain, centred):
        optimizer = muon_sgd(model, 0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            if model is centred:
                centring.step()
                average.update()
    centred.eval(), plain.eval()
    assert not torch.allclose(plain(x), centred(x))
    # The average of the biases that fold stores is what the averaged bias and mean give, to second order in the moves.
    folded = fold(average.module)
    torch.testing.assert_close(folded(x), average.module(x), rtol=1e-4, atol=1e-5)
    assert float(average.module[0].input_mean.abs().min()) > 0


def test_by_name_it_is_saved_and_loaded(tmp_path):
    options = {"depths": (1, 1, 1, 1), "width": 0.25, "num_classes": 3, "centred": True}
    model = normfree.create_model("nf_resnet50", **options)
    x = torch.rand(2, 3, 32, 32)
    centring = InputCentring(model)
    model(x), centring.step(), centring.close()
    model.eval()
    normfree.save(model, tmp_path / "model.safetensors")
    again = normfree.load(tmp_path / "model.safetensors").eval()
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(normfree.fold(again)(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any("input_mean" in name for name in normfree.fold(again).state_dict())
    result = normfree.spp(model, x)
    other = copy.deepcopy(model)
    for module in other.modules():
        if getattr(module, "input_mean", None) is not None:
            move_input_mean(module, torch.zeros_like(module.input_mean))
    for a, b in zip(result.blocks, normfree.spp(other, x).blocks, strict=True):
        assert a.residual_avg_channel_var == pytest.approx(b.residual_avg_channel_var, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: centre_weights(nn.Linear(3, 2)), "model='Linear'"),
        (lambda: InputCentring(network(), rate=0.0), "rate=0.0"),
        (lambda: InputCentring(network(), rate=1.5), "rate=1.5"),
        (lambda: InputCentring(network(), share=2.0), "share=2.0"),
        (lambda: normfree.create_model("resnetv2_50", centred=True), "centred=True"),
        (lambda: normfree.create_model("nf_resnet50", centred=1), "centred=1"),
    ],
)
def test_mistakes_are_named(call, key):
    with pytest.raises(ValueError, match=key):
        call()
