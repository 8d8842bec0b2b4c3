"""Norms are recognised by what they compute: hand-written ones of many kinds, and none where there is none."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree
from normfree.convert.dataflow import record
from normfree.convert.norms import Normalizations

TOKENS = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))
NODES = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
GRAPHS = torch.arange(32) // 8
RMS, STANDARD, VECTORS = "root mean square norm", "standardization", "normalization of vectors"


class After(nn.Module):
    """A function of what a layer makes, [.., 16] or maps of 16 channels, and of learned gains."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.conv = nn.Linear(16, 16), nn.Conv2d(16, 16, 1)
        self.gain, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.function = function

    def forward(self, x, *more):
        return self.function(self, self.conv(x) if x.dim() == 4 else self.linear(x), *more)

    @property
    def maps(self):
        return self.gain[:, None, None]


def llama(net, x):
    wide = x.to(torch.float64)
    return net.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def t5(net, x):
    return net.gain * (x * torch.rsqrt(x.to(torch.float64).pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def channels_first(net, x):
    mean = x.mean(1, keepdim=True)
    return (
        net.maps * ((x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)) + net.shift[:, None, None]
    )


def without_mean(net, x):  # Restormer's bias-free norm
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens / torch.sqrt(tokens.var(-1, keepdim=True, unbiased=False) + 1e-5) * net.gain).transpose(1, 2)


def all_of_an_example(net, x):  # ConvTasNet's global norm
    mean = x.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
    variance = torch.pow(x - mean, 2).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
    return net.gain * (x - mean) / torch.pow(variance + 1e-8, 0.5) + net.shift


def cumulative(net, x):
    count = torch.arange(1, 11)[None, :, None] * 16.0
    mean = x.sum(-1, keepdim=True).cumsum(1) / count
    square = x.pow(2).sum(-1, keepdim=True).cumsum(1) / count
    return (x - mean) / (square - mean.pow(2) + 1e-8).sqrt()


def moments(net, x):
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def two_moments(net, x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean**2 + 1e-5)


def groups(net, x):
    y = x.view(4, 4, -1)
    return ((y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-5)).view_as(x) * net.maps


def response(net, x):  # ConvNeXt V2's
    norm = x.norm(p=2, dim=(2, 3), keepdim=True)
    return net.maps * (x * (norm / (norm.mean(1, keepdim=True) + 1e-6))) + x


def filter_response(net, x):
    return torch.max(net.maps * x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6), net.shift[:, None, None])


def evolved_of_groups(net, x):
    deviation = torch.sqrt(x.view(4, 4, 4, 6, 6).var((2, 3, 4), keepdim=True) + 1e-5).expand(4, 4, 4, 6, 6)
    return x * torch.sigmoid(x * net.maps) / deviation.reshape_as(x)


def evolved_of_batches(net, x):
    batch, own = x.var((0, 2, 3), keepdim=True), x.var((2, 3), keepdim=True)
    return x / torch.max((batch + 1e-5).sqrt(), net.maps * x + (own + 1e-5).sqrt())


def of_graphs(net, x, graphs):
    count = torch.zeros(4).index_add(0, graphs, torch.ones(32)).clamp(min=1)[:, None]
    centred = x - (torch.zeros(4, 16).index_add(0, graphs, x) / count)[graphs] * net.gain
    variance = torch.zeros(4, 16).index_add(0, graphs, centred * centred) / count
    return net.gain * centred / (variance + 1e-5).sqrt()[graphs] + net.shift


def of_graphs_by_scattering(net, x, graphs):
    index = graphs[:, None].expand_as(x)
    centred = x - (torch.zeros(4, 16).scatter_add_(0, index, x) / 8).index_select(0, graphs)
    variance = torch.zeros(4, 16).scatter_add_(0, index, centred.pow(2)) / 8
    return centred / (variance + 1e-5).sqrt().gather(0, index)


def of_pairs(net, x):
    x = x - x.mean(0, keepdim=True)
    return x / (1e-5 + x.pow(2).sum(-1).mean()).sqrt()


