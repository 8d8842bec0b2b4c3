"""``save`` and ``load``: one safetensors file with a model's tensors, and notes that say how to build it.

A model of ``create_model`` is its name and overrides, a converted one the record of its conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid, is_integer
from normfree.common.files import (
    FOLDED,
    MODEL_OF_WEIGHTS,
    Stored,
    check_file,
    check_metadata,
    is_of_torch,
    is_safetensors,
    kind_of,
    parse_json,
    read,
    write_atomically,
)
from normfree.common.pickles import check_torch_file
from normfree.common.text import all_lines, first_line, quoted, shortened
from normfree.common.torch_compat import copy_model
from normfree.convert.apply import rewrite
from normfree.convert.record import NOTE as CONVERTED
from normfree.convert.record import conversion_of, first_difference, noted_conversion
from normfree.models import Backbone, create_model
from normfree.models.registry import check_backbone
from normfree.nn.fold import fold, has_foldable
from normfree.trace.inputs import unwrap
from normfree.trace.preserve import check_finite, check_statistics

_SHOWN = 3
# The block in one of timm's names, and in an official one.
_BLOCK = re.compile(r"stages\.\d+\.\d+(?=\.)|[^/]+/~/\w*block\w*(?=/)")


_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and DistributedDataParallel, of torch.compile


def without_wrappers(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict by the names of what was wrapped: prefixes of wrappers that all names have are left out.

    So is the count that ``torch.optim.swa_utils.AveragedModel`` has beside what it wraps.
    """
    if "n_averaged" in state_dict and any(name.startswith("module.") for name in state_dict):
        state_dict = {name: tensor for name, tensor in state_dict.items() if name != "n_averaged"}
    while state_dict and (prefix := next((one for one in _WRAPPERS if all(k.startswith(one) for k in state_dict)), "")):
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


STATE_DICT = "give a .safetensors file, or a .pth file of torch.save(model.state_dict(), …)"

KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model")
"""Where training scripts put state dicts; averaged weights go before those they are the average of, as in timm."""

_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantized tensors",
    "torch.serialization._get_layout": "sparse tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors without values",
}
"""Tensors by the functions of torch that make them, which are not called: a few bytes can claim any memory there."""


def read_state_dict(path: str | Path, argument: str = "path") -> Stored:
    """Read a state dict: a safetensors file, or one of ``torch.save``, of which nothing but tensors is taken.

    A warning says which is taken of a file that holds several.

    Args:
        path: the file, or ``FILE:KEY`` for the state dict that is there under a key. Without one it is the file
            itself, or the first that is there of :data:`KEYS`.
        argument: what named it, for messages.

    Returns:
        What the file holds, its tensors by the names of what wrappers wrap.

    Raises:
        ValueError: no such file, a damaged one, or one that holds anything but tensors in plain containers.
    """
    given, key = path, ""
    if kind_of(path) == "nothing" and kind_of(str(path).rpartition(":")[0]) == "file":
        path, _, key = str(path).rpartition(":")
    path = check_file(path, argument, STATE_DICT)
    if path.suffix == ".safetensors" or is_safetensors(path):
        if key:
            raise invalid(argument, str(given), "is a safetensors file, which has no keys", f"leave :{key} out")
        stored = read(path, argument)
        return replace(stored, tensors=dict(without_wrappers(stored.tensors)))
    if not is_of_torch(path):
        raise invalid(argument, str(path), "holds no state dict", STATE_DICT)
    try:
        check_torch_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of plain values, as scripts keep their options
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # of something that is no tensor, number or container
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named and named[1] in _OTHER_TENSORS:
            rule, remedy = f"holds {_OTHER_TENSORS[named[1]]}, which are no weights", "save dense ones of float32"
            raise invalid(argument, str(path), rule, remedy) from error
        held = f"a pickled {named[1]}" if named else "pickled objects"
        rule = f"holds {held}, and not tensors and plain values alone; to read it would run its code"
        remedy = "where its class is, load it with weights_only=False and write torch.save(model.state_dict(), …)"
        raise invalid(argument, str(path), rule, remedy) from error
    except Exception as error:  # a damaged archive raises almost anything
        rule = f"cannot be read as tensors alone ({first_line(error)})"
        raise invalid(argument, str(path), rule, "write torch.save(model.state_dict(), …) anew") from error
    whole = found if isinstance(found, Mapping) else {}
    named = dict(_state_dicts(whole)) if not key else dict(_state_dicts({key: whole.get(key)}, (key,)))
    if not named:
        others = [str(one) for one, _ in _state_dicts(whole, whole)]
        rule = f"holds no state dict under {quoted(key)}" if key else "holds no state dict"
        remedy = "write torch.save(model.state_dict(), …)"
        if others:
            rule += f", but under {', '.join(map(quoted, others[:3]))}"
            remedy = f"give {shortened(f'{path}:{others[0]}', 120)}"
        raise invalid(argument, str(path), rule, remedy)
    taken, *others = named
    if others:
        held = f"{quoted(str(path))} holds weights under {' and '.join(named)}"
        remedy = f"{shortened(f'{path}:{others[0]}', 120)} takes the latter"
        warnings.warn(f"{held}; those under {taken} are taken; {remedy}", UserWarning, stacklevel=2)
    # Without the attributes that a parameter may bring, which can stand in the place of methods.
    tensors = without_wrappers({str(name): Tensor.detach(tensor) for name, tensor in named[taken].items()})
    return Stored(path, argument, {}, dict(tensors))


