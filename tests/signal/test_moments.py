"""Channel statistics against float64 NumPy, whatever the layout, the precision and the magnitude."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.signal import moments as implementation
from normfree.signal.moments import (
    EXAMPLES_CORRELATED,
    LARGEST_SQ_MEAN_TO_VAR,
    LONGEST_RUN,
    PIECE,
    Moments,
    channel_moments,
)

ROUNDING = 4 * math.sqrt(max(LONGEST_RUN["row"], LONGEST_RUN["column"])) * 2.0**-24
"""Relative error of a mean square of n float32 values summed in one run: roundings of 2⁻²⁴ that add up like a
random walk, sqrt(n) of them, at four standard deviations (1.5e-5). Half precision is read exactly as float32."""

LENGTHS = 4 * math.sqrt(LONGEST_RUN["features"] / 8) * 2.0**-24
"""The same for the length of an example's features, which eight lanes add up: 2e-5."""


@pytest.fixture(scope="module", params=[implementation.SMALL, 0], ids=["few", "many"], autouse=True)
def _as_few_or_as_many(request):
    """Everything holds whichever way a small tensor is taken: as one, and as the first piece of a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "SMALL", request.param)
        yield


def reference(x: torch.Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance per channel, two passes in float64."""
    rows = np.moveaxis(x.double().numpy(), axis, 0).reshape(x.shape[axis], -1)
    return rows.mean(1), rows.var(1)


def assert_close(x: torch.Tensor, axis: int, *, tolerance: float = ROUNDING) -> None:
    moments = channel_moments(x, axis)
    mean, var = reference(x, axis)
    size = var + mean**2
    # An error of the mean square is shared by mean² and the variance; above LARGEST_SQ_MEAN_TO_VAR all is float64.
    np.testing.assert_allclose(moments.mean.numpy(), mean, atol=tolerance * np.sqrt(size).max(), rtol=tolerance)
    np.testing.assert_array_less(np.abs(moments.var.numpy() - var), tolerance * size + 1e-300)
    assert moments.count == x.numel() // x.shape[axis]
    assert moments.avg_channel_sq_mean == pytest.approx((mean**2).mean(), rel=0, abs=2 * tolerance * size.mean())
    assert moments.avg_channel_var == pytest.approx(var.mean(), rel=0, abs=tolerance * size.mean())


LAYOUTS = {
    "map": (lambda: torch.randn(3, 5, 7, 9), 1),
    "channels-last memory": (lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last), 1),
    "tokens": (lambda: torch.randn(3, 11, 5), 2),
    "channels-last axes": (lambda: torch.randn(3, 7, 9, 5), 3),
    "permuted": (lambda: torch.randn(7, 5, 9, 3).permute(3, 1, 0, 2), 1),
    "strided": (lambda: torch.randn(6, 10, 7, 9)[::2, 1::2, :, ::3], 1),
    "expanded": (lambda: torch.randn(1, 5, 1, 9).expand(4, 5, 3, 9), 1),
    "video": (lambda: torch.randn(2, 4, 3, 5, 6), 1),
    "video, channels-last memory": (lambda: torch.randn(2, 4, 3, 5, 6).to(memory_format=torch.channels_last_3d), 1),
    "sequence": (lambda: torch.randn(3, 5, 13), 1),
    "features": (lambda: torch.randn(17, 6), 1),
    "one example": (lambda: torch.randn(1, 5, 8, 8), 1),
    "one channel": (lambda: torch.randn(4, 1, 8, 8), 1),
    "one channel, last": (lambda: torch.randn(4, 8, 1), 2),
    "one position": (lambda: torch.randn(4, 6, 1, 1), 1),
    "no batch axis": (lambda: torch.randn(5, 12, 12), 0),
    "no batch axis, pieces": (lambda: torch.randn(3, 600, 700), 0),
    "a vector": (lambda: torch.randn(6), 0),
    "pieces of a map": (lambda: torch.randn(9, 8, 160, 160), 1),
    "pieces of tokens": (lambda: torch.randn(5, 3000, 96), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    make, axis = LAYOUTS[layout]
    torch.manual_seed(0)
    x = make() * 1.7 + 0.4
    assert_close(x, axis)


def test_the_pieces_are_really_several():
    assert 9 * 8 * 160 * 160 > PIECE < 5 * 3000 * 96


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype, axis):
    torch.manual_seed(1)
    x = (torch.randn(4, 6, 12, 6) * 3 + 1).to(dtype)
    assert_close(x, axis, tolerance=1e-13 if dtype == torch.float64 else ROUNDING)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("magnitude", [1e25, 1e-25, 1e-38, 3e38])
