"""A watch over the operations a model runs: which of them multiply a batch of maps."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MapMultiplications(TorchDispatchMode):
    """Notes the other factor's shape of every multiplication or division of a batch of maps.

    Args:
        batch: examples; no convolution may have as many filters, whose weights would look like maps.
    """

    def __init__(self, batch):
        super().__init__()
        self.batch = batch
        self.found = []

    def is_map(self, value):
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        return len(shape) == 4 and shape[0] == self.batch and shape[2:].numel() > 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        multiplies = any(part in name for part in ("mul", "div", "lerp", "addc")) and "matmul" not in name
        if multiplies and any(self.is_map(value) for value in (*args, result)):
            self.found.append(tuple(getattr(value, "shape", ()) for value in args if not self.is_map(value)))
        return result
