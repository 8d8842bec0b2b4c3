"""Differences by hand, tolerances from precisions, and the waking of what is silent."""

import math

import pytest
import torch
from torch import nn

from normfree.export.comparison import Difference, default_tolerance, difference, silent_parameters, wake_silent


def test_a_difference_is_absolute_and_in_units_of_the_output():
    expected = [torch.tensor([[1.0, -4.0]]), torch.tensor([100.0])]
    actual = [torch.tensor([[1.5, -4.0]]), torch.tensor([101.0])]
    assert difference(actual, expected) == Difference(absolute=1.0, relative=0.125)


@pytest.mark.parametrize(
    ("actual", "expected", "found"),
    [
        ([0.0, 0.0], [0.0, 0.0], Difference(0.0, 0.0)),
        ([0.0, 1.0], [0.0, 0.0], Difference(1.0, math.inf)),
        ([math.nan, 1.0], [2.0, 1.0], Difference(math.inf, math.inf)),
        ([math.inf, 1.0], [2.0, 1.0], Difference(math.inf, math.inf)),
        ([-math.inf, 1.0], [-math.inf, 2.0], Difference(1.0, 0.5)),
        ([], [], Difference(0.0, 0.0)),
    ],
)
def test_zeros_and_what_is_not_finite(actual, expected, found):
    assert difference([torch.tensor(actual)], [torch.tensor(expected)]) == found


def test_integers_and_complex_numbers_compare():
    assert difference([torch.tensor([2, 5])], [torch.tensor([2, 10])]) == Difference(5.0, 0.5)
    assert difference([torch.tensor([3j])], [torch.tensor([3 + 0j])]).absolute == pytest.approx(math.sqrt(18))


@pytest.mark.parametrize(
    ("actual", "expected", "pattern"),
    [
        ([torch.ones(2)], [torch.ones(2), torch.ones(1)], r"has 1 outputs, the model 2"),
        ([torch.ones(2, 1)], [torch.ones(1, 2)], r"shape \[2, 1\], the model's \[1, 2\]"),
        ([torch.ones(1)], [torch.tensor([math.nan])], r"not numbers \(NaN\)"),
    ],
)
def test_what_cannot_be_compared(actual, expected, pattern):
    with pytest.raises(ValueError, match=pattern):
        difference(actual, expected)


def test_merging_keeps_the_larger_of_each():
    assert Difference(1.0, 0.1).merged(Difference(0.5, 0.2)) == Difference(1.0, 0.2)


def test_tolerance_is_half_of_the_digits_of_the_coarsest_precision():
    whole, single, half = torch.ones(1, dtype=torch.int64), torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    assert default_tolerance([whole]) == 0
    assert default_tolerance([whole, single]) == math.sqrt(2**-23)
    assert default_tolerance([single, half, single.double()]) == math.sqrt(2**-7)


def test_only_zeros_are_woken_and_in_a_copy():
    model = nn.Sequential(nn.Conv2d(50, 40, 2), nn.BatchNorm2d(40))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    assert silent_parameters(model) == ["0.weight", "1.weight", "1.bias"]
    woken = wake_silent(model, torch.Generator().manual_seed(0))
    assert silent_parameters(woken) == []
    assert len(silent_parameters(model)) == 3
    assert torch.equal(woken[0].bias, model[0].bias)
    # 8,000 draws: the standard deviation is known to 1 / sqrt(2 * 8000), 0.8 %; the tolerance is six times that.
    assert woken[0].weight.std().item() == pytest.approx(0.2 / math.sqrt(200), rel=0.05)
    assert 0.1 < woken[1].weight.std() < 0.3