def test_magnitudes_whose_square_float32_cannot_hold(magnitude, axis):
    torch.manual_seed(2)
    x = torch.rand(4, 6, 33) * magnitude
    mean, var = reference(x, axis)
    moments = channel_moments(x, axis)
    # Two passes in float64 of values that are exactly what the reference sees: 1e-12 leaves room for its own order.
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(moments.var.numpy(), var, rtol=1e-12)


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_mean_far_above_the_deviation(ratio, axis):
    """The variance keeps five digits: E[x²] − E[x]² is used only where the mean square is not the larger by far."""
    torch.manual_seed(3)
    x = torch.randn(4, 6, 20, 6) + math.sqrt(ratio)
    var = reference(x, axis)[1]
    moments = channel_moments(x, axis)
    tolerance = ROUNDING * (1 + LARGEST_SQ_MEAN_TO_VAR) if ratio < LARGEST_SQ_MEAN_TO_VAR else 1e-12
    np.testing.assert_allclose(moments.var.numpy(), var, rtol=tolerance)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_long_runs_are_cut(memory):
    """A megapixel: added up in one run, float32 would be off by 5e-4 down a column and by 2e-5 along a row."""
    torch.manual_seed(8)
    assert_close(torch.randn(1, 4, 1024, 1024).to(memory_format=memory), 1)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1000.1])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_rounding_that_always_falls_the_same_way(memory, value):
    """A repeated number is the worst case of a running sum: n·2⁻²⁴ for a run of n, and not of the whole map."""
    x = torch.full((1, 4, 512, 512), value).to(memory_format=memory)
    x[:, :2] = torch.randn(1, 2, 512, 512) * 10 * value  # so that the tensor as a whole looks harmless
    worst = max(LONGEST_RUN["row"], LONGEST_RUN["column"]) * 2.0**-24
    np.testing.assert_allclose(channel_moments(x, 1).mean[2:].numpy(), np.float32(value), rtol=worst)
    assert channel_moments(x, 1).dead_fraction == 0.5


shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shapes, st.data(), st.integers(0, 2**31))
def test_any_shape_axis_and_order_of_axes(shape, data, seed):
    torch.manual_seed(seed)
    order = data.draw(st.permutations(range(len(shape))))
    axis = data.draw(st.integers(0, len(shape) - 1))
    assert_close((torch.randn(shape) + 0.3).permute(order), axis)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(-1e3, 1e3), st.integers(0, 2**31))
def test_merging_is_concatenating(first, second, offset, seed):
    torch.manual_seed(seed)
    a = torch.randn(first, 3, 4, dtype=torch.float64)
    b = torch.randn(second, 3, 4, dtype=torch.float64) + offset
    merged, whole = channel_moments(a, 1).merge(channel_moments(b, 1)), channel_moments(torch.cat([a, b]), 1)
    # One-pass float64: the mean square, of which the variance is what is left, is off by 1e-15 of itself.
    scale = 1 + offset**2
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(merged.var, whole.var, rtol=0, atol=1e-13 * scale)
    assert merged.count == whole.count


def test_merging_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match="channels changed from 3 to 4 between batches"):
        channel_moments(torch.randn(2, 3), 1).merge(channel_moments(torch.randn(2, 4), 1))


def test_merging_keeps_all_pairs():
    a, b = torch.randn(3, 4, 5), torch.randn(4, 4, 5)
    one, other = channel_moments(a, 1, examples=3), channel_moments(b, 1, examples=4)
    merged = one.merge(other)
    assert merged.pairs == 3 + 6
    assert merged.correlation == pytest.approx((3 * one.correlation + 6 * other.correlation) / 9)


