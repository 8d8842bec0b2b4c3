"""The fresh start: norms out, standardized layers in, branches scaled, and a signal that keeps its variance."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from convert.nets import (
    Gate,
    Generator,
    PostActivation,
    UNet,
    post_activation,
    pre_activation,
)
from torch import nn

import normfree
from normfree.convert.dataflow import is_norm
from normfree.nn import BranchScale, ScaledWSConv2d, ScaledWSConvTranspose2d, ScaledWSLinear

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def norms_in(model):
    return [name for name, module in model.named_modules() if is_norm(module)]


def test_a_preactivation_network_follows_the_variance_plan():
    model = pre_activation()
    record = normfree.convert(model, IMAGES).conversion
    scales = {change.name: change.input_scale for change in record.changes if change.input_scale is not None}
    gamma, alpha = normfree.gamma(nn.SiLU()), record.alpha
    assert scales["1.conv2"] == pytest.approx(gamma)
    # block 1 is a transition: its shortcut gives 1, its branch alpha²; block 2 adds another alpha²
    assert scales["2.conv1"] == pytest.approx(gamma / math.sqrt(1 + alpha**2))
    assert scales["3.conv1"] == pytest.approx(gamma / math.sqrt(1 + 2 * alpha**2))
    assert scales["3.down"] == scales["3.conv1"]
    assert scales["4.conv1"] == pytest.approx(gamma / math.sqrt(1 + alpha**2)), "reset at the projection"
    assert norms_in(model) and not norms_in(normfree.convert(model, IMAGES))


def test_the_measured_signal_is_the_planned_one():
    signal = normfree.spp(normfree.convert(pre_activation(), IMAGES), IMAGES)
    signal.assert_healthy()
    # 16 to 64 channels drawn once: a branch's variance has a spread of about sqrt(2 / channels) at worst, less what
    # zero padding takes (0.918 of each 3x3 convolution at 16 pixels)
    for block, expected in zip(signal.blocks, (1.04, 1.08, 1.04, 1.08, 1.12), strict=True):
        assert block.avg_channel_var == pytest.approx(expected, rel=0.25)
        assert block.residual_avg_channel_var == pytest.approx(0.9, abs=0.3)


def test_activations_in_place_do_not_reach_the_shortcut():
    model = normfree.convert(pre_activation(), IMAGES)
    out_of_place = {change.name for change in model.conversion.changes if change.now == "OutOfPlace"}
    assert {f"{block}.act{which}" for block in range(1, 6) for which in (1, 2)} <= out_of_place
    assert not {change.name for change in model.conversion.changes if change.now in ("Copy", "OutputCopy")}
    x = torch.randn(2, 32, 8, 8)
    before = x.clone()
    with torch.no_grad():
        model[2](x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(4, c), nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_other_norms_go_the_same_way(norm):
    assert not norms_in(normfree.convert(pre_activation(norm), IMAGES))


def test_postactivation_resnet50_and_nf_resnet50_have_the_same_branches():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    converted = normfree.spp(normfree.convert(torchvision.models.resnet50(weights=None), images), images)
    ours = normfree.spp(normfree.create_model("nf_resnet50"), images)
    assert len(converted.blocks) == 16
    for block, reference in zip(converted.blocks[:13], ours.blocks[:13], strict=True):  # maps of 8 pixels and more
        assert block.residual_avg_channel_var == pytest.approx(reference.residual_avg_channel_var, rel=0.1)
        if block.transition:
            assert block.avg_channel_var == pytest.approx(reference.avg_channel_var, rel=0.1)


def test_a_unet_that_no_tracer_follows():
    model = normfree.convert(UNet(), IMAGES)
    assert not norms_in(model)
    assert isinstance(model.up[0], ScaledWSConvTranspose2d) and isinstance(model.join[0], ScaledWSConv2d)
    assert type(model.out) is nn.Conv2d
    with torch.no_grad():
        y = model.join[0](torch.cat([model.down(IMAGES), model.up(model.low(model.down(IMAGES)))], 1))
    assert float(y.square().mean()) == pytest.approx(1, rel=0.15)


def test_a_generator():
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    model = normfree.convert(Generator(), z)
    assert isinstance(model.start[0], ScaledWSLinear) and isinstance(model.up1[0], ScaledWSConvTranspose2d)
    assert type(model.up2) is nn.ConvTranspose2d, "no normalizer follows the last layer"
    assert float(model.start[0](z).detach().var()) == pytest.approx(1, rel=0.2)
    assert not norms_in(model)


def test_a_branch_that_ends_in_an_activation_is_scaled_behind_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()

        def forward(self, x):
            return x + self.act(self.bn(self.conv(x)))

    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 16, 3), Block()), IMAGES)
    assert isinstance(model[1].act[1], BranchScale)


class Scaled(nn.Module):
    """A branch with a layer scale of its own; ``behind`` is what its last layer's output goes through."""

    def __init__(self, behind):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.layer_scale = nn.Parameter(torch.full((16, 1, 1), 0.5))
        self.behind = behind

    def forward(self, x):
        return x + self.layer_scale * self.behind(self.bn(self.conv(x)))


