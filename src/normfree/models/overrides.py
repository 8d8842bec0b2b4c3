"""What may differ from a named model: the arguments of the families' constructors, for type checkers and editors.

A family takes some of them (``accepted_overrides(name)``), under these names and with these types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from normfree.nn import Activation

Stem = Literal["imagenet", "cifar"]
"""Of a ResNet: for images of about 224 pixels, or of 32."""

ConvolutionName = Literal["scaled_ws", "scaled"]
"""With standardized weights, or with plain ones of LeCun's variance."""

Norm = Literal["batch", "group", "layer", "instance"] | None
"""What a pre-activation ResNet normalizes by; None: nothing does."""

Order = Literal["norm-act", "act-norm"]
"""Of normalizer and activation before a convolution."""


class Overrides(TypedDict, total=False):
    """Keyword arguments of :func:`normfree.create_model` beside those that every model takes."""

    depths: Sequence[int]
    base_widths: Sequence[int]
    width: float
    widths: Sequence[int] | None
    group_size: int | Sequence[int]
    expansion: float | Sequence[float]
    alpha: float
    activation: Activation
    use_se: bool
    se_ratio: float
    stochdepth_rate: float
    drop_rate: float
    skipinit_gain: float
    train_size: int
    test_size: int
    conv: ConvolutionName
    stem: Stem
    norm: Norm
    order: Order
    centred: bool