def _state_dicts(value: Any, keys: Iterable[str] = KEYS) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The state dicts in what a file holds, by their keys; one that is the file itself has none."""
    if isinstance(value, Mapping) and value and all(isinstance(one, Tensor) for one in value.values()):
        yield "", value
    elif isinstance(value, Mapping):
        for key in keys:
            for inner, found in _state_dicts(value.get(key)):
                yield f"{key}{'.' * bool(inner)}{inner}", found


def load_stored(model: nn.Module, stored: Stored) -> None:
    """Load a state dict into a model, in the model's precisions.

    Raises:
        RuntimeError: it is of another model.
        ValueError: naming the file, if it holds numbers of another kind than the model's, or such as no trained model
            has.
    """
    _check_values(model, stored)
    model.load_state_dict(stored.tensors)
    try:
        check_finite(model)
        check_statistics(model)
    except ValueError as error:
        rule = f"holds no weights of a trained model ({first_line(error).removeprefix('model: ').partition(';')[0]})"
        raise stored.error(rule, "give an undamaged file") from error


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
    known, needed = set(given), set(wanted)
    missing = [name for name in wanted if name not in known]
    left = [name for name in given if name not in needed]
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


Model = TypeVar("Model", bound=nn.Module)

SUFFIX = ".safetensors"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Precisions of weights; others (of eight bits and fewer, complex) no layer computes with."""

NAMED = "normfree"
"""The note of a model of ``create_model``: its arguments, as JSON."""


BUILT_BY = "normfree.built_by"
"""The note of a trained model of somebody else: the word for what builds it, and its number of classes, as JSON."""


