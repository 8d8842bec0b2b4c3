"""Which branches carry a factor, and which keep their size, with the reason in the notes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from convert.nets import normed
from torch import nn

import normfree

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two layers, one with a norm, joined with the stream by a function."""

    def __init__(self, forward):
        super().__init__()
        self.branch, self.plain = normed(8, 8), nn.Conv2d(8, 8, 1)
        self.gate, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.joined = forward

    def forward(self, x):
        return self.joined(self, x)


def record_of(forward, *after):
    torch.manual_seed(0)
    return normfree.convert(nn.Sequential(normed(3, 8), Block(forward), *after), IMAGES).conversion


def carriers(record):
    return [change.name for change in record.changes if change.alpha is not None]


def test_a_branch_that_leads_back_to_its_shortcut_keeps_its_size():
    record = record_of(lambda m, x: x + (x + m.branch(x)))
    assert carriers(record) == ["1.branch.0"], "of the sum inside"
    assert record.notes == ("branch added in 1 keeps its size: it leads back to its own shortcut",)


def test_a_layer_that_is_gated_in_one_run_and_not_in_another_keeps_its_size():
    def twice(m, x):
        x = x + m.branch(x)
        gate = torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True)))
        return x + m.branch(x) * gate

    record = record_of(twice)
    assert any("is read through gates and past them" in note for note in record.notes)


def test_a_norm_behind_a_stream_that_goes_on_belongs_to_no_branch():
    def preactivated(m, x):
        x = x + m.plain(torch.relu(x))
        return x + m.branch(torch.relu(m.norm(x)))

    record = record_of(preactivated)
    assert carriers(record) == ["1.branch.0"]


def test_a_norm_behind_a_sum_that_nothing_else_reads_belongs_to_its_branch():
    assert carriers(record_of(lambda m, x: m.norm(x + m.plain(torch.relu(x))))) == ["1.plain"]


class Shared(nn.Module):
    """A block whose activation, which may be other blocks' too, runs inside its branch and at its end."""

    def __init__(self, act):
        super().__init__()
        self.first, self.second, self.act = normed(8, 8), normed(8, 8), act

    def forward(self, x):
        return x + self.act(self.second(self.act(self.first(x))))


class SharedOnce(Shared):
    """The same, with the activation at its end alone."""

    def forward(self, x):
        return x + self.act(self.second(torch.relu(self.first(x))))


def factors(converted):
    return {
        change.name: (change.now, change.input_scale, change.alpha, change.skip_gain)
        for change in converted.conversion.changes
        if change.now != "OutOfPlace"  # of one object, or of each
    }


@pytest.mark.parametrize("kind", [Shared, SharedOnce])
@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU, lambda: nn.SiLU(inplace=True)])
def test_an_activation_that_blocks_share_is_one_in_each_of_them(kind, act, tmp_path):
    shared = act()
    torch.manual_seed(0)
    model = nn.Sequential(normed(3, 8), *(kind(shared) for _ in range(12)))
    own = copy.deepcopy(model)
    for block in own[1:]:
        block.act = act()
    one, each = normfree.convert(model, IMAGES), normfree.convert(own, IMAGES)
    assert factors(one) == factors(each)
    assert sum(alpha is not None for _, _, alpha, _ in factors(one).values()) == 12 and one.conversion.notes == ()
    torch.testing.assert_close(one(IMAGES), each(IMAGES))
    assert float(one(IMAGES).detach().var()) < 2, "12 branches of alpha² each; 13 where nothing carries the factor"
    again = normfree.load(normfree.save(one, tmp_path / "one.safetensors"), original=model)
    torch.testing.assert_close(again(IMAGES), one(IMAGES))


def test_an_activation_inside_the_branch_that_ends_it_has_no_gain_that_is_learned():
    record = normfree.convert(nn.Sequential(normed(3, 8), Shared(nn.SiLU())), IMAGES).conversion
    end = next(change for change in record.changes if change.alpha is not None)
    assert end.name == "1.act" and end.skip_gain is None, "it would scale the layer inside the branch, too"
    inside = next(change for change in record.changes if change.name == "1.second.0")
    assert inside.reason.startswith("measured")
    assert inside.input_scale == pytest.approx(normfree.gamma(nn.SiLU()) / 0.2, rel=0.15), "of what is scaled by alpha"


def test_an_activation_of_a_function_leaves_the_factor_to_the_place_of_the_norm_behind_it_or_to_the_layer():
    behind = record_of(lambda m, x: x + m.norm(F.silu(m.plain(x))))
    assert carriers(behind) == ["1.norm"]
    before = record_of(lambda m, x: x + F.relu(m.branch(x)))
    (end,) = [change for change in before.changes if change.alpha is not None]
    assert end.name == "1.branch.0" and end.skip_gain is None, "relu(s x) has no gradient for s at s = 0"
    assert record_of(lambda m, x: x + F.silu(m.branch(x))).notes == (
        "branch added in 1 keeps its size: it ends in silu, which no weight follows",
    )


