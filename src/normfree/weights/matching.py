"""Foreign weights into a model: everything once, everything of the right shape, all or nothing."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from normfree.common.checks import invalid
from normfree.common.files import check_file
from normfree.common.safetensors_file import read
from normfree.common.text import first_line

_SHOWN = 3
# The block in one of timm's names, and in an official one.
_BLOCK = re.compile(r"stages\.\d+\.\d+(?=\.)|[^/]+/~/\w*block\w*(?=/)")


_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and DistributedDataParallel, of torch.compile


def without_wrappers(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict by the names of what was wrapped: prefixes of wrappers that all names have are left out."""
    while state_dict and (prefix := next((one for one in _WRAPPERS if all(k.startswith(one) for k in state_dict)), "")):
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def read_state_dict(path: str | Path, argument: str = "path") -> Mapping[str, Tensor]:
    """Read a state dict: a safetensors file, or one of ``torch.save``, of which nothing but tensors is taken.

    Args:
        path: the file. One of ``torch.save`` may hold the state dict under ``state_dict``, ``model`` or
            ``model_state_dict``, as training scripts write it.
        argument: what named it, for messages.

    Returns:
        The tensors, by the names of what wrappers wrap.

    Raises:
        ValueError: no such file, a damaged one, or one that holds anything but tensors in plain containers.
    """
    path = check_file(path, argument, "give a .safetensors file, or one of torch.save")
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return without_wrappers(read(path, argument).tensors)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises almost anything
        rule = f"cannot be read as tensors alone ({first_line(error)})"
        raise invalid(argument, str(path), rule, "write torch.save(model.state_dict(), …) anew") from error
    for key in ("state_dict", "model_state_dict", "model"):
        found = found[key] if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
        rule = "holds no state dict"
        raise invalid(argument, str(path), rule, "write torch.save(model.state_dict(), …)")
    return without_wrappers({str(name): tensor for name, tensor in found.items()})


def listed(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_names(argument: str, model: str, wanted: Iterable[str], given: Iterable[str], remedy: str) -> None:
    """Raise unless the given names are the wanted ones; another depth or another family is told first.

    Args:
        argument: whose names they are.
        model: what wants them, for the message.
        wanted: names the model needs.
        given: names at hand.
        remedy: ends the message.

    Raises:
        ValueError: names are missing, or left over.
    """
    __tracebackhide__ = True
    wanted, given = list(wanted), list(given)
    missing = [name for name in wanted if name not in set(given)]
    left = [name for name in given if name not in set(wanted)]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(wanted)} arrays are missing ({listed(missing)})")
    if left:
        parts.append(f"{len(left)} of {len(given)} are left over ({listed(left)})")
    if parts:
        theirs, ours = _blocks(given), _blocks(wanted)
        why = f"does not fit {model}"
        if given and len(missing) == len(wanted):
            why, remedy = f"is of another family than {model}", f"build a model of that family; {remedy}"
        elif theirs and theirs != ours:
            why, remedy = f"has {theirs} blocks where {model} has {ours}", f"create_model of that depth; {remedy}"
        raise ValueError(f"{argument}: {why}: {'; '.join(parts)}; {remedy}")


def _blocks(names: Iterable[str]) -> int:
    """Return how many residual blocks the names tell of."""
    return len({match[0] for name in names if (match := _BLOCK.match(name))})


def check_shapes(
    argument: str, targets: Mapping[str, Tensor], values: Mapping[str, Tensor], sources: Mapping[str, str], remedy: str
) -> None:
    """Raise unless each value has its target's shape.

    Args:
        argument: whose values they are.
        targets: tensors of the model by our names.
        values: what goes there, in our layout, by our names.
        sources: the values' own names, by our names.
        remedy: ends the message.

    Raises:
        ValueError: a shape differs; the message names both tensors of the first, and counts the rest.
    """
    __tracebackhide__ = True
    unlike = [name for name, value in values.items() if value.shape != targets[name].shape]
    if unlike:
        name = unlike[0]
        rest = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
        raise ValueError(
            f"{argument}: {sources[name]} has shape {list(values[name].shape)} in PyTorch's layout "
            f"but {name} has {list(targets[name].shape)}{rest}; {remedy}"
        )


def copy_in(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each value into its target, keeping the target's type and device; nothing, if one cannot be moved there.

    Args:
        targets: tensors of the model, by name.
        values: tensors of the same shapes, by the same names.

    Raises:
        ValueError: the model has no storage.
    """
    if any(targets[name].is_meta for name in values):
        raise invalid("model", "on the meta device", "has nowhere to put weights", "call model.to_empty(device='cpu')")
    moved = {name: value.to(targets[name]) for name, value in values.items()}  # whatever fails, fails here
    with torch.no_grad():
        for name, value in moved.items():
            targets[name].copy_(value)
