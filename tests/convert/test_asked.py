"""A forward that asks what its norms are: they stay, the others go, and what the model returns keeps its form."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import normfree
from normfree.convert import pipeline
from normfree.convert.asked import _may_ask
from normfree.convert.outputs import difference

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
STARTS = ["fresh", "pretrained"]


class Net(nn.Module):
    """Two layers with norms of which nothing is asked, and two, "asked", of which the forward asks something."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        parts = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
        self.asked = nn.Sequential(*(part for each in parts for part in each))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.asked(self.stem(x)))


class Taps(Net):
    def forward(self, x):
        x, taps = self.stem(x), []
        for part in self.asked:
            x = part(x)
            if isinstance(part, nn.BatchNorm2d):
                taps.append(x)
        return [*taps, self.last(x)]


class Slimming(Net):
    def forward(self, x):
        x, penalty = self.stem(x), 0.0
        for part in self.asked:
            x = part(x)
            if isinstance(part, nn.BatchNorm2d):
                penalty = penalty + part.weight.abs().sum()
        return self.last(x), penalty


class SlimmingInTraining(Net):
    """The penalty is kept, and taken in training alone."""

    def forward(self, x):
        x, self.penalty = self.stem(x), 0.0
        for part in self.asked:
            x = part(x)
            if self.training and hasattr(part, "running_mean"):
                self.penalty = self.penalty + part.weight.abs().sum()
        return self.last(x)


class Scaled(Net):
    def forward(self, x):
        x = self.stem(x)
        for part in self.asked:
            x = part(x) if type(part).__name__ != "Identity" else 0.1 * x
        return self.last(x)


class Counting(Net):
    def forward(self, x):
        x = self.asked(self.stem(x))
        return {"logits": self.last(x), "norms": sum(isinstance(part, nn.BatchNorm2d) for part in self.asked)}


class Together(Net):
    """Something else where there is no norm at all: one that stays is enough."""

    def forward(self, x):
        x = self.asked(self.stem(x))
        return self.last(x if any(isinstance(part, nn.BatchNorm2d) for part in self.asked) else 0.1 * x)


KINDS = [Taps, Slimming, SlimmingInTraining, Scaled, Counting]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_that_the_forward_asks_what_they_are_stay_and_the_others_go(kind: type[nn.Module], start: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    model(X)
    converted = normfree.convert(model, X, start=start)
    left = {kept.name: kept.reason for kept in converted.conversion.norms_left}
    assert list(left) == ["asked.1", "asked.4"]
    assert set(left.values()) == {
        "the model's forward asks what it is, and does something else where it is no BatchNorm2d"
    }
    assert type(converted.stem[1]) is nn.Identity
    assert difference(model(X), converted(X)) == ""
    if start == "pretrained":
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-5)
    if kind is SlimmingInTraining:
        model.train()(X), converted.train()(X)
        torch.testing.assert_close(converted.penalty, model.penalty)


@pytest.mark.parametrize("start", STARTS)
def test_of_norms_that_are_asked_about_together_one_stays(start: Any) -> None:
    torch.manual_seed(0)
    converted = normfree.convert(Together().eval(), X, start=start)
    assert [kept.name for kept in converted.conversion.norms_left] == ["asked.4"]


@pytest.mark.parametrize("start", STARTS)
def test_where_all_are_asked_about_the_refusal_says_so(start: Any) -> None:
    class All(Net):
        def forward(self, x):
            for part in (*self.stem, *self.asked):
                x = part(x) if not isinstance(part, nn.BatchNorm2d) else part(x) + 1
            return self.last(x)

    with pytest.raises(ValueError, match=r"all 3 normalizers stay, such as stem.1 .* asks what it is, and does"):
        normfree.convert(All().eval(), X, start=start)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_asked_of_other_modules_and_what_has_one_answer_keeps_no_norm(start: Any) -> None:
    class Harmless(Net):
        def forward(self, x):
            taps = []
            for part in (*self.stem, *self.asked):
                x = part(x)
                if isinstance(part, (nn.ReLU, nn.MaxPool2d)):
                    taps.append(x)
            return [*taps, self.last(x) + torch.rand(1)]

    converted = normfree.convert(Harmless().eval(), X, start=start)
    assert converted.conversion.norms_left == ()


