"""Where conversion could change more than it says: it keeps the function, keeps the norm with a reason, or refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convert.nets import Offset, post_activation, randomise
from torch import nn

import normfree
from normfree.convert import pipeline
from normfree.convert.dataflow import is_norm

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """A convolution and its norm, in a forward of a test's own."""

    def __init__(self, forward, **more):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.own = forward
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.own(self, x)


def shuffled(net, x):
    y = net.conv(x)
    return net.norm(y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2))


def tapped(net, x):
    y = net.conv(x)
    return y, net.norm(y).relu()


def tapped_in_place(net, x):
    y = net.conv(x)
    return y, net.norm(y).relu_()


def tied(net, x):
    return F.conv_transpose2d(net.norm(net.conv(x)).relu(), net.conv.weight)


def tied_copy(net, x):
    return F.conv_transpose2d(net.norm(net.conv(x)).relu(), (net.conv.weight * 1.0).flip(2))


def tied_bias(net, x):
    return net.norm(net.conv(x)) + net.conv.bias.view(-1, 1, 1)


def expanded(net, x):
    return net.norm(net.conv(x).expand(-1, 8, -1, -1))


class Checked(nn.BatchNorm2d):
    """A norm that looks at its input without changing it."""

    def forward(self, input):
        assert input.abs().max() < 1e6
        return super().forward(input)


