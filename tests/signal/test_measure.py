"""What ``spp`` promises of a measurement: averages, inputs, modes, names, numbers that are not finite, JSON."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normfree.signal import spp
from normfree.signal.measure import Measurement
from normfree.trace.preserve import preserve_model


class Block(nn.Module):
    def __init__(self, channels: int, *, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + 0.5 * self.conv2(self.drop(torch.relu(self.conv1(torch.relu(self.norm(x))))))


class Net(nn.Module):
    def __init__(self, blocks: int = 3, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block(8, **options) for _ in range(blocks))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def images(examples: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(examples, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


CURVES = ("avg_channel_sq_mean", "avg_channel_var", "residual_avg_channel_var", "dead_channels")


def curves(result) -> list[float]:
    return [value for name in CURVES for value in result.curve(name) if value is not None]


def test_by_hand():
    model, x = Net(2).double(), images(dtype=torch.float64)
    result = spp(model, x)
    h = model.stem(x)
    for block, measured in zip(model.blocks, result.blocks, strict=True):
        branch = block.conv2(torch.relu(block.conv1(torch.relu(h))))
        h = h + 0.5 * branch
        assert measured.avg_channel_var == pytest.approx(h.var((0, 2, 3), correction=0).mean().item(), rel=1e-12)
        assert measured.avg_channel_sq_mean == pytest.approx(h.mean((0, 2, 3)).square().mean().item(), rel=1e-11)
        expected = branch.var((0, 2, 3), correction=0).mean().item()
        assert measured.residual_avg_channel_var == pytest.approx(expected, rel=1e-12)
        assert (measured.shape, measured.channel_axis, measured.kind) == ((6, 8, 8, 8), 1, "residual")


def test_batches_average_to_their_concatenation():
    model, x = Net().double(), images(12, torch.float64)
    whole = spp(model, x)
    parts = spp(model, [x[:5], x[5:6], x[6:]])
    # A sum in another order, in float64: 1e-10 is a million times its rounding.
    assert curves(parts) == pytest.approx(curves(whole), rel=1e-10)
    assert parts.input["batches"] == 3
    assert parts.input["examples"] == whole.input["examples"] == 12


def test_a_generator_is_read_once_and_its_batches_are_let_go():
    asked, alive = [], []

    def batches():
        for i in range(6):
            asked.append(i)
            batch = images(2) + i
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            # The first is kept for the gradient and the search of non-finite values; the last was just heard.
            assert sum(reference() is not None for reference in alive) <= 2

    spp(Net(1), batches())
    assert asked == list(range(6))


def test_a_loader_with_labels_gives_its_inputs():
    x = images(8)
    expected = curves(spp(Net(), x))
    labelled = DataLoader(TensorDataset(x, torch.arange(8)), batch_size=4)
    unlabelled = DataLoader(TensorDataset(x), batch_size=4)
    assert curves(spp(Net(), labelled)) == pytest.approx(expected, rel=1e-6)
    assert curves(spp(Net(), unlabelled)) == pytest.approx(expected, rel=1e-6)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, left, right, *, scale=1.0):
        h = self.a(left) + right * scale
        return {"features": [h + self.b(torch.relu(h))]}


def test_tuples_are_positional_and_mappings_are_keywords():
    left, right = torch.randn(5, 4), torch.randn(5, 4)
    model = TwoInputs()
    positional = curves(spp(model, (left, right)))
    assert curves(spp(model, {"right": right, "left": left})) == positional
    assert curves(spp(model, {"left": left, "right": right, "scale": 1.0})) == positional
    assert curves(spp(model, [(left[:2], right[:2]), {"left": left[2:], "right": right[2:]}])) == pytest.approx(
        positional, rel=1e-5
    )


def test_modes_of_batch_norm():
    model, x = Net(norm=True), images()
    for block in model.blocks:
        block.norm.running_var.fill_(100.0)
    batch, train, evaluated = (spp(model, x, mode=mode) for mode in ("batch-statistics", "train", "eval"))
    assert curves(batch) == curves(train)  # no dropout: the only difference is silent
    for block, result in zip(batch.blocks, evaluated.blocks, strict=True):
        # Divided by a running deviation of 10, a branch shrinks by far; its bias keeps it from vanishing.
        assert result.residual_avg_channel_var < 0.1 * block.residual_avg_channel_var
    assert evaluated.mode == "eval"


def test_dropout_is_silent_with_batch_statistics_alone():
    noisy, plain, x = Net(norm=True, drop=0.5), Net(norm=True), images()
    assert curves(spp(noisy, x)) == curves(spp(plain, x))
    assert curves(spp(noisy, x, mode="train")) != curves(spp(plain, x, mode="train"))


def test_the_seed_decides_all_that_is_drawn():
    model = Net(drop=0.5)
    model.image_size = 8

    def measured(seed):
        result = spp(model, seed=seed, mode="train", gradient=True)
        return curves(result) + result.curve("avg_sq_gradient")[1:]

    torch.manual_seed(5)
    first = measured(3)
    torch.manual_seed(6)
    assert measured(3) == first
    assert measured(4) != first


def test_without_a_batch_gaussian_noise_of_the_shape_the_model_suggests():
    model = Net(1)
    model.image_size = 16
    result = spp(model)
    assert result.input["kind"] == "gaussian"
    assert result.input["shape"] == [8, 3, 16, 16]
    assert spp(nn.Linear(5, 2)).input["shape"] == [8, 5]
    model.default_cfg = {"input_size": (3, 12, 20)}
    assert spp(model).input["shape"] == [8, 3, 12, 20]


class Twice(nn.Module):
    """Two additions in one module, as in a transformer block, and the module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.a(x)
        return x + self.b(x)


