"""What all commands share: the options they have in common, checks of values, and the terminal they print to.

Imports no torch: ``normfree models`` and every ``--help`` come here first.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from normfree.common.checks import OTHER_NAMES, check_integer, check_seed, invalid
from normfree.common.files import check_place
from normfree.common.text import printable
from normfree.terminal import drop_output

_MODEL = (
    "A name of `normfree models`, torchvision:NAME or timm:NAME (arguments after a colon: nf_resnet50:width=1, "
    "torchvision:resnet18:num_classes=10; published weights by weights=DEFAULT of torchvision's and pretrained=True of "
    "timm's), FILE.py:FACTORY (which may return "
    "(model, batch)), a checkpoint of normfree.save, or a run's folder."
)
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_MODEL, metavar="MODEL")]
Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help=_MODEL, metavar="MODEL ...")]
TrainedModel = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        help="A run's folder, a checkpoint's folder, a .safetensors, .onnx or .pt2 file; or, with --weights, a name of "
        "`normfree models`, torchvision:NAME, timm:NAME or FILE.py:FACTORY.",
        metavar="MODEL",
    ),
]
Original = Annotated[
    str | None,
    tyro.conf.arg(
        help="Of a converted checkpoint, what builds the model it was made of: FILE.py:FACTORY, which is run, or "
        "another MODEL. Needed where that is no name of ours, torchvision's or timm's."
    ),
]
Device = Annotated[
    str | None, tyro.conf.arg(help="cpu, cuda, cuda:1, …; a GPU if there is one by default.", metavar="NAME")
]
ImageSize = Annotated[
    int | None,
    tyro.conf.arg(help="Height and width; that of a run's images, else what the model suggests, else 224, by default."),
]
Input = Annotated[
    str | None,
    tyro.conf.arg(
        help="What to measure with: gaussian (unit noise), photos (random crops of two photographs), a folder of "
        "images, or a source as train's --data.source takes it (digits, parquet files, …). By default the batch that "
        "a factory gives, else gaussian.",
        metavar="gaussian|photos|FOLDER|SOURCE",
    ),
]
Mean = Annotated[
    tuple[float, ...] | None,
    tyro.conf.arg(
        help="Channel means that training subtracted from the images, of pixels in 0 to 1. By default those of the run "
        "that the model lies in; without one, ImageNet's, or for evaluate those of the data where they fit in memory."
    ),
]
Std = Annotated[
    tuple[float, ...] | None, tyro.conf.arg(help="Channel deviations that training divided by, as with the means.")
]
Seed = Annotated[int, tyro.conf.arg(help="Of initialisation and input.")]
Folder = Annotated[Path, tyro.conf.arg(help="Folder to write to.")]

MOST_BATCHES = 1_000_000
_AT_LEAST_ONE = ("batch_size", "batches", "image_size", "rounds", "limit_eval_steps", "top")


def check_options(options: Any) -> None:
    """Refuse values that no command takes: no model, a count below one, a seed that is none.

    Args:
        options: a command, a dataclass.

    Raises:
        ValueError: naming which, and why.
    """
    name = type(options).__name__.lower()
    for field in fields(options):
        value: Any = getattr(options, field.name)
        if field.name == "models" and not value:
            raise invalid(
                "models", value, "none given", f"for example: normfree {name} nf_resnet50 torchvision:resnet50"
            )
        if field.name == "seed":
            check_seed(value)
        if field.name in _AT_LEAST_ONE and value is not None:
            check_integer(field.name, value, 1)
            if field.name == "batches" and value > MOST_BATCHES:
                raise invalid("batches", value, f"must be at most {MOST_BATCHES:,}", "measure fewer")


def option_meant(word: str, command: type[Any]) -> str | None:
    """Return the option of a command that a word stands for: one of that last part, or of another usual name.

    Args:
        word: with its hyphens, and its value if that follows ``=``.
        command: the class of the command, a dataclass.
    """
    options = _options(command)
    field = word.partition("=")[0].rpartition(".")[2].lstrip("-").replace("-", "_").lower()
    return next((options[name] for name in (field, *OTHER_NAMES.get(field, ())) if name in options), None)


def without_none(command: type[Any]) -> type[Any]:
    """Return a command whose help says nothing of a default that is None, which nobody can type; its text says more.

    Args:
        command: the class of a command, a dataclass.
    """
    hints = get_type_hints(command, include_extras=True)
    silent = tyro.conf.arg(help_behavior_hint="")
    unset = [(one.name, Annotated[hints[one.name], silent], None) for one in fields(command) if one.default is None]
    kind = make_dataclass(command.__name__, unset, bases=(command,), frozen=True, kw_only=True)
    kind.__doc__ = command.__doc__
    return tyro.conf.DisallowNone[kind]


def with_option_names(message: str, command: type[Any]) -> str:
    """Return an error's message with options of the command line in the place of arguments of Python.

    ``evaluation_split='x': …; pass evaluation_split='y'`` becomes ``--data.evaluation-split='x': …; pass
    --data.evaluation-split='y'``. Arguments that the command has no option for stay.

    Args:
        message: begins with the argument, then ``=`` or ``:``.
        command: the class of the command, a dataclass.
    """
    options = _options(command)
    begin = re.match(r"(\w+)(?==|: )", message)
    if begin is None or begin[1] not in options:
        return message
    head, remedy = message[begin.end() :].partition("; ")[::2]
    remedy = re.sub(r"\b(\w+)=(?=\S)", lambda match: f"{options.get(match[1], match[1])}=", remedy)
    return options[begin[1]] + head + (f"; {remedy}" if remedy else "")


def _options(command: type[Any]) -> dict[str, str]:
    """Options by the names of their fields; of fields of one name the outermost, and none that are positional."""
    found: dict[str, str] = {}
    level: list[tuple[type[Any], str]] = [(command, "")]
    while level:
        nested: list[tuple[type[Any], str]] = []
        for kind, prefix in level:
            hints = get_type_hints(kind, include_extras=True)
            for field in fields(kind):
                hint, marks = _unwrapped(hints[field.name])
                name = next((m.name for m in marks if getattr(m, "name", None) is not None), field.name)
                inner = [one for one, _ in map(_unwrapped, (hint, *get_args(hint))) if isinstance(one, type)]
                inner = [one for one in inner if is_dataclass(one)]
                if inner:
                    omitted = name == "" or tyro.conf.OmitArgPrefixes in marks
                    nested.append((inner[0], prefix if omitted else f"{prefix}{name}."))
                elif tyro.conf.Positional not in marks:
                    found.setdefault(field.name, "--" + (prefix + name).replace("_", "-"))
        level = nested
    return {**found, **{field: found[option] for field, option in getattr(command, "same_as", {}).items()}}


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what it is annotated with."""
    return (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())


