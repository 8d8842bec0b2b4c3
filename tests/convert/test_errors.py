"""What conversion refuses, each with one clear line, and what it leaves alone with its reason."""

from __future__ import annotations

import pytest
import torch
import torchvision
from convert.nets import post_activation
from torch import nn

import normfree
from normfree.convert.pipeline import NOT_RUN

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def convolution(norm=None):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {}, "it has no normalizer that is recognised (looked for: "),
        (
            nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(256, 2, 8, batch_first=True)),
            {},
            "stands between linear and attention",
        ),
        (
            nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(256, 2, 8, batch_first=True)),
            {"start": "pretrained"},
            "no constants to fold; keep it as it is",
        ),
        (convolution(nn.GroupNorm(2, 4)), {"start": "pretrained"}, 'no constants to fold; choose start="fresh"'),
        (convolution(), {"start": "warm"}, "start='warm': unknown choice; choose one of 'fresh', 'pretrained'"),
        (convolution(), {"beta": "guess"}, "choose one of 'plan', 'measured'"),
        (convolution(), {"alpha": -1.0}, "alpha=-1.0: must be a finite number"),
        (convolution(), {"skip_gain": float("nan")}, "skip_gain=nan"),
        (convolution(), {"seed": -1}, "seed=-1"),
        (lambda x: x, {}, "model: function is no torch.nn.Module"),
    ],
)
def test_bad_input_is_one_line(model, options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - its notes, which a traceback shows, have more lines
        normfree.convert(model, IMAGES, **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_norm_inside_a_scripted_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(4))))
    with pytest.raises(ValueError, match=r"model: 1 is a scripted Sequential.*script what normfree.fold makes of it"):
        normfree.convert(model, IMAGES)


def test_a_forward_that_needs_another_input():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = convolution()

        def forward(self, x, mask):
            return self.body(x) * mask

    with pytest.raises(ValueError, match=r"mask.*give a batch that the model's forward takes"):
        normfree.convert(Two(), IMAGES)
    mask = torch.ones(4, 1, 14, 14)
    for batch in ((IMAGES, mask), {"x": IMAGES, "mask": mask}):
        assert normfree.convert(Two(), batch).conversion.norms_left == ()


def test_a_batch_without_values_or_variance():
    with pytest.raises(ValueError, match="is empty"):
        normfree.convert(convolution(), IMAGES[:0])
    with pytest.raises(ValueError, match="example_input: all that a filter of 0 sees at once is the same"):
        normfree.convert(convolution(), torch.zeros(4, 3, 16, 16))


def test_grey_images_in_three_channels_seen_pixel_by_pixel():
    grey = IMAGES.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    pixelwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    with pytest.raises(ValueError, match=r"filter of 0 sees at once is the same .* grey images seen pixel by pixel"):
        normfree.convert(pixelwise, grey, beta="measured")
    for model, images in ((pixelwise, IMAGES), (convolution(), grey)):
        assert not normfree.convert(model, images, beta="measured").conversion.norms_left


class Shared(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.own = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.own(self.norm(self.second(self.norm(self.first(x)))))


def test_a_shared_norm_goes_where_a_layer_of_its_own_comes_before_each_of_its_places():
    record = normfree.convert(Shared(), IMAGES).conversion
    assert record.norms_left == ()
    assert next(change.carried_by for change in record.changes if change.name == "norm") == ("first", "second")


def test_a_shared_norm_becomes_an_affine_map_in_a_pretrained_one():
    model = Shared().eval()
    converted = normfree.convert(model, IMAGES, start="pretrained")
    assert "several layers share it" in next(c.reason for c in converted.conversion.changes if c.name == "norm")
    torch.testing.assert_close(converted(IMAGES), model(IMAGES))


def test_layers_whose_weight_is_not_their_own_stay():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="0 before it has parametrizations"):
        normfree.convert(model, IMAGES)
    hooked = convolution()
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError,
        match=r"its normalizer stays, 1 \(BatchNorm2d\): 0 before it has hooks; keep it",
    ):
        normfree.convert(hooked, IMAGES)
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)  # something lies in between now
    record = normfree.convert(hooked, IMAGES).conversion
    assert [(change.now, "0 before it has hooks" in change.reason) for change in record.changes] == [
        ("ChannelUnits", True)
    ]


