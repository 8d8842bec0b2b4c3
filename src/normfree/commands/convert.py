"""``normfree convert``: a model without its normalizers, as a checkpoint that every other command takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from torch import nn

from normfree.commands.devices import device_named
from normfree.commands.outputs import check_folder
from normfree.commands.spp import batch_shape, precision_of
from normfree.commands.tables import print_conversion
from normfree.common.checks import invalid
from normfree.common.safetensors_file import read
from normfree.common.text import all_lines
from normfree.convert import ALPHA, SKIP_GAIN, Conversion, conversion_of, convert
from normfree.data import probe_named
from normfree.sources import Built, build
from normfree.weights import save
from normfree.weights.matching import without_wrappers


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Take the normalizers out of a model, and write it as a checkpoint with the record of every change.

    The checkpoint is a MODEL to all other commands. Beside it, .json has the record alone.
    """

    model: Annotated[str, tyro.conf.Positional]
    """torchvision:NAME, timm:NAME, FILE.py:FACTORY (which may return (model, batch)), a name of `normfree models`,
    or a checkpoint of normfree.save."""
    original: str | None = None
    """Of a converted checkpoint, what builds the model it was made of: FILE.py:FACTORY, which is run, or another MODEL.
    Needed where that is no name of ours, torchvision's or timm's."""
    out: Path
    """Checkpoint to write; by custom *.safetensors."""
    start: Literal["fresh", "pretrained"] = "fresh"
    """fresh: new, variance-preserving weights; pretrained: the function of the trained model, kept."""
    weights: Path | None = None
    """State dict of the model before conversion, as safetensors."""
    alpha: float = ALPHA
    """Factor of the residual branches (fresh)."""
    skip_gain: float = SKIP_GAIN
    """Initial value of their learnable factor (fresh)."""
    beta: Literal["plan", "measured"] = "plan"
    """plan: closed forms of input scales where there are any; measured: all on the input (fresh)."""
    input: str = "gaussian"
    """What to run and measure with: gaussian, photos, or a folder of images."""
    image_size: int | None = None
    """Height and width; what the model suggests by default, 224 if it does not."""
    batch_size: int = 8
    """Examples in the batch."""
    seed: int = 0
    """Of initialisation and input."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one by default."""

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.image_size, self.seed)
        if self.out.is_dir() or self.out.suffix != ".safetensors":
            raise ValueError(f"out: {str(self.out)!r} is no checkpoint's name; give one that ends in .safetensors")
        check_folder(self.out.parent)

    def run(self, console: Console) -> None:
        """Build, convert, write, and say what was changed."""
        built, _ = prepared(self)
        with console.status(f"converting {escape(self.model)}"):
            converted = converted_as(self, built)
        conversion = _record_of(converted)
        paths = [save(converted, self.out), conversion.to_json(self.out.with_suffix(".json"))]
        print_conversion(console, conversion)
        console.print("wrote " + " ".join(str(path) for path in paths), highlight=False, markup=False, soft_wrap=True)


def prepared(options: Any) -> tuple[Built, dict[str, Any]]:
    """The model a command asks for, with its weights, and the batch to convert and measure with.

    Args:
        options: a command with the fields of :class:`Convert`.

    Returns:
        The model, on the device asked for, and its batch (a factory's own where it left it); what to note of the batch.
    """
    device = device_named(options.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        built = build(options.model, options.original)
    if options.weights is not None:
        _load_weights(built.model, options.weights)
    model = built.model.to(device)
    if built.batch is not None:
        if options.input != "gaussian" or options.image_size is not None:
            raise ValueError(f"input: {options.model} gives a batch of its own; leave out --input and --image-size")
        return Built(model, built.batch), {"kind": "the factory's own"}
    probe = probe_named(options.input)
    shape = batch_shape(model, probe, image_size=options.image_size, batch_size=options.batch_size)
    drawn = next(iter(probe.batches(shape, count=1, seed=options.seed)))
    return Built(model, drawn.to(device, precision_of(model))), probe.describe()


def converted_as(options: Any, built: Built) -> nn.Module:
    """The model converted with a command's options."""
    return convert(
        built.model,
        built.batch,
        start=options.start,
        alpha=options.alpha,
        skip_gain=options.skip_gain,
        beta=options.beta,
        seed=options.seed,
        source=options.model,
    )


def check_sizes(batch_size: int, image_size: int | None, seed: int) -> None:
    """Refuse sizes and seeds that are none.

    Raises:
        ValueError: naming which.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is too few; give at least 1")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: {image_size} is no size; give at least 1, usually 32 to 256")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: {seed} is no integer from 0 to 2**63 - 1; give one such as 0")


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(without_wrappers(read(path, "weights").tensors))
    except RuntimeError as error:
        rule = f"are not this model's ({all_lines(error)})"
        raise invalid("weights", str(path), rule, "give its own state dict") from error


def _record_of(converted: nn.Module) -> Conversion:
    conversion = conversion_of(converted)
    assert conversion is not None, "convert leaves its record"
    return conversion