def save_trained(
    model: nn.Module, path: str | Path, word: str, num_classes: int, *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a network that was trained by a word for what builds it: as :func:`save` where a file can rebuild it.

    Any other is written with the word, and read by :func:`load` with the model that the word builds.

    Args:
        model: the network.
        path: where to, ``*.safetensors``.
        word: what it was built by, as ``normfree train --model`` takes it.
        num_classes: of its outputs.
        metadata: as :func:`save` takes it.
    """
    try:
        return save(model, path, metadata=metadata)
    except ValueError:
        check_target(path)
        note = json.dumps({"model": word, "num_classes": num_classes})
        return write(model, path, {**(metadata or {}), BUILT_BY: note})


def built_by(path: str | Path) -> tuple[str, int] | None:
    """Return what builds the model whose trained weights a file of :func:`save_trained` holds, and its classes.

    Returns:
        None of any other file.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    stored = read(path)
    if BUILT_BY not in stored.notes:
        return None
    try:
        note = parse_json(stored.notes[BUILT_BY])
        word, classes = note["model"], note["num_classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise stored.error("does not say what builds its model", "take an undamaged copy") from error
    if not isinstance(word, str) or not is_integer(classes) or classes < 1:
        raise stored.error("does not say what builds its model", "take an undamaged copy")
    return word, classes


def save(model: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a model of :func:`normfree.create_model` or :func:`normfree.convert` as one safetensors file.

    Beside the weights the file has what rebuilds the model: its name and overrides, or the record of its conversion.
    A model that :func:`normfree.fold` has made plain is written as such, and comes back plain. The file is whole or
    not there.

    Args:
        model: the model; of a compiled or data-parallel one, what it wraps.
        path: where to, ``*.safetensors``; a file of that name is replaced.
        metadata: more text by name for the file to keep, such as the names of the classes.

    Returns:
        The path.

    Raises:
        ValueError: the path is a folder or ends otherwise; metadata that are no text by name; the model does not
            know how it was built, was built from a callable, or has had a layer exchanged since.
    """
    __tracebackhide__ = True
    model, metadata = unwrap(model), check_metadata(metadata)
    if (note := _note_of_conversion(model)) is not None:
        return write(model, path, {**metadata, CONVERTED: note})
    if (note := config_note(model)) is not None:
        return write(model, path, {**metadata, NAMED: note})
    check_backbone(model, "save its state_dict with safetensors.torch.save_file")
    rule = "has no config, so a file could not rebuild it"
    remedy = "build it with normfree.create_model, or convert it with normfree.convert"
    raise invalid("model", type(model).__name__, rule, remedy)


def load(path: str | Path, *, original: nn.Module | None = None) -> nn.Module:
    """Rebuild a model that :func:`save` wrote, with its weights.

    Args:
        path: the file.
        original: for a converted model, the one it was converted from, and for somebody else's, trained by
            ``normfree train``, the same model, with any weights; it is left as it is.

    Returns:
        The model, in evaluation mode, each tensor in the precision it was saved in. Mixed-precision training
        (autocast, "bf16-mixed") keeps its weights in float32, so they are saved and come back in float32.

    Raises:
        ValueError: the file is none of ours, or damaged; an original is needed, or is another model.
    """
    __tracebackhide__ = True
    stored = read(path)
    if CONVERTED in stored.notes:
        return _load_converted(stored, original)
    if BUILT_BY in stored.notes:
        return _load_foreign(stored, original)
    if NAMED in stored.notes:
        if original is not None:
            rule = f"{str(stored.path)!r} holds no converted model"
            raise invalid("original", type(original).__name__, rule, "leave it out")
        return load_named(stored)
    raise stored.error("has weights, but not the model they belong to", MODEL_OF_WEIGHTS)


def config_note(model: nn.Module) -> str | None:
    """Return the arguments with which ``create_model`` builds a model, as JSON; None of a model it did not build.

    Raises:
        ValueError: an argument is a callable; the model's tensors are not those that ``create_model`` would make.
    """
    if not isinstance(model, Backbone) or not model.config:
        return None
    try:
        note = json.dumps(model.config)
    except TypeError as error:
        rule = f"its overrides cannot be written down ({error})"
        raise invalid("model", model.name, rule, "build it from names and numbers alone") from error
    with torch.device("meta"):
        rebuilt = create_model(**model.config)
    shapes, expected = (
        {name: tensor.shape for name, tensor in one.state_dict().items()}
        for one in (model, rebuilt if has_foldable(model) else fold(rebuilt))
    )
    changed = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if changed:
        rule = (
            f"{len(changed)} tensors ({', '.join(changed[:3])}) are not those of create_model(**model.config), so a "
            "file could not rebuild it"
        )
        centred = all(name.endswith(".input_mean") for name in changed)
        remedy = "build it with create_model(…, centred=True)" if centred else "give create_model what you changed"
        raise invalid("model", model.name, rule, remedy)
    return note


def check_depths(depths: Any, tensors: int) -> None:
    """Raise if a network of these depths has more blocks than a file has tensors; each block has several.

    Raises:
        ValueError: it has, or they are no depths.
    """
    __tracebackhide__ = True
    blocks = depths if isinstance(depths, (list, tuple)) else [depths]
    if not all(is_integer(depth) for depth in blocks) or sum(blocks) > tensors:
        raise invalid("depths", depths, f"must be integers of at most {tensors} in all, for so many tensors", "mend it")


def load_named(stored: Stored) -> Backbone:
    """Return the model of ``create_model`` that a file holds.

    Raises:
        ValueError: it holds none, or one that this version does not build. No memory was taken for its weights then.
    """
    config = read_config(stored)
    try:
        return restore(create_model(**config), stored)
    except (TypeError, RuntimeError, ValueError) as error:
        raise _not_built(stored, error) from error


def read_config(stored: Stored) -> dict[str, Any]:
    """Return the arguments of ``create_model`` that a file notes, once a model without memory has its tensors' shapes.

    Raises:
        ValueError: it notes none, or those of a model with other tensors.
    """
    try:
        config = parse_json(stored.notes[NAMED])
    except (KeyError, ValueError) as error:
        rule = "does not say which model of create_model it holds"
        raise stored.error(rule, "give one that normfree.save_pretrained or normfree.save wrote") from error
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise stored.error("names no model of create_model", "give an undamaged file")
    try:
        if "depths" in config:
            check_depths(config["depths"], len(stored.tensors))
        with torch.device("meta"):
            model = create_model(**config)
    except Exception as error:  # arguments of any kind and size make a constructor raise almost anything
        raise _not_built(stored, error) from error
    check_fits(model, stored)
    return config


def _not_built(stored: Stored, error: Exception) -> ValueError:
    rule = f"does not describe a model this version builds ({first_line(error)})"
    return stored.error(rule, "save it anew, or use the version that wrote it")


def _note_of_conversion(model: nn.Module) -> str | None:
    """The record of a converted model, as JSON; None of any other."""
    conversion = conversion_of(model)
    if conversion is None:
        return None
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    names = [change.name for change in conversion.changes]
    within = {name for name in names if any(name.startswith(f"{one}.") for one in names)}  # a norm's own activation
    missing = [name for name in names if name not in known | within]
    if missing:
        rule = f"{missing[0]} of its conversion's record is gone, so a file could not rebuild it"
        remedy = "change the original so and convert that, or keep model.state_dict() by safetensors.torch.save_file"
        raise invalid("model", type(model).__name__, rule, remedy)
    return json.dumps(conversion.to_dict())


def _load_converted(stored: Stored, original: nn.Module | None) -> nn.Module:
    """The original, rewritten as the file's record says, with the file's weights."""
    conversion = noted_conversion(stored)
    if original is not None and not isinstance(original, nn.Module):
        raise invalid("original", original, "is no torch.nn.Module", "pass the model itself, with any weights")
    if original is None:
        rule = f"{quoted(str(stored.path))} holds a converted {conversion.model}, which is made of its original"
        raise ValueError(f"original: is missing, for {rule}; pass the model it was converted from, with any weights")
    difference, other_class = first_difference(conversion, unwrap(original))
    if other_class:
        rule = f"it is not the model that {quoted(str(stored.path))} was converted from: {difference}"
        raise invalid("original", type(original).__name__, rule, f"pass the {conversion.model} it was converted from")
    if difference:
        file = quoted(str(stored.path))
        said = f"{file} was converted from another model than the original, or from other versions: {difference}"
        warnings.warn(said, UserWarning, stacklevel=3)
    try:
        model = rewrite(unwrap(original), conversion)
        for name, tensor in model.state_dict().items():
            if tensor.numel() == 0:  # of a mark, which files of before it lack
                stored.tensors.setdefault(name, tensor)
        return restore(model, stored)
    except Exception as error:  # a forged record makes constructors raise almost anything
        rule = f"it is not the model that {str(stored.path)!r} was converted from ({all_lines(error)})"
        remedy = f"pass the {conversion.model} it was converted from, or one of the same sizes"
        raise invalid("original", type(original).__name__, rule, remedy) from error


def _load_foreign(stored: Stored, original: nn.Module | None) -> nn.Module:
    """A copy of the original with the file's weights."""
    if original is None:
        rule = f"{quoted(str(stored.path))} holds trained weights of a model that is none of normfree's"
        raise ValueError(f"original: is missing, for {rule}; pass that model, with any weights")
    try:
        return restore(copy_model(unwrap(original)), stored)
    except (RuntimeError, ValueError) as error:
        rule = f"it is not the model whose weights {str(stored.path)!r} holds ({all_lines(error)})"
        raise invalid("original", type(original).__name__, rule, "pass the model that was trained") from error


def check_target(path: str | Path) -> Path:
    """Return where to write a file of weights; refuse what is none.

    Raises:
        ValueError: a folder, or a name that promises another form.
    """
    __tracebackhide__ = True
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
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        _check_writable(model, name, tensor, weight=name in parameters)
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()  # a tied one: safetensors writes nothing twice
        memory.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    folded = {} if has_foldable(model) or BUILT_BY in notes else {FOLDED: "true"}
    return write_atomically(path, _with_sorted_notes(to_bytes(tensors, metadata={**notes, **folded})))


def _with_sorted_notes(content: bytes) -> bytes:
    """The bytes of a safetensors file with its notes by name, which safetensors writes in any order."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


def _check_writable(model: nn.Module, name: str, tensor: Tensor, *, weight: bool) -> None:
    """Raise for a tensor that a file could not give back."""
    __tracebackhide__ = True
    rule = ""
    if not name.isascii() and name.encode(errors="replace").decode() != name:
        remedy = "give the module another name"
        raise invalid("model", type(model).__name__, f"{quoted(name)} has half a character in its name", remedy)
    if not isinstance(tensor, Tensor):  # the packed weights of quantized layers, what get_extra_state gives
        rule = f"is a {type(tensor).__name__}, no tensor"
    elif tensor.is_meta:
        rule = "is on the meta device, without values"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        rule = f"is {'quantized' if tensor.is_quantized else 'sparse'}"
    elif tensor.dtype not in FLOATING and (weight or tensor.is_floating_point() or tensor.is_complex()):
        rule = f"holds {_dtype_name(tensor.dtype)}, which are no weights"
    if rule:
        remedy = "save it in float32, float64, float16 or bfloat16, as dense tensors"
        raise invalid("model", type(model).__name__, f"{shortened(name, 80)} {rule}", remedy)


def check_fits(model: nn.Module, stored: Stored) -> None:
    """Raise unless a model, which may be on the meta device, has the tensors of a file: names, shapes, kinds of number.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    __tracebackhide__ = True
    own = cast("nn.Module", fold(model) if stored.folded else model).state_dict()
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
    __tracebackhide__ = True
    if theirs.dtype not in FLOATING and (mine.is_floating_point() or theirs.is_floating_point() or theirs.is_complex()):
        rule = f"{name} holds {_dtype_name(theirs.dtype)}, which are no weights"
        raise stored.error(rule, "save the model in float32, float64, float16 or bfloat16")
    if theirs.is_floating_point() and not mine.is_floating_point():
        rule = f"{name} holds {_dtype_name(theirs.dtype)} where the model counts in {_dtype_name(mine.dtype)}"
        raise stored.error(rule, "give an undamaged one")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def take_form(model: Model, stored: Stored) -> Model:
    """Return a model in the form of the stored one: folded if that is, each tensor in the precision it has there.

    Tensors of several precisions keep each its own: a model of bfloat16 layers and a float32 classifier comes back as
    such. Where there is one precision, what no state dict has (non-persistent buffers) takes it, too.
    """
    model = cast("Model", fold(model)) if stored.folded else model
    floating = {name: tensor.dtype for name, tensor in stored.tensors.items() if tensor.is_floating_point()}
    if len(set(floating.values())) == 1:
        model.to(next(iter(floating.values())))
    own = model.state_dict(keep_vars=True)
    for name in floating.keys() & own.keys():
        own[name].data = own[name].data.to(floating[name])
    return model


def restore(model: Model, stored: Stored) -> Model:
    """Return a freshly built model with what is stored, in evaluation mode.

    Raises:
        RuntimeError: it is another model.
        ValueError: numbers of another kind than the model's.
    """
    model = take_form(model, stored)
    _check_values(model, stored)
    model.load_state_dict(stored.tensors)
    model.eval()
    return model


def _check_values(model: nn.Module, stored: Stored) -> None:
    """Refuse numbers of another kind than the model's, and two values of a weight that it has under two names.

    Raises:
        ValueError: naming the file.
    """
    first_at: dict[tuple[object, ...], str] = {}
    for name, mine in model.state_dict().items():
        if name not in stored.tensors:
            continue
        given = stored.tensors[name]
        check_number_kind(stored, name, mine, given)
        if mine.is_meta or mine.numel() == 0 or mine.layout != torch.strided or mine.shape != given.shape:
            continue
        place = mine.untyped_storage().data_ptr(), mine.storage_offset(), mine.shape, mine.stride()
        first = first_at.setdefault(place, name)
        if first != name and not torch.equal(given, stored.tensors[first]):
            rule = f"has two values of one weight of the model, {first} and {name}"
            raise stored.error(rule, "give weights of this model, or build it with two weights there")
