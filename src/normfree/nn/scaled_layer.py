"""What the layers with factors in their weight have in common, whatever their geometry and how their weight is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.branch_end import BranchEnd, Scale
from normfree.nn.fold import Foldable


class ScaledLayer(BranchEnd, Foldable):
    """A linear operation with the factors of its input and its output in its weight.

    ``y = alpha * s * (op(input_scale * x, W) + b) = op(x, alpha * s * input_scale * W) + alpha * s * b``

    A subclass adds the torch class whose geometry it has, and ``plain(weight, bias)``, which returns a layer in that
    geometry that only has the given weight and bias.

    Attributes:
        input_scale: constant factor of the input, such as gamma / beta.
    """

    weight: Any  # the torch classes declare them differently
    bias: Any
    input_scale: float

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight, in the layer's layout, and the bias [O] or None that a plain layer needs instead."""
        scale = self.branch_scale()
        bias = self.bias if scale is None or self.bias is None else self.bias * scale
        return self.scaled_weight(scale), bias

    def scaled_weight(self, scale: Scale | None) -> Tensor:
        """Return the weight with the factor of the input and ``scale``, that of the output."""
        weight = self.weight if self.input_scale == 1 else self.weight * self.input_scale
        return weight if scale is None else weight * scale

    def folded(self: Any) -> nn.Module:
        """Return a plain layer of the same outputs, its tensors where and as laid out as this one's."""
        with torch.no_grad():
            weight, bias = self.effective()
        return self.plain(weight.detach(), None if bias is None else bias.detach())
