"""A model to and from a safetensors file: its tensors, their precisions, and whether it was folded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.common.files import write_atomically
from normfree.common.safetensors_file import FOLDED, Stored
from normfree.common.text import shortened
from normfree.nn.fold import fold, has_foldable

Model = TypeVar("Model", bound=nn.Module)

SUFFIX = ".safetensors"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Precisions of weights; others (of eight bits and fewer, complex) no layer computes with."""


def check_target(path: str | Path) -> Path:
    """Return where to write a file of weights; refuse what is none.

    Raises:
        ValueError: a folder, or a name that promises another form.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise invalid("path", type(path).__name__, "must be a path", f"pass one such as 'model{SUFFIX}'")
    path = Path(path)
    if path.is_dir():
        raise invalid("path", str(path), "is a folder", f"name the file, such as {str(path / f'model{SUFFIX}')!r}")
    if path.suffix != SUFFIX:
        rule = f"must end in {SUFFIX}, for no other form is written"
        raise invalid("path", str(path), rule, f"pass {str(path.with_suffix(SUFFIX))!r}")
    return path


def write(model: nn.Module, path: str | Path, notes: Mapping[str, str]) -> Path:
    """Write a model's tensors with these notes, and a note if it is folded; the file is whole or not there.

    Raises:
        ValueError: as :func:`check_target`.
    """
    from safetensors.torch import save as to_bytes

    path = check_target(path)
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()  # a tied one: safetensors writes nothing twice
        memory.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    folded = {} if has_foldable(model) else {FOLDED: "true"}
    return write_atomically(path, to_bytes(tensors, metadata={**notes, **folded}))


def check_fits(model: nn.Module, stored: Stored) -> None:
    """Raise unless a model, which may be on the meta device, has the tensors of a file: names, shapes, kinds of number.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    own = cast(nn.Module, fold(model) if stored.folded else model).state_dict()
    for name in sorted({*own, *stored.tensors}):
        mine, theirs = own.get(name), stored.tensors.get(name)
        if mine is None or theirs is None:
            there = "is not in the file" if theirs is None else "is not in the model"
            raise stored.error(f"does not describe its tensors: {shortened(name, 80)} {there}", "give an undamaged one")
        if mine.shape != theirs.shape:
            rule = f"does not describe its tensors: {name} is {list(theirs.shape)}, described as {list(mine.shape)}"
            raise stored.error(rule, "give an undamaged one")
        check_number_kind(stored, name, mine, theirs)


def check_number_kind(stored: Stored, name: str, mine: Tensor, theirs: Tensor) -> None:
    """Raise where a file has integers for a model's floating-point numbers, or the reverse.

    Raises:
        ValueError: naming the tensor.
    """
    if theirs.dtype not in FLOATING and (mine.is_floating_point() or theirs.is_floating_point() or theirs.is_complex()):
        rule = f"{name} holds {_named(theirs.dtype)}, which are no weights"
        raise stored.error(rule, "save the model in float32, float64, float16 or bfloat16")
    if theirs.is_floating_point() and not mine.is_floating_point():
        rule = f"{name} holds {_named(theirs.dtype)} where the model counts in {_named(mine.dtype)}"
        raise stored.error(rule, "give an undamaged one")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def alike(model: Model, stored: Stored) -> Model:
    """Return a model in the form of the stored one: folded if that is, each tensor in the precision it has there.

    Tensors of several precisions keep each its own: a model of bfloat16 layers and a float32 classifier comes back as
    such. Where there is one precision, what no state dict has (non-persistent buffers) takes it, too.
    """
    model = cast(Model, fold(model)) if stored.folded else model
    floating = {name: tensor.dtype for name, tensor in stored.tensors.items() if tensor.is_floating_point()}
    if len(set(floating.values())) == 1:
        model.to(next(iter(floating.values())))
    own = model.state_dict(keep_vars=True)
    for name in floating.keys() & own.keys():
        own[name].data = own[name].data.to(floating[name])
    return model


def restored(model: Model, stored: Stored) -> Model:
    """Return a freshly built model with what is stored, in evaluation mode.

    Raises:
        RuntimeError: it is another model.
        ValueError: numbers of another kind than the model's.
    """
    model = alike(model, stored)
    for name, mine in model.state_dict().items():
        if name in stored.tensors:
            check_number_kind(stored, name, mine, stored.tensors[name])
    model.load_state_dict(stored.tensors)
    return model.eval()
