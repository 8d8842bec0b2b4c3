"""Forward-mode differentiation agrees with reverse mode: ``<u, J t> = <J^T u, t>`` for random u and t."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jvp

from normfree.models import create_model
from normfree.nn import (
    ACTIVATIONS,
    AveragePool2x2,
    KeptMeanConvTranspose2d,
    ScaledWSConv2d,
    build_activation,
    standardize,
)

SHAPE = {"widths": (8, 12, 16, 16), "depths": (1, 1, 1, 1), "stochdepth_rate": 0.0, "drop_rate": 0.0, "num_classes": 3}
FAMILIES = [("nfnet_f0", {"activation": name, "padding": "same"}) for name in sorted(ACTIVATIONS)] + [
    ("nf_resnet50", {"use_se": True}),
    ("nf_regnet_b0", {}),
    ("skipinit_resnet50", {}),
    ("fixup_resnet50", {"activation": "silu"}),
]

# Of torch's own: its forward-mode formulas of some operations are TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def drawn(like):
    return {name: torch.randn_like(value) for name, value in like.items()}


def assert_adjoint(function, inputs):
    tangents = drawn(inputs)
    outputs, forwards = jvp(function, (inputs,), (tangents,))
    weights = torch.randn_like(outputs)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    reverse = torch.autograd.grad(function(leaves), list(leaves.values()), weights)
    expected = sum((one * other).sum() for one, other in zip(reverse, tangents.values(), strict=True))
    torch.testing.assert_close((weights * forwards).sum(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "overrides"), FAMILIES)
def test_of_networks_by_their_parameters_and_images(name, overrides):
    torch.manual_seed(0)
    model = create_model(name, **SHAPE, **overrides).double()
    inputs = {key: value.detach() + 0.1 * torch.randn_like(value) for key, value in model.named_parameters()}
    inputs["image"] = torch.randn(2, 3, 33, 32, dtype=torch.float64)

    def logits(inputs):
        parameters = {key: value for key, value in inputs.items() if key != "image"}
        return functional_call(model, parameters, (inputs["image"],))

    assert_adjoint(logits, inputs)


def test_of_filters_on_both_sides_of_the_floor_and_of_other_layouts():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    weight[1] = 0.7 + weight[1] * 1e-4
    inputs = {"weight": weight, "gain": torch.randn(4, dtype=torch.float64)}
    assert_adjoint(lambda inputs: standardize(inputs["weight"], inputs["gain"], 1.3), inputs)
    expected = standardize(weight, inputs["gain"], 1.3)
    with forward_ad.dual_level():
        torch.testing.assert_close(standardize(weight, inputs["gain"], 1.3), expected, rtol=1e-12, atol=1e-12)
    layer = KeptMeanConvTranspose2d(4, 6, 3, stride=2, groups=2, skip_gain=0.5).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    inputs = {name: value.detach() for name, value in layer.named_parameters()}
    assert_adjoint(lambda inputs: functional_call(layer, inputs, (x,)), inputs)


def test_of_gradients():
    torch.manual_seed(0)
    padded = ScaledWSConv2d(2, 3, 3, 2, padding="same", alpha=0.2, skip_gain=0.7)
    model = nn.Sequential(
        build_activation("gelu")[0], padded, build_activation("silu")[0], AveragePool2x2(), nn.Flatten()
    )
    model = model.double()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)

    def loss(weight):
        return functional_call(model, {**parameters, "1.weight": weight}, (x,)).square().sum()

    expected = torch.autograd.functional.hessian(loss, parameters["1.weight"])
    torch.testing.assert_close(hessian(loss)(parameters["1.weight"]), expected)
    torch.testing.assert_close(jacfwd(jacfwd(loss))(parameters["1.weight"]), expected)


def test_compiled():
    model = nn.Sequential(build_activation("silu")[0], ScaledWSConv2d(2, 3, 3), AveragePool2x2())
    x, tangent = torch.randn(2, 1, 2, 5, 5)

    def pushed(x, tangent):
        return jvp(model, (x,), (tangent,))

    compiled = torch.compile(pushed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, tangent), pushed(x, tangent))
