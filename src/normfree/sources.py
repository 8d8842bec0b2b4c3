"""Models from anywhere, by one word: ours, torchvision's, timm's, a function in a file, a checkpoint.

(Where images come from is in ``data/sources.py``.)

A file of weights is data. What a converted one says about its original is followed only where that is a name of this
package, torchvision or timm; code is run only from a ``FILE.py`` that the person names.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from normfree.common.checks import LISTED, check_memory, invalid, require, suggestion
from normfree.common.files import PREPROCESSING, check_file, kind_of, notes_of, read, sizes
from normfree.common.process import OWN_FILE, set_default_device
from normfree.common.text import all_lines, causes, first_line, one_line, quoted
from normfree.common.torch_compat import tree_leaves
from normfree.convert import Conversion, stored_conversion
from normfree.models import create_model, list_models
from normfree.models.registry import parse_overrides
from normfree.trace.inputs import unwrap
from normfree.trace.preserve import check_present
from normfree.weights import load
from normfree.weights.checkpoint import built_by, check_depths, load_stored, read_config, read_state_dict

FORMS = (
    "a name of `normfree models`, torchvision:NAME, timm:NAME, FILE.py:FACTORY, a checkpoint of normfree.save, or "
    "the folder of a run or of its checkpoint"
)

DEEPEST = 100_000
"""Blocks of a network at most: a stage's loop over more would run for hours."""

MOST_IN_A_FILE = 4096
"""Sum of the integers among a foreign constructor's arguments that a file names, unless it has more tensors: any of
them may be a depth."""

_ABOUT_WEIGHTS = {"weights", "weights_backbone", "pretrained", "progress", "quantize", "device", "dtype"}
"""Arguments of foreign constructors that say where weights come from and go to, not which network is built."""

_OF_TIMM = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate")
"""What timm's networks take that do not say their class."""


@dataclass(frozen=True)
class Built:
    """A model, and what is known of it.

    Attributes:
        model: the model.
        batch: what its factory gave with it, None if it gave none.
        shape: of one example, as the run that the weights are of has them; None without a run.
        random: whether its weights are random for certain: those of a name, without a file.
        statistics: channel means and deviations that the run's images are standardized with; None without a run.
        own: whether its weights are those that a FILE.py:FACTORY made.
    """

    model: nn.Module
    batch: Any = None
    shape: tuple[int, ...] | None = None
    random: bool = False
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    own: bool = False


def build(source: str, original: str | None = None) -> Built:
    """Build a model, freshly initialised (or as a checkpoint has it).

    A FACTORY is a function, or the model itself. A function may return ``(model, batch)`` to say what the model takes:
    a tensor, a tuple of positional or a mapping of keyword arguments.

    Args:
        source: one of :data:`FORMS`. Arguments follow a name after a colon: ``nf_resnet50:width=1,activation=silu``,
            ``torchvision:resnet18:num_classes=10``, ``torchvision:resnet18:weights=DEFAULT``,
            ``timm:resnet18:pretrained=True``.
        original: of a converted checkpoint, what builds the model it was converted from, in the same forms. Without
            it, what the checkpoint says is followed where it is a name of ours, torchvision's or timm's alone.

    Raises:
        ValueError: if there is no such model, the message naming the nearest; or published weights cannot be had.
    """
    if path := _checkpoint_of(source):
        built = _from_checkpoint(path, original)
        return built if built.batch is not None else _of_run(built, path)
    if original is not None:
        raise _no_use(original, source)
    if names_factory(source):
        return _from_file(source)
    file, _, factory = source.partition(":")
    if factory.isidentifier() and file not in list_models() and Path(f"{file}.py").is_file():
        raise invalid("model", source, "is a module and a name in it", f"name the file: {file}.py:{factory}")
    named, pretrained = _by_name(source, DEEPEST)
    if not pretrained and source.count(":") > source.startswith(("torchvision:", "timm:")):  # arguments
        _check_memory(named, source)
    return Built(named(), random=not pretrained)