@pytest.mark.parametrize("shape", [(2, 8, 3), (5, 4, 6, 6), (3, 40, 64, 64), (EXAMPLES_CORRELATED + 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cosine_similarity_against_every_pair(shape, dtype):
    torch.manual_seed(4)
    x = (torch.randn(shape) + 0.5).to(dtype)
    rows = x[:EXAMPLES_CORRELATED].double().flatten(1)
    cosines = [
        torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0).item()
        for i in range(len(rows))
        for j in range(i)
    ]
    found = channel_moments(x, 1, examples=shape[0]).correlation
    assert found == pytest.approx(np.mean(cosines), abs=LENGTHS)


def test_cosine_similarity_ignores_memory_layout_and_magnitude():
    torch.manual_seed(5)
    x = torch.randn(4, 6, 5, 5) + 1
    plain = channel_moments(x, 1, examples=4).correlation
    last = channel_moments(x.to(memory_format=torch.channels_last), 1, examples=4).correlation
    tiny = channel_moments(x * 1e-24, 1, examples=4).correlation
    huge = channel_moments(x * 1e24, 1, examples=4).correlation
    assert last == pytest.approx(plain, abs=1e-6)
    assert [tiny, huge] == pytest.approx([plain, plain], abs=1e-6)


def test_examples_without_direction_make_no_pair():
    x = torch.randn(4, 6, 5)
    x[1] = 0
    moments = channel_moments(x, 1, examples=4)
    assert moments.pairs == 3
    assert math.isfinite(moments.correlation)
    assert channel_moments(torch.zeros(4, 6, 5), 1, examples=4).correlation is None


def test_no_correlation_without_a_batch_to_compare():
    x = torch.randn(4, 6, 5)
    assert channel_moments(x, 1).correlation is None
    assert channel_moments(x[:1], 1, examples=1).correlation is None
    assert channel_moments(x, 1, examples=2).correlation is None  # the leading axis is not the examples


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_dead_channels_are_counted_whatever_their_value(memory):
    torch.manual_seed(6)
    x = torch.randn(4, 8, 9, 9).to(memory_format=memory)
    assert channel_moments(x, 1).dead_fraction == 0
    x[:, 0] = 0
    x[:, 3] = 0.1  # a bias alone: constant, not zero
    x[:, 5] = -1 / 3
    assert channel_moments(x, 1).dead_fraction == 3 / 8
    x[:, 3] += 1e-3 * torch.randn(4, 9, 9)  # small beside its mean, but alive
    assert channel_moments(x, 1).dead_fraction == 2 / 8


def test_one_value_per_channel_is_not_called_dead():
    assert channel_moments(torch.randn(1, 8), 1).dead_fraction == 0


def test_not_finite_stays_not_finite():
    x = torch.randn(2, 3, 4)
    x[0, 1, 2] = math.inf
    assert not math.isfinite(channel_moments(x, 1).avg_channel_var)


def test_scaling_and_choice_of_channels():
    torch.manual_seed(7)
    x, factor = torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)
    moments = channel_moments(x, 1)
    divided = channel_moments(x / factor[:, None], 1)
    torch.testing.assert_close(moments.divide(factor).mean, divided.mean)
    torch.testing.assert_close(moments.divide(factor).var, divided.var)
    kept = moments.channels(torch.tensor([True, False, True]))
    torch.testing.assert_close(kept.var, moments.var[[0, 2]])


def test_the_input_is_neither_changed_nor_kept():
    x = torch.randn(2, 3, 4, requires_grad=True)
    before = x.detach().clone()
    moments = channel_moments(x, 1)
    assert torch.equal(x, before)
    assert not moments.mean.requires_grad
    assert isinstance(moments, Moments)


def test_small_activations_are_measured_as_they_were_when_they_were_entered():
    """Moments that are computed together, later, are those of each by itself, whatever became of the activation."""
    torch.manual_seed(9)
    shapes = [((4, 6, 5), 1), ((4, 6, 5), 2), ((3, 7), 1), ((4, 6, 5), 1), ((1, 2), 1)] * 3
    tensors = [(torch.randn(shape, dtype=torch.float64) + number, axis) for number, (shape, axis) in enumerate(shapes)]
    alone = []
    for x, axis in tensors:
        moments = channel_moments(x.clone(), axis, examples=len(x))
        alone.append((moments.mean, moments.var, moments.correlation, moments.dead_fraction, moments.avg_channel_var))
    together = [channel_moments(x, axis, examples=len(x)) for x, axis in tensors]
    for x, _ in tensors:
        x.zero_()
    for moments, (mean, var, correlation, dead, avg_var) in zip(together, alone, strict=True):
        torch.testing.assert_close(moments.mean, mean, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(moments.var, var, rtol=1e-13, atol=1e-14)
        assert (moments.correlation or 0) == pytest.approx(correlation or 0, rel=1e-12)
        assert moments.dead_fraction == dead
        assert moments.avg_channel_var == pytest.approx(avg_var, rel=1e-13)
        assert moments.avg_channel_var == pytest.approx(moments.var.mean().item(), rel=1e-13)
        assert moments.avg_channel_sq_mean == pytest.approx(moments.mean.square().mean().item(), rel=1e-13)


def test_no_value_is_kept_longer_than_the_moments_that_wait_for_it():
    x = torch.randn(2, 3, dtype=torch.float32)
    waiting = channel_moments(x, 1)
    kept = weakref.ref(next(iter(vars(waiting)["together"].entries.values()))[0][1]) if implementation.SMALL else None
    assert waiting.count == 2
    del waiting
    gc.collect()
    assert kept is None or kept() is None


@pytest.mark.parametrize("shape", [(8, 6), (3, 5, 4), (20, 2)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("divisor", [1.0, 0.1])
def test_a_sparse_tensor_has_the_moments_of_the_dense_one(shape, axis, divisor):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu() + 0.0
    layouts = [dense.to_sparse(), dense.to_sparse(1)]
    layouts += [dense.to_sparse_csr(), dense.to_sparse_csc()] if dense.dim() == 2 else []
    twice = torch.cat([layouts[0].indices()] * 2, 1), torch.cat([layouts[0].values() / 2] * 2)
    for sparse in (*layouts, torch.sparse_coo_tensor(*twice, shape)):
        found, wanted = (channel_moments(x, axis, examples=len(x), divisor=divisor) for x in (sparse, dense))
        assert found.count == wanted.count
        for name in ("mean", "deviation"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=ROUNDING, atol=ROUNDING)
        assert found.correlation == (
            None if wanted.correlation is None else pytest.approx(wanted.correlation, abs=1e-6)
        )


@pytest.mark.parametrize(("shape", "axis"), [((12, 6), 1), ((12, 5, 4, 3), 1), ((12, 5, 6), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_similarity_without_a_bias_is_that_of_the_values_without_it(shape, axis, dtype):
    """Where there is much of it with the bias; else both are one number, and nothing left is None."""
    generator = torch.Generator().manual_seed(0)
    values, bias = torch.randn(shape, generator=generator).to(dtype), torch.full((shape[axis],), 8.0, dtype=dtype)
    along = [-1 if other == axis else 1 for other in range(len(shape))]
    given = values + bias.reshape(along)
    found = channel_moments(given, axis, examples=12, bias=bias)
    wanted = channel_moments(given - bias.reshape(along), axis, examples=12)
    assert found.correlation > 0.9 and abs(wanted.correlation) < 0.5
    assert found.own_correlation == pytest.approx(wanted.correlation, abs=1e-3)
    assert channel_moments(given, axis, examples=12).own_correlation == found.correlation
    small = channel_moments(values, axis, examples=12, bias=0.01 * bias)
    assert small.own_correlation == small.correlation
    nothing = channel_moments(bias.reshape(along).expand(shape), axis, examples=12, bias=bias)
    assert nothing.correlation == pytest.approx(1) and nothing.own_correlation is None
    merged = found.merge(small)
    sums = found.without_bias[0] + small.cosine_sum, found.without_bias[1] + small.pairs
    assert merged.own_correlation == pytest.approx(sums[0] / sums[1])
    assert found.divide(2.0).own_correlation == found.own_correlation
