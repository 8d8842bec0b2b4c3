"""Models side by side, and beside their limit: what a training step or inference costs, and the ratios promised of it.

In the order of this file: clocks and counted memory; the machine, which stands beside every number; a comparison, whose
contenders take turns in one process; the pages of its results.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.common.checks import (
    check_choice,
    check_choices,
    check_integer,
    check_memory,
    check_number,
    invalid,
    processor,
    require,
)
from normfree.common.text import first_line, one_line
from normfree.nn import fold, has_foldable
from normfree.sources import build

__all__ = [
    "Clock",
    "Contender",
    "Part",
    "Precision",
    "Step",
    "Target",
    "Task",
    "hardware",
    "interleaved",
    "limit",
    "machine_name",
    "markdown",
    "measure",
    "ratios",
    "seconds",
    "shown",
    "spread",
]

MINIMUM_ROUNDS = 3
"""Fewest a median is taken of, also where the time is up."""


class Clock:
    """Wall-clock seconds of a call, an accelerator's work included.

    Args:
        device: what the call runs on.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, call: Callable[[], Any]) -> float:
        """Return the seconds ``call`` takes until its results are there."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Return when the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of a call on the CPU."""
    return Clock()(call)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    budget: float = float("inf"),
    clock: Callable[[Callable[[], Any]], float] = seconds,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round: A B C, A B C and so on.

    Args:
        calls: by name; each is expected to be warm.
        rounds: most to run.
        budget: seconds after which no further round starts, once there are three.
        clock: times one call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for completed in range(rounds):
        if completed >= MINIMUM_ROUNDS and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Return the ratio within each round, in which a drift of the machine cancels."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, quartiles and extremes."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


def shown(values: Mapping[str, float], digits: int = 3) -> str:
    """Return a spread in words: median (lower to upper quartile)."""
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f} to {values['q3']:.{digits}f})"


