"""Each kind of finding: its lines of Python run, the finding goes, and its place in the documentation is there."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent

import pytest
import torch
from torch import nn

import normfree
from normfree.cli import main
from normfree.commands.explain import read_sections
from normfree.signal import KINDS

DOCS = Path(__file__).parents[2]
X = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """``y = x + gain * conv(relu(x))``."""

    def __init__(self, std=1 / 6, gain=None, bias=0.0):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=std)
        nn.init.constant_(self.conv.bias, bias)
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        y = self.conv(torch.relu(x))
        return x + (y if self.gain is None else self.gain * y)


class Adapted(nn.Module):
    """A branch whose gate a layer computes (adaLN)."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x):
        return x + self.gate(x.mean((2, 3)))[:, :, None, None] * self.conv(torch.relu(x))


def images(*blocks):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks)


def dense(count, activation=nn.ReLU, gain=None, norm=None):
    layers = [nn.Linear(32, 32) for _ in range(count)]
    for layer in layers:
        if gain is not None:
            nn.init.normal_(layer.weight, std=gain * 32**-0.5)
            nn.init.zeros_(layer.bias)
    parts = [part for layer in layers for part in (layer, *([norm(32)] if norm else []), activation())]
    return nn.Sequential(*parts, nn.Linear(32, 4))


class Normed(nn.Module):
    """A branch of unit variance, whatever the stream is."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.conv(torch.relu(x)))


def changed(model, change):
    with torch.no_grad():
        change(model)
    return model


class Operation(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


class Attends(nn.Module):
    """Attention and a feed-forward branch, without a normalizer."""

    def __init__(self, width=32):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for module in (self.attention.out_proj, self.up, self.down):
            nn.init.kaiming_normal_(module.weight)
        nn.init.kaiming_normal_(self.attention.in_proj_weight)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Cells(nn.Module):
    """Recurrent layers, and a head on the last state."""

    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(8, 32, 4, batch_first=True), nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Again(nn.Module):
    """A cell written by hand."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 2)
        nn.init.normal_(self.again.weight, std=0.6)

    def forward(self, x):
        state = torch.zeros(len(x), 32)
        for index in range(x.shape[1]):
            state = torch.relu(self.enter(x[:, index]) + self.again(state))
        return self.last(state)


class Tied(nn.Module):
    """One branch, twenty times."""

    def __init__(self):
        super().__init__()
        self.enter, self.branch, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.enter(x)
        for _ in range(20):
            x = x + 3 * torch.relu(self.branch(x))
        return self.last(x)


class Words(nn.Module):
    """An embedding, and what reads it."""

    def __init__(self, *body, pooled=False):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(50, 32), nn.Sequential(*body), nn.Linear(32, 5)
        self.pooled = pooled

    def forward(self, x):
        x = self.table(x)
        return self.head(self.body(x.mean(1) if self.pooled else x))


MAPS = torch.randn(8, 5, 12, 12, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 300, 1, 1]).view(
    5, 1, 1
)