def test_a_forward_that_does_something_else_each_time_is_converted() -> None:
    runs = []

    class Growing(Net):
        def forward(self, x):
            runs.append(1)
            x = super().forward(x)
            for _ in runs:
                x = 1.0 * x
            return x

    assert normfree.convert(Growing().eval(), X).conversion.norms_left == ()


@pytest.mark.parametrize("start", STARTS)
def test_asking_leaves_the_model_as_it_is(start: Any) -> None:
    torch.manual_seed(0)
    model = Taps()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.named_modules())
    normfree.convert(model, X, start=start)
    assert list(model.named_modules()) == modules and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("start", STARTS)
def test_outputs_of_another_form_are_refused(start: Any) -> None:
    class Typed(Net):
        def forward(self, x):
            made = super().forward(x)
            return made if hasattr(self.stem[0], "gain") else (made, made)

    with pytest.raises(ValueError, match=r"what it returns was of type tuple and is a floating-point tensor"):
        normfree.convert(Typed().eval(), X, start=start)


def _is_plain(self):
    return type(self.asked[0]) is nn.Conv2d


def _is_of_name(self):
    return self.asked[0].__class__.__name__ == "Conv2d"


def _is_torchs(self):
    return type(self.asked[0]).__module__.startswith("torch.nn")


def _is_plain_in_training(self):
    return not self.training or type(self.asked[0]) is nn.Conv2d


