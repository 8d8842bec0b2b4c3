"""What lies before, between and behind residual blocks is judged too, and so is each stream by its own beginning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.signal import points, spp

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
WIDTH = 32


def conv(inputs: int, outputs: int, gain: float = 1.0, kernel: int = 3) -> nn.Conv2d:
    """A convolution drawn by He's initialisation, its weights times a gain."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    layer.weight.data *= gain
    nn.init.zeros_(layer.bias)
    return layer


def plain(layers: int, gain: float) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(layers) for part in (conv(WIDTH, WIDTH, gain), nn.ReLU())))


def linear(gain: float) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    layer.weight.data *= gain
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return x + self.norm(self.conv(x.relu()))


def behind(gain: float) -> nn.Module:
    return nn.Sequential(conv(3, WIDTH), Block(), Block(), plain(12, gain), nn.Conv2d(WIDTH, 2, 1))


def before(gain: float) -> nn.Module:
    return nn.Sequential(conv(3, WIDTH), plain(20, gain), Block(), nn.Conv2d(WIDTH, 2, 1))


def between(gain: float) -> nn.Module:
    return nn.Sequential(conv(3, WIDTH), Block(), plain(12, gain), Block(), nn.Conv2d(WIDTH, 2, 1))


class Detector(nn.Module):
    """Two heads of which one is sick, with the small last layers that detectors have."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, WIDTH), Block(), Block())
        self.classes, self.boxes = plain(8, gain), plain(4, 1.0)
        self.scores, self.offsets = conv(WIDTH, 9), conv(WIDTH, 4)
        for layer in (self.scores, self.offsets):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x):
        x = self.body(x)
        return {"scores": self.scores(self.classes(x)).sigmoid(), "boxes": self.offsets(self.boxes(x))}


class Pooled(nn.Module):
    """A head of linear layers behind a global pool."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, WIDTH), Block(), Block())
        layers = [part for _ in range(10) for part in (linear(gain), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(WIDTH, 5))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class UNet(nn.Module):
    """A healthy, normalized encoder, and a decoder of two plain layers a level; on either side of the concatenation."""

    def __init__(self, gain: float, *, skip_first: bool) -> None:
        super().__init__()
        self.stem, self.skip_first = conv(3, WIDTH), skip_first
        down = [nn.Sequential(conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU()) for _ in range(4)]
        up = [(conv(2 * WIDTH, WIDTH, gain), nn.ReLU(), conv(WIDTH, WIDTH, gain), nn.ReLU()) for _ in range(4)]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(nn.Sequential(*level) for level in up)
        self.head = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x):
        x, maps = self.stem(x), []
        for down in self.down:
            maps.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            both = [maps.pop(), F.interpolate(x, scale_factor=2.0)]
            x = up(torch.cat(both if self.skip_first else both[::-1], 1))
        return self.head(x)