SICK = {
    "explosion": [
        lambda: (images(*(Block() for _ in range(20))), IMAGES),
        lambda: (dense(12, gain=4.0), X),
    ],
    "attenuation": [lambda: (dense(12), X), lambda: (dense(12, nn.Tanh), X)],
    "mean_shift": [lambda: (images(*(Block(std=0.05, bias=0.3) for _ in range(8))), IMAGES)],
    "branch_variance": [
        lambda: (images(*(Block(std=0.02) for _ in range(3))), IMAGES),
        lambda: (images(*(Block(std=0.9) for _ in range(3))), IMAGES),
        lambda: (images(*(Normed() for _ in range(3))), 255 * IMAGES),
    ],
    "silenced_branch": [
        lambda: (images(*(Block(gain=0.0) for _ in range(3))), IMAGES),
        lambda: (images(*(Adapted() for _ in range(3))), IMAGES),
        lambda: (images(Block(std=0.0), Block()), IMAGES),
    ],
    "dead_channels": [
        lambda: (changed(dense(3, gain=1.5), lambda m: m[2].weight[:8].zero_()), X),
        lambda: (changed(dense(3), lambda m: m[0].bias.fill_(-50.0)), X),
        lambda: (nn.Sequential(*changed(dense(3), lambda m: m[-1].bias.fill_(-50.0)), nn.ReLU()), X),
        lambda: (nn.Sequential(*changed(dense(3), lambda m: m[-1].bias.fill_(50.0)), nn.Hardtanh(), nn.Flatten(0)), X),
    ],
    "zero_layer": [lambda: (changed(dense(3), lambda m: m[-1].weight.zero_()), X)],
    "correlation_collapse": [lambda: (changed(dense(20), lambda m: [p.mul_(1.5) for p in m.parameters()]), X)],
    "gradient_explosion": [
        lambda: (dense(30, nn.Tanh, gain=3.0), X),
        lambda: (dense(45, norm=nn.BatchNorm1d), X),
    ],
    "gradient_vanishing": [lambda: (dense(10, nn.Sigmoid, gain=1.0), X)],
    "uneven_inputs": [
        lambda: (dense(3, gain=1.5), X * torch.ones(32).index_fill(0, torch.tensor([2, 5]), 1e3)),
        lambda: (nn.Sequential(nn.Conv2d(5, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), MAPS),
    ],
    "non_finite": [
        lambda: (nn.Sequential(nn.Linear(32, 32), Operation(torch.log), nn.Linear(32, 4)), X),
        lambda: (dense(150, gain=4.0), X),
    ],
}
BY_HAND = {"single_value", "variance_plan", "softmax_output"}
"""Whose remedy is in the batch or in the model's own lines, so that there are none to be pasted."""

CASES = [(kind, number) for kind, made in SICK.items() for number in range(len(made))]


def found(model, batch, kind):
    return [finding for finding in normfree.spp(model, batch).findings if finding.kind == kind]


@pytest.mark.parametrize(("kind", "number"), CASES, ids=[f"{kind} {number}" for kind, number in CASES])
def test_the_remedy_can_be_pasted_and_the_finding_goes(kind, number):
    torch.manual_seed(0)
    model, batch = SICK[kind][number]()
    for finding in (findings := found(model, batch, kind)):
        assert finding.code and finding.remedy
    assert findings
    names = {"model": model, "batch": batch}
    exec(findings[0].code, names)
    assert not found(names["model"], names["batch"], kind)


def test_a_gradient_that_is_not_finite_is_traced_to_its_line():
    distance = Operation(lambda x: x + (x * 0).square().sum(1, keepdim=True).sqrt())  # a norm of zero has no derivative
    model = nn.Sequential(nn.Linear(32, 32), distance, nn.Linear(32, 4))
    (finding,) = found(model, X, "gradient_explosion")
    with pytest.raises(RuntimeError, match="returned nan"), pytest.warns(UserWarning, match=r"has no derivative"):
        exec(finding.code, {"model": model, "batch": X})


def test_every_kind_is_tried_and_has_its_place_in_the_documentation():
    assert set(SICK) | BY_HAND == set(KINDS) and not BY_HAND & set(SICK)
    torch.manual_seed(0)
    for kind, number in CASES:
        model, batch = SICK[kind][number]()
        for finding in normfree.spp(model, batch, gradient=kind.startswith("gradient")).findings:
            page, anchor = finding.docs.split("#")
            assert anchor == finding.kind
            assert re.search(rf"^### {anchor}$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE), finding.docs
    page = (DOCS / "docs" / "signal.md").read_text(encoding="utf-8")
    assert all(f"\n### {kind}\n" in page and f"[`{kind}`](#{kind})" in page for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_finding_is_explained_wherever_the_package_is(kind, capsys):
    assert main(["explain", *kind.split("_")]) == 0
    told = capsys.readouterr().out.strip()
    assert told.startswith(f"### {kind}\n\n") and "\n## " not in told and told.count("### ") == 1
    links = re.findall(r"\]\(#([a-z_-]+)\)", told)
    assert all(link.replace("-", "_") in read_sections() for link in links)


def test_a_finding_that_there_is_not_is_an_error_that_names_the_nearest(capsys):
    assert main(["explain", "explosoin"]) == 2
    assert "did you mean explosion" in capsys.readouterr().err
    assert main(["explain"]) == 0
    assert set(KINDS) <= set(capsys.readouterr().out.split())


def test_a_failed_assertion_shows_the_remedy():
    torch.manual_seed(0)
    plot = normfree.spp(dense(30), X)
    errors = [finding for finding in plot.findings if finding.severity == "error"]
    assert len(errors) > 1 and len({error.code for error in errors}) == 1
    with pytest.raises(AssertionError, match=r"See normfree explain attenuation") as raised:
        plot.assert_healthy()
    told = str(raised.value)
    assert told.count("normfree.convert(model, batch)") == 1, "the lines that all have in common, once"
    assert told.endswith("\n\n    import normfree\n\n" + indent(errors[0].code.partition("\n\n")[2], "    "))
    assert all(f"  {error.kind}: " in told and error.kind in told.partition("In Python")[2] for error in errors)


TOKENS = torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(8, 30, 8, generator=torch.Generator().manual_seed(0))


def weight_normed():
    layers = (nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)) for _ in range(12))
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(32, 4))


