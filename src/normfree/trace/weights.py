"""Whether a model's tensors are there, and hold numbers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def check_present(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that are not there yet, or without values.

    Raises:
        ValueError: naming the first.
    """
    __tracebackhide__ = True
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(f"model: {kind} {name!r} is not initialised yet; run one batch through the lazy model")
            if tensor.is_meta and kind == "parameter":  # a buffer without values may be one that is never read
                raise ValueError(
                    f"model: parameter {name!r} is on the meta device, without values; initialise it first"
                )


def check_finite(model: nn.Module) -> None:
    """Refuse a model with parameters that are not finite.

    Raises:
        ValueError: naming the first.
    """
    __tracebackhide__ = True
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (bad := int((~torch.isfinite(parameter)).sum())):
            raise ValueError(
                f"model: parameter {name!r} has {bad} of {parameter.numel()} values that are not finite; "
                "initialise it, or load a sound checkpoint"
            )


def check_statistics(model: nn.Module) -> None:
    """Refuse running statistics that no data have: a mean or variance that is not finite, a negative variance.

    An infinite variance would make a normalizer's output its bias, whatever the input: finite, and wrong.

    Raises:
        ValueError: naming the first.
    """
    __tracebackhide__ = True
    for name, buffer in model.named_buffers():
        kind = name.rpartition(".")[2]
        if kind in ("running_mean", "running_var"):
            wrong = ~torch.isfinite(buffer) if kind == "running_mean" else ~(torch.isfinite(buffer) & (buffer >= 0))
            if bad := int(wrong.sum()):
                raise ValueError(
                    f"model: buffer {name!r} has {bad} of {buffer.numel()} values that no statistic has (not finite, "
                    "or a negative variance); load a sound checkpoint"
                )