def test_a_second_addition_of_one_module_is_numbered():
    block = Twice()
    names = [b.name for b in spp(nn.Sequential(block, block, Twice()), torch.randn(3, 4)).blocks]
    assert names == ["0", "0#2", "0#3", "0#4", "2", "2#2"]
    assert [b.name for b in spp(block, torch.randn(3, 4)).blocks] == ["", "#2"]


def test_layers_where_there_is_no_addition_and_where_asked():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x = images()
    result = spp(plain, x)
    assert [(b.name, b.kind, b.shape) for b in result.blocks] == [("0", "layer", (6, 4, 6, 6)), ("3", "layer", (6, 5))]
    assert result.blocks[0].residual_avg_channel_var is None
    assert result.entry.shape == (6, 3, 8, 8)
    assert result.configuration["points"] == "layers"
    layers = spp(Net(2), x, points="layers")
    names = [f"blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert [b.name for b in layers.blocks] == ["stem", *names, "head"]


def test_the_fallback_to_layers_is_what_asking_for_layers_gives():
    norm = nn.BatchNorm1d(4)
    nn.init.zeros_(norm.weight)
    plain = nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(0.5), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    fallen, asked = spp(plain, x, mode="train"), spp(plain, x, mode="train", points="layers")
    assert fallen.to_dict() == asked.to_dict()


def test_json_holds_the_contract(tmp_path):
    result = spp(Net(2), images(), name="small", expected_var=[1.0, 2.0], gradient=True)
    document = json.loads(result.to_json(tmp_path / "new" / "spp.json").read_text())
    assert document["schema"] == 1
    (model,) = document["models"]
    assert model == result.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert {"model", "mode", "input", "entry", "blocks", "findings"} <= set(model)
    assert {"avg_channel_sq_mean", "avg_channel_var"} <= set(model["entry"])
    keys = "index name shape channel_axis transition avg_channel_sq_mean avg_channel_var residual_avg_channel_var"
    assert {*keys.split(), "expected_var"} <= set(model["blocks"][0])
    assert [block["expected_var"] for block in model["blocks"]] == [1.0, 2.0]
    assert model["model"] == "small"
    assert spp(Net(1), images()).to_dict()["blocks"][0]["expected_var"] is None


class Overflows(Net):
    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        x = x * 1e30
        return self.blocks[1](x * 1e30)


def test_what_is_not_finite_is_null_and_a_finding():
    result = spp(Overflows(2), images())
    assert [block["avg_channel_var"] for block in result.to_dict()["blocks"]][1] is None
    (finding,) = [f for f in result.findings if f.kind == "non_finite"]
    assert (finding.severity, finding.block) == ("error", 1)
    json.dumps(result.to_dict(), allow_nan=False)


def test_assert_healthy():
    sick, healthy = spp(Overflows(2), images()), spp(Net(1, norm=True), images())
    healthy.assert_healthy()
    with pytest.raises(AssertionError, match=r"Overflows is not healthy.*\n.*non_finite: values stop being finite"):
        sick.assert_healthy()
    errors = {f.kind for f in sick.findings if f.severity == "error"}
    sick.assert_healthy(ignore=errors)
    with pytest.raises(ValueError, match="ignore='non-finite': unknown choice"):
        sick.assert_healthy(ignore=["non-finite"])


def test_expected_variances_of_the_model_and_of_the_caller_or_why_there_are_none(tmp_path):
    model, x = Net(2), images()
    model.expected_variances = lambda: [1.5, 2.5]
    assert [b.expected_var for b in spp(model, x).blocks] == [1.5, 2.5]
    assert [b.expected_var for b in spp(model, x, expected_var=(3, 4)).blocks] == [3.0, 4.0]
    assert spp(model, x).configuration["expected_var"] is True
    layers = spp(model, x, points="layers")
    assert [b.expected_var for b in layers.blocks] == [None] * 6  # not a point each
    assert layers.configuration["expected_var"] == "its expected_variances() are 2, and 6 points were measured"
    without = spp(Net(2), x).configuration["expected_var"]
    assert without == "it has no plan: no expected_variances(), and none was given as spp(…, expected_var=…)"
    page = layers.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"No expectation of Net: {layers.configuration['expected_var']}." in page
    assert "No expectation" not in spp(model, x).to_html(tmp_path / "page.html").read_text(encoding="utf-8")


class Watcher(nn.Module):
    """Notes which earlier activations are still alive when it runs."""

    def __init__(self, alive: list, counts: list) -> None:
        super().__init__()
        self.alive, self.counts = alive, counts

    def forward(self, x):
        self.counts.append(sum(reference() is not None for reference in self.alive))
        self.alive.append(weakref.ref(x))
        return x


class Chain(nn.Module):
    """A chain of residual blocks that holds on to nothing; each activation is told of to a watcher."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(10))
        self.watcher = Watcher([], [])

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
            self.watcher(x)
        return x


@pytest.mark.parametrize("points", ["residual", "layers"])
def test_no_activation_outlives_its_use(points):
    model = Chain()
    counts, alive = [], []
    with preserve_model(model, "eval") as preserved:
        model.watcher.alive, model.watcher.counts = alive, counts
        measurement = Measurement(model, preserved, points=points, wake=True, seed=0)
        measurement.add(torch.randn(3, 4))
    # While block n is told of, block n − 1 is gone: only the caller's own variable holds one.
    assert counts == [0] * 10
    assert not any(reference() is not None for reference in alive)


class Scaled(nn.Module):
    """A layer whose weight is computed in its forward, and freed after it."""

    def __init__(self, size: int, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.gain)


def weight_normed(size: int, gain: float) -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(size, size))
    layer.parametrizations.weight.original0.data.fill_(gain)
    return layer


@pytest.mark.parametrize("layer", [Scaled, weight_normed])
def test_a_weight_computed_in_the_forward_has_its_own_gain(layer):
    """The next one of its shape may lie where it did."""
    torch.manual_seed(0)
    gains, size = (1.0, 0.1, 3.0, 0.5, 1.0, 0.2, 0.0, 2.0), 128
    model = nn.Sequential(*[part for gain in gains for part in (layer(size, gain), nn.Tanh())], nn.Linear(size, 2))
    x = torch.randn(32, size)
    for _ in range(3):
        found = [block.weight_gain for block in spp(model, x, gradient=False).blocks]
        assert found[:-1] == pytest.approx(gains, rel=0.02)