UNLIKE = {
    "a transformer": (lambda: Words(*(Attends() for _ in range(8))), TOKENS),
    "a transformer whose gradient overflows": (lambda: Words(*(Attends() for _ in range(30))), TOKENS),
    "attention behind a few layers": (lambda: nn.Sequential(dense(4)[:-1], *(Attends() for _ in range(8))), X[None]),
    "an LSTM": (lambda: Cells(nn.LSTM), SEQUENCES),
    "a GRU": (lambda: Cells(nn.GRU), SEQUENCES),
    "a recurrent network": (lambda: Cells(nn.RNN), SEQUENCES),
    "a cell written by hand": (Again, SEQUENCES),
    "an LSTM behind convolutions": (
        lambda: nn.Sequential(Operation(lambda x: x.mT), *dense_maps(6), Operation(lambda x: x.mT), Cells(nn.LSTM)),
        SEQUENCES,
    ),
    "a branch that runs again": (Tied, X),
    "an embedding": (
        lambda: Words(*(p for _ in range(12) for p in (nn.Linear(32, 32), nn.Tanh())), pooled=True),
        TOKENS,
    ),
    "weights that are computed": (weight_normed, X),
    "few features": (
        lambda: nn.Sequential(nn.Linear(32, 4), *(p for _ in range(12) for p in (nn.Linear(4, 4), nn.Tanh()))),
        X,
    ),
    "a sine": (lambda: nn.Sequential(*(p for _ in range(10) for p in (nn.Linear(32, 32), Operation(steep_sine)))), X),
    "what is standardized": (lambda: normfree.convert(dense(12), X), X),
    "batch norm before attention": (
        lambda: nn.Sequential(
            nn.Conv1d(8, 32, 3), nn.BatchNorm1d(32), Operation(lambda x: x.mT), *(Attends() for _ in range(8))
        ),
        SEQUENCES.mT,
    ),
}


def steep_sine(x):
    return torch.sin(30 * x)


def dense_maps(count):
    return [part for _ in range(count) for part in (nn.Conv1d(8, 8, 3, padding=1), nn.ReLU())]


@pytest.mark.parametrize("name", UNLIKE)
def test_the_lines_of_every_finding_work_on_the_model_in_hand(name):
    """Whatever the model is made of: what is pasted runs, and an error is none afterwards."""
    made, batch = UNLIKE[name]
    for index in range(len(normfree.spp(seeded(made), batch).findings)):
        model = seeded(made)
        finding = normfree.spp(model, batch).findings[index]
        assert finding.remedy
        if not finding.code:
            continue
        names = {"model": model, "batch": batch}
        exec(finding.code, names)
        after = {each.kind: each.severity for each in normfree.spp(names["model"], batch).findings}
        assert after.get(finding.kind) != "error" and not (
            finding.severity == "warning" and after.get(finding.kind) == "warning"
        ), name


def seeded(made):
    torch.manual_seed(0)
    return made()


def offset(layer):
    """Layers with biases far above what they add to."""
    layers = [part for _ in range(6) for part in (layer(), nn.ReLU())]
    return changed(nn.Sequential(*layers, layer()), lambda m: [p.fill_(5.0) for p in m.parameters() if p.dim() == 1])


def remedies_of(made, batch):
    return {finding.kind: finding for finding in normfree.spp(seeded(made), batch).findings}


def test_the_words_of_a_remedy_fit_the_model_in_hand():
    chain = remedies_of(lambda: dense(40), X)
    for kind, finding in chain.items():
        assert "branch" not in finding.remedy + finding.code, kind
        assert "sigmoid" not in finding.remedy and "tanh" not in finding.remedy and "pool" not in finding.remedy, kind
    assert "√2 for ReLU" in chain["attenuation"].remedy and "residual connections" in chain["gradient_vanishing"].remedy
    bent = remedies_of(lambda: dense(10, nn.Sigmoid, gain=1.0), X)["gradient_vanishing"].remedy
    assert "do not saturate in the place of sigmoid" in bent and "He" not in bent
    blocks = remedies_of(lambda: images(*(Block() for _ in range(20))), IMAGES)["explosion"]
    assert "x + α·f(x/β)" in blocks.remedy and "branches as alpha * f(x / beta)" in blocks.code
    for layer, batch, name in (
        (lambda: nn.Conv1d(16, 16, 3), torch.randn(4, 16, 40), "ScaledWSConv1d"),
        (lambda: nn.Conv3d(16, 16, 1), torch.randn(4, 16, 4, 4, 4), "ScaledWSConv3d"),
        (lambda: nn.ConvTranspose2d(16, 16, 1), torch.randn(4, 16, 4, 4), "ScaledWSConvTranspose2d"),
        (lambda: nn.Linear(16, 16), torch.randn(4, 16), "ScaledWSLinear"),
    ):
        shifted = remedies_of(lambda layer=layer: offset(layer), batch)["mean_shift"].remedy
        assert f"({name})" in shifted, shifted
    for kind, finding in remedies_of(lambda: Cells(nn.LSTM), SEQUENCES).items():
        assert not re.search("ReLU|He |pools|ScaledWS|branch", finding.remedy + finding.code), kind
        assert ("orthogonal" in finding.remedy) == ("orthogonal_" in finding.code), kind
    for kind, finding in remedies_of(lambda: Words(*(Attends() for _ in range(8))), TOKENS).items():
        assert "convert" not in finding.code and "Add residual" not in finding.remedy, kind
        assert ("smaller by √16" in finding.remedy) == ("name.endswith(last)" in finding.code), kind


