"""The pretrained start: the function of the model in evaluation mode, without its normalizers."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from convert.nets import Gate, Generator, PostActivation, UNet, post_activation, pre_activation, randomise
from torch import nn

import normfree
from normfree.convert import conversion_of
from normfree.convert.dataflow import is_norm
from normfree.nn import ChannelAffine, KeptMeanConv2d

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NETS = {
    "post": (post_activation, IMAGES),
    "gated": (lambda: post_activation(Gate), IMAGES),
    "pre": (pre_activation, IMAGES),
    "unet": (UNet, IMAGES),
    "generator": (Generator, torch.randn(3, 8, generator=torch.Generator().manual_seed(0))),
    "instance": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGES,
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()),
        torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)),
    ),
    "three": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, groups=1), nn.BatchNorm3d(4), nn.ReLU()),
        torch.randn(2, 3, 5, 5, 5, generator=torch.Generator().manual_seed(0)),
    ),
    "one weight a filter": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)),
        IMAGES,
    ),
    "reflected": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        IMAGES,
    ),
    "reflected, same, even kernel": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4)),
        IMAGES,
    ),
    "circular, transposed beside it": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, padding=2, dilation=2, padding_mode="circular"),
            nn.BatchNorm2d(4),
            nn.ConvTranspose2d(4, 3, 3),
            nn.BatchNorm2d(3),
        ),
        IMAGES,
    ),
    "frozen statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), torchvision.ops.FrozenBatchNorm2d(4), nn.ReLU()),
        IMAGES,
    ),
    "same": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4, affine=False)), IMAGES),
}


def relative(first, second):
    return float((first - second).abs().max() / second.abs().max())


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_in_both_modes_and_folded(name):
    build, batch = NETS[name]
    torch.manual_seed(0)
    model = randomise(build()).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(batch)
        converted = normfree.convert(model, batch, start="pretrained")
        assert not any(is_norm(module) for module in converted.modules())
        assert relative(converted(batch), wanted) < 1e-5
        assert relative(converted.train()(batch), wanted) < 1e-5
        assert relative(normfree.fold(converted)(batch), wanted) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_was_frozen_stays_frozen():
    def layers():
        first = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()

    names = {"0.weight", "0.gain", "0.kept_mean", "0.bias", "3.weight", "3.gain", "3.kept_mean", "3.bias"}
    affine = {"6.weight", "6.bias"}
    assert learning(normfree.convert(layers(), IMAGES, start="pretrained")) == names | affine
    gone = {
        "0 1": {"0.weight", "0.gain", "0.kept_mean", "0.bias"},
        "1": {"0.bias"},
        "3 4 6": {"3.weight", "3.gain", "3.kept_mean", "3.bias", *affine},
    }
    for frozen, without in gone.items():
        model = layers()
        for name in frozen.split():
            model[int(name)].requires_grad_(False)
        assert learning(normfree.convert(model, IMAGES, start="pretrained")) == (names | affine) - without, frozen
    half = layers()
    half[0].requires_grad_(False)  # the norm's scale and shift still learn, and nothing else: it stays an affine map
    assert learning(normfree.convert(half, IMAGES, start="pretrained")) == {
        *(name for name in names if name.startswith("3.")),
        *("1.weight", "1.bias", *affine),
    }
    fixed = layers()
    fixed[6] = torchvision.ops.FrozenBatchNorm2d(4)
    assert not affine & learning(normfree.convert(fixed, IMAGES, start="pretrained"))


def test_resnet18_in_double_precision_to_rounding():
    torch.manual_seed(0)
    model = randomise(torchvision.models.resnet18(weights=None)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    converted = normfree.convert(model, x, start="pretrained")
    with torch.no_grad():
        assert relative(converted(x), model(x)) < 1e-12
    made = [change.now for change in converted.conversion.changes]
    counts = {"KeptMeanConv2d": 20, "Identity": 12, "OutputCopy": 8, "OutOfPlace": 9}
    assert {now: made.count(now) for now in made} == counts


def test_a_norm_no_layer_reaches_stays_an_affine_map_and_says_so():
    converted = normfree.convert(randomise(pre_activation()), IMAGES, start="pretrained")
    affine = {name for name, module in converted.named_modules() if isinstance(module, ChannelAffine)}
    told = {change.name: change.reason for change in conversion_of(converted).changes if change.now == "ChannelAffine"}
    assert affine == set(told)
    assert "2.norm1" in affine and "2.norm2" not in affine
    assert "follows no layer alone" in told["2.norm1"]


def test_every_new_number_trains():
    converted = normfree.convert(randomise(post_activation()), IMAGES, start="pretrained").train()
    converted(IMAGES[:1]).square().sum().backward()
    layers = [module for module in converted.modules() if isinstance(module, KeptMeanConv2d)]
    assert len(layers) == 13
    for layer in layers:
        for parameter in (layer.weight, layer.gain, layer.kept_mean, layer.bias):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_norms_without_constants_stay_and_are_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    record = normfree.convert(model, IMAGES, start="pretrained").conversion
    assert [kept.name for kept in record.norms_left] == ["1"]
    assert "no constants" in record.norms_left[0].reason


def test_a_convolution_read_elsewhere_is_not_folded_into():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y.tanh()

    model = randomise(Twice()).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert type(converted.conv) is nn.Conv2d
    with torch.no_grad():
        assert relative(converted(IMAGES), model(IMAGES)) < 1e-5


def deep():
    """Eight blocks, the last five on a quarter of the image's height and width."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    sizes = ((16, 16), (16, 32, 2), (32, 32), (32, 32, 2), (32, 32), (32, 32), (32, 32), (32, 32))
    blocks = [PostActivation(*size) for size in sizes]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def test_finetuning_with_one_image_a_step_where_batch_norm_fails():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = deep()
    train(model, images[:400], labels[:400], batch=20, steps=60, rate=0.02)
    images = images.flip(3)  # mirrored, the digits are a task of their own
    tested = images[1000:], labels[1000:]
    start = accuracy(model, *tested)
    converted = normfree.convert(model, images[:2], start="pretrained")
    assert accuracy(converted, *tested) == start
    for tuned in (model, converted):
        train(tuned, images[400:1000], labels[400:1000], batch=1, steps=400, rate=0.0003)
    assert accuracy(converted, *tested) > start + 0.3, "0.32 before, 0.74 after"
    assert accuracy(model, *tested) < start + 0.2, (
        "0.38 after: one image's statistics are not those it was trained with"
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(images[:1, :, :4, :4])  # maps of 1 x 1: BatchNorm does not run at all
    converted.train()(images[:1, :, :4, :4])


def train(model, images, labels, *, batch, steps, rate):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    model.train()
    for step in range(steps):
        chosen = [(step * batch + i) % len(images) for i in range(batch)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, images, labels):
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def plain_scaled(**factors):
    """A norm behind each kind of our convolution that is not standardized, whose factors are numbers in its weight."""
    layer = normfree.nn.ScaledConv2d(3, 4, 3, **factors)
    nn.init.normal_(layer.weight, 0.1)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return randomise(nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"bias": False, "stride": 2, "padding": "same"},
        {"input_scale": 1.7},
        {"alpha": 0.2, "skip_gain": -0.7, "input_scale": 3.0},
        {"alpha": 0.0},
        {"skip_gain": 0.0},
    ],
)
def test_a_norm_folds_into_our_convolution_that_is_not_standardized(factors):
    model = plain_scaled(**factors).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert [type(part).__name__ for part in converted[:2]] == ["KeptMeanConv2d", "Identity"]
    with torch.no_grad():
        assert torch.allclose(converted(IMAGES), model(IMAGES), atol=1e-5)
    fresh = normfree.convert(model, IMAGES)
    assert [change.now for change in fresh.conversion.changes] == ["ScaledWSConv2d", "Identity"]


