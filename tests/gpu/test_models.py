"""On a GPU the layers and networks compute what they compute on a CPU, compiled and in bfloat16 too."""

import copy

import pytest
import torch
from devices import close, images
from torch import nn

from normfree import create_model, fold
from normfree.nn import (
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSConvTranspose2d,
    ScaledWSLinear,
    standardize,
)
from normfree.optim import AdaptiveGradientClipping, nesterov_sgd

pytestmark = pytest.mark.gpu

SMALL = {"depths": (1, 2, 1, 1), "num_classes": 7, "skipinit_gain": 1.0, "stochdepth_rate": 0.0, "drop_rate": 0.0}
NETWORKS = {
    "nf_resnet50": {**SMALL, "width": 0.5},
    "nf_regnet_b0": {**SMALL, "width": 0.5},
    "nfnet_f0": {**SMALL, "width": 0.25},
    "resnetv2_50": {key: SMALL[key] for key in ("depths", "num_classes")} | {"width": 0.5},
    "fixup_resnet50": {key: SMALL[key] for key in ("depths", "num_classes")} | {"width": 0.5},
}


def built(name):
    torch.manual_seed(0)
    return create_model(name, **NETWORKS[name])


LAYERS = {
    "1d": (lambda: ScaledWSConv1d(6, 8, 3, padding=1, groups=2), (2, 6, 12)),
    "2d": (lambda: ScaledWSConv2d(6, 8, 3, stride=2, padding=1), (2, 6, 12, 12)),
    "depthwise": (lambda: ScaledWSConv2d(6, 6, 3, groups=6), (2, 6, 12, 12)),
    "3d": (lambda: ScaledWSConv3d(6, 8, 3), (2, 6, 5, 5, 5)),
    "transposed": (lambda: ScaledWSConvTranspose2d(6, 8, 3, stride=2), (2, 6, 5, 5)),
    "linear": (lambda: ScaledWSLinear(6, 8), (4, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_agree_with_float64_on_the_cpu(device, kind):
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    reference = build().double()
    layer = copy.deepcopy(reference).float().to(device)
    x = torch.randn(shape, dtype=torch.float64)
    expected, actual = reference(x), layer(x.float().to(device))
    assert close(actual, expected, 1e-5)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for one, other in zip(layer.parameters(), reference.parameters(), strict=True):
        assert close(one.grad, other.grad, 1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_filters_below_the_floor_agree_and_so_do_second_derivatives(device, layout):
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    weight[0] = 0.3  # a constant filter
    weight[1] *= 1e-4  # one whose norm is below the floor's
    factors = torch.randn(5, 3, 3, 3, dtype=torch.float64)

    def derivatives(where, dtype):
        filters = weight.to(where, dtype).contiguous(memory_format=layout).requires_grad_()
        gain = torch.linspace(0.5, 2, 5, dtype=dtype, device=where).requires_grad_()
        result = standardize(filters, gain, 1.3)
        loss = (result * factors.to(where, dtype)).sum()
        plain = torch.autograd.grad(loss, (filters, gain), retain_graph=True)
        first = torch.autograd.grad(loss, (filters, gain), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() * 1e-8 + first[1].square().sum(), (filters, gain))
        return result, *plain, *first, *second

    for mine, theirs in zip(derivatives(device, torch.float32), derivatives("cpu", torch.float64), strict=True):
        assert close(mine, theirs, 1e-4)


def test_transforms_and_bfloat16_weights(device):
    torch.manual_seed(0)
    weights, gains = torch.randn(4, 5, 3, 3, 3, device=device), torch.rand(4, 5, device=device)
    each = torch.stack([standardize(weight, gain, 1.3) for weight, gain in zip(weights, gains, strict=True)])
    assert close(torch.func.vmap(lambda weight, gain: standardize(weight, gain, 1.3))(weights, gains), each, 1e-5)
    half = standardize(weights[0].bfloat16(), gains[0], 1.3)
    assert half.dtype == torch.bfloat16
    assert close(half, each[0], 0.02)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_the_cpu_forward_and_backward(device, name):
    reference = built(name)
    network = copy.deepcopy(reference).to(device, memory_format=torch.channels_last)
    x = images()
    expected, actual = reference(x), network(x.to(device, memory_format=torch.channels_last))
    assert close(actual, expected, 1e-4)
    expected.square().mean().backward()
    actual.square().mean().backward()
    largest = max(parameter.grad.abs().max() for parameter in reference.parameters() if parameter.grad is not None)
    for (label, one), other in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert (one.grad.cpu() - other.grad).abs().max() <= 2e-3 * largest, label


@pytest.mark.parametrize("name", ["nf_regnet_b0", "nfnet_f0"])
def test_compiled_in_bfloat16_a_step_is_the_plain_step(device, name):
    torch._dynamo.reset()
    plain = built(name).to(device, memory_format=torch.channels_last)
    compiled = copy.deepcopy(plain)
    x = images().to(device, memory_format=torch.channels_last)

    def gradients(model, call, dtype):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(call(x), torch.arange(4, device=device))
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact_model = copy.deepcopy(plain)
    exact = gradients(exact_model, exact_model, torch.float32)
    noise = (gradients(plain, plain, torch.bfloat16) - exact).norm()
    found = (gradients(compiled, torch.compile(compiled), torch.bfloat16) - exact).norm()
    assert noise < 0.5 * exact.norm()
    assert found <= 1.5 * noise + 1e-3 * exact.norm()


@pytest.mark.parametrize("name", ["nf_resnet50", "nf_regnet_b0", "nfnet_f0"])
def test_folded_networks_agree(device, name):
    network = built(name).to(device).eval()
    x = images().to(device)
    with torch.no_grad():
        assert close(fold(network)(x), network(x), 1e-4)


def test_clipped_steps_agree_with_the_cpu(device):
    reference = built("nfnet_f0")
    network = copy.deepcopy(reference).to(device)
    x, labels = images(), torch.arange(4)
    for model, where in ((reference, torch.device("cpu")), (network, device)):
        optimizer = nesterov_sgd(model, 0.1, weight_decay=2e-5)
        optimizer = AdaptiveGradientClipping(optimizer, model, 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(where)), labels.to(where)).backward()
            optimizer.step()
    for (name, one), other in zip(network.named_parameters(), reference.named_parameters(), strict=True):
        assert close(one, other[1], 2e-3) or other[1].abs().max() < 1e-3, name
