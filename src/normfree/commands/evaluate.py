"""``normfree evaluate``: how good a trained network is."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from normfree.common.files import write_atomically
from normfree.common.text import quoted
from normfree.data import DataConfig, EvaluationData, open_evaluation

if TYPE_CHECKING:
    from normfree.train.trained import Trained

OVERRIDES = {
    "source": "source",
    "split": "evaluation_split",
    "image_size": "image_size",
    "batch_size": "batch_size",
    "workers": "workers",
    "on_bad_image": "on_bad_image",
}
"""Fields of the data that an option changes."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure loss, top-1 and top-5 of a trained network, on the data of its run or on other data.

    Under torchrun the images are divided among the processes.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a checkpoint's folder, or a .safetensors, .onnx or .pt2 file."""
    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Run whose data and preparation apply; the one the model lies in by default."""
    original: str | None = None
    """Of a converted checkpoint, what builds the model it was made of: FILE.py:FACTORY, which is run, or another
    MODEL of `normfree spp`. Needed where that is no name of ours, torchvision's or timm's."""
    trust_code: bool = False
    """Open a .pt2 file although it can run code of whoever wrote it; an .onnx file cannot."""
    source: str | None = None
    """Other data: digits, a folder, *.parquet, *.tar, hub:OWNER/NAME."""
    split: str | None = None
    """Split to evaluate on; validation if there is one, else test, by default."""
    image_size: int | None = None
    """Height and width; as in the run by default."""
    batch_size: int | None = None
    """Images at once; 256 by default."""
    workers: int | None = None
    """Processes that decode; as in the run by default."""
    on_bad_image: Literal["error", "skip"] | None = None
    """What a damaged image does; as in the run by default."""
    limit_eval_steps: int | None = None
    """Evaluate on so many batches only."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it natively; else fp32. Exported files have their own."""
    json: Path | None = None
    """File to write the numbers and the confusion matrix to."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "limit_eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is too few; give at least 1")

    def run(self, console: Console) -> None:
        """Evaluate, and say how good it is."""
        from normfree.sources import opened
        from normfree.train.distributed import launch
        from normfree.train.evaluation import evaluate
        from normfree.train.trained import open_trained

        trained = open_trained(
            self.model, self.run_folder, opened=partial(opened, original=self.original), trust_code=self.trust_code
        )
        fabric = launch("cpu" if trained.exported else self.accelerator, "fp32" if trained.exported else self.precision)
        data = self._data(trained, fabric.global_rank, fabric.world_size)
        network = trained.network.to(fabric.device)
        found = evaluate(network, data, fabric, limit=self.limit_eval_steps)
        if not fabric.is_global_zero:
            return
        if math.isnan(found.loss):
            raise ValueError(
                f"model: the outputs of {quoted(self.model)} are not numbers; normfree spp says where it begins"
            )
        top5 = "" if found.top5 is None else f"  top-5 {100 * found.top5:.2f} %"
        skipped = f"  {len(data.bad_images)} bad images" if data.bad_images else ""
        line = f"accuracy {100 * found.top1:.2f} %{top5}  loss {found.loss:.4f}  of {found.examples:,} images{skipped}"
        if self.json is not None:
            result: dict[str, Any] = {"model": self.model, "source": data.config.source, **found.to_dict()}
            result |= {"classes": list(data.class_names), "bad_images": data.bad_images}
            line += f"\nwrote {write_atomically(self.json, json.dumps(result) + chr(10))}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _data(self, trained: Trained, rank: int, world_size: int) -> EvaluationData:
        """The run's data with what the options change."""
        known = trained.data
        if known is None and self.source is None:
            raise ValueError(
                f"source: {self.model!r} lies in no run, so its data are not known; pass --source or --run"
            )
        digits = self.source == "digits"  # which say themselves
        config = known or DataConfig(in_channels=None if digits else trained.in_channels)
        changes = {field: getattr(self, option) for option, field in OVERRIDES.items()}
        changes = {field: value for field, value in changes.items() if value is not None}
        if self.source is not None and known is not None and self.source != known.source:
            # What was found in the run's own data does not hold for others.
            changes |= {"in_memory": "auto", "streaming": "auto", "image_column": None, "label_column": None}
            changes |= {"num_classes": None, "evaluation_examples": None}
        return open_evaluation(
            dataclasses.replace(config, **{"batch_size": 256, **changes}),
            rank=rank,
            world_size=world_size,
            classes=trained.class_names,
        )