def zero_vectors_kept(net, x):
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def in_place(net, x):
    return x.mul_(x.pow(2).mean(-1, keepdim=True).add_(1e-6).rsqrt_())


def by_einsum(net, x):
    return x * torch.rsqrt(torch.einsum("btc,btc->bt", x, x) / 16 + 1e-6)[..., None]


def of_neighbours(net, x):
    return F.local_response_norm(x, 3)


def fused(net, x):
    return torch.addcmul(net.shift, x * torch.rsqrt(x.square().mean(-1, True) + 1e-6), net.gain)


def divisive(net, x):  # of learned image compression
    return x * torch.rsqrt(F.conv2d(x * x, net.conv.weight.square(), net.conv.bias.square() + 1))


def divisive_by_magnitudes(net, x):
    return x / F.linear(x.abs(), net.linear.weight.abs(), net.linear.bias.abs() + 1)


NORMS = {
    "llama": (llama, (TOKENS,), RMS, {"channels"}),
    "t5": (t5, (TOKENS,), RMS, {"channels"}),
    "channels first": (channels_first, (IMAGES,), STANDARD, {"channels"}),
    "without mean": (without_mean, (IMAGES,), STANDARD, {"channels"}),
    "all of an example": (all_of_an_example, (TOKENS,), STANDARD, {"channels", "positions"}),
    "cumulative": (cumulative, (TOKENS,), STANDARD, {"channels", "neighbours"}),
    "moments": (moments, (TOKENS,), STANDARD, {"channels"}),
    "two moments": (two_moments, (TOKENS,), STANDARD, {"channels"}),
    "groups": (groups, (IMAGES,), STANDARD, None),
    "response": (response, (IMAGES,), "response normalization", {"channels", "positions"}),
    "filter response": (filter_response, (IMAGES,), RMS, {"positions"}),
    "evolved, of groups": (evolved_of_groups, (IMAGES,), STANDARD, None),
    "evolved, of batches": (evolved_of_batches, (IMAGES,), STANDARD, {"examples", "positions"}),
    "batch": (
        lambda net, x: (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt(),
        (IMAGES,),
        STANDARD,
        {"examples", "positions"},
    ),
    "graphs": (of_graphs, (NODES, GRAPHS), STANDARD, {"nodes"}),
    "graphs, by scattering": (of_graphs_by_scattering, (NODES, GRAPHS), STANDARD, {"nodes"}),
    "pairs": (of_pairs, (NODES,), "normalization over examples", {"channels", "examples"}),
    "vectors": (lambda net, x: F.normalize(x, dim=-1), (TOKENS,), VECTORS, {"channels"}),
    "vectors, scaled": (lambda net, x: F.normalize(x, dim=-1) * 4 * net.gain, (TOKENS,), VECTORS, {"channels"}),
    "vectors, by magnitude": (lambda net, x: F.normalize(x, p=1, dim=-1), (TOKENS,), VECTORS, {"channels"}),
    "vectors, but zeros": (zero_vectors_kept, (TOKENS,), VECTORS, {"channels"}),
    "cosines": (lambda net, x: F.cosine_similarity(x, net.gain[None, None], dim=-1), (TOKENS,), VECTORS, {"channels"}),
    "maximum": (lambda net, x: x / x.abs().amax(-1, keepdim=True).clamp(min=1e-5), (TOKENS,), VECTORS, {"channels"}),
    "divisive": (divisive, (IMAGES,), VECTORS, {"channels"}),
    "divisive, by magnitudes": (divisive_by_magnitudes, (TOKENS,), VECTORS, {"channels"}),
    "in place": (in_place, (TOKENS,), RMS, {"channels"}),
    "einsum": (by_einsum, (TOKENS,), VECTORS, {"channels"}),
    "neighbours": (of_neighbours, (IMAGES,), RMS, {"neighbours"}),
    "fused": (fused, (TOKENS,), RMS, {"channels"}),
    "by a function, of layers": (lambda net, x: F.layer_norm(x, (16,)), (TOKENS,), "native_layer_norm", {"channels"}),
    "by a function, of squares": (lambda net, x: F.rms_norm(x, (16,)), (TOKENS,), None, {"channels"}),
    "by a function, of groups": (
        lambda net, x: F.group_norm(x, 4),
        (IMAGES,),
        "native_group_norm",
        {"channels", "positions"},
    ),
}


def normalizations(function, inputs):
    torch.manual_seed(0)
    found = Normalizations(record(After(function).eval(), inputs)).found
    return [one for one in found if not one.centres]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_recognised_by_what_it_computes(name):
    function, inputs, kind, over = NORMS[name]
    found = normalizations(function, inputs)
    assert len(found) == 1, [str(one) for one in found]
    assert kind is None or found[0].kind == kind
    assert over is None or found[0].statistic.over == over


def excited(net, x):
    return x * torch.sigmoid(net.conv(F.relu(net.conv(x.mean((2, 3), keepdim=True)))))


def excited_by_squares(net, x):
    return x * torch.sigmoid(net.conv(x.pow(2).mean((2, 3), keepdim=True)))


def weighted_squares(net, x):
    return x * net.linear(x.square())


def gated_by_weighted_squares(net, x):
    return x * torch.sigmoid(net.linear(x.square()))


def divided_by_a_layer(net, x):
    return x / (1 + net.linear(x).square())


def gated_by_norms(net, x):
    return x * (1 + torch.tanh(x.pow(2).sum((2, 3), keepdim=True).add(1e-5).sqrt()))


def energy(net, x):  # SimAM's: a gate of the squares
    square = (x - x.mean((2, 3), keepdim=True)).pow(2)
    return x * torch.sigmoid(square / (4 * (square.sum((2, 3), keepdim=True) / 35 + 1e-4)) + 0.5)


def softmax_by_hand(net, x):
    exponential = torch.exp(x - x.amax(-1, keepdim=True))
    return exponential / exponential.sum(-1, keepdim=True)


def standardized_weight(net, x):
    weight = net.conv.weight
    mean = weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / (weight.std((1, 2, 3), keepdim=True) + 1e-5))


