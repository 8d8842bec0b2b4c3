"""Padding, pools, the variance plan, stochastic depth and squeeze-excite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from normfree.nn import (
    AveragePool2x2,
    MaxPool2d,
    ScaledConv2d,
    SqueezeExcite,
    StochasticDepth,
    pad_same,
    same_padding,
    symmetric_padding,
    variance_plan,
)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "expected"),
    [
        (224, 7, 2, 1, (2, 3)),
        (225, 7, 2, 1, (3, 3)),
        (56, 3, 2, 1, (0, 1)),
        (55, 3, 2, 1, (1, 1)),
        (56, 3, 1, 1, (1, 1)),
        (56, 1, 2, 1, (0, 0)),
        (9, 3, 1, 2, (2, 2)),
        (5, 2, 1, 1, (0, 1)),
        (7, 2, 2, 1, (0, 1)),
    ],
)
def test_same_padding_by_hand(size, kernel, stride, dilation, expected):
    assert same_padding(size, kernel, stride, dilation) == expected


def test_same_gives_ceil_of_size_over_stride():
    for size in range(1, 30):
        for kernel in range(1, 8):
            for stride in range(1, 5):
                before, after = same_padding(size, kernel, stride)
                assert (size + before + after - kernel) // stride + 1 == math.ceil(size / stride)
                assert after - before in (0, 1)


def test_explicit_padding_only_where_the_sides_differ():
    x = torch.randn(1, 2, 9, 8)
    padded, rest = pad_same(x, 3, 2)
    assert padded.shape == (1, 2, 9, 9)
    assert rest == (1, 0)
    assert pad_same(x, 3)[0] is x
    assert symmetric_padding((3, 5), (2, 1)) == (2, 2)


def test_symmetric_convolution_is_torch_own():
    layer = ScaledConv2d(2, 3, 5, 2, dilation=2)
    x = torch.randn(1, 2, 11, 12)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, 2, 4, 2))
    explicit = ScaledConv2d(2, 3, 5, 2, padding=1)
    assert explicit(x).shape[2:] == (5, 5)


@pytest.mark.parametrize("size", [8, 9])
def test_max_pool_never_returns_padding(size):
    x = -1 - torch.rand(1, 2, size, size)
    same = MaxPool2d(3, 2, padding="same")(x)
    assert same.shape[2] == math.ceil(size / 2)
    assert same.max() < -1
    torch.testing.assert_close(MaxPool2d(3, 2)(x), F.max_pool2d(x, 3, 2, 1))
    if size == 8:  # SAME starts at the first cell and overhangs the end
        torch.testing.assert_close(same[..., 0, 0], x[..., :3, :3].amax((2, 3)))
        torch.testing.assert_close(same[..., -1, -1], x[..., 6:, 6:].amax((2, 3)))


def test_average_pool_counts_existing_cells_only():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    expected = torch.tensor([[2.0, 3.5], [6.5, 8.0]])
    torch.testing.assert_close(AveragePool2x2()(x)[0, 0], expected)


def test_variance_plan_by_hand():
    plan = variance_plan((2, 3), alpha=0.2)
    assert [block.expected_var for block in plan] == pytest.approx([1.04, 1.08, 1.04, 1.08, 1.12])
    expected = [1, math.sqrt(1.04), math.sqrt(1.08), math.sqrt(1.04), math.sqrt(1.08)]
    assert [block.beta for block in plan] == pytest.approx(expected)
    assert [block.transition for block in plan] == [True, False, True, False, False]
    assert [(block.stage, block.index) for block in plan] == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]
    assert [block.expected_var for block in variance_plan([2], alpha=1)] == [2, 3]


@pytest.mark.parametrize(
    ("depths", "alpha", "message"),
    [
        ((), 0.2, r"^depths=\(\): must be a sequence of blocks per stage; pass"),
        (3, 0.2, r"^depths=3: must be a sequence of blocks per stage; pass"),
        ((3, 0), 0.2, r"^depths=\(3, 0\): must be 2 integers of at least 1; pass"),
        ((3, True), 0.2, r"^depths="),
        ((3,), -0.1, r"^alpha=-0.1: must be a finite number of at least 0; pass"),
        ((3,), math.nan, r"^alpha=nan"),
    ],
)
def test_variance_plan_refusals(depths, alpha, message):
    with pytest.raises(ValueError, match=message):
        variance_plan(depths, alpha)


def test_stochastic_depth_drops_whole_examples_and_does_not_rescale():
    torch.manual_seed(0)
    layer = StochasticDepth(0.25)
    x = torch.full((4000, 2, 3), 7.0)
    kept = layer(x).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 7.0}
    assert (kept == kept[:, :1]).all()
    # Binomial(4000, 3/4): five standard deviations are 0.034.
    assert kept[:, 0].ne(0).float().mean().item() == pytest.approx(0.75, abs=0.034)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_stochastic_depth_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(3, 2)
    assert StochasticDepth(0.5).eval()(x) is x
    state = torch.get_rng_state()
    assert StochasticDepth(0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    for rate in (1, -0.1, "half"):
        with pytest.raises(ValueError, match=r"^rate=.*at least 0 and below 1; pass rate=0"):
            StochasticDepth(rate)


def test_squeeze_excite_equals_its_equation():
    layer = SqueezeExcite(6, 0.5, alpha=0.2, skip_gain=1.5).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    hidden = torch.clamp(x.mean((2, 3)) @ layer.linear0.weight.T + layer.linear0.bias, min=0)
    gate = 2 / (1 + torch.exp(-(hidden @ layer.linear1.weight.T + layer.linear1.bias)))
    torch.testing.assert_close(layer(x), 0.3 * x * gate[:, :, None, None])


def test_squeeze_excite_hidden_width():
    assert SqueezeExcite(10, 0.25).linear0.out_features == 2
    assert SqueezeExcite(2, 0.25).linear0.out_features == 1
    with pytest.raises(ValueError, match=r"^ratio=0: must be a finite number above 0; pass"):
        SqueezeExcite(8, 0)
    with pytest.raises(ValueError, match=r"^channels=0: must be an integer of at least 1; pass"):
        SqueezeExcite(0)
