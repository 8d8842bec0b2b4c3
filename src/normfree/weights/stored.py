"""One safetensors file: a model's tensors, and notes that say how to build it. Models of all kinds go this way."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor, nn

from normfree.nn.checks import invalid
from normfree.nn.fold import fold, has_foldable
from normfree.signal.files import write_atomically

Model = TypeVar("Model", bound=nn.Module)

SUFFIX = ".safetensors"
FOLDED = "normfree.folded"  # the note of a model that fold has made plain


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

    path = Path(path)
    if path.is_dir():
        remedy = "name a file in it, or read a folder of normfree.save_pretrained with normfree.from_pretrained"
        raise invalid(argument, str(path), "is a folder", remedy)
    if not path.is_file():
        raise invalid(argument, str(path), "is no file", "give one that normfree.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return Stored(path, argument, file.metadata() or {}, tensors)
    except (SafetensorError, OSError) as error:
        if zipfile.is_zipfile(path):
            remedy = "write its tensors with safetensors.torch.save_file(model.state_dict(), …)"
            raise invalid(argument, str(path), "is a file of torch.save, not of safetensors", remedy) from error
        rule = f"is no sound safetensors file ({' '.join(str(error).split())})"
        raise invalid(argument, str(path), rule, "give an undamaged one that normfree.save wrote") from error


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
    """
    model = alike(model, stored)
    model.load_state_dict(stored.tensors)
    return model.eval()
