"""How a trained network's images are prepared and what its classes are called, as its files say it themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from normfree.common.files import PREPROCESSING, parse_dataclass, parse_json, refused
from normfree.common.text import first_line
from normfree.data.config import MOST_CLASSES, DataConfig


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a network takes and answers.

    A run's weights and exported files keep it among their metadata, under the name ``METADATA``, as a JSON object of
    these attributes.

    Attributes:
        image_size: height and width in pixels.
        crop_ratio: share of the shorter side that the centre crop takes, see :class:`DataConfig`.
        mean: of each channel, to subtract from pixels in 0 to 1.
        std: deviations to divide by.
        classes: names of the logits.
    """

    METADATA: ClassVar[str] = PREPROCESSING

    image_size: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(set(self.classes)) == len(self.classes) <= MOST_CLASSES:
            raise ValueError(
                f"Preprocessing.classes: {len(self.classes):,}, of which {len(set(self.classes)):,} differ"
            )
        # whose rules the other values keep
        DataConfig(image_size=self.image_size, crop_ratio=self.crop_ratio, mean=self.mean, std=self.std)

    @classmethod
    def of(cls, config: DataConfig, classes: Sequence[str]) -> Preprocessing:
        """Return that of a resolved config's evaluated images."""
        mean, std = config.statistics
        size, ratio = config.size, config.crop_ratio
        return cls(image_size=size, crop_ratio=ratio, mean=mean, std=std, classes=tuple(classes))

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> Preprocessing | None:
        """Return what a file says.

        Args:
            metadata: of the file.
            path: the file, for messages.

        Returns:
            None where it says nothing.

        Raises:
            ValueError: what it says is damaged.
        """
        if (text := metadata.get(cls.METADATA)) is None:
            return None
        try:
            return parse_dataclass(cls, parse_json(text))
        except ValueError as error:
            rule = f"its metadata {cls.METADATA} are damaged ({first_line(error)})"
            raise refused("model", path, rule, "take an undamaged copy") from error

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations."""
        return self.mean, self.std

    def to_metadata(self) -> dict[str, str]:
        """Return it as ``normfree.save`` and ``normfree.export.to_onnx`` take it."""
        return {self.METADATA: json.dumps(dataclasses.asdict(self))}