def test_a_layer_scale_stands_for_the_skip_gain():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Scaled(lambda y: y), Scaled(lambda y: y))
    record = normfree.convert(model, IMAGES).conversion
    first, second = (change for change in record.changes if change.alpha is not None)
    assert first.alpha == 0.2 and first.skip_gain is None
    assert first.reason.endswith("ends the branch added in 2, whose 2.layer_scale stands for the skip gain")
    assert second.input_scale == pytest.approx(1 / math.sqrt(1 + 0.2**2 * 0.5**2))


def test_what_cannot_be_scaled_is_told():
    up = nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2))
    record = normfree.convert(nn.Sequential(nn.Conv2d(3, 16, 3), Scaled(up)), IMAGES).conversion
    assert record.notes == ("branch added in 1 keeps its size: it ends in upsample_nearest2d, which no weight follows",)
    assert all(change.alpha is None for change in record.changes)


def test_auxiliary_heads_lose_their_norms_too():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.aux = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            x = self.body(x)
            return (x, self.aux(x)) if self.training else x

    assert not norms_in(normfree.convert(Headed(), IMAGES))


def test_examples_do_not_see_each_other_and_the_original_is_untouched():
    torch.manual_seed(0)
    model = post_activation(Gate)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    converted = normfree.convert(model, IMAGES).train()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in converted.modules())
    x = IMAGES[:3].clone().requires_grad_()
    converted(x)[0].sum().backward()
    assert float(x.grad[0].abs().max()) > 0
    assert float(x.grad[1:].abs().max()) == 0


def test_the_same_seed_gives_the_same_weights():
    model = post_activation()
    first, second = (normfree.convert(model, IMAGES).state_dict() for _ in range(2))
    assert torch.equal(first["0.0.weight"], second["0.0.weight"])
    other = normfree.convert(model, IMAGES, seed=1).state_dict()
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_it_trains_where_the_model_without_its_norms_diverges():
    # eighteen blocks without norms: torch's own initialisation of ReLU networks with kaiming doubles every block
    torch.manual_seed(0)
    blocks = [PostActivation(16, 16) for _ in range(18)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    labels = torch.arange(16) % 4
    images = IMAGES[:, :, :12, :12] + labels.view(-1, 1, 1, 1)
    deleted = copy.deepcopy(model)
    for block in deleted[1:19]:
        block.bn1, block.bn2 = nn.Identity(), nn.Identity()
    assert not losses(deleted, images, labels)[-1] < 10
    trained = losses(normfree.convert(model, images), images, labels)
    assert trained[-1] < 0.6 * trained[0]


def losses(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        found.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return found


def test_a_fused_activation_that_ends_a_branch_is_scaled_and_works_out_of_place():
    from timm.layers import BatchNormAct2d

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.norm = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), BatchNormAct2d(16)

        def forward(self, x):
            return x + self.norm(self.left(x) + self.right(x))

    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Fused()), IMAGES)
    scaled = [change.name for change in model.conversion.changes if change.now == "BranchScale"]
    assert scaled == ["2.norm.act"]
    assert [type(module).__name__ for module in model[2].norm.modules() if not list(module.children())] == [
        "ReLU",
        "BranchScale",
    ]
    assert not model[2].norm[0].inplace


def test_wrapped_models_are_unwrapped():
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    converted = normfree.convert(model, IMAGES)
    assert type(converted) is nn.Sequential
    assert [change.name for change in converted.conversion.changes] == ["0", "1"]