def demodulated(net, x):  # a weight made of an activation, as in StyleGAN 2
    weight = net.conv.weight[None] * net.linear(x.mean((2, 3)))[:, None, :, None, None]
    weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
    return F.conv2d(x.reshape(1, 64, 6, 6), weight.reshape(64, 16, 1, 1), groups=4)


def attention(net, x):
    return F.softmax(x @ x.transpose(1, 2) * 0.25, -1) @ x


def linear_attention(net, x):
    x = F.elu(x) + 1
    return (x @ (x.transpose(1, 2) @ x)) / (x @ x.sum(1, keepdim=True).transpose(1, 2) + 1e-6)


def over_a_mask(net, x):
    mask = (x[..., :1] > 0).float()
    return (x * mask).sum(1) / mask.sum(1)


def distances(net, x):
    square = x.pow(2).sum(-1)
    return (square[:, :, None] + square[:, None] - 2 * x @ x.transpose(1, 2)).clamp(min=0).sqrt()


def statistics_beside(net, x):
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    return torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], -1)


def deviation_of_the_batch(net, x):
    return torch.cat([x, x.std(0, keepdim=True).mean().expand(4, 1, 6, 6)], 1)


NOT_NORMS = {
    "weighted squares": (weighted_squares, TOKENS),
    "a gate of weighted squares": (gated_by_weighted_squares, TOKENS),
    "a layer's output in the denominator": (divided_by_a_layer, TOKENS),
    "softmax": (lambda net, x: F.softmax(x, -1), TOKENS),
    "softmax by hand": (softmax_by_hand, TOKENS),
    "squeeze and excitation": (excited, IMAGES),
    "excitation by squares": (excited_by_squares, IMAGES),
    "a gate of norms": (gated_by_norms, IMAGES),
    "energy": (energy, IMAGES),
    "a standardized weight": (standardized_weight, IMAGES),
    "a demodulated weight": (demodulated, IMAGES),
    "attention": (attention, TOKENS),
    "linear attention": (linear_attention, TOKENS),
    "attention renormalized": (lambda net, x: x.sigmoid() / (x.sigmoid().sum(1, keepdim=True) + 1e-6), TOKENS),
    "dropout": (lambda net, x: F.dropout(x, 0.5, True), TOKENS),
    "pooling": (lambda net, x: x.mean((2, 3)), IMAGES),
    "pooling of powers": (lambda net, x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3), IMAGES),
    "pooling over a mask": (over_a_mask, TOKENS),
    "distances": (distances, TOKENS),
    "a loss": (lambda net, x: ((x - net.gain) ** 2).mean(), TOKENS),
    "softsign": (lambda net, x: x / (1 + x.abs()), TOKENS),
    "inverse square root unit": (lambda net, x: x * torch.rsqrt(1 + x * x), TOKENS),
    "advantages": (lambda net, x: x - x.mean(-1, keepdim=True), TOKENS),
    "statistics beside": (statistics_beside, TOKENS),
    "deviation of the batch beside": (deviation_of_the_batch, IMAGES),
    "a layer scale": (lambda net, x: x + net.gain * x + net.shift, TOKENS),
    "a constant": (lambda net, x: x / 4.0, TOKENS),
    "another activation's deviation": (lambda net, x: net.linear(x) / x.std(1, keepdim=True), TOKENS),
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_what_divides_nothing_by_its_size_is_no_norm(name):
    function, inputs = NOT_NORMS[name]
    assert normalizations(function, inputs) == []


