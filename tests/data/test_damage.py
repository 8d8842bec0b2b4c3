"""Each kind of damage, in each kind of source: named and stopped at, or named, counted and left out."""

import gzip
import io
import json
import re
import subprocess
import sys
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


def damage_column(path, column):
    """Damage all pages that a column of a parquet file has in the last group of rows; the footer stays."""
    from pyarrow import parquet

    groups = parquet.read_metadata(path)
    last = groups.row_group(groups.num_row_groups - 1)
    content = bytearray(path.read_bytes())
    for part in map(last.column, range(last.num_columns)):
        if part.path_in_schema.startswith(column):
            start = part.dictionary_page_offset or part.data_page_offset
            content[start : start + part.total_compressed_size] = b"\xa5" * part.total_compressed_size
    path.write_bytes(content)


@pytest.fixture(params=["whole", "cached", "streamed"])
def config_of(request, tmp_path, monkeypatch):
    """A config on a folder, read in every way there is."""
    if request.param == "cached":
        monkeypatch.setattr("normfree.data.sources.SMALL", 0)
    return DataConfig(
        source=str(tmp_path),
        streaming=request.param == "streamed",
        cache_folder=tmp_path / "cache",
        in_memory=False,
        num_classes=3,
        batch_size=2,
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("column", ["image", "label"])
def test_a_damaged_page_names_its_file(tmp_path, config_of, split, column, no_network):
    for name in ("train-0", "train-1", "test-0", "test-1"):
        write_parquet(tmp_path / f"{name}.parquet", [encoded(number) for number in range(6)], [0, 1, 2] * 2)
    damage_column(tmp_path / f"{split}-1.parquet", column)
    damaged, sound = (open_training, open_evaluation)[:: 1 if split == "train" else -1]
    with pytest.raises(ValueError, match=rf"{split}-1\.parquet.* could not be read .*; mend the files") as caught:
        list(damaged(config_of))
    assert "\n" not in str(caught.value)
    if split == "test" or config_of.streaming:  # evaluation names its classes by the training labels
        assert list(sound(config_of))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "arrow", "parquet"])
def test_a_damaged_file_of_a_hub_is_named(tmp_path, ending, no_network):
    contents = {"csv": b'image,label\n"a', "jsonl": b'{"image": ', "arrow": b"ARROW1\0\0noise", "parquet": b"PAR1"}

    (tmp_path / f"train-1.{ending}").write_bytes(contents[ending])
    with pytest.raises(ValueError, match=rf"train-1\.{ending}. could not be read") as caught:
        open_training(DataConfig(source=f"hub:{tmp_path}", cache_folder=tmp_path / "cache"))
    assert "\n" not in str(caught.value)


STREAMED = """
from normfree.data import DataConfig, open_training
try:
    list(open_training(DataConfig(source={!r}, batch_size=2, num_classes=3, streaming=True, workers=1, prefetch=9)))
except ValueError as error:
    kept = error  # with its frames, as an interactive session keeps the last one
    print("refused")
"""


def test_workers_end_where_the_first_batches_cannot_be_read(tmp_path):
    """They ignore SIGTERM, by which Python ends them and then waits."""
    for name in ("train-0", "train-1"):  # of the former a few images are looked at as it is opened
        write_parquet(tmp_path / f"{name}.parquet", [encoded(number) for number in range(20)], [0] * 20)
    damage_column(tmp_path / "train-1.parquet", "image")
    done = subprocess.run(
        [sys.executable, "-c", STREAMED.format(str(tmp_path))], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "refused\n" and done.returncode == 0
