"""One safetensors file: a model's tensors, and notes that say how to build it. Models of all kinds go this way."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid
from normfree.common.files import check_file, kind_of, refused, write_atomically
from normfree.common.text import all_lines, shortened
from normfree.nn.fold import fold, has_foldable

Model = TypeVar("Model", bound=nn.Module)

SUFFIX = ".safetensors"
FOLDED = "normfree.folded"  # the note of a model that fold has made plain

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Precisions of weights; others (of eight bits and fewer, complex) no layer computes with."""

NOTE = 2**26
"""Characters of a note that are read at most: the record of a conversion of 100,000 modules."""


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        path: the file.
        argument: what named it, for messages.
        notes: the file's metadata.
        tensors: by the names of the model's state dict.
    """

    path: Path
    argument: str
    notes: Mapping[str, str]
    tensors: dict[str, Tensor]

    @property
    def folded(self) -> bool:
        """Whether the model was a folded one."""
        return FOLDED in self.notes

    def error(self, rule: str, remedy: str) -> ValueError:
        """Return (not raise) the error that says what is wrong with the file."""
        return invalid(self.argument, str(self.path), rule, remedy)


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


def read(path: str | Path, argument: str = "path") -> Stored:
    """Read a safetensors file.

    Args:
        path: the file.
        argument: what named it, for messages.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    kind = kind_of(path)
    if kind == "a folder":
        remedy = "name a file in it, or read a folder of normfree.save_pretrained with normfree.from_pretrained"
        raise invalid(argument, str(path), "is a folder", remedy)
    path = check_file(path, argument, "give one that normfree.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            if any(len(note) > NOTE for note in notes.values()):
                raise refused(argument, path, f"has a note of more than {NOTE:,} characters", "give an undamaged one")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return Stored(path, argument, notes, tensors)
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the latter: a dtype torch does not have
        if zipfile.is_zipfile(path):
            remedy = "write its tensors with safetensors.torch.save_file(model.state_dict(), …)"
            raise invalid(argument, str(path), "is a file of torch.save, not of safetensors", remedy) from error
        rule = f"is no sound safetensors file ({all_lines(error)})"
        raise invalid(argument, str(path), rule, "give an undamaged one that normfree.save wrote") from error


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


def sizes(path: str | Path, argument: str = "path") -> tuple[int, int]:
    """Return how many numbers and how many tensors a safetensors file holds, from its header.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(check_file(path, argument), framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        rule = f"is no sound safetensors file ({all_lines(error)})"
        raise invalid(argument, str(path), rule, "give an undamaged one") from error
    return sum(map(math.prod, shapes)), len(shapes)


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
