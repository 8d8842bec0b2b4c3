"""What each layer of a fresh model is fed: γ and β in closed form where there is one, measured elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from convert.nets import post_activation
from torch import nn

import normfree
from normfree.convert.dataflow import is_norm
from normfree.nn import ScaledWSConv2d

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_step_moves_the_effective_weight_as_far_as_it_moves_a_plain_one():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.ReLU(), nn.BatchNorm2d(64)]
    model = normfree.convert(nn.Sequential(*layers), IMAGES)
    assert model[3].input_scale == pytest.approx(normfree.gamma(nn.ReLU()))
    plain = normfree.fold(model)
    target = torch.randn_like(plain(IMAGES))
    for network in (model, plain):
        (network(IMAGES) - target).square().mean().backward()
    before = model[3].scaled_weight(None).detach()
    with torch.no_grad():
        model[3].weight -= 1e-3 * model[3].weight.grad
        step = (model[3].scaled_weight(None) - before).flatten(1) / -1e-3
    gradient, directions = plain[3].weight.grad.flatten(1), F.normalize(before.flatten(1))
    gradient = gradient - gradient.mean(1, keepdim=True)
    gradient = (
        gradient - (gradient * directions).sum(1, keepdim=True) * directions
    )  # standardized: neither mean nor size
    ratios = step.norm(dim=1) / gradient.norm(dim=1)
    assert F.cosine_similarity(step, gradient).min() > 0.99
    assert ratios.mean() == pytest.approx(1, abs=0.05), "0.34 with raw weights of the usual size"


def test_parallel_layers_add_their_variances_and_concatenated_ones_average_them():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.right = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.sum = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
            self.cat = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))

        def forward(self, x):
            left = self.left(x)
            total = left + self.right(x)
            return self.sum(total), self.cat(torch.cat([left, total], 1))

    record = normfree.convert(Parallel(), IMAGES).conversion
    scales = {change.name: change.input_scale for change in record.changes if change.input_scale is not None}
    assert scales["sum.1"] == pytest.approx(normfree.gamma(nn.ReLU()) / math.sqrt(2))
    assert scales["cat.0"] == pytest.approx(1 / math.sqrt((1 + 2) / 2))


def test_other_activations_have_their_own_gamma_however_they_are_written():
    def made(x):
        return x * torch.sigmoid(1.702 * x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn2(self.conv2(made(self.bn(self.conv1(x)))))

    record = normfree.convert(Net(), IMAGES).conversion
    scale = next(change for change in record.changes if change.name == "conv2")
    assert scale.input_scale == pytest.approx(normfree.gamma(made))
    assert "sigmoid" in scale.reason


def test_measured_scales_make_every_output_a_unit():
    model = normfree.convert(post_activation(), IMAGES, beta="measured")
    assert all("measured" in change.reason for change in model.conversion.changes if change.input_scale is not None)
    seen = {}
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, ScaledWSConv2d)]
    for layer in layers:
        if layer[1].skip_gain is not None:
            nn.init.ones_(layer[1].skip_gain)
    for name, layer in layers:
        layer.register_forward_hook(
            lambda m, _, y, name=name: seen.update({name: float(y.square().mean()) / m.alpha**2})
        )
    with torch.no_grad():
        model.eval()(IMAGES)
    assert set(seen) == {name for name, _ in layers}
    assert all(value == pytest.approx(1, rel=1e-3) for value in seen.values())


def test_a_norm_of_the_input_becomes_the_units_of_the_example():
    table = 5000 + 1000 * torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(20), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    converted = normfree.convert(model, table)
    assert not any(is_norm(module) for module in converted.modules())
    assert converted.conversion.changes[0].now == "ChannelUnits"
    torch.testing.assert_close(converted(table), model.train()(table), rtol=1e-3, atol=1e-4)
    assert all(parameter.requires_grad for parameter in converted[0].parameters())
    by_example = nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    kept = normfree.convert(by_example, IMAGES).conversion.norms_left
    assert [(one.name, one.reason) for one in kept] == [("0", "it gives the input its units, each example by itself")]


def test_numbers_given_by_keyword_belong_to_the_function():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(3)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])

        def forward(self, x):
            x = self.norms[0](self.convs[0](x))
            x = self.norms[1](self.convs[1](torch.add(x.relu(), x, alpha=0.1)))
            return self.norms[2](self.convs[2](torch.add(x.relu(), x, alpha=5.0)))

    scales = {change.name: change.input_scale for change in normfree.convert(Mixed(), IMAGES).conversion.changes}
    assert scales["convs.1"] == pytest.approx(normfree.gamma(lambda x: x.relu() + 0.1 * x))
    assert scales["convs.2"] == pytest.approx(normfree.gamma(lambda x: x.relu() + 5 * x))


def test_slopes_that_differ_from_channel_to_channel_have_no_closed_form():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8)]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[5].weight[2:] = 1.0  # the first two are as in the other
    reasons = {change.name: change.reason for change in normfree.convert(model, IMAGES).conversion.changes}
    assert reasons["3"].startswith("γ") and reasons["6"].startswith("measured")


def test_a_norm_that_stays_has_no_planned_variance():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.LayerNorm(8)
            self.norm.register_forward_hook(lambda *_: None)
            self.last = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

        def forward(self, x):
            y = self.body(x)
            return self.last(self.norm((y + y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    reasons = {change.name: change.reason for change in normfree.convert(Kept(), IMAGES).conversion.changes}
    assert reasons["last.0"].startswith("measured")


def test_a_layer_used_on_several_signals_says_which_it_was_measured_on():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.head, self.norm = nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)

        def forward(self, x):
            y = self.stem(x)
            return self.norm(self.head(y)), self.norm(self.head(F.avg_pool2d(y, 2)))

    model = normfree.convert(Head(), IMAGES)
    change = next(change for change in model.conversion.changes if change.name == "head")
    assert change.reason == "measured on the first of several signals"
    assert float(model(IMAGES)[0].detach().square().mean()) == pytest.approx(1, rel=1e-3)


def test_layers_that_conversion_did_not_make_keep_their_weights():
    ours = ScaledWSConv2d(3, 8, 3, input_scale=1.7)
    model = nn.Sequential(ours, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    assert torch.equal(normfree.convert(model, IMAGES)[0].weight, ours.weight)


def test_noise_of_its_own_leaves_the_random_state_alone_and_follows_the_seed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model.image_size = 16
    state = torch.get_rng_state()
    first, second, other = (normfree.convert(model, seed=seed)[0].input_scale for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second != other


def test_a_norm_behind_another_is_no_norm_of_the_input():
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()
    )
    record = normfree.convert(nn.Sequential(*dense, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), IMAGES).conversion
    assert [change.now for change in record.changes if change.was == "BatchNorm2d"] == 3 * ["Identity"]


def test_a_pool_before_a_norm_is_made_up_for_where_no_layer_behind_is_standardized():
    dense = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(8), nn.ReLU()]
    converted = normfree.convert(nn.Sequential(*dense, nn.Conv2d(8, 8, 3)), IMAGES)
    assert type(converted[4]).__name__ == "ChannelUnits"
    outputs = converted[:5](IMAGES).detach()
    torch.testing.assert_close(outputs.var((0, 2, 3), correction=0), torch.ones(8), rtol=1e-3, atol=0)


def test_measured_scales_are_those_of_branches_awake():
    torch.manual_seed(0)
    model = post_activation()
    records = (normfree.convert(model, IMAGES, beta="measured", skip_gain=gain).conversion for gain in (1.0, 0.0))
    awake, asleep = ({change.name: change.input_scale for change in record.changes} for record in records)
    assert asleep == awake


def test_a_layer_that_shrinks_its_input_keeps_the_usual_raw_weights():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.BatchNorm2d(64)]
    loud, quiet = (normfree.convert(nn.Sequential(*layers), size * IMAGES, beta="measured")[0] for size in (0.1, 10))
    assert quiet.input_scale < 1 < loud.input_scale
    assert float(quiet.weight.detach().std()) == pytest.approx(27**-0.5, rel=0.1)
    assert float(loud.weight.detach().std()) == pytest.approx(loud.input_scale * 27**-0.5, rel=0.1)


def test_a_sum_over_expanded_positions_is_measured():
    class Context(nn.Module):
        def __init__(self):
            super().__init__()
            self.local = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
            self.whole = nn.Sequential(nn.Conv2d(3, 16, 32), nn.BatchNorm2d(16))
            self.after = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))

        def forward(self, x):
            return self.after(self.local(x) + self.whole(x))

    record = normfree.convert(Context(), IMAGES).conversion
    assert next(c for c in record.changes if c.name == "after.0").reason.startswith("measured")