class Rectified(nn.BatchNorm2d):
    """A norm with an activation of its own, by a name of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.nonlinearity = nn.LeakyReLU(0.1)

    def forward(self, input):
        return self.nonlinearity(super().forward(input))


def test_an_activation_of_a_norm_stays_by_any_name():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Rectified(8), nn.Conv2d(8, 8, 3), Rectified(8))
    converted = normfree.convert(model, IMAGES)
    assert [type(converted[i]) for i in (1, 3)] == [nn.LeakyReLU, nn.LeakyReLU]
    assert converted[2].input_scale == pytest.approx(normfree.gamma(nn.LeakyReLU(0.1)))


# Sums of two resolutions.


class Additive(nn.Module):
    """A U-Net that adds its skips; ``deep`` blocks at each level, as LinkNet's encoder has them."""

    def __init__(self, deep=0, levels=4):
        super().__init__()
        self.stem = normed(3, 16)
        self.down = nn.ModuleList(nn.Sequential(normed(16, 16), nn.ReLU(), *blocks(deep)) for _ in range(levels))
        self.up = nn.ModuleList(nn.Sequential(normed(16, 16), nn.ReLU()) for _ in range(levels))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x, maps = self.stem(x).relu(), []
        for down in self.down:
            maps.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            x = F.interpolate(up(x), scale_factor=2.0) + maps.pop()
        return self.head(x)


class Transposed(Additive):
    """The same with transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4)
        )

    def forward(self, x):
        x, maps = self.stem(x).relu(), []
        for down in self.down:
            maps.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            x = up(x) + maps.pop()
        return self.head(x)


class Pyramid(Additive):
    """A top-down path over projections."""

    def __init__(self):
        super().__init__()
        self.side = nn.ModuleList(normed(16, 16) for _ in range(4))
        del self.up

    def forward(self, x):
        x, maps = self.stem(x).relu(), []
        for down in self.down:
            x = down(F.max_pool2d(x, 2))
            maps.append(x)
        top = self.side[3](maps.pop())
        for side in self.side[:3]:
            top = side(maps.pop()) + F.interpolate(top, scale_factor=2.0)
        return self.head(top)


class Inner(nn.Module):
    """A residual block, with a stride and a projection of its own if asked for."""

    def __init__(self, stride=1):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, stride, 1), nn.BatchNorm2d(16))
        self.second = normed(16, 16)
        self.down = nn.Sequential(nn.Conv2d(16, 16, 1, stride), nn.BatchNorm2d(16)) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.down(x) + self.second(self.first(x).relu())


def blocks(count):
    return [Inner() for _ in range(count)]


class LongSkip(nn.Module):
    """Blocks in a long skip connection, then an enlargement (EDSR)."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(*blocks(4), normed(16, 16))
        self.tail = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x):
        x = self.stem(x)
        return self.tail(x + self.body(x))


class Enlarging(nn.Module):
    """A generator's block, which enlarges its input on both ways."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.side = normed(16, 16), normed(16, 16), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        larger = F.interpolate(x.relu(), scale_factor=2.0)
        return self.side(F.interpolate(x, scale_factor=2.0)) + self.second(self.first(larger).relu())


class Squeezed(Inner):
    """A residual block with a gate that pools."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return x + y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))


SUMS = {
    "a decoder that adds its skips": (Additive, 0),
    "with blocks in its encoder": (lambda: Additive(deep=2), 8),
    "with transposed convolutions": (Transposed, 0),
    "a pyramid": (Pyramid, 0),
    "a long skip connection": (LongSkip, 5),
    "strides and projections": (lambda: nn.Sequential(normed(3, 16), Inner(), Inner(2), Inner(2)), 3),
    "enlarged on both ways": (lambda: nn.Sequential(normed(3, 16), Enlarging(), Enlarging()), 2),
    "a gate that pools": (lambda: nn.Sequential(normed(3, 16), Squeezed(), Squeezed()), 2),
}


@pytest.mark.parametrize("name", SUMS)
def test_residual_branches_are_scaled_and_sums_of_two_resolutions_are_not(name):
    build, branches = SUMS[name]
    torch.manual_seed(0)
    record = normfree.convert(build(), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))).conversion
    assert len(carriers(record)) == branches and record.notes == () and record.norms_left == ()


@pytest.mark.parametrize("kind", [Additive, Transposed])
def test_the_lowest_level_of_an_additive_decoder_has_its_part_in_the_output(kind):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = kind()
    assert part_of_the_lowest(model.train(), images) > 0.01
    assert part_of_the_lowest(normfree.convert(model, images), images) > 0.01, "3e-6 with alpha at each level"


@torch.no_grad()
def part_of_the_lowest(model, images):
    """What of an output's variance goes where the lowest level's map is set to its mean."""
    outputs = model(images)
    hook = model.down[-1].register_forward_hook(lambda module, inputs, output: output.mean().expand_as(output))
    without = model(images)
    hook.remove()
    return float((outputs - without).var() / outputs.var())