class LongSkip(nn.Module):
    """An image restorer: the input, and what a plain network says of it."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, WIDTH), nn.ReLU(), plain(16, gain), conv(WIDTH, 3))

    def forward(self, x):
        return x + self.body(x)


SICK = {
    "behind": behind,
    "before": before,
    "between": between,
    "a detector's head": Detector,
    "behind a pool": Pooled,
    "decoder": lambda gain: UNet(gain, skip_first=False),
    "decoder, skip first": lambda gain: UNet(gain, skip_first=True),
    "beside a long skip": LongSkip,
}


# What fades in two layers, and then meets a skip connection, is weak and can be learned.
SEVERE = {False: ("error",), True: ("error", "warning")}


@pytest.mark.parametrize(("gain", "kind"), [(3.0, "explosion"), (0.2, "attenuation"), (1.0, None)])
@pytest.mark.parametrize("where", SICK)
def test_a_network_sick_in_one_part_is_never_healthy(where, gain, kind):
    torch.manual_seed(0)
    signal = spp(SICK[where](gain), X)
    found = {
        finding.kind: finding for finding in signal.findings if finding.severity in SEVERE[where.startswith("decoder")]
    }
    if kind is None:
        assert not found
    else:
        assert kind in found
        assert "times He's gain" in found[kind].message
        assert signal.verdict != "healthy"


def test_small_growth_over_many_layers():
    torch.manual_seed(0)
    signal = spp(nn.Sequential(conv(3, WIDTH), Block(), plain(24, 1.3), nn.Conv2d(WIDTH, 2, 1)), X)
    assert ("explosion", "error") in {(finding.kind, finding.severity) for finding in signal.findings}


def test_layers_are_measured_as_by_hand():
    torch.manual_seed(0)
    model = behind(1.0).double()
    x = X.double()
    signal = spp(model, x)
    assert [block.name for block in signal.blocks] == ["1", "2"]
    assert [layer.name for layer in signal.layers] == ["0", *(f"3.{2 * i}" for i in range(12)), "4"]
    seen = {}
    for name in ("3.8", "4"):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.detach()}))
    model.train()(x)
    for name, value in seen.items():
        (layer,) = (layer for layer in signal.layers if layer.name == name)
        assert layer.avg_channel_var == pytest.approx(value.var((0, 2, 3), correction=0).mean().item(), rel=1e-10)
        assert (layer.last, layer.kind) == (name == "4", "layer")
    assert signal.outputs[0].avg_channel_var == signal.layers[-1].avg_channel_var
    assert signal.to_dict()["layers"][0]["name"] == "0"


def test_layers_inside_blocks_are_none():
    """Also where whoever adds is the model itself, and the first pass cannot tell."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = conv(3, WIDTH), nn.Conv2d(WIDTH, 2, 1)
            self.first, self.second = nn.ModuleList(conv(WIDTH, WIDTH) for _ in range(3)), nn.ModuleList([])

        def forward(self, x):
            x = self.stem(x)
            for layer in self.first:
                x = x + layer(x.relu())
            return self.head(x)

    torch.manual_seed(0)
    assert [layer.name for layer in spp(Flat(), X).layers] == ["stem", "head"]


