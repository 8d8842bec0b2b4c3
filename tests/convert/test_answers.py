"""The invariant of a fresh start: what carries the variance of each norm that goes, and the variance itself."""

from __future__ import annotations

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree
from normfree.convert import Conversion
from normfree.convert.dataflow import is_norm, record
from normfree.convert.fresh import fresh_plan
from normfree.convert.structure import Structure
from normfree.nn import ScaledWSLinear

DEPTH, WIDTH = 8, 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Chain(nn.Module):
    """Linear layers and norms, joined in some way, and a last layer."""

    def __init__(self, step, norm=nn.BatchNorm1d, out=WIDTH, normed=WIDTH):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, out) for _ in range(DEPTH))
        self.norms = nn.ModuleList(norm(normed) for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, 3)
        self.step = step

    def forward(self, x, *more):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self.step(linear, norm, x, *more)
        return self.last(x)


def aggregated(x, to, of):
    return torch.zeros_like(x).index_add(0, to, x[of]) / 4


def nodes():
    return torch.randn(64, WIDTH, generator=generator()), *torch.randint(0, 64, (2, 256), generator=generator())


def adjacency():
    joined = (torch.rand(64, 64, generator=generator()) < 0.1).float() + torch.eye(64)
    return joined / joined.sum(1, keepdim=True)


class Tabular(nn.Module):
    """Categories embedded, numbers of any unit normalized, then linear, ReLU, BatchNorm, dropout."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, 8) for _ in range(3))
        self.numbers = nn.BatchNorm1d(5)
        layers = [k for i in (29, 64, 64) for k in (nn.Linear(i, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Dropout(0.2))]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 2))

    def forward(self, categories, numbers):
        embedded = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        return self.layers(torch.cat([*embedded, self.numbers(numbers)], 1))


class Concatenated(nn.Module):
    """tanh(norm(cat(left(x), right(x))))."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(WIDTH, WIDTH // 2) for _ in range(DEPTH)) for _ in "12")
        self.norms, self.last = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(DEPTH)), nn.Linear(WIDTH, 3)

    def forward(self, x):
        for left, right, norm in zip(self.left, self.right, self.norms, strict=True):
            x = torch.tanh(norm(torch.cat([left(x), right(x)], 1)))
        return self.last(x)


def causal_convolutions():
    class Causal(nn.Module):
        def __init__(self, channels, dilation):
            super().__init__()
            self.conv = nn.Conv1d(channels, 16, 3, padding=2 * dilation, dilation=dilation)
            self.norm, self.cut = nn.BatchNorm1d(16), 2 * dilation

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)[:, :, : -self.cut]))

    return nn.Sequential(*(Causal(3 if i == 0 else 16, 2**i) for i in range(5)), nn.Conv1d(16, 4, 1))


class Recurrent(nn.Module):
    """A norm between a recurrent layer and a linear one, behind an activation."""

    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.LSTM(8, WIDTH, batch_first=True), nn.BatchNorm1d(WIDTH)
        self.hidden, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.last(self.hidden(self.norm(self.cell(x)[0][:, -1]).tanh()).relu())


def rows(*sizes):
    return torch.randn(*sizes, generator=generator())


KINDS = {
    "activation before the norm": (lambda: Chain(lambda k, n, x: n(k(x).relu())), lambda: rows(64, WIDTH)),
    "norm before the layer": (lambda: Chain(lambda k, n, x: k(n(x)).relu()), lambda: rows(64, WIDTH)),
    "a gated linear unit before it": (
        lambda: Chain(lambda k, n, x: n(F.glu(k(x))), out=2 * WIDTH),
        lambda: rows(64, WIDTH),
    ),
    "a gated linear unit behind it": (
        lambda: Chain(lambda k, n, x: F.glu(n(k(x))), out=2 * WIDTH, normed=2 * WIDTH),
        lambda: rows(64, WIDTH),
    ),
    "a constant factor": (lambda: Chain(lambda k, n, x: F.gelu(n(0.01 * k(x)))), lambda: rows(64, WIDTH)),
    "transposed around it": (
        lambda: Chain(lambda k, n, x: F.relu(n(k(x).transpose(1, 2)).transpose(1, 2))),
        lambda: rows(16, 10, WIDTH),
    ),
    "LayerNorm": (lambda: Chain(lambda k, n, x: n(k(x)).relu(), nn.LayerNorm), lambda: rows(64, WIDTH)),
    "LayerNorm behind tanh": (
        lambda: Chain(lambda k, n, x: n(torch.tanh(k(x))), nn.LayerNorm),
        lambda: rows(64, WIDTH),
    ),
    "messages of a graph": (lambda: Chain(lambda k, n, x, to, of: n(aggregated(k(x), to, of)).relu()), nodes),
    "messages before the layer": (lambda: Chain(lambda k, n, x, to, of: n(k(aggregated(x, to, of))).relu()), nodes),
    "an adjacency matrix given": (
        lambda: Chain(lambda k, n, x, matrix: n(matrix @ k(x)).relu()),
        lambda: (rows(64, WIDTH), adjacency()),
    ),
    "a sparse one": (
        lambda: Chain(lambda k, n, x, matrix: n(torch.sparse.mm(matrix, k(x))).relu()),
        lambda: (rows(64, WIDTH), adjacency().to_sparse()),
    ),
    "a table": (Tabular, lambda: (torch.randint(0, 10, (64, 3), generator=generator()), 50 + 1000 * rows(64, 5))),
    "concatenations": (Concatenated, lambda: rows(64, WIDTH)),
    "causal convolutions": (causal_convolutions, lambda: rows(8, 3, 64)),
    "behind a recurrence": (Recurrent, lambda: rows(64, 6, 8)),
}


