"""Layers of other people's classes: one linear map of a weight of their own, whatever their forward does besides."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from convert.nets import randomise
from torch import nn
from torch.func import functional_call, grad, vmap

import normfree
from normfree.nn import standardization_of

WIDTH, DEPTH = 16, 6


class Padding(nn.Conv2d):
    """TensorFlow's padding: the greater half below and to the right."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Causal(nn.Conv1d):
    """Pads on the left alone, and crops through the class it extends."""

    def forward(self, x):
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Composite(nn.Conv2d):
    """detectron2's: a norm and an activation as attributes, in its own forward."""

    def __init__(self, *arguments, norm=None, activation=None, **options):
        super().__init__(*arguments, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class EqualizedConv(nn.Module):
    """An equalized learning rate: a weight of unit variance, multiplied by a constant in each forward."""

    def __init__(self, inputs, outputs, rate=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gain, self.rate = 1 / math.sqrt(inputs * 9), rate

    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype) * self.gain, self.bias * self.rate, padding=1)


class EqualizedLinear(nn.Module):
    """The same as a matrix, its bias optional."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x):
        bias = self.bias
        return F.linear(x, self.weight * self.scale, None if bias is None else bias * 0.1)


class GraphLinear(nn.Module):
    """A graph library's own linear layer, with its own names."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels) / math.sqrt(in_channels))
        self.register_parameter("bias", None)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Aggregating(nn.Module):
    """A graph convolution: multiplies, aggregates over a fixed ring of neighbours, adds its bias then."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        y = x @ self.kernel
        return (y + y.roll(1, 0)) / 2 + self.offset


class Matmul(nn.Module):
    """A one by one convolution as a product with the transposed weight."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return x @ self.weight.t()


class Kernel(nn.Module):
    """A matrix [in, out] under another name and a bias that is added."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel, self.b = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.matmul(x, self.kernel) + self.b


class Addmm(nn.Module):
    """GPT-2's Conv1D: weight [in, out], addmm on flattened tokens."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Einsum(nn.Module):
    """A product written as a sum over indices, of a weight by heads [heads, out / heads, in]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, outputs // 4, inputs))

    def forward(self, x):
        return torch.einsum("ni,hoi->nho", x, self.weight).flatten(1)


class FirstFactor(nn.Module):
    """A one by one convolution as weight times map."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return torch.matmul(self.weight, x)


class Coordinates(nn.Conv2d):
    """CoordConv: two more input channels that hold the position."""

    def __init__(self, inputs, outputs, size):
        super().__init__(inputs + 2, outputs, size, padding=size // 2)

    def forward(self, x):
        rows = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1).expand(len(x), 1, *x.shape[2:])
        columns = torch.linspace(-1, 1, x.shape[3]).expand(len(x), 1, *x.shape[2:])
        return super().forward(torch.cat([x, rows, columns], 1))


class Cropped(nn.ConvTranspose2d):
    """A transposed convolution that crops what it makes."""

    def forward(self, x):
        y = F.conv_transpose2d(x, self.weight, self.bias, self.stride, groups=self.groups)
        return y[:, :, 1:-1, 1:-1]


