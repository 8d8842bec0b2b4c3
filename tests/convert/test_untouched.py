"""What conversion must leave as it is: the example, the original, the defaults of torch; and what it must not lose."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from convert.nets import FunctionalGate, Offset, post_activation, randomise
from torch import nn

import normfree
from normfree.nn import BranchScale, ChannelAffine

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STARTS = pytest.mark.parametrize("start", ["fresh", "pretrained"])


def small(channels=8):
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 1))


class Preparing(nn.Module):
    """A forward that writes into its input."""

    def __init__(self):
        super().__init__()
        self.body = small()

    def forward(self, x):
        return self.body(x.sub_(0.5).div_(0.25))


@STARTS
def test_the_example_is_left_as_it_is(start):
    images = IMAGES.clone()
    converted = normfree.convert(randomise(Preparing()).eval(), images, start=start)
    assert torch.equal(images, IMAGES)
    assert not converted.conversion.norms_left


class Pathways(nn.Module):
    """Writes into the list that it is given, as networks of several pathways do."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fast = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, pathways):
        pathways[0], pathways[1] = self.slow(pathways[0]), self.fast(pathways[1])
        return self.head(pathways.pop() + pathways[0])


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_a_list_in_the_example_is_left_as_it_is(start):
    slow, fast = torch.randn(4, 3, 8, 8), torch.randn(4, 1, 8, 8)
    pathways = [slow, fast]
    converted = normfree.convert(Pathways().eval(), (pathways,), start=start)
    assert not converted.conversion.norms_left
    assert len(pathways) == 2 and pathways[0] is slow and pathways[1] is fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_with_another_gain_than_it_has_is_folded_in_any_precision(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Offset(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model = randomise(model).eval().to(dtype)
    converted = normfree.convert(model, IMAGES.to(dtype), start="pretrained")
    assert not converted.conversion.norms_left
    error = (converted(IMAGES.to(dtype)) - model(IMAGES.to(dtype))).abs().max() / model(IMAGES.to(dtype)).abs().max()
    assert float(error) < (1e-5 if dtype == torch.float32 else 0.05)


def test_statistics_of_the_batch_are_told_in_half_precision():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x):
            y = self.body(x)
            return (y - y.mean((0, 2, 3), keepdim=True)) / y.std((0, 2, 3), keepdim=True)

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        record = normfree.convert(Batched().to(dtype), IMAGES.to(dtype)).conversion
        assert [one.was for one in record.norms_left] == ["standardization"]


@STARTS
def test_a_forward_that_closes_over_the_original_is_told(start):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU())
    body = model[0]
    body.forward = lambda x: body[1](body[0](x))
    with pytest.raises(ValueError, match=r"still calls a Conv2d of the original.*as a method"):
        normfree.convert(model.eval(), IMAGES, start=start)


def test_what_cannot_be_copied_is_one_line():
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"model: Sequential cannot be copied \(TypeError: .*copy\.deepcopy"):
        normfree.convert(model, IMAGES)


@pytest.mark.parametrize("act", [normfree.convert, normfree.spp])
def test_a_model_made_for_inference_alone_is_one_line_with_a_remedy(act):
    with torch.inference_mode():
        model = small()
    with pytest.raises(ValueError, match=r"^model: parameter '0\.weight' was made inside of torch\.inference_mode"):
        act(model, IMAGES)
    act(copy.deepcopy(model), IMAGES)


def test_a_seed_too_large_is_one_line():
    with pytest.raises(ValueError, match="seed=18446744073709551616"):
        normfree.convert(small(), IMAGES, seed=2**64)


def test_the_defaults_of_torch_do_not_matter():
    model = small()
    wanted = normfree.convert(model, IMAGES).state_dict()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = normfree.convert(model, IMAGES).state_dict()
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("place", [0, 1])
def test_what_has_a_hook_on_gradients_stays(place):
    model = small()
    model[place].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"its normalizer stays, 1 \(BatchNorm2d\): .* has hooks"):
        normfree.convert(model, IMAGES)


def test_a_parametrized_bias_stays():
    class Halved(nn.Module):
        def forward(self, bias):
            return bias / 2

    model = small()
    torch.nn.utils.parametrize.register_parametrization(model[0], "bias", Halved())
    with pytest.raises(ValueError, match="0 before it has parametrizations"):
        normfree.convert(model, IMAGES)


@STARTS
def test_an_activation_that_norms_share_runs_in_each_place(start):
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3), BatchNormAct2d(8))
    model[3].act = model[1].act
    converted = normfree.convert(randomise(model).eval(), IMAGES, start=start)
    assert not converted.conversion.norms_left
    assert sum(isinstance(module, nn.ReLU) for module in converted.modules()) == 1, "still one module"
    if start == "pretrained":
        torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_branch_that_is_returned_too_keeps_its_size_and_says_so():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = small()[:2], nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x):
            x = self.stem(x)
            branch = self.branch(x)
            return x + branch, branch

    converted = normfree.convert(Both(), IMAGES)
    assert "what ends it is read elsewhere, too" in converted.conversion.notes[0]
    assert float(converted(IMAGES)[1].detach().var()) == pytest.approx(1, abs=0.4)