def variances(model, batch):
    return [block.avg_channel_var for block in normfree.spp(model, batch, points="layers").blocks]


def output_variance(model, batch):
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return float((model(*batch) if isinstance(batch, tuple) else model(batch)).detach().var())


@pytest.mark.parametrize("name", KINDS)
def test_every_norm_is_answered_by_what_carries_its_variance(name):
    build, make_batch = KINDS[name]
    torch.manual_seed(0)
    model, batch = build(), make_batch()
    converted = normfree.convert(model, batch)
    record = converted.conversion
    assert record.norms_left == () and not any(is_norm(module) for module in converted.modules())
    changed = {change.name: change for change in record.changes}
    norms = [changed[key] for key, module in model.named_modules() if is_norm(module)]
    assert norms
    for change in norms:
        assert change.carried_by
        for carrier in change.carried_by:  # a layer that is standardized, or the norm's own place
            assert changed[carrier].input_scale is not None or carrier == change.name
    for block in normfree.spp(converted, batch, points="layers").blocks:
        if block.name in changed:
            assert 1 / 4 < block.avg_channel_var < 4
    assert 0.1 < output_variance(converted, batch) / output_variance(model, batch) < 10


def test_a_layer_for_each_norm_of_a_deep_perceptron():
    model = nn.Sequential(*(k for _ in range(12) for k in (nn.Linear(64, 64), nn.ReLU(), nn.BatchNorm1d(64))))
    torch.manual_seed(0)
    converted = normfree.convert(nn.Sequential(*model, nn.Linear(64, 3)), rows(64, 64))
    assert sum(isinstance(module, ScaledWSLinear) for module in converted.modules()) == 12
    assert all(1 / 4 < value < 4 for value in variances(converted, rows(64, 64)))


def test_a_record_names_what_carries_each_norm_and_is_read_again():
    converted = normfree.convert(Chain(lambda k, n, x: n(k(x)).relu()), rows(64, WIDTH))
    record = converted.conversion
    assert {c.name: c.carried_by for c in record.changes if c.was == "BatchNorm1d"} == {
        f"norms.{i}": (f"linears.{i}",) for i in range(DEPTH)
    }
    assert Conversion.from_dict(record.to_dict()) == record
    document = record.to_dict()
    for change in document["changes"]:  # as records were before
        del change["carried_by"], change["within"]
    assert [change.now for change in Conversion.from_dict(document).changes] == [c.now for c in record.changes]


def test_nodes_that_see_each_other_are_no_norm():
    batch = rows(64, WIDTH), adjacency()
    record = normfree.convert(Chain(lambda k, n, x, matrix: n(matrix @ k(x)).relu()), batch).conversion
    assert record.norms_left == ()
    assert any("its rows see each other: by design where" in note for note in record.notes)


def test_averaging_neighbours_is_made_up_for_where_they_become_alike():
    torch.manual_seed(0)
    model, batch = Chain(lambda k, n, x, matrix: n(matrix @ k(x)).relu()), (rows(64, WIDTH), adjacency())
    found = variances(normfree.convert(model, batch), batch)
    assert max(found) / min(found) < 16, "1e5 without an affine map in any place"
    assert all(1 / 4 < value < 4 for value in found[:-1])


