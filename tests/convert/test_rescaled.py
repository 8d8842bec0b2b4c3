"""What enters the first residual block has unit variance, in whatever units the input is and whatever comes first."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree


class Block(nn.Module):
    """``x + second(relu(first(relu(x))))``."""

    def __init__(self, kind, channels, post=False):
        super().__init__()
        shape, options = ((channels, channels), {}) if kind is nn.Linear else ((channels, channels, 3), {"padding": 1})
        self.first, self.second, self.post = kind(*shape, **options), kind(*shape, **options), post

    def forward(self, x):
        y = x + self.second(torch.relu(self.first(torch.relu(x))))
        return torch.relu(y) if self.post else y


class Padding(nn.Conv1d):
    def forward(self, input):
        return F.conv1d(F.pad(input, (2, 2)), self.weight, self.bias)


class Product(nn.Module):
    """``x @ kernel``, without a bias."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        return x @ self.kernel


class Projection(nn.Module):
    """A shortcut by a narrow layer."""

    def __init__(self):
        super().__init__()
        self.project, self.first = nn.Conv2d(4, 16, 1), nn.Conv2d(4, 16, 3, padding=1)

    def forward(self, x):
        return self.project(x) + self.first(torch.relu(x))


def residual(kind, *first, post=False):
    return nn.Sequential(*first, *(Block(kind, 16, post) for _ in range(3)), Head())


class Head(nn.Linear):
    def __init__(self):
        super().__init__(16, 3)

    def forward(self, input):
        return super().forward(input.flatten(2).mean(2) if input.dim() > 2 else input)


VECTORS, MAPS = (256, 4), (16, 1, 12, 12)
NARROW = {
    "five taps": (lambda: residual(nn.Conv1d, nn.Conv1d(1, 16, 5, padding=2)), (32, 1, 32), 1.0),
    "no bias": (lambda: residual(nn.Conv1d, nn.Conv1d(1, 16, 5, padding=2, bias=False)), (32, 1, 32), 1.0),
    "1x1 of colours": (lambda: residual(nn.Conv2d, nn.Conv2d(3, 16, 1)), (16, 3, 12, 12), 1.0),
    "1x1": (lambda: residual(nn.Conv2d, nn.Conv2d(1, 16, 1)), MAPS, 1.0),
    "3x1": (lambda: residual(nn.Conv2d, nn.Conv2d(1, 16, (3, 1), padding=(1, 0))), MAPS, 1.0),
    "linear": (lambda: residual(nn.Linear, nn.Linear(4, 16)), VECTORS, 1.0),
    "one feature": (lambda: residual(nn.Linear, nn.Linear(1, 16)), (256, 1), 1.0),
    "transposed": (lambda: residual(nn.Conv2d, nn.ConvTranspose2d(2, 16, 2, 2)), (16, 2, 6, 6), 1.0),
    "its own forward": (lambda: residual(nn.Conv1d, Padding(1, 16, 5)), (32, 1, 32), 1.0),
    "a matrix": (lambda: residual(nn.Linear, Product()), VECTORS, 1.0),
    "ours": (lambda: residual(nn.Conv2d, normfree.nn.ScaledConv2d(1, 16, 2)), MAPS, 1.0),
    "two": (lambda: residual(nn.Conv1d, nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Conv1d(4, 16, 1)), (32, 1, 32), 1.0),
    "rectified": (lambda: residual(nn.Conv2d, nn.Conv2d(1, 16, 2), nn.ReLU(), post=True), MAPS, 0.34),
}


def made(name, units=1.0):
    make, shape, expected = NARROW[name]
    torch.manual_seed(0)
    model = make()
    return model, units * torch.rand(shape, generator=torch.Generator().manual_seed(0)), expected


@pytest.mark.parametrize("name", NARROW)
def test_the_stream_has_unit_variance_in_whatever_units_the_input_is(name):
    outputs = []
    for units in (0.01, 1.0, 255.0):
        model, batch, expected = made(name, units)
        converted = normfree.convert(model, batch)
        plot = normfree.spp(converted, batch, gradient=False)
        assert plot.entry.avg_channel_var == pytest.approx(expected, rel=0.02)
        assert all(block.avg_channel_var == pytest.approx(expected, rel=0.3) for block in plot.blocks)
        assert not converted.conversion.notes
        outputs.append(converted.eval()(batch))
    assert all(torch.allclose(each, outputs[0], atol=1e-3) for each in outputs)