def place_on(device: torch.device, model: nn.Module) -> nn.Module:
    """Return a model on a device.

    Raises:
        ValueError: it is no tree of modules, has tensors without values, or cannot be moved there.
    """
    check_present(unwrap(model))
    try:
        return model.to(device)
    except (NotImplementedError, RuntimeError) as error:  # a buffer without values, a device that is full
        raise ValueError(f"model: {type(model).__name__} cannot be put on {device}: {first_line(error)}") from error


def _check_memory(named: Callable[[], nn.Module], source: str) -> None:
    """Raise where a model that a word with arguments builds is larger than the machine's memory."""
    foreign = source.startswith(("torchvision:", "timm:"))
    try:
        with _LargeOnMeta() if foreign else torch.device("meta"):
            size = sum(parameter.nbytes for parameter in named().parameters())
    except (RuntimeError, OverflowError) as error:  # more numbers than an index counts
        raise invalid("model", source, first_line(error), "pass smaller numbers") from error
    check_memory("model", source, size)


def network_factory(word: str, original: str | None = None) -> Callable[[int, int], nn.Module] | None:
    """Return what builds the network that ``normfree train --model`` names; None for one of ours.

    What is returned takes the number of classes and of the images' channels.

    A network of torchvision or timm ends in as many classes as there are, where the word says neither ``num_classes``
    nor what published weights it has. Any other has its own number of outputs.

    Args:
        word: as the source of :func:`build`.
        original: as of :func:`build`.

    Raises:
        ValueError, ImportError: as of :func:`check_sources`.
    """
    if original is None and word.partition(":")[0] in list_models():
        return None
    check_sources([word], original)
    return lambda num_classes, in_channels: build(_with_classes(word, num_classes), original).model


def _with_classes(word: str, num_classes: int) -> str:
    """A word for a model of torchvision or timm with a number of classes, where it may have any."""
    prefix, _, rest = word.partition(":")
    name, _, options = rest.partition(":")
    given = parse_overrides(options) if prefix in ("torchvision", "timm") else {"num_classes": None}
    if {"num_classes", "weights"} & set(given) or given.get("pretrained"):
        return word
    return f"{prefix}:{name}:" + ",".join([f"num_classes={num_classes}", *([options] if options else [])])


def takes_original(source: str) -> bool:
    """Tell whether a source is a file of weights that go into its original: a converted model, or somebody else's.

    Raises:
        ValueError: it is a damaged file.
    """
    path = _checkpoint_of(source)
    return path is not None and (stored_conversion(path) is not None or built_by(path) is not None)


def check_sources(sources: Sequence[str], original: str | None) -> None:
    """Raise, before any model is built, for a name of none and for an original of no use.

    Args:
        sources: as of :func:`build`.
        original: as of :func:`build`, of those of them that are converted checkpoints.

    Raises:
        ValueError: there is no such model; an original is given, and none of the sources is a converted checkpoint.
        ImportError: a model's package is not installed.
    """
    __tracebackhide__ = True
    for source in sources:
        if not names_factory(source) and _checkpoint_of(source) is None:
            _by_name(source, DEEPEST)
    if original is not None and not any(takes_original(source) for source in sources):
        raise _no_use(original, " ".join(sources))


def load_checkpoint(path: str | Path, original: str | None = None) -> nn.Module:
    """The model in a checkpoint; a converted one is made of its original.

    Args:
        path: of the checkpoint.
        original: as of :func:`build`.

    Raises:
        ValueError: no such file, a damaged one, or a converted model whose original its record does not name as one of
            ours, torchvision's or timm's.
    """
    return _from_checkpoint(str(path), original).model