def test_a_norm_folds_into_our_convolution_of_one_weight_a_filter():
    layer = normfree.nn.ScaledConv2d(3, 3, 1, groups=3, input_scale=2.0, alpha=0.5)
    model = randomise(nn.Sequential(layer, nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1))).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert type(converted[1]) is nn.Identity
    with torch.no_grad():
        assert torch.allclose(converted(IMAGES), model(IMAGES), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "width", "left"), [("resnet50", 0.5, 0), ("bn_regnet_b0", 0.25, 0), ("resnetv2_50", 0.5, 17)]
)
def test_our_own_batch_norm_networks_fold(name, width, left):
    """What a pre-activation network keeps are the maps behind its sums, which no layer alone comes before."""
    model = normfree.create_model(name, num_classes=5, width=width).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    converted = normfree.convert(model, images, start="pretrained")
    maps = [change.reason for change in converted.conversion.changes if change.now == "ChannelAffine"]
    assert len(maps) == left
    assert all("it follows no layer alone" in reason for reason in maps)
    with torch.no_grad():
        assert torch.allclose(normfree.fold(converted)(images), model(images), rtol=1e-3, atol=1e-4)


def test_the_record_says_how_closely_the_outputs_are_kept():
    model = randomise(post_activation()).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    with torch.no_grad():
        wanted, found = model(IMAGES), converted(IMAGES)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert converted.conversion.output_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 1e-5
    assert f"by at most {error:.1e} of the largest" in converted.conversion.summary()
    assert normfree.convert(model, IMAGES).conversion.output_error is None, "a fresh one is another function"


class Skipping(nn.Module):
    """Two layers, the second of which goes without its norm, or by another way, where ``leaves_out`` says so."""

    def __init__(self, leaves_out, other=False):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.other, self.leaves_out = nn.Conv2d(8, 8, 3) if other else None, leaves_out

    def forward(self, x):
        y = torch.relu(self.norm1(self.first(x)))
        if not self.leaves_out(x):
            return self.norm2(self.second(y))
        return self.second(y) if self.other is None else self.norm2(self.other(y))


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    ("leaves_out", "change"),
    [
        (lambda x: x.mean() < -0.5, lambda x: x - 1),
        (lambda x: x.mean() > 1, lambda x: x + 1.5),
        (lambda x: x.abs().max() > 10, lambda x: 20 * x),
        (lambda x: x.std() < 0.2, lambda x: x / 20),
    ],
)
def test_a_norm_that_other_inputs_go_around_stays(other, leaves_out, change):
    model = randomise(Skipping(leaves_out, other)).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    for images in (IMAGES, change(IMAGES)):
        torch.testing.assert_close(converted(images), model(images), rtol=1e-4, atol=1e-4)
    reasons = {one.name: one.reason for one in converted.conversion.norms_left}
    assert set(reasons) == {"norm2"} and "on other inputs" in reasons["norm2"]
