"""Sets small enough to decode once: all pixels in one tensor, of which a batch is a few rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normfree.common.checks import invalid
from normfree.common.packages import required
from normfree.data.config import DataConfig
from normfree.data.crops import CentreCrop
from normfree.data.loading import Decoded, Decoder, Example, loader
from normfree.data.records import Record, Table

LARGEST = 2**30
"""Bytes that are held in memory without being asked to."""
DIGITS_SPLITS = ("train", "test")
CHUNK = 256
"""Images decoded together."""


@dataclass
class Pixels:
    """Decoded examples.

    Args:
        images: uint8 [N, H, W, C].
        targets: int64 [N].
        class_names: of the targets.
        failures: name and reason of each image left out.
    """

    images: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Examples of those numbers: uint8 [N, C, H, W], channels last in memory, and their targets."""
        chosen = torch.tensor(indices)
        return self.images[chosen].permute(0, 3, 1, 2), self.targets[chosen]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and biased deviation of each channel, of pixels in 0 to 1."""
        means, stds = [], []
        for channel in self.images.unbind(-1):  # exact: sums of integers, from the 256 counts
            counts = torch.bincount(channel.reshape(-1), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64) / 255
            mean = float((counts * values).sum() / counts.sum())
            variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
            means.append(mean)
            stds.append(max(variance, 1e-12) ** 0.5)
        return tuple(means), tuple(stds)


def digits(*, training: bool) -> Pixels:
    """scikit-learn's 1797 grey 8×8 digits, divided once and for all: of each class, every fifth to the test part.

    Args:
        training: the four fifths to train on, or the fifth to test on.
    """
    found: Any = required("sklearn.datasets", "the digits", "scikit-learn").load_digits()
    # Values are 0 to 16; 255 / 16 rounds, and stays invertible.
    images = (torch.from_numpy(found.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    targets = torch.from_numpy(found.target).to(torch.int64)
    rank_in_class = torch.nn.functional.one_hot(targets).cumsum(0).gather(1, targets[:, None]).squeeze(1)
    chosen = (rank_in_class % 5 != 0) if training else (rank_in_class % 5 == 0)
    return Pixels(images[chosen], targets[chosen], tuple(map(str, range(10))))


def decoded(examples: Iterable[Record] | Table, class_names: tuple[str, ...], config: DataConfig) -> Pixels:
    """Decode everything, with the config's workers; images of another size are resized and cropped to the centre.

    Args:
        examples: a table, or records in order.
        class_names: of the targets.
        config: with channels and image size resolved.

    Raises:
        ValueError: naming the first damaged image, unless the config says to skip them, or if none is left.
    """
    table = examples if isinstance(examples, Table) else None
    asked: Iterable[Any] = range(len(examples)) if isinstance(examples, Table) else examples
    decoder = Decoder(table, CentreCrop(config.size), config.channels, replace=False)
    images, targets, failures = [], [], []
    for batch in loader(decoder, _Chunks(asked), config, keep=False):
        check_failures(batch, config)
        images.append(batch.images.permute(0, 2, 3, 1).clone())  # out of the memory shared with the worker
        targets.append(batch.targets.clone())
        failures += batch.failures
    if not sum(map(len, images)):
        raise invalid("source", config.source, "holds no image that decodes", "mend the files")
    return Pixels(torch.cat(images), torch.cat(targets), class_names, failures)


def check_failures(batch: Decoded, config: DataConfig) -> None:
    """Raise the ``ValueError`` that a damaged image is, unless damaged images are to be skipped."""
    if not batch.failures:
        return
    name, reason = batch.failures[0]
    if config.on_bad_image == "error":
        remedy = "remove or replace it, or pass on_bad_image='skip'"
        raise ValueError(f"source: {name} does not decode as an image ({reason}); {remedy}")


class _Chunks:
    """Examples in runs, without draws of their own."""

    def __init__(self, examples: Iterable[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[list[Example]]:
        chunk: list[Example] = []
        for example in self.examples:
            chunk.append(Example(example))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