class Block(nn.Module):
    """A convolution with its norm and activation, the weight a parameter of the block."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(outputs, inputs, 3, 3)), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.norm(F.conv2d(x, self.weight, padding=1)))


def chain(make, norm, *inputs, act=nn.SiLU, depth=DEPTH):
    torch.manual_seed(0)
    layers = [part for i in range(depth) for part in (make(inputs[0] if i == 0 else WIDTH), norm(WIDTH), act())]
    return nn.Sequential(*layers, inputs[1])


IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(16, 4, 40, generator=torch.Generator().manual_seed(0))


def maps(make, act=nn.SiLU):
    return chain(make, nn.BatchNorm2d, 3, nn.Conv2d(WIDTH, 4, 1), act=act), IMAGES


def rows(make):
    return chain(make, nn.BatchNorm1d, 8, nn.Linear(WIDTH, 3), act=nn.ReLU), ROWS


def series(make):
    return chain(make, nn.BatchNorm1d, 4, nn.Conv1d(WIDTH, 2, 1)), SERIES


def composite(bias):
    torch.manual_seed(0)
    options = {"norm": lambda: nn.BatchNorm2d(WIDTH), "activation": nn.SiLU}
    made = [
        Composite(3 if i == 0 else WIDTH, WIDTH, 3, padding=1, bias=bias, **{k: v() for k, v in options.items()})
        for i in range(DEPTH)
    ]
    return nn.Sequential(*made, nn.Conv2d(WIDTH, 4, 1)), IMAGES


CASES = {
    "padding": lambda: maps(lambda n: Padding(n, WIDTH, 2, bias=False)),
    "padding, strided and grouped": lambda: maps(lambda n: Padding(n, WIDTH, 2, groups=1 if n == 3 else 4)),
    "causal": lambda: series(lambda n: Causal(n, WIDTH, 3, dilation=2)),
    "causal without bias": lambda: series(lambda n: Causal(n, WIDTH, 3, bias=False)),
    "composite": lambda: composite(True),
    "composite without bias": lambda: composite(False),
    "equalized": lambda: maps(lambda n: EqualizedConv(n, WIDTH)),
    "equalized linear": lambda: rows(lambda n: EqualizedLinear(n, WIDTH)),
    "equalized linear with bias": lambda: rows(lambda n: EqualizedLinear(n, WIDTH, bias=True)),
    "graph": lambda: rows(lambda n: GraphLinear(n, WIDTH)),
    "matmul": lambda: rows(lambda n: Matmul(n, WIDTH)),
    "kernel": lambda: rows(lambda n: Kernel(n, WIDTH)),
    "addmm": lambda: rows(lambda n: Addmm(n, WIDTH)),
    "einsum": lambda: rows(lambda n: Einsum(n, WIDTH)),
    "first factor": lambda: series(lambda n: FirstFactor(n, WIDTH)),
    "coordinates": lambda: maps(lambda n: Coordinates(n, WIDTH, 3)),
    "cropped": lambda: maps(lambda n: Cropped(n, WIDTH, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_norms_go_and_the_variance_stays(name):
    model, batch = CASES[name]()
    converted = normfree.convert(model, batch)
    record = converted.conversion
    assert not record.norms_left
    standardized = [change for change in record.changes if change.now == f"standardized {change.was}"]
    assert len(standardized) == DEPTH
    kind = type(model[0])
    assert all(isinstance(converted[index], kind) for index in range(0, len(model) - 1) if type(model[index]) is kind)
    variances = [block.avg_channel_var for block in normfree.spp(converted, batch, points="layers").blocks[:DEPTH]]
    assert max(variances) < 4 * min(variances)
    assert all(0.25 < value < 4 for value in variances)
    plain = normfree.fold(converted)
    assert standardization_of(plain[0]) is None and standardization_of(converted[0]) is not None
    torch.testing.assert_close(plain(batch), converted.eval()(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_pretrained_start_folds_exactly(name):
    model, batch = CASES[name]()
    model = randomise(model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(model.state_dict())
    converted = normfree.convert(model, batch, start="pretrained")
    record = converted.conversion
    assert {change.now for change in record.changes if change.was.startswith("Batch")} == {"Identity"}
    assert sum(change.now == f"kept-mean {type(model[0]).__name__}" for change in record.changes) == DEPTH
    assert not record.norms_left
    wanted = model(batch)
    torch.testing.assert_close(converted(batch), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = normfree.fold(converted)
    torch.testing.assert_close(plain(batch), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize("name", ["padding", "composite without bias", "equalized", "cropped", "first factor"])
def test_files_gradients_of_examples_and_frozen_parameters(name, start, tmp_path):
    model, batch = CASES[name]()
    model = randomise(model).eval()
    for part in (model[0], model[1]):
        part.requires_grad_(False)
    converted = normfree.convert(model, batch, start=start).eval()
    path = normfree.save(converted, tmp_path / "model.safetensors")
    back = normfree.load(path, original=CASES[name]()[0])
    assert torch.equal(back(batch), converted(batch)) and back.conversion == converted.conversion
    assert type(back[0]) is type(converted[0])
    folded = normfree.fold(converted)
    again = normfree.load(normfree.save(folded, tmp_path / "folded.safetensors"), original=CASES[name]()[0])
    assert torch.equal(again(batch), folded(batch))
    frozen = {key for key, parameter in converted[0].named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == (start == "pretrained")
    for parameter in converted.parameters():
        parameter.requires_grad_()
    parameters = {key: parameter.detach() for key, parameter in converted.named_parameters()}

    def loss(parameters, x):
        return functional_call(converted, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
    converted(batch).square().sum().backward()
    for key, parameter in converted.named_parameters():
        assert parameter.grad is not None, key
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-3 * size + 1e-5)


class Normed(nn.Conv2d):
    """A weight norm of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.length = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = self.length * self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return self._conv_forward(x, weight, self.bias)


