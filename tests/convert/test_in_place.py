"""After conversion nothing writes in place into what a layer gave, so that hooks see what they saw before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from convert.nets import randomise
from torch import nn

import normfree
from normfree.nn import Copy, OutputCopy

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STARTS = pytest.mark.parametrize("start", ["fresh", "pretrained"])
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def overwritten(model, x):
    """The layers whose output has changed by the end of the forward pass."""
    seen, handles = [], []

    def keeping(name):
        return lambda module, inputs, output: seen.append((name, output, output.clone()))

    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            handles.append(module.register_forward_hook(keeping(name)))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    assert seen
    return [name for name, output, before in seen if not torch.equal(output, before)]


class Block(nn.Module):
    """A convolution, its norm, and something in place behind them."""

    def __init__(self, behind, **more):
        super().__init__()
        self.conv, self.norm, self.behind = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), behind
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.behind(self, x, self.norm(self.conv(x)))


def adds(net, x, y):
    y += x
    return y


def adds_to_the_shortcut(net, x, y):
    shortcut = net.norm2(net.conv2(x))
    shortcut += y.relu()
    return shortcut


def calls_twice(net, x, y):
    y = net.act(y)
    y += x
    return net.act(y)


PROJECTED = {"conv2": nn.Conv2d(3, 3, 1), "norm2": nn.BatchNorm2d(3)}
BLOCKS = {
    "a module": (lambda net, x, y: net.act(y), {"act": nn.ReLU(inplace=True)}, 0),
    "a module behind a view": (lambda net, x, y: net.act(y.flatten(2)).view_as(x), {"act": nn.SiLU(inplace=True)}, 0),
    "a function": (lambda net, x, y: F.relu(y, inplace=True), {}, 1),
    "a method": (lambda net, x, y: y.clamp_(min=0), {}, 1),
    "a sum": (adds, {}, 1),
    "a sum into the shortcut": (adds_to_the_shortcut, PROJECTED, 1),
    "one module twice": (calls_twice, {"act": nn.ReLU(inplace=True)}, 0),
    "a dropout": (lambda net, x, y: net.drop(y), {"drop": nn.Dropout(0.5, inplace=True)}, 0),
    "a functional dropout": (lambda net, x, y: F.dropout(y, 0.5, net.training, inplace=True), {}, 1),
}


@STARTS
@pytest.mark.parametrize("name", BLOCKS)
def test_no_layers_output_is_overwritten(name, start):
    behind, more, copies = BLOCKS[name]
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), Block(behind, **more), nn.Conv2d(3, 2, 1))).eval()
    converted = normfree.convert(model, IMAGES, start=start)
    assert not converted.conversion.norms_left
    assert overwritten(converted, IMAGES) == []
    assert overwritten(converted.train(), IMAGES) == []
    assert sum(isinstance(module, OutputCopy) for module in converted.modules()) == copies
    assert not any(isinstance(module, Copy) for module in normfree.fold(converted).modules())
    if start == "pretrained":
        torch.testing.assert_close(converted.eval()(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(normfree.fold(converted)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@STARTS
def test_an_activation_inside_of_a_norm_works_out_of_place(start):
    from timm.layers import BatchNormAct2d

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 1))).eval()
    assert model[1].act.inplace
    assert overwritten(normfree.convert(model, IMAGES, start=start), IMAGES) == []


def test_the_original_keeps_its_activations():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    converted = normfree.convert(model, IMAGES)
    assert (model[2].inplace, converted[2].inplace) == (True, False)


@STARTS
def test_a_resnet_takes_hooks_on_gradients_and_comes_back_from_a_file(start, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    images = torch.randn(4, 3, 32, 32)
    converted = normfree.convert(model, images, start=start)
    assert overwritten(converted, images) == []
    again = normfree.load(normfree.save(converted, tmp_path / "model.safetensors"), original=model)
    seen = []
    for each in (converted, again):
        for module in each.modules():
            if isinstance(module, LAYERS):
                module.register_full_backward_hook(lambda *given: seen.append(given))
        each.train()(images).square().sum().backward()
    assert len(seen) == 2 * 21


@STARTS
def test_per_example_gradients_sum_to_the_gradient(start):
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    images = torch.randn(4, 3, 32, 32)
    converted = normfree.convert(model, images, start=start).train()
    assert opacus.validators.ModuleValidator.validate(converted) == []
    whole = [g.clone() for g in torch.autograd.grad(converted(images).square().sum(), converted.parameters())]
    sampled = opacus.GradSampleModule(converted, loss_reduction="sum")
    sampled(images).square().sum().backward()
    for parameter, gradient in zip(converted.parameters(), whole, strict=True):
        assert len(parameter.grad_sample) == 4
        torch.testing.assert_close(parameter.grad_sample.sum(0), gradient, rtol=1e-3, atol=1e-3)
