"""Trained networks, opened to be used: a run, a checkpoint, a file of weights, or an exported file."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from normfree.common.checks import invalid, require
from normfree.common.files import kind_of, notes_of, parse_dataclass, parse_json, read_json, refused
from normfree.common.text import first_line, one_line, quoted, shortened
from normfree.convert.record import NOTE as CONVERTED
from normfree.data import DataConfig
from normfree.data.config import Preprocessing
from normfree.models.registry import list_models, parse_overrides
from normfree.trace.preserve import check_finite, check_statistics
from normfree.train.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    MODEL,
    CheckpointStore,
    check_weights,
    verify_checkpoint,
)
from normfree.weights import load
from normfree.weights.checkpoint import BUILT_BY, NAMED

REMEDY = "export the network again"

MOST_INPUT = 2**31
"""Bytes of a batch that an exported file takes at most."""

SAME = 1e-4
"""Difference, also relative, of two answers to the same images that is rounding."""

FORMS = "a run's folder, a checkpoint's folder, or a .safetensors, .onnx or .pt2 file"


@dataclass(frozen=True)
class Trained:
    """A network and what to feed it.

    Attributes:
        network: takes standardized images [N, C, H, W] and returns logits; in evaluation mode, on the CPU.
        exported: whether it is an exported file, which knows its precision and device itself.
        data: as the run it comes from resolved them, in the size the network is evaluated at; None without a run.
        class_names: of the logits; None where neither the run nor the file says them.
        training_data: what tells the images it was trained on from others; empty where that is not known.
        size: height and width of images that it was converted on; None where that is not known.
        note: what a person should know before they read an accuracy; "" for nothing.
        preprocessing: of its images, as the file says it; None where it does not.
    """

    network: nn.Module
    exported: bool
    data: DataConfig | None
    class_names: tuple[str, ...] | None
    training_data: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    note: str = ""
    preprocessing: Preprocessing | None = None

    @property
    def prepared(self) -> DataConfig | Preprocessing | None:
        """How its images are cropped and standardized, as its run or its file has it; None where neither does."""
        return self.data or self.preprocessing

    @property
    def in_channels(self) -> Literal[1, 3] | None:
        """Channels of its images, 1 or 3, as an exported file or its first convolution has them; None without."""
        if isinstance(self.network, FixedBatch):
            first = self.network.channels
        else:
            first = next((part.in_channels for part in self.network.modules() if isinstance(part, nn.Conv2d)), None)
        return first if first in (1, 3) else None

    @property
    def image_size(self) -> int | None:
        """Height and width of its images, as its run or an exported file has them; None where neither says it."""
        fixed = self.network.size if isinstance(self.network, FixedBatch) else None
        return fixed or (self.size if self.prepared is None else self.prepared.image_size)


def open_trained(
    source: str | Path,
    run: str | Path | None = None,
    *,
    opened: Callable[[Path], nn.Module] = load,
    built: nn.Module | None = None,
    trust_code: bool = False,
) -> Trained:
    """Open a trained network.

    Args:
        source: a run's folder, a checkpoint's folder, or a .safetensors, .onnx or .pt2 file.
        run: folder of the run it comes from, which says how images are prepared; the one it lies in by default.
        opened: how to open a file of weights.
        built: the network itself, where ``source`` is a word that it was built by.
        trust_code: whether a .pt2 file may be opened. PyTorch's loader runs what such an archive says, so whoever wrote
            it decides what this process does; a .safetensors or .onnx file cannot.

    Raises:
        ValueError: if there is no such network, it is damaged, or a .pt2 file and not trusted.
    """
    path = Path(source)
    if built is not None:
        found = None if run is None else find_run(Path(run), required=True)
        network = _usable(built, path)
        network.eval()
        if found is None:
            return Trained(network, False, None, None)
        return Trained(network, False, found.data, found.classes, found.training_data)
    if (kind := kind_of(path)) not in ("file", "a folder", "nothing"):
        raise refused("model", path, f"is {kind}, no file", f"give {FORMS}")
    if path.suffix == ".pt2" and path.is_file() and not trust_code:
        rule = "PyTorch's loader of .pt2 files runs code that the file holds"
        remedy = "give an .onnx or .safetensors file, or --trust-code (trust_code=True) if you made it yourself"
        raise invalid("model", str(path), rule, remedy)
    if not path.exists():
        raise ValueError(f"model: there is no {quoted(str(path))}; give {FORMS}")
    found = find_run(path if run is None else Path(run), required=run is not None)
    data, names, images = (None, None, {}) if found is None else (found.data, found.classes, found.training_data)
    opener = None if path.is_dir() else {".onnx": OnnxNetwork, ".pt2": ProgramNetwork}.get(path.suffix)
    if opener is None:
        weights = weights_of(path)
        network, metadata = _usable(opened(weights), weights), notes_of(weights) or {}
    else:
        network = opener(path)
        metadata = network.metadata
    preprocessing, note = Preprocessing.read(metadata, path), ""
    if preprocessing is not None and found is not None:
        _check_prepared(preprocessing, found, path, exported=opener is not None)
    elif preprocessing is not None:
        names = preprocessing.classes
    if isinstance(network, FixedBatch) and data is not None and network.size not in (None, data.image_size):
        note = f"images are taken at {network.size} × {network.size} as the file has them, where the run's are "
        note += f"{data.image_size} × {data.image_size}"
        data = dataclasses.replace(data, image_size=network.size)
    return Trained(network, opener is not None, data, names, images, note=note, preprocessing=preprocessing)


def preprocessing_of(path: Path) -> Preprocessing | None:
    """Return how the images of a run's network are prepared, as the run says it, or else a file of its weights.

    Args:
        path: of the run, a checkpoint, or a file of weights.

    Raises:
        ValueError: what says it is damaged, or the two say different things.
    """
    run = find_run(path)
    if run is not None and path.is_dir():
        return Preprocessing.of(run.data, run.classes)
    said = Preprocessing.read(notes_of(weights_of(path)) or {}, path)
    if said is not None and run is not None:
        _check_prepared(said, run, path)
    return said if run is None else Preprocessing.of(run.data, run.classes)


def _check_prepared(said: Preprocessing, run: RunData, path: Path, *, exported: bool = False) -> None:
    """Raise if a file and its run do not say the same of images and classes; an exported file may have its own size."""
    __tracebackhide__ = True
    names = [one.name for one in dataclasses.fields(said) if not (exported and one.name == "image_size")]
    other = [n for n in names if getattr(said, n) != (run.classes if n == "classes" else getattr(run.data, n))]
    if other:
        rule = "says of its images or classes what its run, the one it lies in or that of --run, does not"
        remedy = "give the run it comes from, or move the file out of this one"
        raise refused("model", path, f"{rule} ({', '.join(other)})", remedy)


def _check_own(folder: Path, weights: Path) -> None:
    """Raise if weights that a folder stands for are of other images, classes or another network than its run's.

    What the weights do not note is not compared, nor is a network that the run took from a file or a function.
    """
    __tracebackhide__ = True
    run, notes = find_run(folder), notes_of(weights) or {}
    if run is None:
        return
    if (said := Preprocessing.read(notes, weights)) is not None:
        _check_prepared(said, run, weights)
    name, _, overrides = (run.model or "").partition(":")
    own = name in list_models()
    if run.model is None or not {BUILT_BY, *([NAMED, CONVERTED] if own else [])} & notes.keys():
        return
    try:
        wanted = {"name": name, **parse_overrides(overrides)} if own else {"model": run.model}
        noted = parse_json(notes[NAMED if own else BUILT_BY])
        of_data = ("num_classes", "in_channels", "padding")
        same = {key: value for key, value in noted.items() if key not in of_data} == json.loads(json.dumps(wanted))
    except (KeyError, ValueError, TypeError, AttributeError):  # no such note, or a forged one
        same = False
    if not same:
        rule = f"is of another network than its run's {CONFIG} says ({shortened(run.model, 120)})"
        raise refused("model", weights, rule, "restore both from a copy, or move the file out of this run")


def _usable(network: nn.Module, path: Path) -> nn.Module:
    """The network, of one precision, once it is known to have a classifier, and numbers as weights and statistics.

    Raises:
        ValueError: it has not.
    """
    try:
        check_finite(network)
        check_statistics(network)
        if getattr(network, "num_classes", None) == 0:
            raise ValueError("model: it has no classifier, and its features are no classes")
    except ValueError as error:
        raise refused("model", path, first_line(error), "give the weights of a trained network") from error
    kinds = {tensor.dtype for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()}
    return network.float() if len(kinds) > 1 else network


def weights_of(path: str | Path) -> Path:
    """Return the file of weights that a run or a checkpoint stands for.

    Of a run it is ``model.safetensors``, or, with a warning, its best checkpoint's before the run has ended; averaged
    weights go before those they are the average of. Any file stands for itself.

    Args:
        path: of a run, of a checkpoint, or of a file.

    Raises:
        ValueError: if the folder is neither, the checkpoint is damaged, or the run's files do not belong together.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / MANIFEST).is_file():
        weights = verify_checkpoint(path).weights
        _check_own(path, weights)
        return weights
    if (path / CONFIG).is_file() and (path / MODEL).is_file():
        remedy = f"restore both from a copy, or name the file itself: {shortened(str(path / MODEL), 80)}"
        check_weights(path, "model", remedy)
        _check_own(path, path / MODEL)
        return path / MODEL
    store = CheckpointStore(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    best = store.best()
    if best is None:
        raise ValueError(f"model: {str(path)!r} holds no run and no sound checkpoint; give {FORMS}")
    if (path / CONFIG).is_file():
        total = find_run(path, required=True).steps
        of = f" of {total:,}" if total else ""
        warnings.warn(
            f"the run in {path} has not ended; its weights are those of step {best.step:,}{of}",
            UserWarning,
            stacklevel=2,
        )
        _check_own(path, best.weights)
    return best.weights


@dataclass(frozen=True)
class RunData:
    """What a run's config.json says that its data and network have.

    Attributes:
        data: as the run resolved them, in the size the network is evaluated at.
        classes: names of the logits.
        training_data: what tells the images it was trained on from others.
        steps: of the whole run; None where an older one does not say.
        model: the word for its network.
    """

    data: DataConfig
    classes: tuple[str, ...]
    training_data: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    model: str | None = None


@overload
def find_run(path: Path, *, required: Literal[True]) -> RunData: ...
@overload
def find_run(path: Path, *, required: bool = False) -> RunData | None: ...
def find_run(path: Path, *, required: bool = False) -> RunData | None:
    """Return the data and the classes of the run in the nearest of a path and three folders above.

    Raises:
        ValueError: the run's config is damaged, or there is none and one is required.
    """
    for folder in (path, *path.absolute().parents)[:4]:
        file = folder / CONFIG
        if kind_of(file) == "nothing" or (kind_of(folder) != "a folder"):
            continue
        described = read_json(file, "run")
        config = described.get("config")
        if not isinstance(config, dict) or not isinstance(described.get("derived"), dict):
            continue  # a file of that name of something else
        try:
            names = {one.name for one in dataclasses.fields(RunData)} - {"model"}
            known = {name: value for name, value in described["derived"].items() if name in names}
            derived = parse_dataclass(RunData, known)
            if len(set(derived.classes)) < len(derived.classes):
                raise ValueError("RunData.classes: a class is there twice")
            size = config.get("evaluation_size") or derived.data.image_size
            word = word if isinstance(word := config.get("model"), str) else None
            return dataclasses.replace(derived, data=dataclasses.replace(derived.data, image_size=size), model=word)
        except ValueError as error:
            raise refused("run", file, f"is damaged ({first_line(error)})", "restore it from a copy") from error
    if required:
        raise refused("run", path, "is no run's folder", f"give one with a {CONFIG} of `normfree train`")
    return None


def image_sizes(shape: Sequence[object]) -> tuple[int | None, int | None, int | None]:
    """Return the number of examples, the channels and the size of the images that a file takes, None where any will do.

    Raises:
        ValueError: it does not take one batch of images.
    """
    if len(shape) != 4:
        raise ValueError(f"it takes {quoted(list(shape))}, no batch of images [N, C, H, W]")
    batch, channels, size = (one if isinstance(one, int) and one > 0 else None for one in (*shape[:2], shape[-1]))
    if 4 * (batch or 1) * (channels or 1) * (size or 1) ** 2 > MOST_INPUT:
        raise ValueError(f"it takes batches {quoted(list(shape))}, of more than {MOST_INPUT / 2**30:g} GiB")
    return batch, channels, size


def check_one_result(path: Path, names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a file gives one result: which of several are the logits, it does not say."""
    __tracebackhide__ = True
    if len(names) != 1:
        rule = f"returns {len(names)} results ({', '.join(map(quoted, names[:3]))}), not a number per class"
        raise refused("model", path, rule, "give a classifier")


class FixedBatch(nn.Module):
    """A network that takes one number of examples, or any.

    Attributes:
        path: of the file.
        batch_size: that number; None for any.
        size: height and width it takes; None for any.
        channels: of its images; None for any.
        metadata: text by name that it keeps.
    """

    path: Path
    metadata: Mapping[str, str]
    batch_size: int | None
    size: int | None
    channels: int | None
    answer: Callable[[Tensor], Tensor]
    is_compared = False

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; a last batch that is not full is filled up with zeros for the purpose.

        Raises:
            ValueError: it does not run, or gives other answers the second time (of the first images it is given).
        """
        images = images.float().cpu().contiguous()
        if self.size is not None and images.shape[-1] != self.size:
            raise ValueError(f"image_size: {images.shape[-1]}, but the file takes {self.size}; leave it out")
        try:
            answers = self._answers(images)
            again = answers if self.is_compared else self._answers(images)
            same = answers is again or torch.allclose(answers, again, SAME, SAME, equal_nan=True)
        except Exception as error:  # of ONNX Runtime's and the program's own kinds
            raise refused("model", self.path, f"does not run ({one_line(error)})", REMEDY) from error
        if not same:
            rule = "gives the same images another answer each time, as of a dropout in training or of random numbers"
            raise refused("model", self.path, rule, "export the network in evaluation mode")
        self.is_compared = True
        return answers

    def _answers(self, images: Tensor) -> Tensor:
        if self.batch_size is None:
            return self.answer(images)
        answers = []
        for part in images.split(self.batch_size):
            full = torch.cat([part, part.new_zeros(self.batch_size - len(part), *part.shape[1:])])
            answers.append(self.answer(full)[: len(part)])
        return torch.cat(answers)


class OnnxNetwork(FixedBatch):
    """An ONNX file, run by ONNX Runtime.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is damaged, takes anything but one batch of images, or gives several results.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        onnxruntime = require("onnxruntime", "an ONNX file")
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what matters is raised
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            (given,) = session.get_inputs()
            self.batch_size, self.channels, self.size = image_sizes(given.shape)
            names = [one.name for one in session.get_outputs()]
        except Exception as error:  # of its own kinds
            raise refused("model", path, f"ONNX Runtime does not run it ({first_line(error)})", REMEDY) from error
        check_one_result(path, names)
        self.metadata = session.get_modelmeta().custom_metadata_map
        self.answer = lambda images: torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


class ProgramNetwork(FixedBatch):
    """A torch.export program.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is damaged, takes anything but one batch of images, or gives several results.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        kept: dict[str, Any] = {Preprocessing.METADATA: ""}
        try:
            program = torch.export.load(path, extra_files=kept)
            (name,) = program.graph_signature.user_inputs
            (shape,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == name)
            self.batch_size, self.channels, self.size = image_sizes(shape)
            module = program.module()
            names = [str(one) for one in program.graph_signature.user_outputs]
        except Exception as error:  # a damaged file raises almost anything
            raise refused("model", path, f"PyTorch does not load it ({first_line(error)})", REMEDY) from error
        check_one_result(path, names)
        self.metadata = {name: text for name, text in kept.items() if text}
        self.answer = lambda images: module(images)  # not as a child: a program has no mode to change
