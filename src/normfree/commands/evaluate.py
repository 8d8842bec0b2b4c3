"""``normfree evaluate`` and ``normfree predict``: how good a trained network is, and what it says of images."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor

from normfree.commands.shared import Mean, Original, Std, Terminal, TrainedModel, check_options
from normfree.common.checks import invalid, require
from normfree.common.files import check_file, check_place, kind_of, refused, walk, write_atomically
from normfree.common.text import printable, quoted
from normfree.data import (
    DataConfig,
    EvaluationData,
    OnBadImage,
    Standardization,
    identify_training,
    open_evaluation,
    with_any_split,
)
from normfree.data.config import check_image_size, check_statistics, cropping, imagenet_statistics, preparation
from normfree.data.holdout import HoldoutSource
from normfree.train.config import Accelerator, Precision
from normfree.train.trained import MOST_INPUT, Trained, open_trained

MOST_IMAGES = 10_000
"""Images that are predicted at once: 1.5 GB at 224 pixels."""


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What both commands take."""

    same_as: ClassVar[dict[str, str]] = {"run": "run_folder"}
    """Options by the names that errors have for them: an argument, or the field of the data that they change."""

    model: TrainedModel
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run that says how images are prepared and what the classes are; the one the model lies in by default."""
    original: Original = None
    weights: Path | None = None
    """State dict of a MODEL that is built by a word: .safetensors, or a .pth of torch.save(model.state_dict(), …). Of a
    checkpoint of several, averaged weights are taken, and FILE:KEY takes those of that key."""
    trust_code: bool = False
    """Open a .pt2 file although it can run code of whoever wrote it; an .onnx file cannot."""
    image_size: int | None = None
    """Height and width; as in the run or the exported file by default, else that of the data, else 224."""
    mean: Mean = None
    std: Std = None
    crop_ratio: float | None = None
    """Share of the shorter side that the centre crop of an image of another size takes; as in the run or the file by
    default, else 0.875."""

    def __post_init__(self) -> None:
        if self.crop_ratio is not None:
            DataConfig(crop_ratio=self.crop_ratio)  # whose rules it keeps
        check_statistics(self.mean, self.std)
        check_options(self)
        check_image_size("image_size", self.image_size)

    def open(self, console: Terminal) -> Trained:
        """Return the network; what a person should know of its weights or its images' size is said."""
        from normfree.convert import conversion_of
        from normfree.sources import build, example_shape, is_word, load_checkpoint, load_weights

        if is_word(self.model):
            built = build(self.model, self.original)
            if self.weights is not None:
                load_weights(built.model, self.model, self.weights)
            elif built.random:
                self.tell(console, f"the weights of {self.model} are random; --weights FILE takes trained ones")
            return open_trained(self.model, self.run_folder, built=built.model)
        if self.weights is not None:
            rule = f"{quoted(self.model)} has weights of its own"
            raise invalid("weights", str(self.weights), rule, "leave it out, or give what builds the model as MODEL")
        with_original = partial(load_checkpoint, original=self.original)
        trained = open_trained(self.model, self.run_folder, opened=with_original, trust_code=self.trust_code)
        if trained.note:
            self.tell(console, trained.note)
        shape = example_shape(conversion_of(trained.network))
        return trained if shape is None or len(shape) != 3 else dataclasses.replace(trained, size=shape[-1])

    def tell(self, console: Terminal, line: str) -> None:
        """Say a line beside the result."""
        console.say(line)


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Trained):
    """Measure loss, top-1 and top-5 of a trained network, on the data of its run or on other data.

    Under torchrun the images are divided among the processes.
    """

    same_as: ClassVar[dict[str, str]] = {"evaluation_split": "split", "run": "run_folder"}

    source: str | None = None
    """Other data: digits, a folder, *.parquet, *.tar, hub:OWNER/NAME."""
    split: str | None = None
    """Split to evaluate on; by default that of the run's data, else validation if there is one, else test, else all."""
    batch_size: int | None = None
    """Images at once; 256 by default, fewer of large ones."""
    workers: int | None = None
    """Processes that decode; as in the run by default."""
    on_bad_image: OnBadImage | None = None
    """What a damaged image does; as in the run by default."""
    limit_eval_steps: int | None = None
    """Evaluate on so many batches only."""
    accelerator: Accelerator = "auto"
    """auto: a GPU if there is one."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware multiplies it natively; else fp32. Exported files have their own."""
    json: Path | None = None
    """File to write the numbers and the confusion matrix to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json is not None:
            check_place("json", self.json)

    def run(self, console: Terminal) -> None:
        """Evaluate, and print how good it is."""
        from normfree.train.distributed import launch, resolve_precision
        from normfree.train.evaluation import evaluate

        trained = self.open(console)
        fabric = launch("cpu" if trained.exported else self.accelerator, "fp32" if trained.exported else self.precision)
        data = self._data(trained, fabric.global_rank, fabric.world_size)
        network = trained.network.to(fabric.device)
        found = evaluate(network, data, fabric, limit=self.limit_eval_steps)
        if not fabric.is_global_zero:
            return
        if not math.isfinite(found.loss):
            raise ValueError(
                f"model: the outputs of {quoted(self.model)} are not numbers; normfree spp says where it begins"
            )
        top5 = "" if found.top5 is None else f"  top-5 {100 * found.top5:.2f} %"
        skipped = f"  {len(data.bad_images)} bad images" if data.bad_images else ""
        precision = "fp32" if trained.exported else resolve_precision(self.precision, fabric.device.type)
        everything = self.source is not None and self.split is None and data.split == data.config.training_split
        images = f"{found.examples:,} images ({'all' if everything else data.split})"
        line = f"accuracy {100 * found.top1:.2f} %{top5}  loss {found.loss:.4f}  of {images}{skipped}"
        line += "" if precision == "fp32" else f"  in {precision}; --precision fp32 takes longer and rounds less"
        if self.json is not None:
            result: dict[str, Any] = {
                "model": self.model,
                "source": data.config.source,
                "split": data.split,
                **found.to_dict(),
            }
            result |= {"mean": data.config.mean, "std": data.config.std}
            result |= {"classes": list(data.class_names), "bad_images": data.bad_images}
            line += f"\nwrote {write_atomically(self.json, json.dumps(result) + chr(10))}"
        if trained.prepared is None and self.mean is None:
            console.say(preparation(*data.config.statistics, "measured on the data"))
        if trained.prepared is None and self.crop_ratio is None and not data.config.in_memory:
            console.say(cropping(data.config.size, data.config.crop_ratio))
        if everything:
            why, remedy = "they have no split to evaluate on", ""
            if trained.data is not None and trained.data.holdout:
                why = "they are not those that the run held some out of"
            elif trained.data is None:
                remedy = "; --run RUN takes those that its run held out, if it was trained on these"
            console.say(
                f"all images of {quoted(data.config.source)} are taken, for {why}; the network may have been trained "
                f"on some{remedy}"
            )
        console.say(line)

    def _data(self, trained: Trained, rank: int, world_size: int) -> EvaluationData:
        """The run's data with what the options change."""
        known = trained.data
        if known is None and self.source is None:
            rule = f"{quoted(self.model)} lies in no run, so its data are not known"
            raise invalid("source", None, rule, "pass --source or --run")
        if known is not None and self.source is None and "://" in known.source:
            rule = f"the data of the run in which {quoted(self.model)} lies are at {quoted(known.source)}"
            raise invalid("source", None, rule, "an address is opened where --source names it: give it, or other data")
        config = known or DataConfig()
        if known is None and self.source != "digits":  # which say both themselves
            config = DataConfig(in_channels=trained.in_channels, image_size=trained.image_size)
        if known is None and (said := trained.preprocessing) is not None:
            config = dataclasses.replace(config, crop_ratio=said.crop_ratio, mean=said.mean, std=said.std)
        options = ("source", "image_size", "mean", "std", "crop_ratio", "batch_size", "workers", "on_bad_image")
        changes = {option: getattr(self, option) for option in options} | {"evaluation_split": self.split}
        changes = {field: value for field, value in changes.items() if value is not None}
        changes["cache_folder"] = None  # the process's own, and no place that a run's file names
        if known is not None and self.workers is None:  # of the run's machine, which may have had more cores
            changes["workers"] = min(known.workers, os.cpu_count() or 1)
        if self.source is not None and known is not None and self.source != known.source:
            # What was found in the run's own data does not hold for others.
            changes |= {"in_memory": "auto", "streaming": "auto", "image_column": None, "label_column": None}
            changes |= {"num_classes": None, "evaluation_examples": None}
        size = self.image_size or config.image_size or 224
        fitting = max(1, min(256, MOST_INPUT // (4 * (config.in_channels or 3) * size**2)))
        config = dataclasses.replace(config, **{"batch_size": fitting, **changes})
        config = self._with_split(config, trained)
        return open_evaluation(config, rank=rank, world_size=world_size, classes=trained.class_names)

    def _with_split(self, config: DataConfig, trained: Trained) -> DataConfig:
        """The config with what the run held out, of the same images wherever they lie; other data are taken whole.

        Raises:
            ValueError: if the run's folder has other images now, and those held out would be others.
        """
        known = trained.data
        if known is not None and known.holdout:
            seen = {name: value for name, value in trained.training_data.items() if name != "examples"}
            if self.source in (None, known.source):
                if self.split in (None, HoldoutSource.name) and identify_training(config) != seen:
                    rule = "has other images than the run held some out of, which it may have been trained on"
                    raise invalid("source", config.source, rule, "restore them, or give other images by --source")
                return config
            with contextlib.suppress(ValueError):  # no such split
                if identify_training(config) == seen:
                    return config
        return with_any_split(dataclasses.replace(config, holdout=None)) if self.source is not None else config


@dataclass(frozen=True, kw_only=True)
class Predict(_Trained):
    """Name the most probable classes of images."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders, of which all images are taken, those in the folders below too."""
    top: int = 5
    """Classes to name."""
    json: bool = False
    """Print JSON: a list of {"image", "predictions": [{"class", "index", "probability"}]}."""

    def __post_init__(self) -> None:
        if not self.images:
            raise invalid("images", (), "none given", "for example: normfree predict runs/digits image.png")
        super().__post_init__()

    def run(self, console: Terminal) -> None:
        """Read all images first, then predict and print."""
        from normfree.train.evaluation import check_no_probabilities, logits_of

        require("torchvision", "predict")
        files = self._files()
        trained = self.open(console)
        images, standardization, said = self._images(trained, files)
        if said:
            self.tell(console, said)
        names = trained.class_names
        with torch.no_grad():
            parts = map(standardization, images.split(64))
            logits = torch.cat([logits_of(trained.network, part, None) for part in parts])
        check_no_probabilities(logits)
        logits = logits.float()
        if names is not None and len(names) != logits.shape[1]:
            rule = f"tells {logits.shape[1]} classes apart, where its run or its metadata name {len(names)}"
            raise refused("model", self.model, rule, "give the run it comes from by --run, or an undamaged file")
        for path, row in zip(files, logits, strict=True):
            if not row.isfinite().all():
                given, image = quoted(self.model), quoted(str(path))
                raise ValueError(f"model: the outputs of {given} for {image} are not numbers; normfree spp says why")
        found = [
            {"image": str(path), "predictions": self._predictions(row, names)}
            for path, row in zip(files, logits.softmax(1), strict=True)
        ]
        if self.json:
            sys.stdout.write(json.dumps(found, indent=1) + "\n")
            return
        for one in found:
            console.say(printable(one["image"]))
            for predicted in one["predictions"]:
                console.say(f"  {100 * predicted['probability']:6.2f} %  {printable(predicted['class'])}")

    def tell(self, console: Terminal, line: str) -> None:
        """Say a line beside the result: on stderr where that is JSON."""
        if self.json:
            print(printable(line, keep="\n"), file=sys.stderr)
        else:
            console.say(line)

    def _files(self) -> list[Path]:
        """The image files, those of a folder in the order of their names.

        Raises:
            ValueError: there is no such file, a folder holds no image, or there are more than can be read at once.
        """
        from normfree.data.sources import SUFFIXES

        files: list[Path] = []
        for path in self.images:
            inside = [path]
            if kind_of(path) == "a folder":
                found = (one for one in walk(path, "images") if one.suffix.lower() in SUFFIXES)
                inside = sorted(islice(found, MOST_IMAGES + 1))
            if not inside:
                rule = f"holds no image ({', '.join(sorted(SUFFIXES))}), nor do the folders below it"
                raise refused("images", path, rule, "give images, or a folder of some")
            files += inside
            if len(files) > MOST_IMAGES:
                rule = f"comes to more images than the {MOST_IMAGES:,} that are read at once"
                raise refused("images", path, rule, "give fewer, one part after the other")
        for path in files:
            remedy = "give an image, or a folder of some"
            if glob.has_magic(str(path)):
                remedy = "give a folder, or the pattern without quotes, of which the shell makes names"
            elif re.match(r"\w+:/", str(path)):  # of "://" in a path
                remedy = "download it first: no address is opened here"
            check_file(path, "images", remedy)
        return files

    def _images(self, trained: Trained, files: list[Path]) -> tuple[Tensor, Standardization, str]:
        """All images, of eight bits; what standardizes them; and how it does, where neither run nor option says it.

        Raises:
            ValueError: naming a file that does not decode.
        """
        import numpy as np

        from normfree.data.augmentation import CentreCrop
        from normfree.data.records import DamagedImage, decode

        channels = (trained.data and trained.data.in_channels) or trained.in_channels or 3
        check_statistics(self.mean, self.std, channels)
        said = ""
        if self.mean is not None and self.std is not None:
            statistics = self.mean, self.std
        elif trained.prepared is not None:
            statistics = trained.prepared.statistics
        else:
            statistics = imagenet_statistics(channels)
            said = preparation(*statistics)
        if self.image_size is None and trained.image_size is None:
            said += ("\n" if said else "") + "images taken at 224 × 224; --image-size says otherwise"
        ratio = self.crop_ratio or (trained.prepared or DataConfig()).crop_ratio
        crop = CentreCrop(self.image_size or trained.image_size or 224, ratio)
        rows, cropped = [], False
        for path in files:
            try:
                decoded = decode(path, channels)
                cropped = cropped or decoded.size != (crop.size, crop.size)
                image = np.asarray(crop(decoded))
            except DamagedImage as damage:
                raise refused("images", path, f"does not decode as an image ({damage})", "give an image") from damage
            rows.append(torch.from_numpy(image.copy()).reshape(*image.shape[:2], -1).permute(2, 0, 1))
        if cropped and trained.prepared is None and self.crop_ratio is None:
            said += ("\n" if said else "") + cropping(crop.size, ratio)
        return torch.stack(rows), Standardization(*statistics), said

    def _predictions(self, probabilities: Tensor, names: tuple[str, ...] | None) -> list[dict[str, Any]]:
        values, indices = probabilities.topk(min(self.top, len(probabilities)))
        return [
            {"class": names[index] if names else str(index), "index": index, "probability": value}
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