def test_a_factor_moves_a_weight_at_one_pace_in_all_units():
    """A step of gradient descent changes a share of the weight that the input's units have no part in."""
    moved = []
    for units in (1.0, 255.0):
        model, batch, _ = made("five taps", units)
        converted = normfree.convert(model, batch)
        converted(batch).square().mean().backward()
        raw = converted.get_parameter("0.raw_weight")
        assert torch.equal(raw, model.get_parameter("0.weight"))
        moved.append(raw.grad)
    assert torch.allclose(*moved, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["five taps", "no bias", "1x1", "linear", "its own forward", "a matrix", "ours"])
def test_a_scaled_layer_folds_is_copied_and_kept(name, tmp_path):
    model, batch, _ = made(name, 255.0)
    converted = normfree.convert(model, batch).eval()
    with torch.no_grad():
        expected = converted(batch)
        folded = normfree.fold(converted)
        assert torch.allclose(folded(batch), expected, rtol=1e-4, atol=1e-4)
        assert type(folded[0]) is (nn.Conv2d if name == "ours" else type(model[0]))
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(converted)))(batch), expected)
        normfree.save(converted, tmp_path / "model.safetensors")
        again = normfree.load(tmp_path / "model.safetensors", original=made(name)[0]).eval()
        assert torch.equal(again(batch), expected)


def test_a_bias_takes_out_what_all_examples_share_unless_it_is_frozen():
    for frozen in (False, True):
        model, batch, _ = made("five taps", 255.0)
        model[0].requires_grad_(not frozen)
        converted = normfree.convert(model, batch)
        plot = normfree.spp(converted, batch, gradient=False)
        assert plot.entry.avg_channel_var == pytest.approx(1, rel=0.02)
        assert (plot.entry.avg_channel_sq_mean > 0.1) == frozen
        assert torch.equal(converted[0].bias, model[0].bias) == frozen


def test_a_narrow_shortcut_gives_unit_variance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Projection(), Block(nn.Conv2d, 16), Head())
    batch = 255 * torch.rand(16, 1, 12, 12)
    converted = normfree.convert(model, batch)
    assert {change.name: change.now for change in converted.conversion.changes}["1.project"] == "scaled Conv2d"
    assert normfree.spp(converted, batch).blocks[-1].avg_channel_var == pytest.approx(2, rel=0.3)


def test_a_stream_beside_norms_gets_unit_variance_from_a_layer_that_stays():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return x + self.second(torch.relu(self.first(self.norm(x))))

    torch.manual_seed(0)
    batch = 255 * torch.rand(256, 1)
    converted = normfree.convert(nn.Sequential(nn.Linear(1, 16), Normed(), Normed(), nn.Linear(16, 2)), batch)
    assert normfree.spp(converted, batch).entry.avg_channel_var == pytest.approx(1, rel=0.02)


def test_first_layers_of_a_model_without_blocks_give_unit_variance():
    for units in (0.01, 1.0, 255.0):
        torch.manual_seed(0)
        parts = [nn.Conv1d(1, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU()]
        batch = units * torch.rand(32, 1, 32)
        converted = normfree.convert(nn.Sequential(*parts, Head()), batch)
        plot = normfree.spp(converted, batch)
        assert [layer.avg_channel_var for layer in plot.blocks[:3]] == pytest.approx([1] * 3, rel=0.4)


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(50, 16), residual(nn.Linear)

    def forward(self, x):
        return self.body(self.table(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.body = nn.LSTM(4, 16, batch_first=True), residual(nn.Linear)

    def forward(self, x):
        return self.body(self.cell(x[:, None])[0][:, 0])


def normed_weight():
    return residual(nn.Linear, nn.utils.parametrizations.weight_norm(nn.Linear(4, 16)))


@pytest.mark.parametrize(
    ("make", "batch", "named"),
    [
        (normed_weight, 255 * torch.rand(VECTORS), "given by 0,"),
        (Recurrent, 0.01 * torch.rand(VECTORS), "given by cell,"),
        (lambda: residual(nn.Linear), 255 * torch.rand(64, 16), "given by the input itself,"),
    ],
)
def test_a_stream_that_nothing_can_scale_is_noted(make, batch, named):
    torch.manual_seed(0)
    (note,) = (each for each in normfree.convert(make(), batch).conversion.notes if "first residual block" in each)
    assert named in note


def test_a_lookup_is_noted_where_it_is_far_from_unit_variance_alone():
    indices = torch.randint(0, 50, (64,), generator=torch.Generator().manual_seed(0))
    for size, noted in ((1.0, False), (0.4, True), (2.5, True)):
        torch.manual_seed(0)
        model = Looked()
        model.table.weight.data.mul_(size)
        notes = normfree.convert(model, indices).conversion.notes
        assert any("given by table, which takes no factor" in note for note in notes) == noted