class Towers(nn.Module):
    """An image tower with residual blocks and a plain one of another input."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.image = nn.Sequential(conv(3, WIDTH), Block(), Block())
        self.text = nn.Sequential(nn.Linear(10, WIDTH), *(p for _ in range(10) for p in (linear(gain), nn.ReLU())))

    def forward(self, image, text):
        return self.image(image).mean((2, 3)) @ self.text(text).T


@pytest.mark.parametrize(("gain", "kind"), [(3.0, "explosion"), (0.2, "attenuation"), (1.0, None)])
def test_each_tower_is_judged(gain, kind):
    torch.manual_seed(0)
    signal = spp(Towers(gain), (X, torch.randn(4, 10)))
    errors = {finding.kind for finding in signal.findings if finding.severity == "error"}
    assert kind in errors if kind else not errors


def test_each_stream_begins_with_its_own_entry():
    """One network on two inputs, the second a hundred times as large: neither explodes against the other."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(Block() for _ in range(3)))

        def forward(self, first, second):
            return self.body(first), self.body(second)

    torch.manual_seed(0)
    first = torch.randn(4, WIDTH, 8, 8)
    signal = spp(Siamese(), (first, 200 * first))
    entries = [entry.avg_channel_var for entry in signal.entries]
    assert entries[1] / entries[0] == pytest.approx(4e4, rel=1e-5)
    assert [block.entry for block in signal.blocks] == [0, None, None, 1, None, None]
    assert not {"explosion", "attenuation"} & {finding.kind for finding in signal.findings}


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Flow(nn.Module):
    """Affine couplings whose networks end in a layer of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), zeroed(nn.Linear(32, 8)))
            for _ in range(3)
        )

    def forward(self, x):
        for net in self.nets:
            first, second = x.chunk(2, 1)
            scale, shift = net(first).chunk(2, 1)
            x = torch.cat([second * scale.exp() + shift, first], 1)
        return x


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.policy, self.value = nn.Linear(32, 4), zeroed(nn.Linear(32, 1))
        nn.init.normal_(self.policy.weight, std=0.01)

    def forward(self, x):
        hidden = self.trunk(x)
        return self.policy(hidden).softmax(-1), self.value(hidden)


@pytest.mark.parametrize("model", [Flow, ActorCritic, lambda: nn.Sequential(nn.Linear(8, 9), zeroed(nn.Linear(9, 2)))])
def test_a_zero_head_is_an_info(model):
    torch.manual_seed(0)
    found = {finding.kind: finding.severity for finding in spp(model(), torch.randn(64, 8)).findings}
    assert found["zero_layer"] == "info"
    assert not {"error", "warning"} & set(found.values())


def test_a_zero_layer_that_cuts_off_what_follows_is_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), zeroed(nn.Linear(32, 32)), nn.ReLU(), linear(1.0), nn.ReLU())
    errors = {
        f.kind
        for f in spp(nn.Sequential(model, nn.Linear(32, 2)), torch.randn(64, 8)).findings
        if f.severity == "error"
    }
    assert "dead_channels" in errors


class PostActivation(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.conv, self.norm = conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH)
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


@pytest.mark.parametrize("in_place", [False, True])
def test_numbers_after_the_block_s_activation_are_given_too(in_place):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, WIDTH), *(PostActivation(in_place=in_place) for _ in range(3))).double()
    seen = []
    for block in list(model)[1:]:
        block.register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))
    model.train()(X.double())
    outputs, seen[:] = list(seen), []
    for block, out in zip(spp(model, X.double()).blocks, outputs, strict=True):
        assert block.activated_avg_channel_var == pytest.approx(
            out.var((0, 2, 3), correction=0).mean().item(), rel=1e-9
        )
        assert block.activated_avg_channel_sq_mean == pytest.approx(
            out.mean((0, 2, 3)).square().mean().item(), rel=1e-9
        )
        assert block.activated_avg_channel_var < 0.9 * block.avg_channel_var


def test_a_pre_activation_is_no_block_s_activation():
    torch.manual_seed(0)
    signal = spp(nn.Sequential(conv(3, WIDTH), Block(), Block(), Block()), X)
    assert [block.activated_avg_channel_var for block in signal.blocks] == [None] * 3


@pytest.mark.parametrize("name", ["resnet50", "fixup_resnet50"])
def test_post_activation_families_give_the_official_place(name):
    from normfree.models import create_model

    torch.manual_seed(0)
    model = create_model(name, width=1, depths=(1, 2, 1, 1), num_classes=4)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # FixUp's branches end in zeros, and x + 0 is activated already
    signal = spp(model, X)
    assert all(block.activated_avg_channel_var is not None for block in signal.blocks)
    ratios = [block.activated_avg_channel_var / block.avg_channel_var for block in signal.blocks]
    assert all(0.2 < ratio < 0.9 for ratio in ratios)  # 20 to 50 % and more from the sum's, as the golden cases say


class SparseProducts(nn.Module):
    """Messages along two edges: a product of sparse adjacencies, made in the forward (Graph U-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, edges):
        weights = x.abs().mean() * torch.ones(edges.shape[1])  # of the edges, so that the matrix depends on the input
        adjacency = torch.sparse_coo_tensor(edges, weights, (len(x), len(x))).to_sparse_csr()
        twice = (adjacency @ adjacency).to_sparse_coo().coalesce()
        hidden = torch.sparse.mm(twice, self.first(x)).relu()
        return self.last(hidden)


def test_sparse_tensors_are_no_activations():
    torch.manual_seed(0)
    signal = spp(SparseProducts(), (torch.randn(16, 8), torch.randint(0, 16, (2, 64))))
    assert [block.name for block in signal.blocks] == ["first", "last"]


