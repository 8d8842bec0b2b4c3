"""Each kind of damage, in each kind of source: named and stopped at, or named, counted and left out."""

import io
import tarfile

import numpy as np
import pytest
from damaged_images import DAMAGED, photograph, saved
from image_sets import CLASSES, encoded, write_parquet
from PIL import Image

from normfree.data import DataConfig, open_evaluation, open_training

KINDS = ("empty", "text", "truncated jpeg", "truncated png", "bomb", "animated gif", "float")
WHOLE = {
    "cmyk.jpg": saved(Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "JPEG"),
    "deep.png": saved(Image.fromarray(np.full((12, 12), 65535, np.uint16))),
    "clear.png": saved(Image.new("RGBA", (12, 12), (255, 0, 0, 255))),
    "plain.png": encoded(200),
}


def write(folder, way, images):
    """A source of the images in their order, the first of the first class."""
    folder.mkdir()
    if way == "parquet":
        write_parquet(folder / "train.parquet", images, [n % 3 for n in range(len(images))])
    elif way == "folder":
        for number, image in enumerate(images):
            (folder / CLASSES[number % 3]).mkdir(exist_ok=True)
            (folder / CLASSES[number % 3] / f"{number:03d}.png").write_bytes(image)
    else:
        with tarfile.open(folder / "train-0.tar", "w") as tar:
            for number, image in enumerate(images):
                for kind, content in (("png", image), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return str(folder / "train-0.tar")
    return str(folder)


@pytest.fixture(params=["folder", "parquet", "shards"])
def way(request):
    """The kind of source."""
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_in_every_source(tmp_path, way, kind):
    damaged, reason = DAMAGED[kind]
    images = [encoded(number) for number in range(3)] + [damaged] + [encoded(number) for number in range(4, 7)]
    source = write(tmp_path / "images", way, images)
    config = DataConfig(source=source, batch_size=7, image_size=12, in_memory=False, evaluation_split="train")
    for opened in (open_training, open_evaluation):
        with pytest.raises(ValueError, match=rf"(003|3)\.png.*does not decode as an image.*({reason})") as caught:
            list(opened(config))
        assert "\n" not in str(caught.value)
    lenient = DataConfig(**{**vars(config), "on_bad_image": "skip"})
    data = open_training(lenient)
    assert [len(targets) for _, targets in data] == [7]
    evaluated = open_evaluation(lenient)
    assert sum(len(targets) for _, targets in evaluated) == 6
    for bad_images in (data.bad_images, evaluated.bad_images):
        (name,) = bad_images
        assert "3.png" in name and ("row 3" in name) == (way == "parquet")


def test_unusual_colours_are_no_damage(tmp_path, way):
    source = write(tmp_path / "images", way, list(WHOLE.values()))
    config = DataConfig(source=source, batch_size=4, image_size=12, in_memory=False, evaluation_split="train")
    images, targets = next(iter(open_evaluation(config)))
    found = {int(t): [] for t in targets}
    for image, target in zip(images, targets, strict=True):
        found[int(target)].append(image[:, 6, 6].tolist())
    assert found[1] == [[255, 255, 255]] and found[2] == [[255, 0, 0]]
    cmyk, plain = sorted(found[0], reverse=True)
    assert np.abs(np.subtract(cmyk, [255, 0, 0])).max() <= 3 and plain[0] == 200


def test_a_set_of_photographs_is_given_whole(tmp_path, way):
    """The other side of it: what is whole is never counted as damaged."""
    source = write(tmp_path / "images", way, [saved(photograph(), "JPEG")] * 6)
    data = open_training(DataConfig(source=source, batch_size=3, image_size=12, on_bad_image="skip"))
    assert sum(len(targets) for _, targets in data) == 6 and not data.bad_images
