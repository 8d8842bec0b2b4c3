"""The judgement behind the table of converted models: what a loss became, and where the search for a rate ends."""

import math

import pytest
from torch import nn
from torch.optim import SGD, Adam

from normfree.nn import ScaledWSConv2d


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


@pytest.mark.parametrize(
    ("deleted_trains_below", "converted_trains_below", "rate", "outcomes"),
    [
        (0.001, 0.02, 0.01, ("fails", "trains")),
        (0.001, 0.005, 0.003, ("fails", "trains")),
        (0.02, 0.02, 0.0001, ("trains", "trains")),
        (0.0, 0.0, 0.0001, ("fails", "fails")),
        (0.02, 0.0, 0.0001, ("trains", "fails")),
    ],
)
def test_adam_takes_the_first_rate_at_which_only_the_converted_model_trains(
    training, deleted_trains_below, converted_trains_below, rate, outcomes
):
    found = training.first_apart(below(deleted_trains_below), below(converted_trains_below))
    assert found["rate"] == rate
    assert (found["deleted"]["outcome"], found["converted"]["outcome"]) == outcomes


@pytest.mark.parametrize(("trains_with", "tried"), [(SGD, {SGD}), (Adam, {SGD, Adam})])
def test_what_does_not_train_with_sgd_is_tried_with_adam(training, monkeypatch, trains_with, tried):
    used = set()

    def run(model, batches, rate, steps, optimizing):
        optimizer = optimizing(list(model.parameters()), rate)
        used.add(type(optimizer))
        standardized = any(isinstance(each, ScaledWSConv2d) for each in model.modules())
        return {"outcome": "trains" if standardized and isinstance(optimizer, trains_with) else "fails"}

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training, "classifier", lambda name: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    found = training.trained("timm:lcnet_050", 200)
    assert used == tried
    told_apart = found["adam"] if Adam in tried else found
    assert (told_apart["deleted"]["outcome"], told_apart["converted"]["outcome"]) == ("fails", "trains")