def word_of(source: str) -> str:
    """Return the word for what builds a model like that of a file or a run's folder, where it says so; else the source.

    Args:
        source: as of :func:`build`.
    """
    path = _checkpoint_of(source)
    if path is None or stored_conversion(path) is not None:
        return source
    if (trained := built_by(path)) is not None:
        return _with_classes(*trained)
    config = read_config(read(path))
    return f"{config.pop('name')}:" + ",".join(f"{name}={value!r}" for name, value in config.items())


def load_weights(model: nn.Module, source: str, path: str | Path) -> None:
    """Give a model the weights of a state dict in a file.

    Args:
        model: the model, which is changed.
        source: what it was built by, for messages.
        path: a .safetensors file, or one of ``torch.save(model.state_dict(), …)``.

    Raises:
        ValueError: the file holds no state dict, or another model's.
    """
    try:
        load_stored(model, read_state_dict(path, "weights"))
    except RuntimeError as error:
        name, remedy = source.partition(":")[0], "give its own state dict"
        if "size mismatch" in str(error) and not names_factory(source) and not Path(source).exists():
            base = ":".join(source.split(":")[: 2 if name in ("torchvision", "timm") else 1])
            remedy += (
                f"; for another number of classes the MODEL is {base}:num_classes=N, and a network of your own is "
            )
            remedy += "FILE.py:FACTORY"
        differ = re.sub(r"^Error\(s\) in loading state_dict for \w+: *", "", all_lines(error))
        raise invalid("weights", str(path), f"are the weights of another model: {differ}", remedy) from error


def _no_use(original: str, source: str) -> ValueError:
    rule = f"{quoted(source)} is no converted checkpoint, nor weights of another's model: it is built without one"
    return invalid("original", original, rule, "leave --original out")


def names_factory(source: str) -> bool:
    """Tell whether a source is a file of Python, and what in it builds the model."""
    prefix = source.partition(":")[0]
    named = prefix in ("torchvision", "timm")
    return not named and ".py" in source and Path(source.rpartition(":")[0] or source).suffix == ".py"


def is_word(source: str) -> bool:
    """Tell whether a source is a name or a FILE.py:FACTORY, and no file of weights, exported file or folder."""
    prefix = source.partition(":")[0]
    return (
        prefix in ("torchvision", "timm")
        or names_factory(source)
        or (prefix in list_models() and not Path(source).exists())
    )


def _checkpoint_of(source: str) -> str | None:
    """The file of weights that a word stands for; None of all other forms."""
    prefix, _, rest = source.partition(":")
    if prefix in ("torchvision", "timm") or names_factory(source):
        return None
    if source.endswith(".safetensors"):
        return source
    kind = "nothing" if rest else kind_of(source)
    if kind == "a folder" and prefix not in list_models():
        from normfree.train.trained import weights_of

        return str(weights_of(source))
    return source if kind not in ("nothing", "a folder") else None


def _from_checkpoint(path: str, original: str | None) -> Built:
    conversion, trained = stored_conversion(path), built_by(path)
    if conversion is None and trained is None:
        if original is not None:
            raise _no_use(original, path)
        return Built(load(path))
    if original is not None:
        built = build(original if trained is None else _with_classes(original, trained[1]))
        try:
            model = load(path, original=built.model)
        except ValueError as error:  # names the class of what it was given, where a person has given a word
            named = f"original={type(built.model).__name__!r}"
            raise ValueError(str(error).replace(named, f"original={original!r}", 1)) from error
        return Built(model, built.batch, shape=example_shape(conversion))
    source = trained[0] if trained is not None else conversion.source if conversion is not None else None
    numbers, tensors = sizes(path)
    named = None
    with suppress(ValueError):  # a FILE.py, a path, or a name of nothing: the file may not decide what is run
        if source is not None:
            source = source if trained is None else _with_classes(*trained)
            named, _ = _by_name(source, tensors, weights=False)
    if named is None:
        said = "a model of your own" if source is None else quoted(source)
        made = "was converted from" if trained is None else "holds trained weights of"
        rule = f"{quoted(path)} {made} {said}; no code is run because a file names it"
        raise ValueError(
            f"original: is missing: {rule}; pass --original FILE.py:FACTORY, or whatever builds that model"
        )
    was = "it was converted from" if trained is None else "was trained"
    _check_size(named, f"{quoted(source or '')}, which {was},", path, numbers)
    return Built(load(path, original=named()), shape=example_shape(conversion))


