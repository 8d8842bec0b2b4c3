"""Dropout in front of a layer: where it acts, and having it act while scales are measured.

A dropout of probability p keeps the mean of its input and divides its mean square by 1 - p. Behind a ReLU the variance
that the next standardized layer sees is 1.6 times what it would be for p = 0.3, 2.5 times for p = 0.5. A norm takes
that back in every layer; scales that do not know of it let the signal of ten layers grow a hundred or ten thousand
times in training. So what dropout acts on has no closed form, and is measured with dropout on.

In evaluation the signal is then smaller than in training, as after batch norms, whose running statistics are those of
training. Source: Hendrycks and Gimpel, "Adjusting for dropout variance in batch normalization and weight
initialization", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DROPOUTS = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout})


class DropoutNoted(TorchFunctionMode):
    """Tells of every dropout, whether it acts or not.

    Stochastic depth is none: its expectation over networks is what the plan of variances is for.

    Args:
        note: called with what the dropout is given.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS and _probability(args, kwargs) > 0:
            self.note(args[0])
        return func(*args, **kwargs)


class DropoutActs(TorchFunctionMode):
    """Has every dropout act as in training, whatever mode its module is in."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            kwargs, args = {**kwargs, "p": _probability(args, kwargs), "training": True, "inplace": False}, args[:1]
        return func(*args, **kwargs)


def _probability(args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    return float(kwargs["p"] if "p" in kwargs else args[1])