def check_folder(out: Path) -> None:
    """Refuse a folder that could not be written to, before any work is done; nothing is made yet.

    Raises:
        ValueError: naming the folder and why.
    """
    check_place("out", out, folder=True)


def command_line(name: str, options: Any, positional: Sequence[str], *, without: Sequence[str]) -> str:
    """A command's line in a shell, with the options that are not at their defaults, for the records it writes.

    Args:
        name: of the command.
        options: the command, a dataclass.
        positional: its words that need no name.
        without: fields to leave out: those of the positional words, and where results go.
    """
    words = ["normfree", name, *positional]
    for field in fields(options):
        value, option = getattr(options, field.name), "--" + field.name.replace("_", "-")
        if field.name in without or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return shlex.join(words)


class Terminal(Console):
    """A console of rich's whose own control codes are the only ones: those in texts are written as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)  # FILE.py:heart: is a model's name
        self._announced: set[str] = set()

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with printable text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))

    def say(self, text: str) -> None:
        """Print text as it is: no markup, no colours, no line breaks of the terminal's."""
        self.print(text, highlight=False, markup=False, soft_wrap=True)

    def announce(self, text: str) -> None:
        """Say what is about to be done; that nobody reads it (`| true`) is no reason not to do it."""
        try:
            self.say(text)
        except BrokenPipeError:
            self.quiet = True
            drop_output()

    def announce_once(self, text: str) -> None:
        """Announce what has not been announced before: a note that is the same for several models."""
        if text not in self._announced:
            self._announced.add(text)
            self.announce(text)

    def on_broken_pipe(self) -> None:
        """Raise the error of a closed pipe; rich's own answer, SystemExit, could be that of a model's code."""
        raise BrokenPipeError from None

    def say_written(self, paths: Iterable[Path], replaced: Iterable[Path] = ()) -> None:
        """Print which files were written, and in the place of which earlier ones."""
        earlier = " ".join(map(str, replaced))
        self.say("wrote " + " ".join(map(str, paths)) + (f", in the place of an earlier {earlier}" if earlier else ""))