def peak_bytes(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Return the most bytes a call holds at one time, above those held when it starts.

    For a training step that starts without gradients these are activations, gradients and what operations need
    besides; parameters, the optimizer's state and the batch are there before.

    On an accelerator the caching allocator counts. On a CPU PyTorch's profiler records every allocation and release,
    in order: unlike resident memory it depends on no earlier call. Scratch memory that a library takes from the
    system by itself is not seen.

    Args:
        call: what to run, warm.
        device: where it runs.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = highest = 0
    for change in _allocations(call):
        held += change
        highest = max(highest, held)
    return highest


def _allocations(call: Callable[[], Any]) -> list[int]:
    """The bytes of each allocation on the CPU, in order; negative ones are releases."""
    from torch.profiler import ProfilerActivity, profile

    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler from reporting to stderr that it starts, stops and finds no GPU; restores the environment."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


PACKAGES = ("torch", "torchvision", "timm", "numpy")


def hardware() -> dict[str, Any]:
    """Return the machine and the versions of packages, which stand beside every measured number."""
    found = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def versions(found: dict[str, Any]) -> str:
    """Return what :func:`hardware` found as one sentence's words."""
    where = f"{found['cpu']}, {found['threads']} of {found['cores']} cores"
    if "gpu" in found:
        where = f"{found['gpu']}; {where}"
    return f"{where}; Python {found['python']}, " + ", ".join(f"{package} {found[package]}" for package in PACKAGES)


def machine_name(device: str | torch.device = "cpu") -> str:
    """Return a name for a folder of results: the device's, in lower case, such as ``nvidia-h200`` or ``amd-epyc-2``.

    Args:
        device: what ran the models; a CPU's name ends in the number of its cores.
    """
    if torch.device(device).type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = re.sub(r"\((R|TM|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", f"{processor()}") + f" {os.cpu_count()}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


Task = Literal["training", "inference"]
Precision = Literal["float32", "bfloat16"]

Step = Literal["limit", "folded", "compiled", "onnx"]
"""What may be done to a model before it is timed."""

ONLY_INFERENCE = ("folded", "onnx")

WARM_UP = 2
"""Calls before anything is measured: compilers, allocators and caches do their work in the first."""

LEARNING_RATE = 1e-4
"""Of the timed steps: small enough that the weights stay about where they start."""

Call = Callable[[], Any]


def measure(
    part: Part,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    lenient: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure one comparison, all contenders in this process.

    The rounds are A B C, A B C, …; ratios are taken within a round. In training the peak memory of one more step is
    taken of each. Gaussian images, channels last; every model is drawn with the same seed.

    Args:
        part: the comparison.
        device: where to run it.
        seed: of models and images.
        lenient: note a contender that cannot be had or fails under ``"failed"`` instead of raising.
        say: called with a line of progress.

    Returns:
        JSON's types: ``part``'s fields; where it was measured; per contender ``source``, ``steps``, ``seconds`` (a
        spread), ``raw_seconds`` and in training ``peak_bytes``; and ``targets`` as they were met.

    Raises:
        ValueError: a model that there is not, or that fails.
    """
    device = torch.device(device)
    load = os.getloadavg()[0]
    contenders: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = (part.batch_size, part.channels, part.image_size, part.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        batch = images.to(device, memory_format=torch.channels_last)
        for contender in part.contenders:
            say(f"{part.name}: {contender.label}")
            result = contenders[contender.label] = {"source": contender.source, "steps": list(contender.steps)}
            prepare = contender.training if part.task == "training" else contender.inference
            try:
                call = prepare(batch, getattr(torch, part.precision), seed)
                for _ in range(WARM_UP):
                    call()
            except Exception as error:
                if not lenient and isinstance(error, (ValueError, ImportError, OSError, MemoryError)):
                    raise
                if not lenient:
                    raise ValueError(
                        f"model: {contender.label} fails in {part.task} on images {list(shape)} ({one_line(error)}); "
                        "give a model that returns logits for them"
                    ) from error
                result["failed"] = first_line(error) if isinstance(error, ValueError) else one_line(error)
            else:
                calls[contender.label] = call
            gc.collect()
        say(f"{part.name}: rounds")
        times = interleaved(calls, rounds=part.rounds, budget=part.budget, clock=Clock(device))
        for label, values in times.items():
            contenders[label] |= {"seconds": spread(values), "raw_seconds": values}
            if part.task == "training":
                contenders[label]["peak_bytes"] = peak_bytes(calls[label], device)
    fields = ("name", "title", "task", "batch_size", "channels", "image_size", "precision")
    return {
        "schema": 1,
        **{name: getattr(part, name) for name in fields},
        "device": str(device),
        "seed": seed,
        "rounds": len(next(iter(times.values()), [])),
        "hardware": {**hardware(), "load": load},
        "contenders": contenders,
        "targets": [target.compare(contenders) for target in part.targets],
    }


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison, as data.

    Args:
        name: of its file.
        title: of its table.
        task: "training" (one step, and its peak memory) or "inference".
        contenders: who takes turns; names are unique.
        batch_size, channels, image_size: of the images [batch_size, channels, image_size, image_size].
        precision: "float32", or "bfloat16": autocast in training, the weights' own in inference.
        rounds: most to run.
        budget: seconds for all rounds.
        targets: ratios promised.

    Raises:
        ValueError: a value that breaks its rule.
    """

    name: str
    title: str
    task: Task
    contenders: Sequence[Contender]
    batch_size: int
    image_size: int
    channels: int = 3
    precision: Precision = "float32"
    rounds: int = 21
    budget: float = 60.0
    targets: Sequence[Target] = ()

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("batch_size", "channels", "image_size", "rounds"):
            check_integer(name, getattr(self, name), 1)
        check_memory("batch_size", self.batch_size, 4 * self.batch_size * self.channels * self.image_size**2)
        check_number("budget", self.budget, 0.0)
        labels = [contender.label for contender in self.contenders]
        if not labels or len(set(labels)) < len(labels):
            raise invalid("contenders", labels, "must be at least one, each once", "leave the repeated one out")
        if self.task == "training":
            for step in (step for contender in self.contenders for step in contender.steps if step in ONLY_INFERENCE):
                raise invalid("steps", step, "has no training step", 'compare it with task="inference"')
        unknown = {name for target in self.targets for name in (target.of, target.over)} - set(labels)
        assert not unknown, f"{self.name}: targets name {unknown}, who take no part"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise: the ratio of two contenders, in time or in memory.

    Attributes:
        of, over: names of the contenders, numerator and denominator.
        at_most: the ratio promised.
        quantity: "time" or "memory".
    """

    of: str
    over: str
    at_most: float
    quantity: Literal["time", "memory"] = "time"

    def __post_init__(self) -> None:
        check_choices(self)

    def compare(self, contenders: dict[str, Any]) -> dict[str, Any]:
        """Return the promise, the spread of what was measured and whether it is kept; None where one is missing."""
        above, below = (contenders.get(name, {}) for name in (self.of, self.over))
        measured = None
        if self.quantity == "time" and "raw_seconds" in above and "raw_seconds" in below:
            measured = spread(ratios(above["raw_seconds"], below["raw_seconds"]))
        elif self.quantity == "memory" and "peak_bytes" in above and "peak_bytes" in below:
            measured = spread([above["peak_bytes"] / below["peak_bytes"]])
        met = None if measured is None else measured["median"] <= self.at_most
        return {**vars(self), "measured": measured, "met": met}


@dataclass(frozen=True)
class Contender:
    """A model and what is done to it before it is timed.

    Args:
        source: as ``normfree.sources.build`` takes it.
        steps: in their order.
        name: what to call it; made of both by default.

    Raises:
        ValueError: an unknown step.
    """

    source: str
    steps: tuple[Step, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for step in self.steps:
            check_choice("steps", step, Step)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or ", ".join((self.source, *self.steps))

    def training(self, batch: Tensor, precision: torch.dtype, seed: int) -> Call:
        """Return a call that is one training step: forward pass, cross-entropy, backward pass, SGD with momentum.

        Args:
            batch: images [N, C, H, W], where the model is to run and in the memory format to be used.
            precision: float32, or that of autocast.
            seed: of the model.
        """
        model = self._model(batch.device, seed, training=True)
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True)
        labels = torch.zeros(len(batch), dtype=torch.long, device=batch.device)

        def step() -> None:
            with torch.autocast(batch.device.type, precision, enabled=precision != torch.float32):
                logits = model(batch)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def inference(self, batch: Tensor, precision: torch.dtype, seed: int) -> Call:
        """Return a call that is one forward pass in evaluation mode, without gradients; arguments of ``training``."""
        model = self._model(batch.device, seed, training=False).to(precision)
        batch = batch.to(precision)
        if "onnx" in self.steps:
            return _onnx_call(model, batch)

        def forward() -> Tensor:
            with torch.inference_mode():
                return model(batch)

        return forward

    def _model(self, device: torch.device, seed: int, *, training: bool) -> nn.Module:
        """The model, drawn with ``seed``, channels last, all steps done but ``onnx``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(self.source).model
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train(training)
        for step in self.steps:
            model = STEPS[step](model)
        return model


def limit(model: nn.Module) -> nn.Module:
    """Return the same graph with plain convolutions and activations only, to be trained.

    What a network would cost whose convolutions came with their weights ready: no normalizer, no standardization and
    no factor; every layer that folds is the plain convolution it folds to, with the same bias. It is made of the model
    itself, so that it cannot drift from it, and starts as the same function.

    Args:
        model: of our layers; it is left as it is.

    Returns:
        The copy, in the model's mode, every parameter of its own trainable.

    Raises:
        ValueError: nothing in it folds, so there is no standardization to compare with.
    """
    if not has_foldable(model):
        raise ValueError(f"model: {type(model).__name__} has no layer that folds, so its limit is itself")
    modes = {name: module.training for name, module in model.named_modules()}
    plain = fold(copy.deepcopy(model)).requires_grad_()
    for name, module in plain.named_modules():
        module.training = modes[name]
    return plain


STEPS: dict[Step, Callable[[nn.Module], nn.Module]] = {
    "limit": limit,
    "folded": fold,
    "compiled": lambda model: torch.compile(model),  # type: ignore[dict-item,return-value]
    "onnx": lambda model: model,  # exported when its batch is known
}
"""How each is done."""


def _onnx_call(model: nn.Module, batch: Tensor) -> Call:
    """Return a call of ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    from normfree.export import to_onnx

    onnxruntime = require("onnxruntime", "timing an ONNX file")
    with tempfile.TemporaryDirectory() as folder:
        written = to_onnx(model, batch, Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(written.path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: batch.contiguous().numpy()}
    return lambda: session.run(None, inputs)


# --- comparisons as Markdown ------------------------------------------------------------------------------------------


def markdown(results: Sequence[dict[str, Any]], title: str, remarks: str = "") -> str:
    """Return a page: the promises and whether they were kept, then a table per comparison.

    Args:
        results: as ``measure`` returns them; at least one.
        title: of the page.
        remarks: on the promises; below them, in Markdown.
    """
    assert results
    lines = [f"# {title}", "", f"{versions(results[0]['hardware'])}; seed {results[0]['seed']}.", ""]
    if any(result["targets"] for result in results):
        lines += promises(results)
    if remarks:
        lines += ["", remarks.rstrip()]
    for result in results:
        lines += ["", f"## {result['title']}", "", *comparison(result)]
    return "\n".join(lines) + "\n"


def promises(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of all targets, and of what the limit makes of them."""
    head = ["comparison", "ratio", "target", "measured, median (quartiles)", "", "the limit in its place"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        for target in result["targets"]:
            measured = target["measured"]
            verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
            if measured is None:
                found = "–"
            else:  # memory is counted, and has no spread
                found = shown(measured) if target["quantity"] == "time" else f"{measured['median']:.3f}"
            ratio = f"{target['of']} / {target['over']}, {target['quantity']}"
            cells = [result["title"], ratio, f"≤ {target['at_most']:.2f}", found, verdict, _bound(result, target)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bound(result: dict[str, Any], target: dict[str, Any]) -> str:
    """Return the ratio of times that no network of this graph can go below here: its limit's; nothing if unknown."""
    contenders = result["contenders"]
    limit = next((found for found in contenders.values() if "limit" in found["steps"] and "seconds" in found), None)
    over = contenders.get(target["over"], {})
    if target["quantity"] != "time" or limit is None or "seconds" not in over or "limit" in over["steps"]:
        return ""
    of = contenders[target["of"]]
    same = {*limit["steps"]} - {"limit"} == {*of["steps"]} - {"folded"}
    if not same or limit["source"] != of["source"]:
        return ""
    return f"{limit['seconds']['median'] / over['seconds']['median']:.3f}"


def comparison(result: dict[str, Any]) -> list[str]:
    """Return the lines of one comparison's table."""
    training = result["task"] == "training"
    head = ["", "milliseconds, median (quartiles)", "first / this"] + ["peak memory, MiB"] * training
    size = result["image_size"]
    setting = f"{result['batch_size']}×{result.get('channels', 3)}×{size}×{size}, {result['precision']}"
    lines = [
        f"{setting}, on {result['device']}; {result['rounds']} interleaved rounds, "
        f"load {result['hardware']['load']:.2f} at the start.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    first = next((c["seconds"]["median"] for c in result["contenders"].values() if "seconds" in c), None)
    for label, found in result["contenders"].items():
        if "failed" in found:
            lines.append(f"| {label} | {found['failed']} " + "| – " * (len(head) - 2) + "|")
            continue
        milliseconds = {key: 1e3 * value for key, value in found["seconds"].items()}
        cells = [label, shown(milliseconds, 2), f"{first / found['seconds']['median']:.3f}"]
        if training:
            cells.append(f"{found['peak_bytes'] / 2**20:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
