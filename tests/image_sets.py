"""Tiny data sets of every kind, whose images are told apart by their pixels."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def encoded(number: int, size: int | tuple[int, int] = 12, kind: str = "PNG") -> bytes:
    """An image whose red is its number everywhere, and whose blue is noise."""
    width, height = (size, size) if isinstance(size, int) else size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[:, :, :2] = number, 7 * number % 250
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, count: int, size: int | tuple[int, int] = 12) -> Path:
    for number in range(count):
        file = folder / CLASSES[number % 3] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number, size))
    return folder


def write_parquet(
    file: Path, images: list[bytes], labels: list[int], row_group: int = 7, names: Sequence[str] = CLASSES
) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(
        file, batch_size=row_group
    )
    return file


def write_shards(folder: Path, count: int, shards: int, size: int | tuple[int, int] = 12) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for number in range(shard, count, shards):
                for kind, content in (("png", encoded(number, size)), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/train-{{000..{shards - 1:03d}}}.tar"
