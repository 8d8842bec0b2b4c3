"""Per-channel mean and variance of an activation, in one cheap pass that does not lose precision.

Reading a map twice through a slow reduction would be the whole cost of a plot, so every layout takes
its fastest kernel: a sum and a norm over contiguous rows, or one call of the batch-norm statistics where
channels lie innermost. Both work on pieces that stay in the cache, and the pieces are merged in float64.
A result that single precision cannot carry (overflow, underflow, a mean far above the deviation) is
computed again in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from normfree.trace.inputs import SPARSE

PIECE = 1 << 20
"""Elements looked at in one go: 4 MiB of float32, about what the last-level cache of one core holds."""

SMALL = 1 << 15
"""Up to so many elements the calls cost more than what they compute: all is taken in float64, in as few as will do."""

LARGEST_SQ_MEAN_TO_VAR = 300.0
"""Above this ratio E[x²] − E[x]² in float32 leaves the variance fewer than five digits (6e-8 · 300 = 1.8e-5)."""

LONGEST_RUN = {"row": 4096, "column": 2048, "features": 1 << 18}
"""Values added up one after the other in float32: along a row (in eight lanes or more), down a column, and of an
example's features, whose lengths need no more than five digits.

The rounding of n additions is at most n·2⁻²⁴, if all fall the same way (1.2e-4 for a column of one
repeated number, 2e-5 as measured), and about sqrt(n)·2⁻²⁴ = 3e-6 for data. Without the limit a column of a
million values is off by a per cent.
"""

SMALLEST_VAR_TO_SQ = 1e-4
"""Below this share of its mean square, the variance of a single channel may be rounding alone (1.2e-4)."""

DEAD = 1e-10
"""A channel whose variance is below this share of its mean square is constant."""

LIKE = 0.9
"""Mean cosine similarity up to which it does not matter what a bias has to do with it."""

EXAMPLES_CORRELATED = 8
"""Examples whose pairwise similarity is taken: 28 pairs, at half the cost of a batch of sixteen."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation of every channel, in float64 on the CPU.

    Attributes:
        count: values per channel seen so far.
        mean: channel means, [C].
        deviation: sum of squared deviations from the mean, [C].
        cosine_sum: sum of cosine similarities over pairs of different examples.
        pairs: how many pairs that sum has.
        without_bias: both without the bias of the layer that made the values, where the mean is above LIKE with it.
    """

    count: int
    mean: Tensor
    deviation: Tensor
    # Factories: a default on the class would be found before _Later.__getattr__.
    cosine_sum: float = field(default_factory=float)
    pairs: int = field(default_factory=int)
    without_bias: tuple[float, int] | None = field(default_factory=lambda: None)

    @property
    def var(self) -> Tensor:
        """Biased variance of each channel, [C]."""
        return self.deviation / self.count

    @cached_property
    def avg_channel_sq_mean(self) -> float:
        """Mean over channels of the squared channel mean."""
        return self.mean.square().mean().item()

    @cached_property
    def avg_channel_var(self) -> float:
        """Mean over channels of the biased channel variance."""
        return self.var.mean().item()

    @property
    def correlation(self) -> float | None:
        """Mean cosine similarity of different examples, None without a pair; what rounding adds above 1 is cut off."""
        return min(self.cosine_sum / self.pairs, 1.0) if self.pairs else None

    @property
    def own_correlation(self) -> float | None:
        """The same without the bias of the layer that made the values; None where nothing is left without it."""
        cosine_sum, pairs = self.without_bias or (self.cosine_sum, self.pairs)
        return min(cosine_sum / pairs, 1.0) if pairs else None

    @cached_property
    def dead_fraction(self) -> float:
        """Fraction of channels that are constant: a variance below rounding of their own size.

        One value per channel cannot tell, and counts as none.
        """
        if self.count < 2:
            return 0.0
        size = self.var + self.mean.square()
        return (self.var <= DEAD * size).double().mean().item()

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together (Chan's update): exact, whatever the split."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"batch: channels changed from {self.mean.numel()} to {other.mean.numel()} between batches; "
                "every batch must have the shape of the first apart from its number of examples"
            )
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.deviation + other.deviation + delta.square() * (self.count * other.count / count),
            self.cosine_sum + other.cosine_sum,
            self.pairs + other.pairs,
            self._and_without_bias(other),
        )

    def _and_without_bias(self, other: Moments) -> tuple[float, int] | None:
        if self.without_bias is other.without_bias is None:
            return None
        own, others = (each.without_bias or (each.cosine_sum, each.pairs) for each in (self, other))
        return own[0] + others[0], own[1] + others[1]

    def divide(self, factor: Tensor | float) -> Moments:
        """The moments of the values divided by ``factor`` (a number, or one per channel [C])."""
        mean, deviation = self.mean / factor, self.deviation / factor**2
        if isinstance(factor, Tensor):
            return Moments(self.count, mean, deviation)
        return Moments(self.count, mean, deviation, self.cosine_sum, self.pairs, self.without_bias)

    def channels(self, kept: Tensor) -> Moments:
        """The moments of some channels alone (a mask [C])."""
        return Moments(self.count, self.mean[kept], self.deviation[kept])


def channel_moments(
    x: Tensor, channel_axis: int, *, examples: int | None = None, divisor: float = 1.0, bias: Tensor | None = None
) -> Moments:
    """Per-channel moments of ``x / divisor`` over every other axis.

    Args:
        x: a floating-point activation of any shape, layout and precision; or a sparse input.
        channel_axis: the axis that holds the channels.
        examples: the number of examples in the batch; given and found as the leading axis, the mean
            cosine similarity between the first few examples' flattened features is taken too.
        divisor: a number that the values are divided by.
        bias: what the layer that made the values has added to each channel [C]; the similarity is also taken without.

    Returns:
        The moments, in float64 on the CPU.
    """
    x = x.detach().to_sparse() if x.layout in SPARSE else x.detach()
    if channel_axis == 0:  # one example without a batch axis: the leading axis is the one that is cut
        x, channel_axis = x.unsqueeze(0), 1
    correlated = examples is not None and examples > 1 and x.shape[0] == examples
    if x.is_sparse:
        return _of_sparse(x, channel_axis % x.dim(), correlated=correlated).divide(divisor)
    if x.numel() <= SMALL:
        return _of_few(x, channel_axis % x.dim(), correlated=correlated, divisor=divisor, bias=bias)
    moments, sq_length = _fast(x, channel_axis)
    moments = _refined(moments, x, channel_axis) if _trustworthy(moments) else _exact(x, channel_axis)
    if correlated:
        cosine_sum, pairs = _cosine_sum(x, sq_length)
        without_bias = None
        if bias is not None and cosine_sum > LIKE * pairs:
            along = [-1 if axis == channel_axis % x.dim() else 1 for axis in range(x.dim())]
            without_bias = _cosine_sum(x[:EXAMPLES_CORRELATED] - bias.detach().to(x).reshape(along), None)
        moments = Moments(moments.count, moments.mean, moments.deviation, cosine_sum, pairs, without_bias)
    return moments if divisor == 1 else moments.divide(divisor)


def _of_sparse(x: Tensor, axis: int, *, correlated: bool) -> Moments:
    """The moments of a sparse tensor, from the values that it stores; all others are zeros."""
    x = x.to_dense().to_sparse() if x.dense_dim() else x.coalesce()  # of rows, or of numbers
    channels, count = x.shape[axis], x.numel() // x.shape[axis]
    place, values = x.indices()[axis], x.values().double()

    def sums(of_each: Tensor) -> Tensor:
        return values.new_zeros(channels).index_add_(0, place, of_each)

    mean = sums(values) / count
    zeros = count - sums(torch.ones_like(values))
    deviation = sums((values - mean[place]).square()) + zeros * mean.square()
    cosine_sum, pairs = 0.0, 0
    if correlated:
        first = x.index_select(0, torch.arange(min(EXAMPLES_CORRELATED, x.shape[0]), device=x.device))
        cosine_sum, pairs = _cosine_sum(first.to_dense(), None)
    return Moments(count, mean.cpu(), deviation.cpu(), cosine_sum, pairs)


@dataclass(frozen=True)
class Sizes:
    """How large the channels of an input are: root mean squares over examples and positions.

    Attributes:
        channel: index of the largest.
        largest: its size.
        typical: the median of the others'.
        all: those of all channels that are compared, the largest included, by index.
        axis: of the channels.
    """

    channel: int
    largest: float
    typical: float
    all: Mapping[int, float]
    axis: int


MOST_ROWS = 4096
"""Positions, over all examples, by which the sizes of an input's channels are judged."""


