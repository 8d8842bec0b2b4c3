"""The judgement behind the table of converted models: what a loss became, and where the search for a rate ends."""

import math

import pytest
import torch
from torch import nn


@pytest.fixture
def training(benchmarks):
    return benchmarks("convert_training")


@pytest.mark.parametrize(
    ("first", "last", "peak", "expected"),
    [
        (2.3, 0.2, 3.0, "trains"),
        (5.0, 0.2, 9.0, "trains"),
        (2.3, 0.2, math.inf, "diverges"),
        (2.3, 1.5, 4.7, "diverges"),
        (5.0, 1.5, 9.9, "learns little"),
        (2.3, 2.5, 2.6, "diverges"),
        (2.3, math.nan, math.inf, "diverges"),
        (2.3, 2.3, 2.4, "learns nothing"),
        (2.3, 1.2, 2.4, "learns little"),
    ],
)
def test_what_became_of_a_loss(training, first, last, peak, expected):
    assert training.outcome(first, last, peak) == expected


@pytest.mark.parametrize(
    ("deleted_trains_below", "converted_trains_below", "rate"),
    [
        (0.0, 9.0, 0.4),
        (0.0, 0.3, 0.4 / 2**0.5),
        (1.0, 9.0, 1.6),
        (1.0, 1.2, 0.8 * 2**0.5),
        (0.3, 0.35, 0.4 / 2**0.25),
    ],
)
def test_the_search_ends_where_only_the_converted_model_trains(
    training, deleted_trains_below, converted_trains_below, rate
):
    found = training.search(below(deleted_trains_below), below(converted_trains_below))
    assert (found["deleted"]["outcome"], found["converted"]["outcome"]) == ("fails", "trains")
    assert found["rate"] == pytest.approx(rate)


def test_the_search_ends_where_only_the_deleted_model_trains(training):
    found = training.search(below(0.5), below(0.0))
    assert (found["deleted"]["outcome"], found["converted"]["outcome"]) == ("trains", "fails")


@pytest.mark.parametrize(("limit", "tried"), [(0.0, 7), (9.0, 5), (0.5, 7)])
def test_the_search_gives_up_where_both_models_do_the_same(training, limit, tried):
    found = training.search(below(limit), below(limit))
    assert len(found["rates"]) == tried
    assert found["deleted"] == found["converted"]


def below(limit):
    """Of a model that trains at every rate below a limit: its run at a rate."""
    return lambda rate: {"outcome": "trains" if rate < limit else "fails"}


def test_what_does_not_train_is_tried_with_adaptive_clipping_and_larger_images(training, monkeypatch):
    tried = []

    def told_apart(name, steps, device, size, clip):
        tried.append((size, clip))
        return {"converted": {"outcome": "trains" if clip is training.clip_adaptively else "diverges"}}

    monkeypatch.setattr(training, "_told_apart", told_apart)
    found = training.trained("timm:lcnet_050", 200)
    assert tried == [(32, training.clip_norm), (64, training.clip_adaptively)]
    assert (found["converted"]["outcome"], found["adaptive"]["converted"]["outcome"]) == ("diverges", "trains")


def test_what_trains_is_not_tried_again(training, monkeypatch):
    monkeypatch.setattr(training, "_told_apart", lambda *_: {"converted": {"outcome": "trains"}})
    assert "adaptive" not in training.trained("timm:resnet26", 200)


@pytest.mark.parametrize(("clip", "norms"), [("clip_norm", (0.8, 0.6)), ("clip_adaptively", (0.1, 0.05))])
def test_gradients_are_clipped_as_the_recipe_says(training, clip, norms):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, weight, gradient in zip(model, (2.0, 1.0, 1.0), (4.0, 3.0, 0.0), strict=True):
        nn.init.constant_(layer.weight, weight)
        layer.weight.grad = torch.full((1, 1), gradient)
    getattr(training, clip)(model)
    assert (float(model[0].weight.grad), float(model[1].weight.grad)) == pytest.approx(norms)
