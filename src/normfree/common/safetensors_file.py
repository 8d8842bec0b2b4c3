"""One safetensors file as it is read: a model's tensors, and the notes that say how to build it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from normfree.common.checks import invalid
from normfree.common.files import check_file, kind_of, refused
from normfree.common.text import all_lines

FOLDED = "normfree.folded"
"""The note of a model that fold has made plain."""

MOST_NOTE = 2**26
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
            if any(len(note) > MOST_NOTE for note in notes.values()):
                raise refused(
                    argument, path, f"has a note of more than {MOST_NOTE:,} characters", "give an undamaged one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return Stored(path, argument, notes, tensors)
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the latter: a dtype torch does not have
        if zipfile.is_zipfile(path):
            remedy = "write its tensors with safetensors.torch.save_file(model.state_dict(), …)"
            raise invalid(argument, str(path), "is a file of torch.save, not of safetensors", remedy) from error
        rule = f"is no sound safetensors file ({all_lines(error)})"
        raise invalid(argument, str(path), rule, "give an undamaged one that normfree.save wrote") from error


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