def example_shape(conversion: Conversion | None) -> tuple[int, ...] | None:
    """Return the shape of one example of the batch a model was converted on; None unless that was a single tensor."""
    shapes = () if conversion is None else conversion.input_shapes
    return shapes[0][1:] if len(shapes) == 1 and len(shapes[0]) > 1 else None


def _of_run(built: Built, path: str) -> Built:
    """A model with the shape of an image that its run evaluates on, and how the run prepares it."""
    beside = any((folder / "config.json").is_file() for folder in Path(path).absolute().parents[:4])
    if not beside and PREPROCESSING not in (notes_of(path) or ()):
        return built  # without the import of what trains, which takes a second
    from normfree.train.trained import preprocessing_of

    said = preprocessing_of(Path(path))
    if said is None:
        return built
    shape = (len(said.mean), said.image_size, said.image_size)
    return replace(built, shape=shape, statistics=said.statistics)


def _by_name(source: str, deepest: int, *, weights: bool = True) -> tuple[Callable[[], nn.Module], bool]:
    """What builds a model of this package, torchvision or timm; no file is looked at, nothing is built yet.

    Args:
        source: a name of ours with overrides, torchvision:NAME or timm:NAME, these with arguments and ``weights=…``.
        deepest: blocks of a network of ours at most.
        weights: whether pretrained weights that are asked for are had; they may be downloaded.

    Returns:
        The constructor, and whether its model is a pretrained one.

    Raises:
        ValueError: it is none of these names, or deeper.
    """
    prefix, _, rest = source.partition(":")
    if prefix in ("torchvision", "timm"):
        most = deepest if weights else max(deepest, MOST_IN_A_FILE)
        return (_torchvision if prefix == "torchvision" else _timm)(rest, weights, most)
    overrides = parse_overrides(rest)
    if prefix not in list_models():
        create_model(prefix)  # raises, with the nearest name
    if "depths" in overrides:
        check_depths(overrides["depths"], deepest)
    return (lambda: create_model(prefix, **overrides)), False


def _torchvision(word: str, weights: bool, deepest: int) -> tuple[Callable[[], nn.Module], bool]:
    torchvision: Any = require("torchvision", f"torchvision:{word}")
    models = torchvision.models
    name, _, options = word.partition(":")
    known = models.list_models()
    if name not in known:
        raise ValueError(f"model: torchvision has no {quoted(name)}; {suggestion(name, known)}")
    taken = _arguments_of(models.get_model_builder(name))
    given, arguments = _foreign_options(f"torchvision:{word}", options, ("weights", "DEFAULT"), taken, deepest)
    if weights and given is not None:
        enum = models.get_model_weights(name)
        if given not in enum.__members__:
            rule = f"torchvision has no weights {quoted(given)} of {name}"
            raise invalid("model", word, rule, f"choose one of {', '.join(enum.__members__)}")

        def download() -> nn.Module:
            with _explain_download(f"torchvision:{word}", enum[given].url, "weights"):
                return models.get_model(name, weights=enum[given], **arguments)

        return _explained(download, f"torchvision:{word}", arguments, "weights"), True

    def build_it() -> nn.Module:
        backbone = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
        return models.get_model(name, weights=None, **({"weights_backbone": None} if backbone else {}), **arguments)

    return _explained(build_it, f"torchvision:{word}", arguments, ""), False