def test_the_cost_of_marking_blocks_grows_as_the_unrolled_network(monkeypatch):
    """Each step's input is added to two states; what was computed before it was read is not searched for it."""

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given, self.first, self.second = nn.Linear(9, 8), nn.LSTMCell(8, 8), nn.LSTMCell(8, 8)

        def forward(self, x):
            one = two = (torch.zeros(len(x), 8),) * 2
            sums = []
            for step in self.given(x).unbind(1):
                one = self.first(step, one)
                two = self.second(one[0], two)
                sums.append(step + one[0] + two[0])
            return torch.stack(sums, 1)

    searched, way_from = [], points._way_from

    def watched(ancestor, node, ways):
        found = way_from(ancestor, node, ways)
        searched.append(len(ways))
        return found

    monkeypatch.setattr(points, "_way_from", watched)
    counts = []
    for steps in (10, 40):
        searched.clear()
        torch.manual_seed(0)
        spp(Unrolled(), torch.randn(2, steps, 9), gradient=False)
        counts.append(sum(searched))
    assert counts[1] <= 1.1 * 4 * counts[0]


@pytest.mark.parametrize(
    ("activation", "severity"), [(nn.Tanh, "info"), (nn.GELU, "info"), (nn.ReLU, "error"), (nn.ReLU6, "error")]
)
def test_what_reads_a_layer_of_zeros_is_dead_for_good_behind_a_relu_alone(activation, severity):
    """The gradient of a ReLU at zero is zero: trained, these reach 89, 90, 10 and 10 % on the digits."""
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), activation())]
    for parameter in layers[6].parameters():
        nn.init.zeros_(parameter)
    found = {f.kind: f for f in spp(nn.Sequential(*layers, nn.Linear(64, 3)), torch.randn(32, 64)).findings}
    assert found["dead_channels"].severity == severity
    assert "whose weights are all zero" in found["dead_channels"].message


class WeightsComputed(nn.Module):
    """Layers of which the last makes the weight of a convolution: of codes, or of what the maps have on average.

    Of the weight itself there may be one for all examples (a hypernetwork), or one for each (a mixture of kernels).
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.last = way, conv(3, 8), conv(8, 2)
        sizes = {"hypernetwork": (4, 8 * 8 * 9), "kernels": (8, 3), "depthwise": (8, 8 * 9)}[way]
        self.maker = nn.Sequential(nn.Linear(sizes[0], 16), nn.ReLU(), nn.Linear(16, sizes[1]))
        self.kernels = nn.Parameter(torch.randn(3, 8 * 8 * 9) / (8 * 9) ** 0.5)

    def forward(self, x, code):
        x = self.first(x).relu()
        if self.way == "hypernetwork":
            x = F.conv2d(x, self.maker(code).view(8, 8, 3, 3), padding=1)
        else:
            made = self.maker(x.mean((2, 3)))
            made = made.sigmoid() @ self.kernels if self.way == "kernels" else made
            groups = len(x) * (1 if self.way == "kernels" else 8)
            weight = made.view(len(x) * 8, -1, 3, 3)
            x = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, padding=1, groups=groups).view_as(x)
        return self.last(x.relu())


@pytest.mark.parametrize("way", ["hypernetwork", "kernels", "depthwise"])
def test_what_makes_the_weight_of_a_convolution_is_no_signal(way):
    torch.manual_seed(0)
    model = WeightsComputed(way)
    model.maker[-1].weight.data *= 1e-3
    plot = spp(model, (X, torch.randn(4)))
    assert not [finding for finding in plot.findings if finding.kind in ("single_value", "attenuation")]
    gates = {point.name for point in plot.blocks if point.gate}
    assert gates == {"maker.0", "maker.2", *([""] if way == "kernels" else [])}
