"""Our own weights: one safetensors file that also says how to build the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from normfree.models import Backbone, create_model
from normfree.nn.fold import fold, has_foldable
from normfree.signal.files import write_atomically

KEY = "normfree"
FOLDED = "normfree.folded"  # in the metadata of a model that fold has made plain


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a model of :func:`normfree.create_model` with its name and overrides; the file is whole or not there.

    A model that :func:`normfree.fold` has made plain is written as such, and comes back plain.

    Args:
        model: the model.
        path: where to; by custom ``*.safetensors``.

    Returns:
        The path.

    Raises:
        ValueError: if the model does not know how it was built, was built from a callable, or has had a layer
            exchanged since.
    """
    from safetensors.torch import save as to_bytes

    if not isinstance(model, Backbone) or not getattr(model, "config", None):
        raise ValueError(
            f"model: {type(model).__name__} was not built by normfree.create_model, so a file could not rebuild it; "
            "save its state_dict with safetensors.torch.save_file"
        )
    try:
        recipe = json.dumps(model.config)
    except TypeError as error:
        raise ValueError(
            f"model: its overrides cannot be written down ({error}); build it from names and numbers alone"
        ) from error
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        rebuilt = create_model(**model.config)
    folded = not has_foldable(model)
    rebuilt = (fold(rebuilt) if folded else rebuilt).state_dict()
    changed = [
        n for n in {*tensors, *rebuilt} if n not in tensors or n not in rebuilt or tensors[n].shape != rebuilt[n].shape
    ]
    if changed:
        raise ValueError(
            f"model: {len(changed)} tensors ({', '.join(sorted(changed)[:3])}) are not those of "
            "create_model(**model.config), so a file could not rebuild it; give create_model what you changed"
        )
    metadata = {KEY: recipe, **({FOLDED: "true"} if folded else {})}
    return write_atomically(path, to_bytes(tensors, metadata=metadata))


def load(path: str | Path) -> Backbone:
    """Rebuild a model that :func:`save` wrote, with its weights.

    Args:
        path: the file.

    Returns:
        The model, in evaluation mode and the precision it was saved in.

    Raises:
        ValueError: if the file is none of ours, or damaged.
    """
    path = Path(path)
    metadata, tensors = contents(path)
    if KEY not in metadata:
        raise ValueError(
            f"path: {str(path)!r} has weights but not the model they belong to; only files of normfree.save do"
        )
    try:
        config: dict[str, Any] = json.loads(metadata[KEY])
        model = create_model(**config)
        if FOLDED in metadata:
            model = cast(Backbone, fold(model))
        precisions = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(precisions) == 1:
            model.to(precisions.pop())
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"path: {str(path)!r} does not describe a model this version builds: {reason}") from error
    return model.eval()


def contents(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: {str(path)!r} is no file; give one that normfree.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {str(path)!r} is no sound safetensors file: {error}") from error
