"""Models from anywhere, by one word: ours, torchvision's, timm's, a function in a file, a checkpoint.

A file of weights is data. What a converted one says about its original is followed only where that is a name of this
package, torchvision or timm; code is run only from a ``FILE.py`` that the person names.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from normfree.common.checks import invalid, suggestion
from normfree.common.files import check_file, kind_of
from normfree.common.memory import check_memory
from normfree.common.packages import required
from normfree.common.safetensors_file import sizes
from normfree.common.text import first_line, one_line, quoted
from normfree.convert import stored_conversion
from normfree.models import create_model, list_models
from normfree.models.registry import parse_overrides
from normfree.siblings import importable
from normfree.weights import load
from normfree.weights.checkpoint import check_depths

FORMS = (
    "a name of `normfree models`, torchvision:NAME, timm:NAME, FILE.py:FACTORY, a checkpoint of normfree.save, or "
    "the folder of a run or of its checkpoint"
)

DEEPEST = 100_000
"""Blocks of a network of ours at most: a stage's loop over more would run for hours."""


class Built(NamedTuple):
    """A model, and the batch its factory gave with it (None if it gave none)."""

    model: nn.Module
    batch: Any = None


def build(source: str, original: str | None = None) -> Built:
    """Build a model, freshly initialised (or as a checkpoint has it).

    A FACTORY is a function, or the model itself. A function may return ``(model, batch)`` to say what the model takes:
    a tensor, a tuple of positional or a mapping of keyword arguments.

    Args:
        source: one of :data:`FORMS`. Overrides follow one of our names after a colon:
            ``nf_resnet50:width=1,activation=silu``.
        original: of a converted checkpoint, what builds the model it was converted from, in the same forms. Without
            it, what the checkpoint says is followed where it is a name of ours, torchvision's or timm's alone.

    Raises:
        ValueError: if there is no such model; the message names the nearest.
    """
    if path := _checkpoint_of(source):
        return _from_checkpoint(path, original)
    if original is not None:
        raise _no_use(original, source)
    if _names_factory(source):
        return _from_file(source)
    named = _by_name(source, DEEPEST)
    if source.partition(":")[2] and not source.startswith(("torchvision:", "timm:")):
        try:
            with torch.device("meta"):
                size = sum(parameter.nbytes for parameter in named().parameters())
        except (RuntimeError, OverflowError) as error:  # more numbers than an index counts
            raise invalid("model", source, first_line(error), "pass smaller widths") from error
        check_memory("model", source, size)
    return Built(named())


def takes_original(source: str) -> bool:
    """Tell whether a source is a converted checkpoint, which is made of its original.

    Raises:
        ValueError: it is a damaged file.
    """
    path = _checkpoint_of(source)
    return path is not None and stored_conversion(path) is not None


def check_original(original: str | None, sources: Sequence[str]) -> None:
    """Raise if an original is given for sources of which none is a converted checkpoint.

    Raises:
        ValueError: as said.
    """
    if original is not None and not any(takes_original(source) for source in sources):
        raise _no_use(original, " ".join(sources))


def opened(path: str | Path, original: str | None = None) -> nn.Module:
    """The model in a checkpoint; a converted one is made of its original.

    Args:
        path: of the checkpoint.
        original: as of :func:`build`.

    Raises:
        ValueError: no such file, a damaged one, or a converted model whose original its record does not name as one of
            ours, torchvision's or timm's.
    """
    return _from_checkpoint(str(path), original).model


def _no_use(original: str, source: str) -> ValueError:
    rule = f"{quoted(source)} is no converted checkpoint, so there is nothing to build it from"
    return invalid("original", original, rule, "leave --original out")


def _names_factory(source: str) -> bool:
    prefix = source.partition(":")[0]
    named = prefix in ("torchvision", "timm")
    return not named and ".py" in source and Path(source.rpartition(":")[0] or source).suffix == ".py"


def _checkpoint_of(source: str) -> str | None:
    """The file of weights that a word stands for; None of all other forms."""
    prefix, _, rest = source.partition(":")
    if prefix in ("torchvision", "timm") or _names_factory(source):
        return None
    if source.endswith(".safetensors"):
        return source
    kind = "nothing" if rest else kind_of(source)
    if kind == "a folder" and prefix not in list_models():
        from normfree.train.trained import weights_of

        return str(weights_of(source))
    return source if kind not in ("nothing", "a folder") else None