def test_a_projection_of_a_branch_without_norms_is_standardized_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.last, self.down = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x):
            return self.down(x) + self.last(torch.relu(self.norm(self.first(x))))

    converted = normfree.convert(nn.Sequential(*small()[:2], Block()), IMAGES)
    exchanged = {change.name for change in converted.conversion.changes if change.now == "ScaledWSConv2d"}
    assert exchanged == {"0", "2.first", "2.last", "2.down"}


def test_measured_scales_restore_what_gates_take():
    torch.manual_seed(0)
    model = post_activation(FunctionalGate)
    planned, measured = (normfree.convert(model, IMAGES, beta=beta).conversion for beta in ("plan", "measured"))
    scales = [{change.name: change for change in record.changes}["2.conv2"] for record in (planned, measured)]
    assert scales[0].correction == scales[1].correction == 2
    assert scales[1].input_scale == pytest.approx(scales[0].input_scale, rel=0.25), "half of it without"


def test_an_affine_map_is_read_by_torchscript():
    scripted = torch.jit.script(ChannelAffine(3))
    assert torch.equal(scripted(IMAGES), IMAGES)


@STARTS
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_what_is_wrapped_is_saved_and_loaded(tmp_path, start, wrap):
    converted = normfree.convert(wrap(small()), IMAGES, start=start)
    path = normfree.save(wrap(converted), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(normfree.load(path, original=wrap(small()))(IMAGES), converted(IMAGES))


@STARTS
def test_a_norm_over_neighbouring_channels_is_told(start):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(5), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    record = normfree.convert(model, IMAGES, start=start).conversion
    assert [(one.name, one.was) for one in record.norms_left] == [("1", "LocalResponseNorm")]


@STARTS
def test_a_damaged_model_is_one_line(start):
    model = small()
    model[3].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter '3\.weight' has 8 of 32 values that are not finite"):
        normfree.convert(model, IMAGES, start=start)
    model = small()
    model[1].running_var.fill_(float("nan"))
    if start == "pretrained":
        for wrong in (float("nan"), float("inf"), -1.0):
            model[1].running_var.fill_(wrong)
            with pytest.raises(ValueError, match=r"model: buffer '1\.running_var' has 8 of 8 values"):
                normfree.convert(model, IMAGES, start=start)
    else:
        assert torch.isfinite(normfree.convert(model, IMAGES, start=start)(IMAGES)).all()


def test_an_affine_map_keeps_the_precision_of_its_input():
    norm, x = nn.BatchNorm2d(3).eval(), IMAGES.bfloat16()
    assert norm(x).dtype is ChannelAffine(3)(x).dtype is torch.bfloat16


def test_a_gain_of_a_kept_transposed_convolution_steps_as_far_as_a_plain_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU()).double()
    converted = normfree.convert(randomise(model).eval(), IMAGES.double(), start="pretrained")
    plain = normfree.fold(converted)
    for network in (converted, plain):
        network(IMAGES.double()).square().mean().backward()
    layer = converted[0]
    before = layer.scaled_weight(None).detach()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 1e-6 * parameter.grad
        step = (layer.scaled_weight(None) - before) / -1e-6
    gradient = plain[0].weight.grad
    assert float((step - gradient).norm() / gradient.norm()) < 1e-3


def test_what_ends_a_branch_inside_of_a_norm_is_saved_and_loaded(tmp_path):
    from timm.layers import BatchNormAct2d

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), BatchNormAct2d(8)

        def forward(self, x):
            return x + self.norm(self.conv(x))

    def build():
        return nn.Sequential(*small()[:2], Fused())

    model = normfree.convert(build(), IMAGES)
    assert any(isinstance(module, BranchScale) for module in model.modules())
    path = normfree.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(normfree.load(path, original=build())(IMAGES), model(IMAGES))


@STARTS
def test_each_module_keeps_its_mode(start):
    model = small().train()
    model[:2].eval()
    converted = normfree.convert(model, IMAGES, start=start)
    assert [module.training for module in converted] == [False, False, True, True]


@STARTS
def test_what_training_alone_runs_is_left_out_where_all_norms_run_without(start):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra = small(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.extra(self.body(x)) if self.training else self.body(x)

    record = normfree.convert(Noisy(), IMAGES, start=start).conversion
    assert "extra" not in {one.name for one in (*record.kept, *record.changes)}


SERVED: list[nn.Module] = []


class Serving(nn.Module):
    """While it runs, another thread runs the model in SERVED."""

    def __init__(self):
        super().__init__()
        self.body = small()

    def forward(self, x):
        if self is not SERVED[0]:
            thread = threading.Thread(target=SERVED[0], args=(x,))
            thread.start()
            thread.join()
        return self.body(x)


@STARTS
def test_the_original_may_run_in_another_thread_meanwhile(start):
    model = randomise(Serving()).eval()
    SERVED[:] = [model]
    assert not normfree.convert(model, IMAGES, start=start).conversion.norms_left
