"""Converted models as files: the weights, and the record that makes the model of the original again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfree.convert.converting import conversion_of
from normfree.convert.record import Conversion
from normfree.convert.rewrite import rewritten
from normfree.nn.fold import fold, has_foldable
from normfree.signal import write_atomically
from normfree.weights import checkpoint

KEY = "normfree.conversion"


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a model of :func:`normfree.create_model` or :func:`normfree.convert` as one safetensors file.

    Beside the weights the file has what rebuilds the model: its name and overrides, or the record of its conversion.
    A model that :func:`normfree.fold` has made plain is written as such.

    Args:
        model: the model.
        path: where to; by custom ``*.safetensors``.

    Returns:
        The path.

    Raises:
        ValueError: a model of neither kind, or one that has had a layer exchanged since.
    """
    from safetensors.torch import save as to_bytes

    conversion = conversion_of(model)
    if conversion is None:
        return checkpoint.save(model, path)
    missing = [c.name for c in conversion.changes if c.name and not _has(model, c.name)]
    if missing:
        raise ValueError(
            f"model: {missing[0]} of its conversion's record is gone, so a file could not rebuild it; "
            "convert the model again after changing it"
        )
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    folded = not has_foldable(model)
    metadata = {KEY: json.dumps(conversion.to_dict())} | ({checkpoint.FOLDED: "true"} if folded else {})
    return write_atomically(path, to_bytes(tensors, metadata=metadata))


def load(path: str | Path, *, original: nn.Module | None = None) -> nn.Module:
    """Rebuild a model that :func:`normfree.save` wrote, with its weights.

    Args:
        path: the file.
        original: for a converted model, the one it was converted from, with any weights; it is left as it is.

    Returns:
        The model, in evaluation mode and the precision it was saved in.

    Raises:
        ValueError: the file is none of ours, or damaged; an original is needed, or is another model.
    """
    metadata, tensors = checkpoint.contents(path)
    if KEY not in metadata:
        if original is not None:
            raise ValueError(f"original: {str(path)!r} holds no converted model; leave it out")
        return checkpoint.load(path)
    conversion = _record_in(metadata, path)
    if original is None:
        how = f"normfree.sources.build({conversion.source!r}).model" if conversion.source else "with any weights"
        raise ValueError(
            f"original: {str(path)!r} holds a converted {conversion.model}; "
            f"pass the model it was converted from ({how})"
        )
    try:
        model = rewritten(original, conversion)
        model = fold(model) if checkpoint.FOLDED in metadata else model
        precisions = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(precisions) == 1:
            model.to(precisions.pop())
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"original: it is not the model that {str(path)!r} was converted from: {reason}") from error
    return model.eval()


def stored_conversion(path: str | Path) -> Conversion | None:
    """The record in a file of :func:`save`; None if the model in it was not converted."""
    metadata = checkpoint.contents(path)[0]
    return _record_in(metadata, path) if KEY in metadata else None


def _record_in(metadata: dict[str, str], path: str | Path) -> Conversion:
    try:
        document: Any = json.loads(metadata[KEY])
        return Conversion.from_dict(document)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"path: {str(path)!r} has a damaged record: {error}; take an undamaged copy") from error


def _has(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), torch.nn.Module)
    except AttributeError:
        return False