def _timm(word: str, weights: bool, deepest: int) -> tuple[Callable[[], nn.Module], bool]:
    timm = require("timm", f"timm:{word}")
    name, _, options = word.partition(":")
    if not timm.is_model(name):
        raise ValueError(f"model: timm has no {quoted(name)}; {suggestion(name, timm.list_models())}")
    taken = {*_arguments_of(timm.model_entrypoint(name)), *_OF_TIMM}
    given, arguments = _foreign_options(f"timm:{word}", options, ("pretrained", "True"), taken, deepest)
    if given not in (None, True, False):
        raise invalid("model", word, f"pretrained={given} is neither True nor False", "write pretrained=True")
    pretrained = weights and given is True

    def build_it() -> nn.Module:
        if not pretrained:
            return timm.create_model(name, pretrained=False, **arguments)
        published = timm.get_pretrained_cfg(name)
        hub = None if published is None or not published.hf_hub_id else f"https://huggingface.co/{published.hf_hub_id}"
        with _explain_download(f"timm:{word}", hub or getattr(published, "url", None), "pretrained"):
            return timm.create_model(name, pretrained=True, **arguments)

    return _explained(build_it, f"timm:{word}", arguments, "pretrained" if pretrained else ""), pretrained


def _arguments_of(builder: Callable[..., Any]) -> list[str]:
    """The names of what a foreign function that builds a network takes, itself or its class; not of weights."""
    found: dict[str, None] = {}
    try:
        kind = typing.get_type_hints(builder).get("return")
    except (NameError, TypeError):  # a hint of a name that is not there
        kind = None
    bases = [base for base in kind.__mro__ if "__init__" in vars(base)] if inspect.isclass(kind) else []
    for function in (builder, *bases):
        parameters = inspect.signature(function).parameters.values()
        found |= {one.name: None for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return [name for name in found if name not in _ABOUT_WEIGHTS]


def _foreign_options(
    word: str, options: str, published: tuple[str, str], taken: Collection[str], deepest: int
) -> tuple[Any, dict[str, Any]]:
    """What may follow the name of somebody else's model: the value that asks for published weights, and arguments.

    Raises:
        ValueError: a name that the constructor does not take; a value that is more than numbers, words and lists of
            them; integers so large that they would be too many blocks.
    """
    arguments = parse_overrides(options)
    option, example = published
    asked = arguments.pop(option, None)
    for name in arguments:
        if name not in taken:
            remedy = f"{suggestion(name, [*taken, option])} {option}={example} takes published weights"
            raise invalid("model", word, f"{name} is no option here", remedy)
    total = 0
    for name, value in arguments.items():
        for one in _leaves(value):
            if not isinstance(one, (int, float, str, type(None))):
                raise invalid("model", word, f"{name} is no number, word or list of them", "write such a value")
            total += one if isinstance(one, int) and name != "num_classes" else 0
    if total > deepest:
        rule = f"its numbers sum to {total:,}, and any may count blocks, of which there are at most {deepest:,}"
        raise invalid("model", word, rule, "pass smaller numbers")
    return asked, arguments


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _explained(
    build_it: Callable[[], nn.Module], word: str, arguments: dict[str, Any], published: str
) -> Callable[[], nn.Module]:
    """What builds a model, with one line for what a foreign constructor says of the arguments it is given."""
    if not arguments:
        return build_it

    def explained() -> nn.Module:
        try:
            return build_it()
        except (_Explained, MemoryError):
            raise
        except Exception as error:  # of any kind, for arguments of any kind
            rule = f"it is not built with {', '.join(arguments)} ({first_line(error)})"
            remedy = "pass other values"
            if published:
                remedy = f"leave {published}= out, whose weights are of the network as it was published"
            raise invalid("model", word, rule, remedy) from error

    return explained


@contextmanager
def _explain_download(word: str, address: str | None, option: str) -> Iterator[None]:
    """While published weights are read or downloaded: one line that says which could not be had, and another way.

    Raises:
        ValueError: they could not.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_network(error):
            raise
        rule = f"the download of {address or 'its weights'} failed ({_reason(error)})"
        remedy = f"leave {option}= out; --weights FILE of normfree convert and doctor takes weights from a file"
        raise _Explained(str(invalid("model", word, rule, remedy))) from error


def _is_of_network(error: BaseException) -> bool:
    """Whether an error is of a connection, a server or a missing file: of the system's or a client's kinds."""
    kinds = {f"{kind.__module__}.".partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not kinds.isdisjoint({"httpx", "httpcore", "requests", "huggingface_hub"})


def _reason(error: BaseException) -> str:
    """Why a connection failed, in the words of what failed first."""
    return first_line(causes(error)[-1], 120)


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


def _check_size(build_it: Callable[[], nn.Module], which: str, path: str, numbers: int) -> None:
    """Raise if a file's original, or network, is larger than the file can be of, before memory is taken for it.

    Conversion removes norms, whose parameters are fewer than the weights'; so an original has at most twice as many
    numbers as the converted model's file (and 2**20 in any case).
    """
    rule = ""
    for mode in (lambda: torch.device("meta"), _LargeOnMeta):  # the former is what most constructors allow
        try:
            with mode():
                model = build_it()
        except Exception as error:  # a constructor that reads values of its tensors, or forged overrides
            rule = f"{which} cannot be built ({first_line(error)})"
            continue
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if needed <= 2 * numbers + 2**20:
            return
        rule = f"has {numbers:,} numbers, and {which} has {needed:,}"
        break
    raise invalid("path", path, rule, "give an undamaged file, or pass --original")


def _from_file(source: str) -> Built:
    """What FACTORY of FILE.py returns, or is; the file's own folder stays importable for it."""
    path, _, factory = source.rpartition(":")
    named = path if path.endswith(".py") else source
    if kind_of(named) == "nothing":
        raise ValueError(f"model: there is no file {quoted(named)}; {_FACTORY}")
    file = check_file(named, "model", f"write {_FACTORY}").resolve()
    if named == source or not factory:
        has = ", ".join(_defined_in(file)[:LISTED])
        has = f"the file defines {has}" if has else "the file defines no function"
        raise ValueError(f"model: {quoted(source)} does not say which function builds the model; {has}; {_FACTORY}")
    try:
        with importable(file.parent), _keeps_process(source):
            made = _call_factory(file, factory)
    except (_Explained, KeyboardInterrupt):
        raise
    except BaseException as error:  # a program that exits, too
        raise ValueError(f"model: {quoted(source)} failed with {one_line(error)}") from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        returned = type(made).__name__
        raise ValueError(f"model: {quoted(source)} returned {returned}, not a torch.nn.Module or (module, batch)")
    unwrap(model)  # raises where its modules are no tree
    try:
        tree_leaves(batch)
    except RecursionError as error:
        raise ValueError(f"model: {quoted(source)} returned a batch that holds itself; return tensors in it") from error
    return Built(model, batch, own=True)


@contextmanager
def _keeps_process(source: str) -> Iterator[None]:
    """Give the process back with the streams, default device and current folder it had, whatever a factory did to them.

    Raises:
        _Explained: an output was closed; or it is another process, made by a fork, that goes on.
    """
    process, folder, device = os.getpid(), os.getcwd(), torch.get_default_device()
    streams = sys.stdout, sys.stderr  # None in a process without a terminal
    opened = [_is_open(stream, number) for stream, number in zip(streams, (1, 2), strict=True)]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = (open(os.devnull, "w") if one and one.closed else one for one in streams)  # noqa: SIM115
        set_default_device(device)
        os.chdir(folder)
    if os.getpid() != process:
        raise _Explained(f"model: {quoted(source)} forked, and this is the child, which is to end by os._exit there")
    for name, stream, number, was_open in zip(("output", "error"), streams, (1, 2), opened, strict=True):
        if was_open and not _is_open(stream, number):
            raise _Explained(f"model: {quoted(source)} closed the standard {name}; leave it open")


def _is_open(stream: Any, number: int) -> bool:
    """Whether a standard stream, and the file of the system's below it, is open."""
    if stream is None or stream.closed:
        return False
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


_FACTORY = (
    "FILE.py:FACTORY names a function of the file that takes no argument and returns the model, or (model, batch), or "
    "the model itself"
)


def _defined_in(file: Path) -> list[str]:
    """The names of what a file defines and a factory can be; the file is not run."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [one.name for one in body if isinstance(one, kinds) and not one.name.startswith("_")]


class _Explained(ValueError):
    """An error that already says all there is to say."""


def _call_factory(file: Path, factory: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{OWN_FILE}{file.stem}", file)
    assert spec is not None and spec.loader is not None, "check_file has found a file that ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, factory, None)
    if isinstance(function, nn.Module):
        return function
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise _Explained(f"model: {file} defines no function {factory!r}; {suggestion(factory, names)}")
    try:
        needed = [p.name for p in inspect.signature(function).parameters.values() if _is_needed(p)]
    except (TypeError, ValueError):  # of a built-in, which says nothing of its arguments
        needed = []
    if needed:
        raise _Explained(
            f"model: {factory} of {file} needs arguments ({', '.join(needed)}); a FACTORY takes none: give them "
            "defaults, or write a function that calls it"
        )
    return function()


def _is_needed(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return not variable and parameter.default is inspect.Parameter.empty


# The modules beside a person's FILE.py are importable from files of its folder, also long after it was run: a model's
# forward may import a sibling when it first runs. They are therefore found by which file imports: an import made by a
# file of the folder looks in that folder first, while imports of ours, and of installed packages, never do.


class _Siblings(importlib.abc.MetaPathFinder):
    """Finds top-level modules of a folder for imports that its own files make."""

    def __init__(self) -> None:
        self.modules: dict[Path, dict[str, ModuleType]] = {}
        """Of each folder, what was imported from it when its file was run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find a module for a file that asks from one of the folders; None for all others."""
        folder = None if path is not None else self._asking(sys._getframe(1))
        if folder is None:
            return None
        if (known := self.modules[folder].get(name)) is not None:
            return importlib.machinery.ModuleSpec(name, _Again(known))
        return importlib.machinery.PathFinder.find_spec(name, [str(folder)])

    def _asking(self, frame: FrameType | None) -> Path | None:
        """The folder of the file whose code imports."""
        while frame is not None and frame.f_code.co_filename.startswith(_IMPORTING):
            frame = frame.f_back
        file = Path("" if frame is None else frame.f_code.co_filename)
        if "site-packages" in file.parts:
            return None
        holding = (folder for folder in self.modules if file.is_relative_to(folder))
        return max(holding, key=lambda folder: len(folder.parts), default=None)


class _Again(importlib.abc.Loader):
    """Gives a module that was imported before."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: Any) -> ModuleType:
        """Return it."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it has run."""


_IMPORTING = ("<frozen importlib", importlib.__file__)
_FINDER = _Siblings()


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Run code of a folder: its modules are importable as in a script of it, and later by its own files.

    Its modules do not stay in ``sys.modules``, for another folder may have the same names.

    Args:
        folder: resolved.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.modules[folder] = {}
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = _file_of(sys.modules[name])
            if file and file.is_relative_to(folder) and "site-packages" not in file.parts:
                _FINDER.modules[folder][name] = sys.modules.pop(name)


def _file_of(module: Any) -> Path | None:
    """The file of a module, without asking its ``__getattr__``, which may raise anything."""
    try:
        file = object.__getattribute__(module, "__dict__").get("__file__")
        return Path(file).resolve() if isinstance(file, str) else None
    except (AttributeError, OSError, ValueError):  # not every entry of sys.modules is a module
        return None
