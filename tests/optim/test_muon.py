"""Muon beside its equations in NumPy: which weights are matrices, what a step does to each, and that runs go on."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import normfree
from normfree.nn import ScaledWSConv2d
from normfree.optim import Muon, muon_groups, muon_sgd
from normfree.optim.muon import NS_COEFFICIENTS, orthogonal


def reference_step(weight, gradient, buffer, *, lr, momentum, decay, kind="rows", groups=1, filter_norms=None):
    """One step of one weight, matrix by matrix; the new weight and buffer."""
    buffer = momentum * buffer + gradient
    ahead = gradient + momentum * buffer
    new = weight.copy()
    outputs = weight.shape[1] if kind == "transposed" else weight.shape[0] // groups
    inputs = weight.shape[0] // groups
    for g in range(groups):
        block = np.s_[g * inputs : (g + 1) * inputs] if kind == "transposed" else np.s_[g * outputs : (g + 1) * outputs]

        def rows(array, block=block):
            part = array[block]
            return (part.swapaxes(0, 1) if kind == "transposed" else part).reshape(outputs, -1)

        matrix = rows(ahead) / max(np.linalg.norm(rows(ahead)), 1e-7)
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        a, b, c = NS_COEFFICIENTS
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        step = lr * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) * (u * s) @ vt
        old = rows(weight)
        if filter_norms is None:
            value = (1 - lr * decay) * old - step
        else:
            centred = old - old.mean(1, keepdims=True)
            step = step - step.mean(1, keepdims=True)
            step = step - (step * centred).sum(1, keepdims=True) / (centred**2).sum(1, keepdims=True) * centred
            value = old - step
            value *= filter_norms[g * outputs : (g + 1) * outputs, None] / np.linalg.norm(value, axis=1, keepdims=True)
        part = new[block]
        if kind == "transposed":
            new[block] = value.reshape(outputs, inputs, *weight.shape[2:]).swapaxes(0, 1)
        else:
            new[block] = value.reshape(part.shape)
    return new, buffer


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "tall": lambda: nn.Linear(3, 7),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(8, 12, (3, 2), groups=4),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "transposed grouped": lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
    "standardized": lambda: ScaledWSConv2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_those_of_the_equations(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    model = nn.Sequential(layer, nn.Linear(1, 2).double())  # the final layer is no matrix
    optimizer = muon_sgd(model, 0.05, sgd_lr=0.2, momentum=0.8, weight_decay=0.1)
    groups = getattr(layer, "groups", 1)
    kind = "transposed" if name.startswith("transposed") else "rows"
    weight, buffer = layer.weight.detach().numpy().copy(), np.zeros(layer.weight.shape)
    norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1) if name == "standardized" else None
    bias, bias_buffer = layer.bias.detach().numpy().copy(), np.zeros(layer.bias.shape)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        weight, buffer = reference_step(
            weight, layer.weight.grad.numpy(), buffer, lr=0.05, momentum=0.8, decay=0.1,
            kind=kind, groups=groups, filter_norms=norms,
        )  # fmt: skip
        bias_buffer = 0.8 * bias_buffer + layer.bias.grad.numpy()
        bias = bias - 0.2 * (layer.bias.grad.numpy() + 0.8 * bias_buffer)
        optimizer.step()
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-12)


def test_singular_values_come_near_one_and_vectors_stay():
    matrices = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    inner = u.mT @ found @ vt.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    assert float((inner - torch.diag_embed(values)).abs().max()) < 1e-10
    torch.testing.assert_close(orthogonal(matrices.mT), found.mT)
    torch.testing.assert_close(orthogonal(1e3 * matrices), found)
    assert not orthogonal(torch.zeros(2, 3)).any()


def test_a_standardized_layer_keeps_its_norms_and_its_function_where_only_those_parts_of_the_step_are():
    torch.manual_seed(0)
    layer = ScaledWSConv2d(6, 8, 3).double()
    before, norms = copy.deepcopy(layer), layer.weight.flatten(1).norm(dim=1)
    optimizer = Muon([{"params": [layer.weight], "standardized": True}], lr=0.3)
    # A gradient whose orthogonalized rows lie along the filters and their mean: one row, so that it is only rescaled.
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.weight.grad[0] = 2 * (layer.weight[0] - layer.weight[0].mean()) + 0.7
    optimizer.step()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), before(x))
    for _ in range(5):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
    torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), norms)
    assert not torch.allclose(layer(x), before(x))


def test_what_is_a_matrix():
    model = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), width=0.25, num_classes=3, use_se=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = muon_groups(model, 0.1, sgd_lr_scale=5.0, sgd_weight_decay=0.2, classifier_lr_scale=0.3)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        found = [names[id(parameter)] for parameter in group["params"]]
        is_matrix = [name.endswith("weight") and not name.startswith("classifier") for name in found]
        assert all(is_matrix) if group["rule"] == "muon" else not any(is_matrix)
    by_name = {group["name"]: group for group in groups}
    assert by_name["classifier decayed"]["lr_scale"] == pytest.approx(1.5)
    assert by_name["classifier decayed"]["weight_decay"] == 0.2
    assert by_name["undecayed"]["lr_scale"] == 5.0 and by_name["undecayed"]["weight_decay"] == 0
    assert any(group.get("standardized") for group in groups)
    embedding = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    assert [len(g["params"]) for g in muon_groups(embedding) if g["rule"] == "muon"] == [1]


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_run_goes_on_to_the_same_bits():
    torch.manual_seed(0)
    first = nn.Sequential(ScaledWSConv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(216, 3))
    second = copy.deepcopy(first)
    whole, part = muon_sgd(first), muon_sgd(second)
    train(first, whole, 2), train(second, part, 2)
    again = muon_sgd(second)
    again.load_state_dict(copy.deepcopy(part.state_dict()))
    train(first, whole, 3), train(second, again, 3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_fits_what_it_is_given_and_a_closure_is_called():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer, x = muon_sgd(model, 0.02, sgd_lr=0.1), torch.randn(64, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda m: Muon(m.parameters()), "params=1.*rule='sgd'"),
        (lambda m: Muon([{"params": [m.weight], "rule": "adam"}]), "rule='adam'"),
        (lambda m: Muon([m.weight], lr=-1.0), "lr"),
        (lambda m: Muon([m.weight], momentum=1.0), "momentum"),
        (lambda m: Muon([m.weight], ns_steps=0), "ns_steps"),
        (lambda m: muon_sgd(m, 0.0), "lr"),
        (lambda m: muon_sgd(m, sgd_lr=0.0), "sgd_lr"),
        (lambda m: muon_sgd(m, momentum=0.0), "momentum"),
    ],
)
def test_mistakes_are_named(call, key):
    with pytest.raises(ValueError, match=key):
        call(nn.Linear(3, 2))


def test_sparse_and_complex_gradients_are_refused():
    weight = nn.Parameter(torch.randn(3, 2))
    weight.grad = torch.randn(3, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        Muon([weight]).step()
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    weight.grad = torch.randn(3, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex"):
        Muon([weight]).step()
