"""The device a command runs on."""

from __future__ import annotations

import torch

from normfree.common.text import first_line


def device_named(name: str | None) -> torch.device:
    """Return a device by name; by default a GPU if there is one.

    Raises:
        ValueError: it is not to be had here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} is not to be had here ({first_line(error)}); use cpu") from error
    return device
