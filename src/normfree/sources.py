"""Models from anywhere, by one word: ours, torchvision's, timm's, a function in a file, a checkpoint."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from normfree.convert import stored_conversion
from normfree.models import create_model, list_models
from normfree.models.overrides import parse_overrides
from normfree.nn.checks import suggestion
from normfree.signal.packages import required
from normfree.weights import load

FORMS = (
    "a name of `normfree models`, torchvision:NAME, timm:NAME, FILE.py:FACTORY, a checkpoint of normfree.save, or "
    "the folder of a run or of its checkpoint"
)


class Built(NamedTuple):
    """A model, and the batch its factory gave with it (None if it gave none)."""

    model: nn.Module
    batch: Any = None


def build(source: str) -> Built:
    """Build a model, freshly initialised (or as a checkpoint has it).

    A FACTORY is a function, or the model itself. A function may return ``(model, batch)`` to say what the model takes:
    a tensor, a tuple of positional or a mapping of keyword arguments.

    Args:
        source: one of :data:`FORMS`. Overrides follow one of our names after a colon:
            ``nf_resnet50:width=1,activation=silu``.

    Raises:
        ValueError: if there is no such model; the message names the nearest.
    """
    prefix, _, rest = source.partition(":")
    if prefix == "torchvision":
        return Built(_torchvision(rest))
    if prefix == "timm":
        return Built(_timm(rest))
    if ".py" in source and Path(source.rpartition(":")[0] or source).suffix == ".py":
        return _from_file(source)
    if source.endswith(".safetensors") or (Path(source).is_file() and not rest):
        return _from_checkpoint(source)
    if Path(source).is_dir() and not rest and prefix not in list_models():
        from normfree.train.trained import weights_of

        return _from_checkpoint(str(weights_of(source)))
    return Built(create_model(prefix, **parse_overrides(rest)))


def opened(path: str | Path) -> nn.Module:
    """The model in a checkpoint; a converted one is made of its original, which its record says how to build.

    Raises:
        ValueError: no such file, a damaged one, or a converted model whose original is none of :data:`FORMS`.
    """
    return _from_checkpoint(str(path)).model


def _from_checkpoint(path: str) -> Built:
    conversion = stored_conversion(path)
    if conversion is None:
        return Built(load(path))
    if conversion.source is None:
        raise ValueError(
            f"model: {path!r} was converted from a {conversion.model} of your own, which its record cannot build; "
            "write FILE.py:FACTORY that returns normfree.load(path, original=...)"
        )
    original = build(_found_from(conversion.source, Path(path)))
    return Built(load(path, original=original.model), original.batch)


def _found_from(source: str, checkpoint: Path) -> str:
    """What builds a converted model's original: a file is looked for here, then beside the checkpoint.

    Raises:
        ValueError: it is in neither place.
    """
    name, _, factory = source.rpartition(":")
    if Path(name).suffix != ".py" or Path(name).is_file():
        return source
    beside = checkpoint.parent / name
    if not beside.is_file():
        raise ValueError(
            f"model: {str(checkpoint)!r} was converted from {source!r}, and there is no {name!r} here or beside it; "
            "run the command in the folder where it was converted"
        )
    return f"{beside}:{factory}"


def _torchvision(name: str) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        raise ValueError(f"model: torchvision has no {name!r}; {suggestion(name, known)}")
    try:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None)
    except (TypeError, ValueError):  # the models without a backbone refuse the argument
        return torchvision.models.get_model(name, weights=None)


def _timm(name: str) -> nn.Module:
    timm = required("timm", f"timm:{name}", "'normfree[timm]'")
    if not timm.is_model(name):
        raise ValueError(f"model: timm has no {name!r}; {suggestion(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False)


def _from_file(source: str) -> Built:
    """What FACTORY of FILE.py returns, or is; the file's own folder is importable meanwhile."""
    path, _, factory = source.rpartition(":")
    file = Path(path)
    if not path or not factory:
        raise ValueError(f"model: {source!r} names no factory; write FILE.py:FACTORY")
    if not file.is_file():
        raise ValueError(f"model: {source!r}: there is no file {path!r}")
    try:
        with _importable(file.parent.resolve()):
            made = _called(file, factory)
    except _Told:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"model: {source!r} failed with {type(error).__name__}: {reason}") from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {source!r} returned {type(made).__name__}, not a torch.nn.Module or (module, batch)")
    return Built(model, batch)


class _Told(ValueError):
    """An error that already says all there is to say."""


def _called(file: Path, factory: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"_normfree_source_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, factory, None)
    if isinstance(function, nn.Module):
        return function
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise _Told(f"model: {file} defines no function {factory!r}; {suggestion(factory, names)}")
    return function()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make the modules of a folder importable, and forget them afterwards: another folder may have the same names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().is_relative_to(folder) and "site-packages" not in Path(file).parts:
                del sys.modules[name]
