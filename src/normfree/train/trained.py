"""Trained networks, opened to be used: a run, a checkpoint, a file of weights, or an exported file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.data import DataConfig
from normfree.nn.checks import invalid
from normfree.signal.packages import required
from normfree.text import first_line
from normfree.train.checkpoint import MANIFEST, CheckpointStore, verified
from normfree.train.config import from_dict
from normfree.train.run import CHECKPOINTS, CONFIG, MODEL
from normfree.weights import load

FORMS = "a run's folder, a checkpoint's folder, or a .safetensors, .onnx or .pt2 file"


@dataclass(frozen=True)
class Trained:
    """A network and what to feed it.

    Attributes:
        network: takes standardized images [N, C, H, W] and returns logits; in evaluation mode, on the CPU.
        exported: whether it is an exported file, which knows its precision and device itself.
        data: as the run it comes from resolved them, in the size the network is evaluated at; None without a run.
        class_names: of the logits; None without a run.
    """

    network: nn.Module
    exported: bool
    data: DataConfig | None
    class_names: tuple[str, ...] | None


def open_trained(
    source: str | Path,
    run: str | Path | None = None,
    *,
    opened: Callable[[Path], nn.Module] = load,
    trust_code: bool = False,
) -> Trained:
    """Open a trained network.

    Args:
        source: a run's folder, a checkpoint's folder, or a .safetensors, .onnx or .pt2 file.
        run: folder of the run it comes from, which says how images are prepared; the one it lies in by default.
        opened: how to open a file of weights.
        trust_code: whether a .pt2 file may be opened. PyTorch's loader runs what such an archive says, so whoever wrote
            it decides what this process does; a .safetensors or .onnx file cannot.

    Raises:
        ValueError: if there is no such network, it is damaged, or a .pt2 file and not trusted.
    """
    path = Path(source)
    if path.suffix == ".pt2" and path.exists() and not trust_code:
        rule = "PyTorch's loader of .pt2 files runs code that the file holds"
        remedy = "give an .onnx or .safetensors file, or --trust-code (trust_code=True) if you made it yourself"
        raise invalid("model", str(path), rule, remedy)
    if not path.exists():
        raise ValueError(f"model: there is no {str(path)!r}; give {FORMS}")
    described = _described(path if run is None else Path(run), required=run is not None)
    data = names = None
    if described is not None:
        derived, config = described["derived"], described["config"]
        data, names = from_dict(DataConfig, derived["data"]), tuple(derived["classes"])
        data = dataclasses.replace(data, image_size=config["evaluation_size"] or data.image_size)
    if opener := {".onnx": OnnxNetwork, ".pt2": ProgramNetwork}.get(path.suffix):
        network = opener(path)
        if data is not None and network.size is not None:
            data = dataclasses.replace(data, image_size=network.size)
        return Trained(network, True, data, names)
    return Trained(opened(weights_of(path)), False, data, names)


def weights_of(path: str | Path) -> Path:
    """Return the file of weights that a run or a checkpoint stands for.

    Of a run it is ``model.safetensors``, or its best checkpoint's before the run has ended; averaged weights go
    before those they are the average of. Any file stands for itself.

    Args:
        path: of a run, of a checkpoint, or of a file.

    Raises:
        ValueError: if the folder is neither, or the checkpoint is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / MANIFEST).is_file():
        return verified(path).weights
    if (path / CONFIG).is_file() and (path / MODEL).is_file():
        return path / MODEL
    store = CheckpointStore(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    best = store.best()
    if best is None:
        raise ValueError(f"model: {str(path)!r} holds no run and no sound checkpoint; give {FORMS}")
    return best.weights


def _described(path: Path, *, required: bool) -> dict[str, Any] | None:
    """What the nearest folder above says of its run."""
    for folder in (path, *path.absolute().parents)[:4]:
        file = folder / CONFIG
        if file.is_file():
            try:
                described = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"run: {str(file)!r} is no sound JSON file: {error}") from error
            if isinstance(described, dict) and {"config", "derived"} <= set(described):
                return described
    if required:
        raise ValueError(f"run: {str(path)!r} is no run's folder; give one with a {CONFIG} of `normfree train`")
    return None


class FixedBatch(nn.Module):
    """A network that takes one number of examples, or any.

    Attributes:
        batch_size: that number; None for any.
        size: height and width it takes; None for any.
    """

    batch_size: int | None
    size: int | None
    answer: Callable[[Tensor], Tensor]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; a last batch that is not full is filled up with zeros for the purpose."""
        images = images.float().cpu().contiguous()
        if self.size is not None and images.shape[-1] != self.size:
            raise ValueError(f"image_size: {images.shape[-1]}, but the file takes {self.size}; leave it out")
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
        ValueError: if it is damaged, or takes anything but one batch of images.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        onnxruntime = required("onnxruntime", "an ONNX file")
        try:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (given,) = session.get_inputs()
        except Exception as error:  # of its own kinds
            raise ValueError(f"model: ONNX Runtime does not run {str(path)!r}: {first_line(error)}") from error
        sizes = [size if isinstance(size, int) else None for size in given.shape]
        self.batch_size, self.size = sizes[0], sizes[-1]
        self.answer = lambda images: torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


class ProgramNetwork(FixedBatch):
    """A torch.export program.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is damaged, or takes anything but one batch of images.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            program = torch.export.load(path)
            (name,) = program.graph_signature.user_inputs
        except Exception as error:  # a damaged file raises almost anything
            raise ValueError(f"model: PyTorch does not load {str(path)!r}: {first_line(error)}") from error
        (shape,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == name)
        sizes = [size if isinstance(size, int) else None for size in shape]
        self.batch_size, self.size = sizes[0], sizes[-1]
        module = program.module()
        self.answer = lambda images: module(images)  # not as a child: a program has no mode to change