class Experts(nn.Module):
    """Each example goes through one of four."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(4))

    def forward(self, x):
        chosen = x.mean((2, 3)).argmax(1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y[chosen == index] = expert(x[chosen == index])
        return x + y


def by_keyword(net, x):
    return net.norm(input=net.conv(input=x))


def height_for_channels(net, x):
    return net.norm(net.conv(x)[:, :, :8].transpose(1, 2))


KEPT_FUNCTIONS = {
    "channels shuffled in between": (lambda: Layers(shuffled), IMAGES),
    "unflattened in between": (
        lambda: nn.Sequential(nn.Linear(8, 256), nn.Unflatten(1, (16, 4, 4)), nn.BatchNorm2d(16)),
        IMAGES[:, 0, 0, :8],
    ),
    "flattened in between": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 14 * 14)),
        IMAGES,
    ),
    "another axis": (lambda: Layers(height_for_channels), IMAGES),
    "tokens": (
        lambda: nn.Sequential(nn.Unflatten(1, (6, 8)), nn.Linear(8, 4), nn.Flatten(1), nn.BatchNorm1d(24)),
        IMAGES[:, 0, :3, :].reshape(4, 48),
    ),
    "returned, too": (lambda: Layers(tapped), IMAGES),
    "returned, and written in place": (lambda: Layers(tapped_in_place), IMAGES),
    "weight read elsewhere": (lambda: Layers(tied), IMAGES),
    "a copy of the weight read elsewhere": (lambda: Layers(tied_copy), IMAGES),
    "bias read elsewhere": (lambda: Layers(tied_bias), IMAGES),
    "channels expanded in between": (lambda: Layers(expanded, conv=nn.Conv2d(3, 1, 3)), IMAGES),
    "an input checked": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Checked(4)), IMAGES),
    "arguments by keyword": (lambda: Layers(by_keyword), IMAGES),
    "eps an integer": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1)), IMAGES),
}


@pytest.mark.parametrize("name", KEPT_FUNCTIONS)
def test_pretrained_keeps_the_function(name):
    build, batch = KEPT_FUNCTIONS[name]
    torch.manual_seed(0)
    model = randomise(build()).eval()
    converted = normfree.convert(model, batch, start="pretrained")
    assert not any(is_norm(module) for module in converted.modules())
    with torch.no_grad():
        torch.testing.assert_close(converted(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_the_norms_of_experts_without_an_example_stay():
    torch.manual_seed(0)
    model, others = randomise(Experts()).eval(), torch.cat([IMAGES.roll(number, 1) for number in range(3)])
    converted = normfree.convert(model, IMAGES[:2], start="pretrained")
    left = converted.conversion.norms_left
    assert len(left) in (2, 3) and all(kept.reason.startswith("no row of the example came to it") for kept in left)
    with torch.no_grad():
        torch.testing.assert_close(converted(others), model(others), rtol=1e-4, atol=1e-5)


def test_timm_layers_that_standardize_their_weight_keep_it():
    from timm.layers import ScaledStdConv2dSame

    model = randomise(nn.Sequential(ScaledStdConv2dSame(3, 4, 3), nn.BatchNorm2d(4))).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    assert not normfree.convert(model, IMAGES).conversion.norms_left


def test_fresh_does_not_overwrite_what_is_returned():
    tap, _ = normfree.convert(Layers(tapped_in_place), IMAGES)(IMAGES)
    assert float(tap.detach().min()) < 0


def test_a_layer_whose_weight_is_read_elsewhere_keeps_it_and_its_norm():
    model = Layers(tied)
    model.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.own = lambda net, x: net.body(tied(net, x))
    record = normfree.convert(model, IMAGES).conversion
    assert [(kept.name, kept.reason) for kept in record.norms_left] == [
        ("norm", "the model reads a parameter of conv before it, too")
    ]


class Rectified(nn.BatchNorm2d):
    """A norm that does more, in a forward of its own."""

    def forward(self, input):
        return F.relu(super().forward(input))


def hooked(channels):
    norm = nn.BatchNorm2d(channels)
    norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    return norm


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Rectified, "its forward does more than normalize (relu)"), (hooked, "it has hooks")],
)
def test_a_norm_that_does_more_stays(kind, reason, start):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).eval()
    converted = normfree.convert(model, IMAGES, start=start)
    assert [(kept.name, kept.reason) for kept in converted.conversion.norms_left] == [("1", reason)]
    if start == "pretrained":
        torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_a_layer_held_in_a_plain_list_is_told(start):
    def listed(net, x):
        return net.norm(net.order[0](x))

    model = Layers(listed)
    model.order = [model.conv]
    with pytest.raises(ValueError, match=r"calls a Conv2d that it also holds in a plain list .* nn.ModuleList"):
        normfree.convert(model, IMAGES, start=start)


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_a_forward_that_asks_the_norm_for_an_attribute_is_told(start):
    model = Layers(lambda net, x: net.norm(net.conv(x)).unflatten(1, (2, net.norm.num_features // 2)))
    with pytest.raises(
        ValueError, match=r"its normalizer stays, norm .*: the model's forward asks for its num_features"
    ):
        normfree.convert(model, IMAGES, start=start)


def test_constants_are_what_the_operations_compute():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = randomise(nn.Sequential(*first, nn.Conv2d(4, 4, 3), Offset(4), nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert not converted.conversion.norms_left
    torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


class Measured(nn.BatchNorm2d):
    """A norm with a factor that it reads out of its input: it is constant in one run, and no constant."""

    def forward(self, input):
        return super().forward(input) * float(input.abs().mean())


@pytest.mark.parametrize("kind", [Measured, Rectified])
def test_a_norm_that_is_no_affine_map_stays_and_the_others_go(kind):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = randomise(nn.Sequential(*first, nn.Conv2d(4, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert [kept.name for kept in converted.conversion.norms_left] == ["4"]
    other = 3 * IMAGES
    torch.testing.assert_close(converted(other), model(other), rtol=1e-4, atol=1e-5)


def test_a_norm_whose_place_gives_something_else_stays(monkeypatch):
    def misfilled(original, converted, changes, constants):
        filled(original, converted, changes, constants)
        if any(change.into == "3" for change in changes):
            converted[3].bias.data += 1.0

    filled = pipeline.fill_constants
    monkeypatch.setattr(pipeline, "fill_constants", misfilled)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = randomise(nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    left = [(kept.name, kept.reason) for kept in converted.conversion.norms_left]
    assert left == [("4", "what it, or something before it, does is more than its constants say")]


def test_outputs_that_differ_for_no_known_reason_are_an_error(monkeypatch):
    def misfilled(original, converted, changes, constants):
        filled(original, converted, changes, constants)
        converted[3].weight.data *= 1.5  # no norm's place

    filled = pipeline.fill_constants
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))).eval()
    normfree.convert(model, IMAGES, start="pretrained")
    monkeypatch.setattr(pipeline, "fill_constants", misfilled)
    with pytest.raises(ValueError, match=r"Sequential gives other outputs once converted \(relative error 0\.[3-9]\)"):
        normfree.convert(model, IMAGES, start="pretrained")


def test_what_takes_another_way_once_converted_is_told():
    def sometimes(net, x):
        y = net.norm(net.conv(x))
        return y if float(y.detach().mean()) > 0.5 else net.late(F.max_pool2d(y, 2))

    model = Layers(sometimes, late=nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    model.norm.weight.data.fill_(0.1)
    normfree.convert(model, IMAGES)
    model.own = lambda net, x: net.norm(net.conv(x)) if hasattr(net.conv, "gain") else sometimes(net, x)
    with pytest.raises(ValueError, match=r"example_input: late.0 does not run on it in the converted model"):
        normfree.convert(model, IMAGES)


def test_a_submodule_by_the_name_of_the_record_is_told():
    model = Layers(lambda net, x: net.norm(net.conv(x)), conversion=nn.Identity())
    with pytest.raises(ValueError, match='its submodule "conversion" has the name of the record'):
        normfree.convert(model, IMAGES)


def test_no_hook_is_left_behind():
    def hooks():
        return {name: dict(value) for name, value in vars(torch.nn.modules.module).items() if "_hooks" in name}

    model, before = post_activation(), hooks()
    normfree.convert(model, torch.randn(4, 3, 16, 16))
    normfree.convert(model, torch.randn(4, 3, 16, 16), start="pretrained")
    assert hooks() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Asking(nn.Module):
    """Asks its norms for what a module in their place does not have."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.norm2, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu() + self.norm2.eps
        self.penalty = self.norm2.weight.abs().sum()
        return self.last(x)


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_a_norm_that_the_forward_asks_for_something_stays(start):
    torch.manual_seed(0)
    model, x = Asking().eval(), torch.randn(8, 3, 12, 12)
    converted = normfree.convert(model, x, start=start)
    (left,) = converted.conversion.norms_left
    assert (left.name, left.reason) == ("norm2", "the model's forward asks for its eps")
    assert type(converted.norm1) is nn.Identity
    converted(x)


def test_a_norm_that_a_function_reads_is_listed_once():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3 if number == 0 else 8, 8, 3) for number in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
            self.last = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                weights = norm.running_mean, norm.running_var, norm.weight, norm.bias
                x = F.batch_norm(conv(x), *weights, self.training).relu()
            return self.last(x)

    torch.manual_seed(0)
    record = normfree.convert(Functional().eval(), torch.randn(8, 3, 12, 12)).conversion
    (left,) = record.norms_left
    assert "by a function, 3 times" in left.reason