def test_a_gradient_that_overflows_follows_from_the_explosion():
    found = remedies_of(lambda: Words(*(Attends() for _ in range(30))), TOKENS)
    gradient = found["gradient_explosion"]
    assert "follows from the explosion" in gradient.message and gradient.code == found["explosion"].code
    assert "logarithm" not in gradient.remedy and "detect_anomaly" not in gradient.code


def test_names_that_end_alike_are_not_drawn_by_mistake():
    """``0.weight`` is the end of ``10.weight``, which is the head."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 32), *(Attends() for _ in range(9)), nn.Linear(32, 3)))
    head = model[10].weight.detach().clone()
    found = {each.kind: each for each in normfree.spp(model, torch.randn(4, 6, 8)).findings}
    exec(found["mean_shift"].code, {"model": model})
    assert torch.equal(model[10].weight, head)


def test_a_chain_has_layers_and_no_blocks():
    plot = normfree.spp(seeded(lambda: dense(40)), X)
    assert len(plot.findings) > 3
    for finding in plot.findings:
        assert not re.search(r"\bblock\b", finding.message), finding.message
    assert plot.blocks[3].place == "layer 3 (6)"


def test_no_message_names_a_place_twice():
    """Where it begins to show may be where it is worst."""
    once = seeded(lambda: nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(32, 32), nn.ReLU()))))
    changed(once, lambda m: m[-2].bias.fill_(5.0))
    dead = changed(seeded(lambda: dense(3, gain=1.5)), lambda m: m[2].weight[:8].zero_())
    branch = seeded(lambda: images(Block(std=0.02), Block()))
    tried = set()
    for model, batch in ((once, X), (dead, X), (branch, IMAGES)):
        for finding in normfree.spp(model, batch, gradient=False).findings:
            tried.add(finding.kind)
            for place in re.findall(r"(?:block|layer) \d+ \(\S+\)", finding.message.partition(". The ")[0]):
                assert finding.message.partition(". The ")[0].count(place) == 1, finding.message
    assert tried >= {"mean_shift", "dead_channels", "branch_variance"}


def test_behind_the_output_there_is_no_next_layer():
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 3)))
    changed(model, lambda m: m[0].bias.fill_(5.0))
    (finding,) = (each for each in normfree.spp(model, X).findings if each.kind == "mean_shift")
    assert "next layer" not in finding.remedy


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (nn.Softmax(1), True),
        (nn.Sequential(nn.Softmax(1), nn.Flatten(), nn.Unflatten(1, (4,))), True),
        (nn.LogSoftmax(1), False),
        (nn.Sigmoid(), False),
        (nn.Identity(), False),
        (Operation(lambda x: 3 * x.softmax(1)), False),
        (Operation(lambda x: x.softmax(0)), False),
        (Operation(lambda x: (x, x.softmax(1))), False),
        (Operation(lambda x: x * x.softmax(1)), False),
    ],
)
def test_an_output_of_probabilities_is_said(last, found):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4), last)
    severities = {each.kind: each.severity for each in normfree.spp(model, X).findings}
    assert severities.get("softmax_output") == ("info" if found else None)


def test_what_fades_before_the_factor_of_a_sine_is_not_to_be_drawn_smaller():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(30 * x)

    layers = [nn.Linear(2 if i == 0 else 64, 64) for i in range(4)]
    for layer in layers[1:]:
        nn.init.uniform_(layer.weight, -((6 / 64) ** 0.5) / 30, (6 / 64) ** 0.5 / 30)
    model = nn.Sequential(*(part for layer in layers for part in (layer, Sine())), nn.Linear(64, 1))
    found = [f for f in normfree.spp(model, 2 * torch.rand(256, 2) - 1).findings if f.kind == "attenuation"]
    assert [f.severity for f in found] == ["warning"]
    assert "smaller" not in found[0].remedy and "SIREN" in found[0].remedy
