"""Where a table keeps images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from normfree.common.checks import invalid, required, suggestion
from normfree.data.config import DataConfig


class Columns(NamedTuple):
    """Where a table keeps what we need."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    """As the table declares them."""


LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")


def find_columns(features: Any, config: DataConfig) -> Columns:
    """Find the images and labels of a table.

    Args:
        features: of a Hugging Face data set, by column; None where it knows none.
        config: whose ``image_column`` and ``label_column`` go first.

    Raises:
        ValueError: if there is no such column, or more than a guess would be needed.
    """
    datasets = required("datasets", "a data source")
    features = features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images and "image" in features and _holds_bytes(features["image"]):
        images = ["image"]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    classes += [name for name in LABEL_COLUMNS if name in features and name not in classes]
    image = _choose_column("image_column", config.image_column, images, features)
    if not (isinstance(features[image], datasets.Image) or _holds_bytes(features[image])):
        rule = "the column holds no encoded images"
        raise invalid("image_column", image, rule, "name one of bytes, or of {bytes, path} as datasets writes it")
    label = _choose_column("label_column", config.label_column, [name for name in classes if name != image], features)
    names = features[label].names if isinstance(features[label], datasets.ClassLabel) else None
    return Columns(image, label, tuple(names) if names else None)


def _choose_column(argument: str, wanted: str | None, candidates: Sequence[str], features: Any) -> str:
    if wanted is not None and wanted not in features:
        raise invalid(argument, wanted, "the data have no such column", suggestion(wanted, features))
    if wanted is None and not candidates:
        known = ", ".join(features) or "none"
        kind = "images" if argument == "image_column" else "labels"
        rule = f"no column is seen to hold {kind} (columns: {known})"
        raise invalid(argument, None, rule, f"pass {argument}, or other data")
    return candidates[0] if wanted is None else wanted


def _holds_bytes(feature: Any) -> bool:
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", None) in ("binary", "large_binary")