TRAINED = {
    "a deep perceptron": (lambda: Chain(lambda k, n, x: n(k(x).relu())), lambda: (rows(64, WIDTH),)),
    "a graph": (
        lambda: Chain(lambda k, n, x, to, of: n(k(x) + aggregated(k(x), to, of)).relu()),
        nodes,
    ),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_it_learns_in_200_steps_where_the_same_without_norms_does_not(kind):
    build, make_batch = TRAINED[kind]
    torch.manual_seed(0)
    model, batch = build(), make_batch()
    labels = torch.randint(0, 2, (64,), generator=generator(1))
    deleted = copy.deepcopy(model)
    deleted.norms = nn.ModuleList(nn.Identity() for _ in range(DEPTH))
    assert last_loss(deleted, batch, labels) > 0.6, "log(2) = 0.69 is what knows nothing"
    assert last_loss(normfree.convert(model, batch), batch, labels) < 0.2


def test_a_table_in_any_units_is_learned_as_with_norms():
    torch.manual_seed(0)
    model, batch = Tabular(), KINDS["a table"][1]()
    labels = torch.randint(0, 2, (64,), generator=generator(1))
    loss = last_loss(normfree.convert(model, batch), batch, labels)
    assert loss < 0.1, "0.7 with an affine map whose weight is one over the standard deviation"


def last_loss(model, batch, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*batch), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


class OwnWeights(nn.Module):
    """Weights that are no layer's, each with a norm; then a layer with its own."""

    def __init__(self, depth=8):
        super().__init__()
        sizes = [3] + [16] * (depth - 1)
        self.weights = nn.ParameterList(nn.Parameter(0.02 * torch.randn(16, size, 3, 3)) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(depth))
        self.tail = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, x):
        for weight, norm in zip(self.weights, self.norms, strict=True):
            x = norm(F.conv2d(x, weight, padding=1)).relu()
        return self.tail(x)


def test_scales_are_measured_with_norms_that_stay_as_they_train():
    torch.manual_seed(0)
    model, batch = OwnWeights(), rows(8, 3, 16, 16)
    converted = normfree.convert(model, batch)
    scales = {change.name: change.input_scale for change in converted.conversion.changes}
    assert 1 < scales["tail.0"] < 3, "4e8 with fresh running statistics, where a norm that stays is the identity"
    assert len(converted.conversion.norms_left) == 8 and converted.conversion.notes == ()
    assert 0.1 < output_variance(converted, batch) / output_variance(model, batch) < 10


def test_a_norm_that_stays_and_has_one_value_a_channel_asks_for_more_examples():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), OwnWeights())
    with pytest.raises(ValueError, match=r"example_input: a norm that stays .* give several examples"):
        normfree.convert(model, rows(1, 3, 8, 8))


@pytest.mark.parametrize("size", [1e-5, 1e5])
def test_an_input_scale_that_stands_for_a_signal_gone_wrong_is_told_with_its_cause(size):
    stem = nn.Conv2d(3, 16, 3, padding=1)
    stem.weight.data *= size

    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.norm = stem, nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

        def forward(self, x):
            return self.norm(self.conv(self.stem(x).relu()))

    torch.manual_seed(0)
    stem.bias.data.zero_()
    (note,) = normfree.convert(Stem(), rows(8, 3, 16, 16)).conversion.notes
    assert note.startswith("conv has an input scale of") and "stem, which conversion left as it is" in note


@pytest.mark.parametrize("preactivated", [False, True])
def test_the_cost_of_a_plan_grows_as_the_graph_does(preactivated):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.second, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            if preactivated:
                return x + self.second(self.norm2(self.first(self.norm1(x).relu())).relu())
            return (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()

    def seconds(depth):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), *(Block() for _ in range(depth)), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        )
        flow = record(model, rows(2, 3, 4, 4))
        times = []
        for _ in range(3):
            start = time.process_time()
            fresh_plan(Structure(flow), model, alpha=0.2, skip_gain=1.0, beta="plan", uncarried={}, staying={})
            times.append(time.process_time() - start)
        return min(times)

    few, many = seconds(60), seconds(480)
    assert many / few < 16, "8 for a cost linear in depth, 64 for one that grows as its square"


def test_a_table_trains_privately():
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    table = rows(64, 5)
    converted = normfree.convert(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), table)
    assert type(converted[0]).__name__ == "ChannelUnits"
    private = opacus.GradSampleModule(converted.train())
    private(table).square().sum().backward()
    assert all(parameter.grad_sample.shape[0] == len(table) for parameter in private.parameters())


def test_the_last_layer_answers_for_no_norm_that_others_could_not():
    """It would give the logits another size: 15 times the original's here."""

    class OwnWeight(nn.Conv2d):
        def forward(self, x):
            variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) / (variance + 1e-10).sqrt(), self.bias, padding=1)

    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), OwnWeight(16, 32, 3), nn.ReLU()]
    head = [nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    model, x = nn.Sequential(*body, *head), torch.randn(16, 3, 16, 16, generator=generator(1))
    converted = normfree.convert(model, x)
    (left,) = converted.conversion.norms_left
    assert left.name == "5" and left.reason.endswith("no layer after it takes over")
    assert type(converted[9]) is nn.Linear
    with torch.no_grad():
        assert 0.25 < float(converted(x).var() / model(x).var()) < 4