def channel_sizes(x: Tensor, channel_axis: int) -> Sizes | None:
    """The sizes of an activation's channels, of its first few thousand positions.

    Channels that are constant, or have two values alone (categories, one channel each), are none of the others: their
    size is how often they are on.

    Args:
        x: a floating-point activation.
        channel_axis: the axis that holds the channels.

    Returns:
        The sizes; None where there are not three channels to compare.
    """
    rows = x.detach().movedim(channel_axis, -1)
    if rows.shape[-1] < 3:
        return None
    values = rows[: max(1, MOST_ROWS * len(rows) // max(1, rows[..., 0].numel()))].flatten(0, -2)[:MOST_ROWS].double()
    low, high = values.amin(0), values.amax(0)
    size = values.square().mean(0).sqrt()
    channel = int(size.argmax())
    measured = ((values != low) & (values != high)).any(0)
    measured[channel] = False
    if int(measured.sum()) < 2 or not bool(size.isfinite().all()):
        return None
    typical = float(size[measured].median())
    measured[channel] = True
    compared = {int(index): float(size[index]) for index in measured.nonzero().flatten()}
    return Sizes(channel, float(size[channel]), typical, compared, channel_axis % x.dim())


def _of_few(x: Tensor, axis: int, *, correlated: bool, divisor: float, bias: Tensor | None) -> Moments:
    """Moments that are computed later, with those of other small activations in the same calls.

    A call costs more than the few values it computes on: twenty calls for each of the thousands of activations of an
    unrolled cell would be most of a recording.
    """
    open_ = getattr(_OPEN, "together", None)
    together = None if open_ is None else open_()
    if together is None or together.size + x.numel() > PIECE:
        together = _Together()
        _OPEN.together = ref(together)
    return together.enter(x, axis, correlated=correlated, divisor=divisor, bias=bias if correlated else None)


_OPEN = threading.local()
"""What small activations are entered into at present, a weak reference; of each thread its own."""


class _Later(Moments):
    """Moments of a small activation; computed when they, or those of any other entered together, are asked for.

    All but the count is filled in then; ``mean_row`` and ``deviation_row`` are NumPy's, which become tensors when asked
    for.
    """

    def __init__(self, count: int, together: _Together) -> None:
        self.__dict__.update(count=count, together=together)

    def __getattr__(self, name: str) -> Any:
        together: _Together | None = self.__dict__.get("together")
        if together is not None:
            together.compute()
            return getattr(self, name)
        if name in ("mean", "deviation") and name + "_row" in self.__dict__:
            row = self.__dict__[name] = torch.from_numpy(self.__dict__[name + "_row"])
            return row
        raise AttributeError(name)


class _Together:
    """Small activations whose moments are computed in the same calls, those of one shape in one array.

    It keeps their values, and is kept alive by the moments that wait for it alone.

    Attributes:
        size: number of elements entered so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self.entries: dict[tuple[torch.Size, int, bool, bool], list[tuple[ref[_Later], Tensor, Tensor | None]]] = {}

    def enter(self, x: Tensor, axis: int, *, correlated: bool, divisor: float, bias: Tensor | None) -> Moments:
        """The moments of an activation, of whose values a copy is kept until they are computed."""
        moments = _Later(x.numel() // x.shape[axis], self)
        values = x.clone() if x.dtype == torch.float64 else x.double()
        if divisor != 1:
            values /= divisor
        bias = None if bias is None else bias.detach().clone()
        self.entries.setdefault((x.shape, axis, correlated, bias is not None), []).append((ref(moments), values, bias))
        self.size += x.numel()
        return moments

    def compute(self) -> None:
        """Compute the moments of all that was entered."""
        entries, self.entries, self.size = self.entries, {}, 0
        for (_, axis, correlated, _), items in entries.items():
            values = torch.stack([value for _, value, _ in items]).resolve_neg().cpu().numpy()
            added = [bias for _, _, bias in items if bias is not None]
            biases = torch.stack(added).double().cpu().numpy() if added else None
            _fill_in([moments() for moments, _, _ in items], values, axis + 1, correlated=correlated, biases=biases)


def _fill_in(
    waiting: Sequence[_Later | None],
    values: np.ndarray[Any, Any],
    axis: int,
    *,
    correlated: bool,
    biases: np.ndarray[Any, Any] | None,
) -> None:
    """Compute the moments of several activations of one shape, [K, …], in float64, and enter them.

    Args:
        waiting: the moments.
        values: the activations.
        axis: that of the channels.
        correlated: whether to take the similarity of examples.
        biases: what the layers that made them have added, [K, C].
    """
    others = tuple(other for other in range(1, values.ndim) if other != axis)
    count = values[0].size // values.shape[axis]
    cosine_sum, pairs = np.zeros(len(values)), np.zeros(len(values), dtype=int)
    without_bias: list[tuple[float, int] | None] = [None] * len(values)
    with np.errstate(all="ignore"):  # what is not finite stays so
        mean = values.sum(others, keepdims=True) / count
        deviation = np.square(values - mean).sum(others)
        mean = mean.reshape(deviation.shape)
        var, sq_mean = deviation / count, np.square(mean)
        dead = (var <= DEAD * (var + sq_mean)).mean(1) if count > 1 else np.zeros(len(values))
        if correlated:
            features = values[:, :EXAMPLES_CORRELATED]
            cosine_sum, pairs = _cosine_sums(features)
            if biases is not None:
                along = (len(values), *(-1 if other == axis else 1 for other in range(1, values.ndim)))
                own_sum, own_pairs = _cosine_sums(features - biases.reshape(along))
                for index in (cosine_sum > LIKE * pairs).nonzero()[0]:
                    without_bias[index] = float(own_sum[index]), int(own_pairs[index])
    numbers = {
        "avg_channel_sq_mean": sq_mean.mean(1).tolist(),
        "avg_channel_var": var.mean(1).tolist(),
        "dead_fraction": dead.tolist(),
        "cosine_sum": cosine_sum.tolist(),
        "pairs": pairs.tolist(),
        "without_bias": without_bias,
    }
    for index, moments in enumerate(waiting):
        if moments is not None:
            del moments.__dict__["together"]
            moments.__dict__.update(mean_row=mean[index], deviation_row=deviation[index])
            moments.__dict__.update({name: each[index] for name, each in numbers.items()})


def _cosine_sums(features: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """As :func:`_cosine_sum`, of several activations of one shape, [K, N, …]."""
    features = features.reshape(*features.shape[:2], -1)
    sq_length = np.einsum("kij,kij->ki", features, features)
    number = np.count_nonzero(sq_length, axis=1)
    total = np.einsum("ki,kij->kj", np.where(sq_length == 0, 0, 1 / np.sqrt(sq_length)), features)
    return (np.einsum("kj,kj->k", total, total) - number) / 2, number * (number - 1) // 2


def _trustworthy(moments: Moments) -> bool:
    sq_mean, var = moments.avg_channel_sq_mean, moments.avg_channel_var
    return 1e-30 < var < 1e30 and sq_mean <= LARGEST_SQ_MEAN_TO_VAR * var


def _refined(moments: Moments, x: Tensor, axis: int) -> Moments:
    """The moments with those channels taken again whose own variance is lost beside their mean."""
    mean, deviation = moments.mean.numpy(), moments.deviation.numpy()
    doubtful = deviation / moments.count < SMALLEST_VAR_TO_SQ * np.square(mean)
    if x.dtype == torch.float64 or not doubtful.any():
        return moments
    again = _exact(x.index_select(axis, torch.from_numpy(doubtful.nonzero()[0]).to(x.device)), axis)
    mean, deviation = mean.copy(), deviation.copy()
    mean[doubtful], deviation[doubtful] = again.mean.numpy(), again.deviation.numpy()
    return _of_numbers(moments.count, mean, deviation)


def _fast(x: Tensor, axis: int) -> tuple[Moments, Numbers | None]:
    """Sums in the tensor's own precision (half precision is read as float32), merged in float64.

    Also the squared length of each example, [N], where rows are summed example by example: then it costs no reading.
    Torch reads the tensor, and NumPy computes with the few numbers that are left, for a call of it costs a fifth.
    """
    if x.stride(axis) == 1 and x.shape[axis] > 1:
        return _of_columns(x, axis), None
    channels, sums, norms = x.shape[axis], [], []
    for piece in _pieces(x):
        rows = piece.movedim(axis, 1).reshape(piece.shape[0], channels, -1)
        runs = list(_runs(rows))
        sums.append([part.sum(3) for part in runs])
        norms.append([torch.linalg.vector_norm(part, dim=3) for part in runs])
    total = np.concatenate([np.sum([_numbers(part).sum(2) for part in parts], 0) for parts in sums])
    square = np.concatenate([np.sum([np.square(_numbers(part)).sum(2) for part in parts], 0) for parts in norms])
    count = x.numel() // channels
    with np.errstate(all="ignore"):  # what is not finite stays so
        mean = total.sum(0) / count
        deviation = np.maximum(square.sum(0) - np.square(mean) * count, 0)
        return _of_numbers(count, mean, deviation), square.sum(1)


def _of_columns(x: Tensor, axis: int) -> Moments:
    """The moments where channels lie innermost: the statistics of a batch norm, merged over pieces in float64."""
    channels, parts = x.shape[axis], []
    for piece in _pieces(x):
        rows = piece.movedim(axis, -1).reshape(piece.numel() // channels, channels)
        for some in rows.split(min(LONGEST_RUN["column"], max(1, PIECE // channels))):
            as_map = some.unsqueeze(0).unsqueeze(2).permute(0, 3, 1, 2)  # [1, C, R, 1], channels innermost
            parts.append((len(some), *torch.batch_norm_update_stats(as_map, None, None, 0.0)))
    count = x.numel() // channels
    total, square = np.zeros(channels), np.zeros(channels)
    with np.errstate(all="ignore"):
        for number, mean, var in parts:
            means = _numbers(mean)
            total += means * number
            square += (_numbers(var) + np.square(means)) * number
        mean = total / count
        return _of_numbers(count, mean, np.maximum(square - np.square(mean) * count, 0))


Numbers = np.ndarray[Any, np.dtype[np.float64]]


def _numbers(values: Tensor) -> Numbers:
    return values.resolve_neg().cpu().numpy().astype(np.float64)


def _of_numbers(count: int, mean: Numbers, deviation: Numbers) -> Moments:
    moments = Moments(count, torch.from_numpy(mean), torch.from_numpy(deviation))
    averages = {"avg_channel_sq_mean": np.square(mean).mean(), "avg_channel_var": deviation.mean() / count}
    moments.__dict__.update({name: float(value) for name, value in averages.items()})
    return moments


def _runs(rows: Tensor) -> Iterator[Tensor]:
    """Rows [N, C, L] cut into runs [N, C, R, L/R] that are short enough for float32; a cache's worth at a time."""
    run = LONGEST_RUN["row"]
    together = run * max(1, PIECE // 4 // max(1, rows.shape[0] * rows.shape[1] * run))
    for part in rows.split(together, dim=2):
        full = part.shape[2] // run * run
        if full:
            yield part[:, :, :full].unflatten(2, (-1, run))
        if full < part.shape[2]:
            yield part[:, :, full:].unsqueeze(2)


def _pieces(x: Tensor) -> list[Tensor]:
    """The tensor cut along its leading axis into pieces the cache holds; at least single precision."""
    rows = max(1, PIECE * x.shape[0] // max(x.numel(), 1))
    pieces = x.split(rows)
    return [piece.float() for piece in pieces] if x.dtype in (torch.float16, torch.bfloat16) else list(pieces)


def _exact(x: Tensor, axis: int) -> Moments:
    """Two passes in float64, a piece at a time: for values single precision cannot square or tell apart."""
    moments: Moments | None = None
    for piece in _pieces(x):
        rows = piece.double().movedim(axis, 0).reshape(x.shape[axis], -1)
        mean = rows.mean(1)
        deviation = (rows - mean.unsqueeze(1)).square().sum(1)
        part = Moments(rows.shape[1], mean.cpu(), deviation.cpu())
        moments = part if moments is None else moments.merge(part)
    assert moments is not None
    return moments


def _cosine_sum(x: Tensor, sq_length: Numbers | None) -> tuple[float, int]:
    """Summed cosine similarity of all pairs among the first examples, and their number.

    ``Σ_{i<j} uᵢ·uⱼ = (|Σ uᵢ|² − n) / 2`` for n unit vectors: two readings, or one where the lengths are known, and not
    a product of all with all. An example of nothing but zeros has no direction, and no part in it.

    Args:
        x: the activation.
        sq_length: squared length of each example, where it is known.
    """
    features = x[:EXAMPLES_CORRELATED]
    order = sorted(range(1, x.dim()), key=lambda axis: -x.stride(axis))
    features = features.permute(0, *order).flatten(1)
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    sq_length = _sq_lengths(features) if sq_length is None else sq_length[:EXAMPLES_CORRELATED]
    if not 1e-30 < sq_length.min() <= sq_length.max() < 1e30:
        features = features.double()
        sq_length = _sq_lengths(features)
    number = int(np.count_nonzero(sq_length))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = np.where(sq_length == 0, 0, 1 / np.sqrt(sq_length))
    scale = torch.from_numpy(unit).to(device=features.device, dtype=features.dtype)
    totals = [torch.linalg.vector_norm(scale @ part) for part in features.split(LONGEST_RUN["features"], 1)]
    return (sum(total.item() ** 2 for total in totals) - number) / 2, number * (number - 1) // 2


def _sq_lengths(rows: Tensor) -> Numbers:
    """Squared length of each row, in float64."""
    parts = rows.split(LONGEST_RUN["features"], 1)
    return np.sum([np.square(_numbers(torch.linalg.vector_norm(part, dim=1))) for part in parts], 0)