def _counts(self):
    return sum(type(part) is nn.Conv2d for part in self.asked) > 1


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("ask", [_is_plain, _is_of_name, _is_torchs, _is_plain_in_training, _counts])
def test_layers_whose_class_the_forward_asks_for_stay_of_it(ask: Any, start: Any) -> None:
    class Asks(Net):
        def forward(self, x):
            x = self.asked(self.stem(x))
            return self.last(x if ask(self) else 0.1 * x)

    torch.manual_seed(0)
    model = Asks().train()
    converted = normfree.convert(model, X, start=start)
    assert all(ask(each.train(mode)) for each in (model, converted) for mode in (True, False))
    layers = [f"asked.{number}" for number in (0, 3) if type(converted.asked[number]) is nn.Conv2d]
    assert layers == (["asked.0", "asked.3"] if ask is _counts else ["asked.0"])
    why = "is asked for its class by the model's forward, which does something else where that is not Conv2d"
    norms = [name.replace("0", "1").replace("3", "4") for name in layers]
    assert [row[0] for row in converted.conversion.rows() if why in row[3]] == norms
    assert [kept.name for kept in converted.conversion.norms_left] == (norms if start == "fresh" else [])
    if start == "pretrained":
        torch.testing.assert_close(converted.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_a_layer_asked_for_a_class_that_it_stays_an_instance_of_is_converted(start: Any) -> None:
    class Asks(Net):
        def forward(self, x):
            x = self.asked(self.stem(x))
            return self.last(x if isinstance(self.asked[0], nn.Conv2d) else 0.1 * x)

    converted = normfree.convert(Asks().eval(), X, start=start)
    assert isinstance(converted.asked[0], nn.Conv2d) and type(converted.asked[0]) is not nn.Conv2d
    assert converted.conversion.norms_left == ()


class Spectrum(Net):
    def forward(self, x):
        return torch.fft.fft2(super().forward(x))


class Labels(Net):
    def forward(self, x):
        made = super().forward(x)
        return (made - made.mean((2, 3), keepdim=True)).argmax(1)


@pytest.mark.parametrize("kind", [Spectrum, Labels])
def test_complex_numbers_and_integers_are_compared(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def misfilled(original, converted, changes, constants):
        filled(original, converted, changes, constants)
        converted.last.weight.data *= -1  # no norm's place

    torch.manual_seed(0)
    model, filled = kind().eval(), pipeline.fill_constants
    assert normfree.convert(model, X, start="pretrained").conversion.output_error < 1e-3
    monkeypatch.setattr(pipeline, "fill_constants", misfilled)
    with pytest.raises(ValueError, match="gives other outputs once converted"):
        normfree.convert(model, X, start="pretrained")


Pair = namedtuple("Pair", ["left", "right"])
ONE = torch.zeros(2, 3)
FORMS = [
    ([ONE], [ONE, ONE], "what it returns was a list of 1 and is one of 2"),
    ([ONE], (ONE,), "what it returns was of type list and is of type tuple"),
    (
        Pair(ONE, 1),
        Pair(ONE, ONE),
        "what it returns [1] was of type int and is a floating-point tensor of shape [2, 3]",
    ),
    ({"a": ONE}, {"b": ONE}, "what it returns had the keys ['a'] and has ['b']"),
    ({"a": [ONE]}, {"a": [ONE.T]}, "what it returns ['a'][0] was a floating-point tensor of shape [2, 3] and is a"),
    (ONE, ONE.long(), "what it returns was a floating-point tensor of shape [2, 3] and is a int64 tensor of"),
    (ONE, torch.fft.fft(ONE), "what it returns was a floating-point tensor of shape [2, 3] and is a complex tensor"),
]


@pytest.mark.parametrize(("was", "now", "told"), FORMS)
def test_a_difference_of_form_is_told_with_its_place(was: Any, now: Any, told: str) -> None:
    assert difference(was, now).startswith(told)
    assert difference(was, was, numbers=True) == "" == difference(now, now, numbers=True)


def test_numbers_and_sizes_count_where_they_are_asked_for() -> None:
    assert difference([1], [2]) == "" and difference([1], [2], numbers=True)
    assert difference([float("nan")], [float("nan")], numbers=True) == ""
    assert difference(ONE, ONE.T, sizes=False) == "" and difference(ONE, ONE[0], sizes=False)


class Computes(nn.Module):
    """A forward that only computes, by a method and torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.twice = nn.BatchNorm1d(8), nn.Linear(8, 8), True

    def part(self, x):
        return F.relu(self.norm(x)) if self.training or self.twice else torch.tanh(self.norm(x))

    def forward(self, x):
        return sum([self.part(self.linear(x))]).add(0)


def _by_type(self, x):
    return self.norm(x) if type(self.norm) is nn.BatchNorm1d else x


def _by_class(self, x):
    return self.norm(x) if self.norm.__class__ is nn.BatchNorm1d else x


def _by_name_of_class(self, x):
    return self.norm(x) if self.norm.__class__.__name__ != "" else x


def _by_attribute(self, x):
    return self.norm(x) + self.norm.weight


def _by_name(self, x):
    return self.norm(x) if getattr(self.norm, "affine", False) else x


def _by_walking(self, x):
    for module in self.children():
        x = module(x)
    return x


def _by_a_function_of_its_own(self, x):
    return _ask(self.norm, x)


def _ask(norm, x):
    return norm(x) if isinstance(norm, nn.BatchNorm1d) else x


class Comprehends(Computes):
    """A comprehension and a function within the forward, with variables of it."""

    def forward(self, x):
        def twice(y):
            return y + x

        return sum(self.part(self.linear(twice(each * x))) for each in (x, 2 * x))


def _closed_over(ask):
    return lambda self, x: self.norm(x) if ask(self.norm) else x


def test_what_only_computes_is_not_run_again(monkeypatch):
    assert not _may_ask(nn.Sequential(Computes(), Comprehends(), torchvision.models.resnet18()))
    monkeypatch.setattr("normfree.convert.asked._Disguised", None)  # it would fail
    normfree.convert(nn.Sequential(Computes(), nn.ReLU(), nn.Linear(8, 2)), torch.randn(32, 8))


@pytest.mark.parametrize(
    "forward",
    [
        *(_by_type, _by_class, _by_name_of_class, _by_attribute, _by_name, _by_walking, _by_a_function_of_its_own),
        _closed_over(str),
    ],
)
def test_whatever_could_ask_is_run(forward):
    kind = type("Asks", (Computes,), {"forward": forward})
    assert _may_ask(nn.Sequential(kind()))


def test_hooks_and_forwards_of_one_module_could_ask():
    hooked, replaced = Computes(), Computes()
    hooked.register_forward_hook(lambda module, inputs, output: output)
    replaced.forward = lambda x: x
    assert _may_ask(nn.Sequential(hooked)) and _may_ask(nn.Sequential(replaced))