class Twice(nn.Conv2d):
    """Uses its weight twice: on the input and on its mirror image."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1)).flip(-1)


class Penalized(nn.Conv2d):
    """One convolution, and something else that reads the weight."""

    def forward(self, x):
        return super().forward(x) * self.weight.square().mean()


class Masked(nn.Conv2d):
    """Only a part of the weight is used."""

    def forward(self, x):
        mask = torch.ones_like(self.weight)
        mask[:, :, 2] = 0
        return self._conv_forward(x, self.weight * mask, self.bias)


class Modulated(nn.Conv2d):
    """A weight that depends on the input."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=1)


class Reading(nn.Conv2d):
    """Adds a bias that it computes of two parameters."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias + self.weight.mean(), padding=1)


class LowRank(nn.Module):
    """A weight and a low-rank change of it."""

    def __init__(self, *sizes, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 72))

    def forward(self, x):
        return F.conv2d(x, self.weight + (self.a @ self.b).view_as(self.weight), padding=1)


REASONS = {
    Normed: "computes its weight from weight",
    Twice: "uses its weight more than once in a run",
    Penalized: "reads its weight elsewhere, too (pow)",
    Masked: "computes its weight from weight (mul)",
    Modulated: "uses its weight in no convolution or matrix product by itself",
    Reading: "reads its weight elsewhere, too (mean)",
    LowRank: "multiplies by several parameters",
}


@pytest.mark.parametrize("kind", [kind for kind in REASONS if kind is not LowRank])
@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_what_does_more_with_its_weight_stays_and_says_why(kind, start):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), kind(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
    model = randomise(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 2, 1))).eval()
    record = normfree.convert(model, IMAGES, start=start).conversion
    named = {one.name: one.reason for one in (*record.kept, *record.changes)}
    assert f"3 before it {REASONS[kind]}" in named["4"]
    if start == "fresh":
        assert [one.name for one in record.norms_left] == ["4"]


def test_a_low_rank_change_of_a_weight_is_no_single_weight():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LowRank(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    record = normfree.convert(model, IMAGES).conversion
    assert [
        (one.name, one.reason.startswith("2 before it computes its weight from ")) for one in record.norms_left
    ] == [("3", True)]


def test_a_block_with_its_own_weight_and_norm():
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(3 if i == 0 else WIDTH, WIDTH) for i in range(DEPTH)], nn.Conv2d(WIDTH, 2, 1))
    converted = normfree.convert(model, IMAGES)
    assert not converted.conversion.norms_left
    variances = [block.avg_channel_var for block in normfree.spp(converted, IMAGES, points="layers").blocks[:DEPTH]]
    assert max(variances) < 4 * min(variances)
    trained = randomise(copy.deepcopy(model)).eval()
    kept = normfree.convert(trained, IMAGES, start="pretrained")  # no bias can be put between weight and activation
    assert {change.now for change in kept.conversion.changes} == {"ChannelAffine"}
    wanted = trained(IMAGES)
    torch.testing.assert_close(kept(IMAGES), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


class Residual(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.norm, self.act = make(WIDTH), nn.BatchNorm2d(WIDTH), nn.SiLU()
        self.second, self.last = make(WIDTH), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        y = F.pad(self.act(self.norm(self.first(x))), (0, 1, 0, 1))[:, :, : x.shape[2], : x.shape[3]]
        return x + self.last(self.second(y))


@pytest.mark.parametrize("skip_gain", [0.5, 0.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: Coordinates(n, WIDTH, 3),
        lambda n: EqualizedConv(n, WIDTH),
        lambda n: Composite(n, WIDTH, 3, padding=1, bias=False),
    ],
)
def test_the_plot_shows_branches_before_alpha(make, skip_gain):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *[Residual(make) for _ in range(4)])
    converted = normfree.convert(model, IMAGES, skip_gain=skip_gain)
    ends = [change for change in converted.conversion.changes if change.alpha is not None]
    assert len(ends) == 4 and all(change.now.startswith("standardized ") for change in ends)
    plot = normfree.spp(converted, IMAGES)
    assert [block.residual_avg_channel_var for block in plot.blocks] == pytest.approx([1.0] * 4, abs=0.3)
    plain = normfree.fold(converted.eval())
    torch.testing.assert_close(plain(IMAGES), converted(IMAGES), rtol=1e-4, atol=1e-5)


def test_precision_and_memory_format_are_kept():
    model, batch = CASES["padding"]()
    model = model.double().to(memory_format=torch.channels_last)
    converted = normfree.convert(model, batch.double())
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float64}
    assert converted[0].raw_weight.is_contiguous(memory_format=torch.channels_last)
    half = normfree.convert(CASES["padding"]()[0].bfloat16(), batch.bfloat16(), start="pretrained")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_original_and_its_class_are_left_alone():
    model, batch = CASES["composite without bias"]()
    normfree.convert(model, batch)
    assert type(model[0]) is Composite and model[0].bias is None
    assert all(type(part) is Composite for part in model[:DEPTH])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_opacus_accepts_it_and_one_private_step_runs():
    opacus = pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator

    model, batch = CASES["padding"]()
    private = normfree.convert(model, batch)
    assert ModuleValidator.validate(private, strict=False) == []
    module = opacus.GradSampleModule(private)
    module(batch).square().sum().backward()
    assert all(parameter.grad_sample.shape[0] == len(batch) for parameter in module.parameters())


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize("reparametrize", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm.*is deprecated:FutureWarning")
def test_a_weight_that_an_old_hook_computes_stays_with_a_reason(reparametrize, start):
    """Once it has run, the computed weight is an attribute with a graph, which no copy.deepcopy takes."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), reparametrize(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)]
    model, images = nn.Sequential(*layers), torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model(images).sum().backward()
    assert not model[3].weight.is_leaf
    wanted = model.eval()(images)
    converted = normfree.convert(model, images, start=start)
    kept = {one.name: one.reason for one in converted.conversion.kept}
    changed = {one.name: one.reason for one in converted.conversion.changes}
    assert {"0", "1"} <= changed.keys() and "3" in kept
    assert (kept | changed)["4"].endswith("3 before it has hooks")
    found = converted(images)
    if start == "pretrained":
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normfree.fold(converted)(images), found)
    converted.train()(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


class Heads(nn.Module):
    """A linear map whose weight has an axis for the heads, as attention and graph layers write it."""

    def __init__(self, equation, shape, bias):
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(shape) * 0.2)
        self.bias = nn.Parameter(torch.randn(12)) if bias else None

    def forward(self, x):
        equation, _, regrouped = self.equation.partition(", ")
        made = torch.einsum(equation, x, self.weight)
        made = made.contiguous().transpose(2, 3) if regrouped else made
        made = made.transpose(1, 2) if made.shape[1] == 4 else made  # heads before positions
        return made.flatten(2) if self.bias is None else made.flatten(2) + self.bias


class Swap(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


HEADS = {
    "ntd,hde->nthe": (4, 12, 3),
    "ntd,hde->nhte": (4, 12, 3),
    "ntd,dhe->nhte": (12, 4, 3),
    "ntd,hed->nthe": (4, 3, 12),
    "ntd,hde->nthe, regrouped": (4, 12, 3),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("equation", HEADS)
def test_a_product_by_heads_takes_the_constants_of_its_norm(equation, bias):
    """Which output of the product is which channel of the norm is told by the operations in between, run on indices."""
    layers = [nn.Linear(12, 12), Heads(equation, HEADS[equation], bias), Swap(), nn.BatchNorm1d(12), Swap()]
    model = randomise(nn.Sequential(*layers, nn.ReLU(), nn.Linear(12, 3))).eval()
    x = torch.randn(8, 12, 12, generator=torch.Generator().manual_seed(0))  # as many positions as channels
    converted = normfree.convert(model, x, start="pretrained")
    changes = {one.name: one for one in converted.conversion.changes}
    if equation.endswith("regrouped"):  # channels are not in the order of the product's outputs
        assert changes["3"].now == "ChannelAffine"
    else:
        assert (changes["1"].now, changes["3"].into) == ("kept-mean Heads", "1")
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