# In modules of their own, in the networks they come from.


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return llama_like(x, self.weight)


def llama_like(x, weight):
    return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Decoder(nn.Module):
    """Two blocks of Llama's order: attention and a gated layer, each behind a norm."""

    def __init__(self, width=16):
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.input_norms = nn.ModuleList(RMSNorm(width) for _ in range(2))
        self.middle_norms = nn.ModuleList(RMSNorm(width) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(2))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, 32)

    def forward(self, x):
        x = self.embedding(x)
        for first, second, qkv, up, down in zip(
            self.input_norms, self.middle_norms, self.qkv, self.up, self.down, strict=True
        ):
            x = x + F.scaled_dot_product_attention(*qkv(first(x)).chunk(3, -1), is_causal=True)
            gate, value = up(second(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * value)
        return self.head(self.norm(x))


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_every_norm_of_a_decoder_is_listed(start):
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    names = {"norm", *(f"{kind}_norms.{block}" for kind in ("input", "middle") for block in range(2))}
    with pytest.raises(ValueError, match=r"all 5 normalizers stay, such as .* \(RMSNorm\): ") as raised:
        normfree.convert(Decoder(), tokens, start=start)
    assert {note.split(" ")[0] for note in raised.value.__notes__} == names
    model = nn.Sequential(Decoder(), nn.Linear(32, 4), nn.Flatten(0, 1), nn.BatchNorm1d(4))
    kept = normfree.convert(model, tokens, start=start).conversion.norms_left
    assert {one.name for one in kept} >= {f"0.{name}" for name in names}
    assert all(one.norm and one.reason for one in kept)


class GlobalNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, channels, 1)), nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x):
        mean = x.mean(dim=(1, 2), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(1, 2), keepdim=True)
        return self.gamma * (x - mean) / (variance + 1e-8).sqrt() + self.beta


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return channels_first_like(x, self.weight, self.bias)


def channels_first_like(x, weight, bias):
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
    return weight[:, None, None] * x + bias[:, None, None]