class Repeated(nn.Module):
    """One block run several times, its weights the same each time."""

    def __init__(self, last=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.last = last

    def forward(self, x):
        x = self.stem(x)
        for _ in range(6):
            x = x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return x if self.last is None else x + self.last(self.conv2(self.norm1(x)))


def test_a_layer_that_ends_a_branch_each_time_it_runs_carries_the_factor():
    converted = normfree.convert(Repeated(), IMAGES)
    last = next(change for change in converted.conversion.changes if change.name == "conv2")
    assert last.alpha == 0.2 and converted.conversion.notes == ()
    block = normfree.spp(converted, IMAGES).blocks[-1]
    assert block.avg_channel_var < 4, "1500 while nothing carried the factor; the six branches are alike, and add up"


def test_a_layer_that_ends_a_branch_not_each_time_is_told_once():
    class Streams(nn.Module):
        """One convolution that ends a branch in two streams, and stands before an activation in a third."""

        def __init__(self):
            super().__init__()
            self.stems = nn.ModuleList(nn.Conv2d(3, 32, 3, padding=1) for _ in range(3))
            self.norms, self.conv = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(3)), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            first, second, third = (stem(x) for stem in self.stems)
            last = torch.tanh(self.conv(self.norms[2](third)))
            return (
                first + self.conv(self.norms[0](first).relu()),
                second + self.conv(self.norms[1](second).relu()),
                third + last,
            )

    record = normfree.convert(Streams(), IMAGES).conversion
    assert all(change.alpha is None for change in record.changes)
    assert record.different_notes() == [
        "branch added in the model keeps its size: conv, which ends it, does so not each time it runs (2 times)",
        "branch added in the model keeps its size: it ends in tanh, which no weight follows",
    ]


def test_norms_that_a_repeated_block_needs_where_nothing_carries_its_factor_stay():
    """Unscaled branches of one weight add up: by 570 in six runs."""
    with pytest.raises(ValueError, match=r"norm1 \(BatchNorm2d\): conv2 runs 7 times on what came of its own output"):
        normfree.convert(Repeated(torch.tanh), IMAGES)


def test_a_norm_behind_a_sum_belongs_to_its_branch():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(16)

        def forward(self, x):
            return self.norm(x + self.act(self.conv(x)))

    model = nn.Sequential(nn.Conv2d(3, 16, 3), PostNorm(), PostNorm())
    converted = normfree.convert(model, IMAGES)
    scaled = [change.name for change in converted.conversion.changes if change.now == "BranchScale"]
    assert scaled == ["1.act", "2.act"]


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_memory_format_and_learning_survive(start):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        converted = normfree.convert(model, IMAGES, start=start)
    assert converted[0].weight.is_contiguous(memory_format=torch.channels_last)
    converted(IMAGES).sum().backward()
    assert converted[0].weight.grad is not None
    usual = normfree.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGES, start=start)
    assert usual[0].weight.is_contiguous()


class Teacher(nn.Module):
    """A student and a frozen copy of it, which gives the targets: BYOL, MoCo, the target network of a DQN."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        for name in (first, "student" if first == "teacher" else "teacher"):
            setattr(self, name, copy.deepcopy(layers))
        self.teacher.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x), target


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_a_teacher_stays_a_frozen_copy_of_its_student(first):
    converted = normfree.convert(Teacher(first), torch.randn(64, 16))
    found, target = converted(torch.randn(8, 16))
    torch.testing.assert_close(found, target)
    assert not any(parameter.requires_grad for parameter in converted.teacher.parameters())
    assert all(parameter.requires_grad for parameter in converted.student.parameters())
    assert not converted.conversion.notes


def test_layers_that_are_no_copies_are_drawn_each_for_itself():
    zeros = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())))
    for layer in zeros[::3]:
        nn.init.zeros_(layer.weight)
        nn.init.uniform_(layer.bias)
    converted = normfree.convert(zeros, torch.randn(64, 16))
    assert not torch.equal(converted[0].weight, converted[3].weight)


def test_a_frozen_layer_that_is_drawn_anew_learns_and_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    model[0].requires_grad_(False)
    converted = normfree.convert(model, torch.randn(64, 16))
    assert converted[0].weight.requires_grad
    assert any("0 was frozen" in note for note in converted.conversion.notes)
