"""The layer that ends a residual branch carries the branch's factor, so that no feature map is multiplied by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normfree.common.checks import check_number

Scale = float | Tensor


class BranchEnd(nn.Module):
    """A layer whose output may be scaled by ``alpha * s``, which it folds into its own numbers.

    Attributes:
        alpha: constant factor of the output.
        skip_gain: s, a learnable 0-d factor of the output, or None.
    """

    # Both are annotated where they are set: TorchScript reads a class's annotations, and cannot read postponed ones.

    def end_branch(self, alpha: float, skip_gain: float | None, **tensor_options: Any) -> None:
        """Set both factors, after ``nn.Module``'s constructor; a layer that ends no branch has (1, None).

        Raises:
            ValueError: alpha negative or not finite; a skip gain that is no finite number.
        """
        self.alpha: float = check_number("alpha", alpha, 0.0)
        self.register_parameter("skip_gain", None)
        self.skip_gain: nn.Parameter | None = None
        if skip_gain is not None:
            initial = torch.full((), check_number("skip_gain", skip_gain), **tensor_options)
            self.skip_gain = nn.Parameter(initial)

    def branch_scale(self) -> Scale | None:
        """Return ``alpha * s``, or None if that is the constant 1."""
        if self.skip_gain is None:
            return None if self.alpha == 1 else self.alpha
        return self.skip_gain if self.alpha == 1 else self.alpha * self.skip_gain

    def ended(self, x: Tensor) -> Tensor:
        """Return ``alpha * s * x``: for a layer that has no weight to carry the factor. TorchScript can read it."""
        skip_gain = self.skip_gain
        if skip_gain is None:
            return x if self.alpha == 1 else x * self.alpha
        return x * skip_gain if self.alpha == 1 else x * (self.alpha * skip_gain)
