"""``normfree predict``: what is in images, according to a trained network."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from normfree.common.checks import check_integer
from normfree.common.files import refused
from normfree.common.text import quoted


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Name the most probable classes of images."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a checkpoint's folder, or a .safetensors, .onnx or .pt2 file."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run that says how images are prepared and what the classes are; the one the model lies in by default."""
    original: str | None = None
    """Of a converted checkpoint, what builds the model it was made of: FILE.py:FACTORY, which is run, or another
    MODEL of `normfree spp`. Needed where that is no name of ours, torchvision's or timm's."""
    trust_code: bool = False
    """Open a .pt2 file although it can run code of whoever wrote it; an .onnx file cannot."""
    image_size: int | None = None
    """Height and width; as in the run by default, 224 without one."""
    top: int = 5
    """Classes to name."""
    json: bool = False
    """Print JSON: a list of {"image", "predictions": [{"class", "index", "probability"}]}."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images: none given; for example: normfree predict runs/digits image.png")
        check_integer("top", self.top, 1)
        if self.image_size is not None:
            check_integer("image_size", self.image_size, 1)

    def run(self, console: Console) -> None:
        """Read all images first, then predict and tell."""
        from normfree.sources import opened
        from normfree.train.evaluation import logits_of
        from normfree.train.trained import open_trained

        trained = open_trained(
            self.model, self.run_folder, opened=partial(opened, original=self.original), trust_code=self.trust_code
        )
        images = self._images(trained)
        names = trained.class_names
        rows = []
        with torch.no_grad():
            for part in images.split(64):
                rows.append(logits_of(trained.network, part, None if names is None else len(names)).float())
        logits = torch.cat(rows)
        for path, row in zip(self.images, logits, strict=True):
            if not row.isfinite().all():
                raise ValueError(f"model: its outputs for {quoted(str(path))} are not numbers; normfree spp says why")
        found = [
            {"image": str(path), "predictions": self._predictions(row, names)}
            for path, row in zip(self.images, logits.softmax(1), strict=True)
        ]
        if self.json:
            sys.stdout.write(json.dumps(found, indent=1) + "\n")
            return
        for one in found:
            console.print(one["image"], highlight=False, markup=False, soft_wrap=True)
            for predicted in one["predictions"]:
                line = f"  {100 * predicted['probability']:6.2f} %  {predicted['class']}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _images(self, trained: Any) -> Tensor:
        """All images as one standardized batch; a ValueError names a file that does not decode."""
        import numpy as np

        from normfree.data import DataConfig, Standardization
        from normfree.data.augmentation import CentreCrop
        from normfree.data.config import IMAGENET_MEAN, IMAGENET_STD
        from normfree.data.decode import DamagedImage, decode

        data = trained.data
        if data is None:
            channels = trained.in_channels or 3
            mean, std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
            data = DataConfig(image_size=224, in_channels=channels, mean=mean, std=std)
        crop = CentreCrop(self.image_size or data.image_size or 224, data.crop_ratio)
        rows = []
        for path in self.images:
            try:
                image = np.asarray(crop(decode(path, data.in_channels or 3)))
            except DamagedImage as damage:
                raise refused("images", path, f"does not decode as an image ({damage})", "give an image") from damage
            rows.append(torch.from_numpy(image.copy()).reshape(*image.shape[:2], -1).permute(2, 0, 1))
        return Standardization(*data.statistics)(torch.stack(rows))

    def _predictions(self, probabilities: Tensor, names: tuple[str, ...] | None) -> list[dict[str, Any]]:
        values, indices = probabilities.topk(min(self.top, len(probabilities)))
        return [
            {"class": names[index] if names else str(index), "index": index, "probability": value}
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