def test_a_functional_norm_is_told():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = convolution()

        def forward(self, x):
            return nn.functional.layer_norm(self.body(x), (14, 14))

    record = normfree.convert(Functional(), IMAGES).conversion
    assert [(kept.name, kept.was) for kept in record.norms_left] == [("", "native_layer_norm")]
    assert "the model normalizes in its own forward, by a function; write it as a module" in str(record)
    assert "1 normalizer left" in record.summary()
    with pytest.raises(ValueError, match=r"its normalizer stays, 0 \(ByHand\): it gives the input its units; keep"):
        normfree.convert(nn.Sequential(ByHand(True)), IMAGES)


class ByHand(nn.Module):
    """Statistics of the batch without a norm's module."""

    def __init__(self, functional):
        super().__init__()
        self.functional = functional

    def forward(self, x):
        if self.functional:
            return nn.functional.batch_norm(x, None, None, training=True)
        mean = x.mean((0, 2, 3), keepdim=True)
        return (x - mean) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("functional", [False, True])
def test_statistics_of_the_batch_taken_by_hand_go_in_a_fresh_start_and_stay_in_a_pretrained_one(functional):
    model = nn.Sequential(convolution(), ByHand(functional), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    assert not normfree.convert(model, IMAGES).conversion.norms_left
    left = normfree.convert(model, IMAGES, start="pretrained").conversion.norms_left
    assert [kept.name for kept in left] == ["1"]


class CentredInTraining(nn.Module):
    """Statistics of the batch in training alone, and nothing in evaluation mode."""

    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True) if self.training else x


