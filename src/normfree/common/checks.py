"""Argument checks shared by all.

Every message names the argument, the value, the rule and the remedy, in that order.
"""

from __future__ import annotations

import difflib
import importlib
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from normfree.common.text import LONGEST_PART, all_lines, printable, quoted, shortened

Choice = TypeVar("Choice")

LISTED = 20
"""Names an error message lists at most."""

EXTRAS = {
    "plot": ("matplotlib", "plotly"),
    "vision": ("torchvision", "PIL"),
    "train": ("lightning", "torchmetrics", "tensorboard", "datasets", "sklearn", "yaml"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "hub": ("huggingface_hub",),
    "timm": ("timm",),
}
"""What the package is used without, by the extra of pyproject.toml that installs it, as Python imports it."""

SERVICES = ("wandb", "mlflow", "transformers")
"""What is used beside ours where somebody has it; of the same name for pip."""


LAUNCHED_WITH = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "MASTER_PORT"), 0),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS"), 1),
}
"""Variables of the environment that tell a process its place among others, by the least that they can be. Fabric and
torchmetrics read them, some as they are imported."""


def invalid(argument: str, value: object, rule: str, remedy: str) -> ValueError:
    """Return (not raise) the ``ValueError`` that says what is wrong with an argument and how to mend it."""
    said = f"{argument}={quoted(value)}: {shortened(rule, LONGEST_PART)}; {remedy}"
    return ValueError(shortened(printable(said)))


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of ``names`` that look most like ``name``, the most similar first."""
    return difflib.get_close_matches(name, sorted(names), n=count, cutoff=0.4)


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return a remedy for an unknown name: the nearest known ones, or the first of all if none is near."""
    known = sorted(names)
    if close := nearest(name, known):
        return f"did you mean {', '.join(close)}?"
    more = f", … ({len(known)} in all)" if len(known) > LISTED else ""
    return f"choose one of {', '.join(known[:LISTED])}{more}"


OTHER_NAMES = {
    "lr": ("learning_rate",),
    "wd": ("weight_decay",),
    "optimizer": ("rule",),
    "opt": ("rule",),
    "warmup": ("warmup_epochs",),
    "clip": ("clip_norm",),
    "grad_clip": ("clip_norm",),
    "max_grad_norm": ("clip_norm",),
    "agc": ("clip_factor",),
    "ema": ("average_decay",),
    "epoch": ("epochs",),
    "num_epochs": ("epochs",),
    "bs": ("batch_size",),
    "batch": ("batch_size",),
    "num_workers": ("workers",),
    "device": ("accelerator",),
    "gpu": ("accelerator", "device"),
    "gpus": ("accelerator", "device"),
    "amp": ("precision",),
    "fp16": ("precision",),
    "bf16": ("precision",),
    "dtype": ("precision",),
    "data": ("source", "input"),
    "data_dir": ("source", "input"),
    "dataset": ("source", "input"),
    "val_split": ("holdout", "split"),
    "size": ("image_size",),
    "img_size": ("image_size",),
    "resolution": ("image_size",),
    "arch": ("model",),
    "pretrained": ("start",),
    "o": ("out", "json"),
    "output": ("out", "json"),
    "output_dir": ("out",),
    "outdir": ("out",),
}
"""Settings by the names that other programs have for them; of several the first that there is."""


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values of a type of choices: a ``Literal``, or a union of some with ``bool`` and ``None``.

    Any other type has none. An argument's type is the one list of its choices, for type checkers, editors and
    :func:`check_choice`.
    """
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) not in (Union, UnionType):
        return ()
    alone: dict[Any, tuple[Any, ...]] = {bool: (True, False), NoneType: (None,)}
    parts = [alone.get(part) or choices_of(part) for part in get_args(hint)]
    named = any(choices_of(part) for part in get_args(hint))
    return tuple(choice for part in parts for choice in part) if named and all(parts) else ()


def check_choice(argument: str, value: Choice, hint: Any) -> Choice:
    """Return ``value`` if it is one of :func:`choices_of` the argument's type; raise ``ValueError`` otherwise."""
    __tracebackhide__ = True
    choices = choices_of(hint)
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise invalid(argument, value, "unknown choice", f"choose one of {listed}")
    return value


def check_choices(config: Any) -> None:
    """Check every field of a dataclass whose type is one of choices."""
    __tracebackhide__ = True
    hints = get_type_hints(type(config))
    for field in fields(config):
        if choices_of(hints[field.name]):
            check_choice(field.name, getattr(config, field.name), hints[field.name])