class Response(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        norm = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gain * (x * (norm / (norm.mean(1, keepdim=True) + 1e-6))) + x


class Unit(nn.Module):
    """Vectors of length 20, with a gain for each channel, as SSD's."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x):
        return self.weight[:, None, None] * x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


@pytest.mark.parametrize(
    ("kind", "dimensions", "goes"),
    [(GlobalNorm, 1, True), (LayerNorm2d, 2, True), (Response, 2, False), (Unit, 2, False)],
)
def test_hand_written_norms_behind_a_convolution_go_in_a_fresh_start_or_stay_with_a_reason(kind, dimensions, goes):
    torch.manual_seed(0)
    layers = (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)) if dimensions == 1 else (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(layers[0], kind(8), nn.PReLU(), type(layers[0])(8, 8, 3), layers[1])
    images = torch.randn(4, 3, *[12] * dimensions)
    fresh = normfree.convert(model, images).conversion
    assert [one.name for one in fresh.norms_left] == ([] if goes else ["1"])
    record = normfree.convert(model.eval(), images, start="pretrained")
    assert [one.name for one in record.conversion.norms_left] == ["1"]
    torch.testing.assert_close(record(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_wrapper_is_found_by_the_norm_inside():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.BatchNorm1d(16)

        def forward(self, x):
            return self.module(x)

    model = nn.Sequential(nn.Linear(8, 16), Wrapper(), nn.ReLU(), nn.Linear(16, 2)).eval()
    record = normfree.convert(model, torch.randn(8, 8), start="pretrained").conversion
    assert [(change.name, change.into) for change in record.changes if change.into] == [("1.module", "0")]


# Norms of constants.


class FrozenWithoutEps(nn.Module):
    """As detection libraries write it, all of it buffers."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return x * scale + self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale


class FrozenByOtherNames(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mu", torch.rand(1, channels, 1, 1))
        self.register_buffer("inverse", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x):
        return torch.addcmul(-self.mu * self.inverse, x, self.inverse)


class OwnBatchNorm(nn.Module):
    """Statistics of the batch in training, learned gains under other names."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x):
        if self.training:
            self.mean, self.variance = x.mean((0, 2, 3)).detach(), x.var((0, 2, 3)).detach()
        mean, variance = (each[:, None, None] for each in (self.mean, self.variance))
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.gamma[:, None, None] + self.beta[:, None, None]


@pytest.mark.parametrize("kind", [FrozenWithoutEps, FrozenByOtherNames, OwnBatchNorm])
def test_norms_of_constants_fold_whatever_their_names(kind, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12)

    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), kind(8), nn.Conv2d(8, 4, 1)).eval()

    model = build()
    converted = normfree.convert(model, images, start="pretrained")
    assert [change.now for change in converted.conversion.changes] == ["KeptMeanConv2d", "Identity", "ChannelAffine"]
    assert not converted.conversion.norms_left
    assert converted[3].weight.requires_grad is converted[3].bias.requires_grad is (kind is OwnBatchNorm)
    with torch.no_grad():
        torch.testing.assert_close(converted(images), model(images), rtol=1e-5, atol=1e-5)
        again = normfree.load(normfree.save(converted, tmp_path / "model.safetensors"), original=build())
        assert torch.equal(again(images), converted(images))


@pytest.mark.parametrize("kind", [FrozenWithoutEps, FrozenByOtherNames, OwnBatchNorm])
def test_norms_of_constants_go_in_a_fresh_start(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), nn.Conv2d(8, 8, 3), kind(8)).eval()
    converted = normfree.convert(model, torch.randn(8, 3, 12, 12))
    made = [change.now for change in converted.conversion.changes]
    assert made == ["ScaledWSConv2d", "Identity", "ScaledWSConv2d", "Identity"]
    assert not converted.conversion.norms_left


class Scale(nn.Module):
    """A learned scale and shift: no statistic, no norm."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels, 1, 1)), nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return x * self.weight + self.bias


class Prepared(nn.Module):
    """Takes the mean and the deviation of a data set off the input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("deviation", torch.rand(3, 1, 1) + 0.5)

    def forward(self, x):
        return (x - self.mean) / self.deviation


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_learned_scales_and_prepared_inputs_are_left_alone(start):
    model = nn.Sequential(Prepared(), nn.Conv2d(3, 8, 3), Scale(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    converted = normfree.convert(model, torch.randn(4, 3, 12, 12), start=start)
    assert (type(converted[0]), type(converted[2])) == (Prepared, Scale)
    assert not converted.conversion.norms_left
    with pytest.raises(ValueError, match=r"it has no normalizer that is recognised \(looked for: "):
        normfree.convert(
            nn.Sequential(Prepared(), nn.Conv2d(3, 8, 3), Scale(8)), torch.randn(4, 3, 12, 12), start=start
        )


class Embedded(nn.Module):
    """A layer of its own, then a table of constants that is added; a buffer stands beside (BERT's and DiT's inputs)."""

    def __init__(self, part, *table):
        super().__init__()
        self.part = part
        self.register_buffer("table", torch.rand(*table))

    def forward(self, x):
        x = self.part(x)
        return (x.flatten(2).transpose(1, 2) if x.dim() == 4 else x) + self.table


EMBEDDED = {
    "of words": (lambda: Embedded(nn.Embedding(9, 16), 10, 16), torch.randint(0, 9, (4, 10))),
    "of features": (lambda: Embedded(nn.Linear(8, 16), 16), torch.randn(4, 10, 8)),
    "of patches": (lambda: Embedded(nn.Conv2d(3, 16, 2, 2), 16, 16), torch.randn(4, 3, 8, 8)),
}


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_a_table_added_behind_a_layer_is_no_norm(name, start):
    build, batch = EMBEDDED[name]
    model = nn.Sequential(build(), nn.Linear(16, 16), nn.Flatten(0, -2), nn.BatchNorm1d(16), nn.Linear(16, 2)).eval()
    converted = normfree.convert(model, batch, start=start)
    assert type(converted[0]) is Embedded and not converted.conversion.norms_left


class Vectors(nn.Module):
    """Root mean square norms written by way of the norm of a vector."""

    FORMS: ClassVar = {
        "normalize": lambda x, size: F.normalize(x, dim=1) * size**0.5,
        "divided": lambda x, size: x / (x.norm(dim=1, keepdim=True) * size**-0.5 + 1e-6),
        "einsum": lambda x, size: x * torch.rsqrt(torch.einsum("bchw,bchw->bhw", x, x)[:, None] / size + 1e-8),
        "unit": lambda x, size: F.normalize(x, dim=1),
        "another constant": lambda x, size: 8 * F.normalize(x, dim=1) * size**0.5,
    }

    def __init__(self, form, channels=16):
        super().__init__()
        self.form, self.weight = self.FORMS[form], nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.form(x, x.shape[1]) * self.weight


@pytest.mark.parametrize("form", Vectors.FORMS)
def test_a_norm_of_vectors_that_gives_unit_mean_square_is_one(form):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), Vectors(form), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), Vectors(form)]
    model, x = nn.Sequential(*layers, nn.Conv2d(16, 3, 1)), torch.randn(8, 3, 12, 12)
    if form in ("unit", "another constant"):
        with pytest.raises(ValueError, match="normalization of vectors, which is part of its function"):
            normfree.convert(model, x)
    else:
        converted = normfree.convert(model, x)
        assert not converted.conversion.norms_left
        with torch.no_grad():
            assert 0.25 < float(converted(x).var() / model(x).var()) < 4


def _by_token(x):
    scale = x.detach().abs().amax(-1, keepdim=True) / 127
    return x + ((x / scale).round().clamp(-127, 127) * scale - x).detach()


def _by_reciprocal(x):
    scale = x.abs().max() / 127
    return (x * scale.reciprocal()).round() * scale


def _back_by_division(x):
    inverse = 127 / x.detach().abs().max()
    return (x * inverse).round() / inverse


def _with_zero_point(x):
    low, high = x.min(), x.max()
    scale = (high - low) / 255
    return ((x - low) / scale).round() * scale + low


QUANTIZERS = [_by_token, _by_reciprocal, _back_by_division, _with_zero_point]


class Elementwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_division_that_is_taken_back_normalizes_nothing(quantize):
    torch.manual_seed(0)
    layers = [[Elementwise(quantize), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()] for _ in range(3)]
    model = nn.Sequential(*(layer for block in layers for layer in block), nn.Linear(16, 2))
    converted = normfree.convert(model, torch.randn(32, 16))
    assert not converted.conversion.norms_left
    assert {change.was for change in converted.conversion.changes} == {"Linear", "BatchNorm1d"}


def test_a_division_that_is_taken_back_behind_a_layer_normalizes_what_the_layer_reads():
    class Reversible(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, x):
            deviation = x.std(-1, keepdim=True)
            return self.layers(x / deviation) * deviation

    with pytest.raises(ValueError, match="standard deviation"):
        normfree.convert(Reversible(), torch.randn(32, 16))