class ByHandInTraining(nn.Module):
    """Statistics of the batch in training alone, as a BatchNorm of one's own has them: it converts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4, 1, 1))

    def forward(self, x):
        return x - (x.mean((0, 2, 3), keepdim=True) if self.training else self.running_mean)


class Logged(nn.Module):
    """A statistic of the batch that the output does not depend on."""

    def forward(self, x):
        self.log = x.mean((0, 2, 3))
        return x


@pytest.mark.parametrize(
    ("part", "count"), [(CentredInTraining, 1), (ByHandInTraining, 0), (Logged, 0), (nn.Dropout, 0)]
)
def test_what_counts_is_whether_examples_see_each_other(part, count):
    converted = normfree.convert(nn.Sequential(convolution(), part()), IMAGES)
    assert len(converted.conversion.norms_left) == count


def test_subclasses_that_compute_what_their_base_does_convert():
    class Three(nn.Conv2d):
        def __init__(self, channels, out):
            super().__init__(channels, out, 3, padding=1)

    model = nn.Sequential(Three(3, 4), nn.BatchNorm2d(4), nn.ReLU(), Three(4, 4), nn.BatchNorm2d(4)).eval()
    assert not normfree.convert(model, IMAGES).conversion.norms_left
    torch.testing.assert_close(normfree.convert(model, IMAGES, start="pretrained")(IMAGES), model(IMAGES))


def test_a_norm_behind_a_recurrent_layer_becomes_an_affine_map():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.norm, self.body = nn.GRU(8, 4, batch_first=True), nn.BatchNorm1d(4), convolution()

        def forward(self, x):
            return self.body(x).mean((2, 3)) + self.norm(self.rnn(x[:, 0])[0].transpose(1, 2)).mean(2)

    changes = normfree.convert(Recurrent(), IMAGES[..., :8]).conversion.changes
    assert next(change.now for change in changes if change.name == "norm") == "ChannelUnits"


def test_an_input_that_leaves_torch_is_told():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = convolution()

        def forward(self, x):
            return self.body(torch.from_numpy(x.numpy().copy()))

    with pytest.raises(ValueError, match=r"leads from the input to it; convert the part .* detector.backbone"):
        normfree.convert(Through(), IMAGES)


def test_a_detector_converts_whole():
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert not normfree.convert(detector.eval(), (images,)).conversion.norms_left


def test_a_list_is_no_example():
    with pytest.raises(ValueError, match="example_input: a list is no batch; give a tensor, a tuple of positional"):
        normfree.convert(convolution(), [IMAGES])
    with pytest.raises(ValueError, match="example_input: it holds no tensor"):
        normfree.convert(convolution(), IMAGES.numpy())


def test_reasons_say_what_is_so():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.norm = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(self.first(x))
            return y + self.norm(y)

    changes = normfree.convert(Read(), IMAGES, start="pretrained").conversion.changes
    reasons = {change.name: change.reason for change in changes}
    assert reasons["first"] == "stays an affine map: it takes the input itself, which no layer comes before"
    assert reasons["norm"] == "stays an affine map: the output of conv before it is read elsewhere, too"


def test_what_never_ran_is_told():
    model = convolution()
    model.unused = nn.Identity()
    model.unused.norm = nn.BatchNorm2d(4)
    kept = normfree.convert(model, IMAGES).conversion.norms_left
    assert [(one.name, one.reason) for one in kept] == [("unused.norm", NOT_RUN["fresh"])]


def test_the_default_input_is_noise_of_the_shape_the_model_suggests():
    torch.manual_seed(0)
    assert normfree.convert(post_activation(), start="pretrained").conversion.input_shapes == ((8, 3, 224, 224),)


def test_branches_are_named_where_their_module_has_no_name():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

        def forward(self, x):
            return x + self.body(x)

    first = normfree.convert(Block(), IMAGES).conversion.changes[0]
    assert first.reason.endswith("; ends the branch added in the model")


def test_a_norm_behind_a_convolution_that_is_no_layer_stays():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(4, 3, 3, 3)])
            self.norm, self.body = nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(self.norm(nn.functional.conv2d(x, self.weights[0])))

    kept = normfree.convert(Own(), IMAGES).conversion.norms_left
    assert [one.name for one in kept] == ["norm"]
    assert kept[0].reason == "the model before it computes convolution with no weight of its own"


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_our_own_comparisons_convert_too(start, padding):
    torch.manual_seed(0)
    sizes = {"widths": (16, 16, 16, 16), "depths": (1, 1, 1, 1)}
    model = normfree.create_model("resnetv2_50", **sizes, num_classes=3, padding=padding).eval()
    images = torch.randn(2, 3, 32, 32)
    converted = normfree.convert(model, images, start=start)
    assert not converted.conversion.norms_left
    assert converted(images).shape == model(images).shape
    if start == "pretrained":
        torch.testing.assert_close(converted(images), model(images), rtol=1e-4, atol=1e-5)


class Dotted(nn.Module):
    """Names with dots, which add_module refuses and setattr does not."""

    def __init__(self):
        super().__init__()
        setattr(self, "stem.0", nn.Conv2d(3, 8, 3))
        setattr(self, "block.1", nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
        setattr(self, "head.0", nn.Linear(8, 4))
        nn.init.zeros_(self._modules["block.1"][1].weight)

    def forward(self, x):
        stem, block, head = self._modules.values()
        x = stem(x)
        return head((x + block(x)).relu().mean((2, 3)))


def test_names_with_dots_are_measured_and_trained_and_refused_where_modules_are_exchanged(tmp_path):
    model, images = Dotted(), torch.randn(4, 3, 8, 8)
    measured = normfree.spp(model, images)
    assert [block.woken for block in measured.blocks] == [("block.1.1.weight",)]
    assert normfree.optim.final_layers(model) == ("head.0",)
    normfree.optim.muon_groups(model, 1e-4)
    normfree.optim.parameter_groups(model, 1e-4, classifier_lr_scale=0.1)
    for start in ("fresh", "pretrained"):
        with pytest.raises(ValueError, match=r"^model='Dotted': the name of its submodule 'stem\.0' has a dot"):
            normfree.convert(model, images, start=start)
    with pytest.raises(ValueError, match=r"^model: torch.export cannot trace it"):
        normfree.export.to_program(model, images, tmp_path / "m.pt2")