def is_integer(value: object) -> bool:
    """Tell whether ``value`` is an ``int`` and not a ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a finite ``int`` or ``float`` and not a ``bool``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(argument: str, value: int, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``; raise ``ValueError`` otherwise."""
    __tracebackhide__ = True
    if not is_integer(value) or value < minimum:
        rule = f"must be an integer of at least {minimum}"
        raise invalid(argument, value, rule, f"pass {argument}={minimum} or more")
    return value


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is an integer that torch's and numpy's generators take: from 0 to 2**63 - 1."""
    __tracebackhide__ = True
    if not is_integer(seed) or not 0 <= seed < 2**63:
        raise invalid("seed", seed, "must be an integer from 0 to 2**63 - 1", "give one such as 0")
    return seed


def check_number(argument: str, value: float, minimum: float = -math.inf, *, exclusive: bool = False) -> float:
    """Return ``value`` as a float if it is finite and at least (or, if exclusive, above) ``minimum``."""
    __tracebackhide__ = True
    if not is_number(value) or value < minimum or (exclusive and value == minimum):
        bound = f" {'above' if exclusive else 'of at least'} {minimum:g}" if math.isfinite(minimum) else ""
        raise invalid(argument, value, f"must be a finite number{bound}", "pass such a number")
    return float(value)


def check_rate(argument: str, value: float) -> float:
    """Return ``value`` as a float if it lies in [0, 1); raise ``ValueError`` otherwise."""
    __tracebackhide__ = True
    if not is_number(value) or not 0 <= value < 1:
        rule = "must be a number of at least 0 and below 1"
        raise invalid(argument, value, rule, f"pass {argument}=0 to switch it off")
    return float(value)


def check_flag(argument: str, value: bool) -> bool:
    """Return ``value`` if it is a ``bool``; raise ``ValueError`` otherwise."""
    __tracebackhide__ = True
    if not isinstance(value, bool):
        raise invalid(argument, value, "must be True or False", f"pass {argument}=True or {argument}=False")
    return value


def check_integers(argument: str, values: Sequence[int], count: int, minimum: int = 1) -> tuple[int, ...]:
    """Return ``values`` as a tuple if they are ``count`` integers of at least ``minimum``."""
    __tracebackhide__ = True
    listed = isinstance(values, (tuple, list))
    if not listed or len(values) != count or not all(is_integer(v) and v >= minimum for v in values):
        rule = f"must be {count} integers of at least {minimum}"
        raise invalid(argument, values, rule, f"pass {argument} with one such integer per stage")
    return tuple(values)


def check_memory(argument: str, value: object, size: int) -> None:
    """Raise if so many bytes are more than the machine's memory.

    Args:
        argument: that asks for them.
        value: of the argument.
        size: bytes.

    Raises:
        ValueError: they are more.
    """
    __tracebackhide__ = True
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system says
        memory = 2**48
    if size > memory:
        rule = f"takes {size / 2**30:.4g} GiB, and this machine has {memory / 2**30:.4g}"
        raise invalid(argument, value, rule, "pass less")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that can still be used: of the machine, or of the container if it has less.

    Args:
        root: where the system's own files are.

    Returns:
        None where the system does not say (Linux alone does, in ``/proc/meminfo`` and ``/sys/fs/cgroup``).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0))  # of files, and given up when memory is asked for
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    return min(free, max(limit - used + cached, 0))


def processor() -> str:
    """Return the name of the machine's processor, as Linux has it, or of its kind elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of a package of :data:`EXTRAS` or :data:`SERVICES`, or say what needs it and how to install it.

    Args:
        module: its dotted name, such as ``"plotly.graph_objects"``.
        purpose: what needs it, such as ``"the report"``.

    Returns:
        The module.

    Raises:
        ImportError: it is missing or broken; one line.
        ValueError: it reads variables of the environment, and one has a value that neither torchrun nor Slurm sets.
    """
    __tracebackhide__ = True
    package = module.partition(".")[0]
    for name, least in LAUNCHED_WITH.items() if package in ("lightning", "torchmetrics") else ():
        value = os.environ.get(name)
        if value is not None and not (value.isdecimal() and int(value) >= least):
            rule = f"of the environment, must be a whole number of at least {least}, as torchrun and Slurm set it"
            raise invalid(name, value, rule, f"unset {name}, or start with torchrun")
    extra = next((f"'normfree[{name}]'" for name, packages in EXTRAS.items() if package in packages), package)
    assert extra != package or package in SERVICES, f"{package} is in no extra"
    try:
        importlib.import_module(package)  # first: if it is missing, the error has its name, not the submodule's
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "is not installed" if missing else f"cannot be imported ({all_lines(error)})"
        message = f"{purpose} needs {package}, which {reason}; pip install {extra}"
        raise ImportError(message, name=package) from error