def _from_checkpoint(path: str, original: str | None) -> Built:
    conversion = stored_conversion(path)
    if conversion is None:
        if original is not None:
            raise _no_use(original, path)
        return Built(load(path))
    if original is not None:
        built = build(original)
        return Built(load(path, original=built.model), built.batch)
    numbers, tensors = sizes(path)
    named = None
    if conversion.source is not None:
        try:
            named = _by_name(conversion.source, tensors)
        except ValueError:  # a FILE.py, a path, or a name of nothing: the file may not decide what is run
            named = None
    if named is None:
        said = "a model of your own" if conversion.source is None else quoted(conversion.source)
        rule = f"{quoted(path)} was converted from {said}; no code is run because a file names it"
        raise invalid("original", None, rule, "pass --original FILE.py:FACTORY, or whatever builds that model")
    _check_size(named, conversion.source or "", path, numbers)
    return Built(load(path, original=named()))


def _by_name(source: str, deepest: int) -> Callable[[], nn.Module]:
    """What builds a model of this package, torchvision or timm; no file is looked at, nothing is built yet.

    Args:
        source: a name of ours with overrides, torchvision:NAME or timm:NAME.
        deepest: blocks of a network of ours at most.

    Raises:
        ValueError: it is none of these names, or deeper.
    """
    prefix, _, rest = source.partition(":")
    if prefix == "torchvision":
        return _torchvision(rest)
    if prefix == "timm":
        return _timm(rest)
    overrides = parse_overrides(rest)
    if prefix not in list_models():
        create_model(prefix)  # raises, with the nearest name
    if "depths" in overrides:
        check_depths(overrides["depths"], deepest)
    return lambda: create_model(prefix, **overrides)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        raise ValueError(f"model: torchvision has no {quoted(name)}; {suggestion(name, known)}")

    def build_it() -> nn.Module:
        try:
            return torchvision.models.get_model(name, weights=None, weights_backbone=None)
        except (TypeError, ValueError):  # the models without a backbone refuse the argument
            return torchvision.models.get_model(name, weights=None)

    return build_it


def _timm(name: str) -> Callable[[], nn.Module]:
    timm = required("timm", f"timm:{name}", "'normfree[timm]'")
    if not timm.is_model(name):
        raise ValueError(f"model: timm has no {quoted(name)}; {suggestion(name, timm.list_models())}")
    return lambda: timm.create_model(name, pretrained=False)


_ALLOCATING = {torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand}


class _LargeOnMeta(TorchFunctionMode):
    """Tensors that are allocated are on the meta device; those that are computed from, such as a range, are not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _ALLOCATING and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def _check_size(build_it: Callable[[], nn.Module], source: str, path: str, numbers: int) -> None:
    """Raise if an original is larger than its converted model can be, before memory is taken for it.

    Conversion removes norms, whose parameters are fewer than the weights'; so an original has at most twice as many
    numbers as the converted model's file (and 2**20 in any case).
    """
    rule = ""
    for mode in (lambda: torch.device("meta"), _LargeOnMeta):  # the former is what most constructors allow
        try:
            with mode():
                model = build_it()
        except Exception as error:  # a constructor that reads values of its tensors, or forged overrides
            rule = f"{quoted(source)}, of which it was converted, cannot be built ({first_line(error)})"
            continue
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if needed <= 2 * numbers + 2**20:
            return
        rule = f"has {numbers:,} numbers, and {quoted(source)}, of which it was converted, {needed:,}"
        break
    raise invalid("path", path, rule, "give an undamaged file, or pass --original")


def _from_file(source: str) -> Built:
    """What FACTORY of FILE.py returns, or is; the file's own folder stays importable for it."""
    path, _, factory = source.rpartition(":")
    if not path or not factory:
        raise ValueError(f"model: {quoted(source)} names no factory; write FILE.py:FACTORY")
    file = check_file(path, "model", "write FILE.py:FACTORY").resolve()
    try:
        with importable(file.parent):
            made = _called(file, factory)
    except _Told:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"model: {quoted(source)} failed with {one_line(error)}") from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        returned = type(made).__name__
        raise ValueError(f"model: {quoted(source)} returned {returned}, not a torch.nn.Module or (module, batch)")
    return Built(model, batch)


class _Told(ValueError):
    """An error that already says all there is to say."""


def _called(file: Path, factory: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"_normfree_source_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "check_file has found a file that ends in .py"
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
