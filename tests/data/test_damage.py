"""Each kind of damage, in each kind of source: named and stopped at, or named, counted and left out."""

import gzip
import io
import json
import re
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


def shard_with(folder, name, content, kind="w"):
    """A shard of one example with one more member."""
    path = folder / "train-0.tar"
    with tarfile.open(path, kind) as tar:
        for each, held in (("000.png", encoded(0)), ("000.cls", b"0"), (name, content)):
            member = tarfile.TarInfo(each)
            member.size = len(held)
            tar.addfile(member, io.BytesIO(held))
    return path


@pytest.mark.parametrize("name", ["000.x.gz", "000.png.xz", "000.npz", "000.NPY", "000.pth", "000.a.cbor", "000.msg"])
@pytest.mark.parametrize("known", [False, True], ids=["counted", "examples and classes known"])
def test_a_member_that_unpacks_to_more_than_is_stored_is_refused(tmp_path, name, known):
    path = shard_with(tmp_path, name, gzip.compress(bytes(1000)))
    counts = {"examples": 1, "evaluation_examples": 1, "num_classes": 3} if known else {}
    config = DataConfig(source=str(path), training_split="train", evaluation_split="train", batch_size=1, **counts)
    with pytest.raises(ValueError, match=rf"train-0\.tar.*{re.escape(name)}.* unpacks to more than is stored of it"):
        next(iter(open_evaluation(config)))


def test_a_number_of_a_class_is_read_whole(tmp_path):
    path = shard_with(tmp_path, "001.cls", b"0" * 33 + b"2")
    with pytest.raises(ValueError, match=r"001\.cls.* is no number of 32 characters at most"):
        next(iter(open_evaluation(DataConfig(source=str(path), evaluation_split="train", batch_size=1))))


@pytest.mark.parametrize("content", [b"0_1", b"0x1", b"1.0", b"", "\u0661".encode()])
def test_only_digits_are_the_number_of_a_class(tmp_path, content):
    path = shard_with(tmp_path, "001.cls", content)
    with pytest.raises(ValueError, match=r"001\.cls.* holds no number"):
        next(iter(open_evaluation(DataConfig(source=str(path), evaluation_split="train", batch_size=1))))


@pytest.mark.parametrize("names", [[1, 2, 3], {"0": "a"}, "abc", [None, "a"]])
def test_names_of_classes_that_are_no_words(tmp_path, names):
    from pyarrow import parquet, table

    columns = table({"image": [{"bytes": encoded(0), "path": None}], "label": [0]})
    label = {"_type": "ClassLabel", "names": names}
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})
    path = tmp_path / "train.parquet"
    parquet.write_table(columns.replace_schema_metadata({"huggingface": features}), path)
    with pytest.raises(ValueError, match=r"label_column=|source=") as caught:
        next(iter(open_evaluation(DataConfig(source=str(path), evaluation_split="train", batch_size=1))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["/**/*.parquet", "data/**/a/**/*.parquet", "data/**/../*.tar", "/**/x/{a,b}.tar"])
def test_a_pattern_that_walks_without_end_is_refused(pattern):
    with pytest.raises(ValueError, match=r"\*\* stands for all folders below one, once, and not below the root"):
        open_evaluation(DataConfig(source=pattern))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nconfigs: *b", r"has no sound header \(it has an alias \(\*name\)"),
        ("configs: [{config_name: default, data_files: '/**/*'}]", "names files that do not lie in its folder"),
        (
            "configs: [{config_name: a, data_files: [{split: test, path: [../x.parquet]}]}]",
            "names files that do not lie in its folder",
        ),
        ("configs: [{config_name: a, data_files: 'http://127.0.0.1:9/x.parquet'}]", "names files that do not lie in"),
        ("a: [", "has no sound header"),
        (f"a: [{'a,' * 100_000}]", "has more than 100,000 values"),
        ("a: " + "[" * 100, "more than 64 in each other"),
        ("a: 1234567890123456789", "has a number of 19 characters"),
        ("a: !!float '" + ":".join(["59"] * 1000) + "'", "has no sound header"),
    ],
)
def test_the_card_of_a_data_set_is_bounded(tmp_path, header, message):
    write_parquet(tmp_path / "train.parquet", [encoded(0)], [0])
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# A data set\n")
    with pytest.raises(ValueError, match=rf"README\.md.*{message}") as caught:
        open_evaluation(DataConfig(source=f"hub:{tmp_path}", evaluation_split="train"))
    assert "\n" not in str(caught.value)
    tags = "".join(f"- a tag of some length, such as the language {number}\n" for number in range(2_000))  # 90 kB
    (tmp_path / "README.md").write_text(
        f"---\nlicense: mit\nconfigs: [{{config_name: a, data_files: '*.parquet'}}]\ntags:\n{tags}---\n"
    )
    assert len(list(open_evaluation(DataConfig(source=f"hub:{tmp_path}", evaluation_split="train", batch_size=1)))) == 1


def test_a_parquet_file_of_too_many_columns_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [encoded(0)], [0])
    monkeypatch.setattr("normfree.data.sources.MOST_COLUMNS", 2)
    for streaming in (False, True):
        config = DataConfig(source=str(tmp_path), evaluation_split="train", streaming=streaming)
        with pytest.raises(ValueError, match=r"train\.parquet': has 3 columns, more than 2"):
            open_evaluation(config)
