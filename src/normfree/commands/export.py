"""``normfree export``: a model as a file that runs without us."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich import filesize
from rich.markup import escape

from normfree.commands.shared import ImageSize, Mean, Model, Original, Seed, Std, Terminal, check_options
from normfree.commands.signals import precision_of
from normfree.common.checks import check_memory, invalid
from normfree.common.torch_compat import import_tracer
from normfree.data import DataConfig, open_evaluation, with_any_split
from normfree.data.config import Preprocessing, check_statistics, preparation
from normfree.export import Exported, to_onnx, to_program
from normfree.export.exported import check_path, is_exported
from normfree.signal import input_shape
from normfree.sources import Built, build, is_word
from normfree.train.evaluation import logits_of
from normfree.train.trained import preprocessing_of

WRITERS = {"onnx": to_onnx, "pt2": to_program}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Fold a model into plain convolutions and write it as an ONNX file or a torch.export program.

    The file is read back, run on random input and compared with the model; one that differs is not kept.
    """

    model: Model
    original: Original = None
    format: Annotated[str | None, tyro.conf.arg(metavar="onnx|pt2")] = None
    """onnx (ONNX Runtime and its like) or pt2 (PyTorch); what --out ends in by default, onnx without it."""
    dynamic_batch: bool = False
    """Let the file take any number of examples instead of --batch-size."""
    batch_size: int | None = None
    """Examples in a batch; 1 by default."""
    image_size: ImageSize = None
    tolerance: float | None = None
    """Largest difference from the model, relative to its largest output; 3.5e-4 by default in float32."""
    source: str | None = None
    """Data that the model was trained on (a folder, *.parquet, …): the file keeps the names of their classes, and how
    images are prepared: --mean, --std, --crop-ratio. Of a run's network it is known."""
    mean: Mean = None
    std: Std = None
    crop_ratio: float | None = None
    """Share of the shorter side that the centre crop takes; 0.875 by default."""
    seed: Seed = 0
    out: Path | None = None
    """File to write, *.onnx or *.pt2; out/export/MODEL.FORMAT by default. An earlier one of that name is replaced."""

    def __post_init__(self) -> None:
        if self.format not in (None, *WRITERS):
            listed = ", ".join(map(repr, WRITERS))
            raise invalid("format", self.format, "unknown format", f"choose one of {listed}")
        check_options(self)
        check_statistics(self.mean, self.std)
        for name in ("mean", "crop_ratio"):
            if self.source is None and (value := getattr(self, name)) is not None:
                raise invalid(name, value, "it is of the data that --source names", "give --source, too")
        self._place()

    def run(self, console: Terminal) -> None:
        """Export, and say what was written and how far it differs."""
        kind, path = self._place()
        check_path(path, f".{kind}")
        replaced = path.exists()
        if replaced and not is_exported(path):
            raise invalid("out", str(path), f"exists, and is no {kind} file", "give another name")
        import_tracer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            built = build(self.model, self.original)
            batch = self._batch(built) if built.batch is None else self._own(built.batch)
        if self.source is not None:
            said = self._preprocessing(console, built, batch)
        else:
            said = None if is_word(self.model) else preprocessing_of(Path(self.model))
            said = said and dataclasses.replace(said, image_size=batch.shape[-1])
        with console.status(f"exporting {escape(self.model)}"):
            write, options = WRITERS[kind], {"dynamic_batch": self.dynamic_batch, "tolerance": self.tolerance}
            metadata = None if said is None else said.to_metadata()
            written = write(built.model, batch, path, metadata=metadata, **options)
        self._print(console, written, built, said, replaced=replaced)

    def _preprocessing(self, console: Terminal, built: Built, batch: Any) -> Preprocessing:
        """How images of the source are prepared, and its classes.

        Raises:
            ValueError: the model takes no images, or tells another number of classes apart.
        """
        if not isinstance(batch, torch.Tensor) or batch.dim() != 4:
            raise invalid("source", self.source, "the model takes no batch of images", "leave it out")
        sizes: dict[str, Any] = {"in_channels": batch.shape[1], "image_size": batch.shape[-1], "batch_size": 1}
        if self.crop_ratio is not None:
            sizes["crop_ratio"] = self.crop_ratio
        config = DataConfig(source=self.source or "", mean=self.mean, std=self.std, **sizes)
        data = open_evaluation(with_any_split(config))
        built.model.eval()
        with torch.no_grad():
            logits_of(built.model, batch, len(data.class_names))
        if self.mean is None:
            console.say(preparation(*data.config.statistics, "measured on the data"))
        return Preprocessing.of(data.config, data.class_names)

    def _batch(self, built: Built) -> torch.Tensor:
        """Unit Gaussian noise in the model's precision, of the shape it suggests or the sizes asked for."""
        try:
            shape = built.shape or input_shape(built.model)
        except ValueError as error:
            remedy = "let FACTORY of FILE.py return (model, batch)"
            raise ValueError(f"model: the shape of its input cannot be inferred; {remedy}") from error
        if self.image_size is not None:
            if len(shape) != 3:
                rule = f"the model takes {list(shape)}, not an image"
                raise invalid("image_size", self.image_size, rule, "leave --image-size out")
            shape = (shape[0], self.image_size, self.image_size)
            check_memory("image_size", self.image_size, 4 * math.prod(shape))
        check_memory("batch_size", self.batch_size, 4 * (self.batch_size or 1) * math.prod(shape))
        return torch.randn(self.batch_size or 1, *shape).to(precision_of(built.model))

    def _own(self, batch: Any) -> Any:
        """The factory's own batch, which leaves no size to choose."""
        for name in ("batch_size", "image_size"):
            if (value := getattr(self, name)) is not None:
                remedy = f"leave --{name.replace('_', '-')} out, or return the model alone"
                raise invalid(name, value, "the factory gives the batch", remedy)
        return batch

    def _place(self) -> tuple[str, Path]:
        """The format and the file, of which either may say the other."""
        if self.out is None:
            kind = self.format or "onnx"
            word = re.sub(r"\.(safetensors|py)\b", "", self.model.rpartition("/")[2])
            return kind, Path("out/export") / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', word).strip('-')}.{kind}"
        kind = self.format or self.out.suffix.removeprefix(".")
        if self.out.suffix != f".{kind}" or kind not in WRITERS:
            ending = f".{self.format}" if self.format else ".onnx or .pt2"
            raise invalid("out", str(self.out), f"does not end in {ending}", "rename it")
        return kind, self.out

    def _print(
        self, console: Terminal, written: Exported, built: Built, said: Preprocessing | None, *, replaced: bool
    ) -> None:
        """Print what was written, what it was checked with, and how far it differs."""
        sizes = ", ".join(map(str, written.batch_sizes))
        assumed = self.image_size is None and built.shape is None and built.batch is None
        is_image = [len(shape) for shape in written.input_shapes] == [4]
        lines = {
            "input": " and ".join(_shape(shape, written.dynamic_batch) for shape in written.input_shapes)
            + (f", checked with N = {sizes}" if written.dynamic_batch else "")
            + ("; the image's size is assumed, --image-size N exports another" if assumed and is_image else ""),
            "operators": ", ".join(f"{count} {name}" for name, count in written.operators.items())
            + ("" if written.opset is None else f" (ONNX opset {written.opset})"),
            "folding": f"the folded model differs from the model by {written.folding}",
            "file": f"the file differs from the folded model by {written.file}; tolerance {written.tolerance:.1e}",
        }
        if written.rehearsal is not None:
            silent = f"{len(written.silent)} all-zero weights and biases"
            lines["rehearsal"] = f"with the {silent} drawn at random, a scratch file differed by {written.rehearsal}"
        if said is not None:
            lines["metadata"] = f"{said.METADATA}: crop, means and deviations of images, {len(said.classes)} classes"
        elif not built.random and is_image:
            lines["metadata"] = (
                "none: --source DATA keeps in the file how images are prepared and what classes are called"
            )
        if built.random:
            lines["note"] = f"these weights are random (seed {self.seed}); give a checkpoint to export trained ones"
        earlier = ", in the place of an earlier one" if replaced else ""
        lines["wrote"] = f"{written.path} ({filesize.decimal(written.size)}){earlier}"
        for name, value in lines.items():
            console.say(f"{name:<10} {value}")


def _shape(shape: tuple[int, ...], dynamic_batch: bool) -> str:
    return "×".join(["N", *map(str, shape[1:])] if dynamic_batch else map(str, shape))
