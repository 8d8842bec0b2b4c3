"""What a source's name leads to, and what a wrong one is told."""

import errno
import io
import os
import tarfile
from dataclasses import replace

import datasets
import pytest
import torch
from image_sets import CLASSES, encoded, write_folder, write_parquet, write_shards
from PIL import Image

from normfree.data import DataConfig, open_evaluation, open_training
from normfree.data.sources import (
    FORMATS,
    SUFFIXES,
    FolderSource,
    count_rows,
    expand_braces,
    fingerprint,
    scan_shards,
    split_of,
)


def everything(data):
    images, targets = zip(*data, strict=True)
    return torch.cat(images), torch.cat(targets)


def numbers(images):
    """The numbers that these images carry in their red."""
    return sorted(images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("in_memory", ["auto", False])
@pytest.mark.parametrize("streaming", ["auto", True])
def test_every_source_gives_its_images_and_classes(folder, parquet, shards, no_network, in_memory, streaming):
    for source, count in ((folder, 20), (parquet, 26), (shards, 21)):
        options = {"in_memory": in_memory, "streaming": streaming, "batch_size": 1, "image_size": 12}
        data = open_training(DataConfig(source=str(source), **options))
        assert data.examples == data.steps_per_epoch == count
        assert data.class_names == (("0", "1", "2") if source == shards else CLASSES)
        assert data.image_shape == (3, 12, 12)
        assert data.num_classes == 3
        assert data.config.in_memory == (in_memory == "auto" and streaming == "auto" and source != folder)


def test_digits_are_divided_by_class_once_and_for_all():
    training, test = open_training(DataConfig(batch_size=1)), open_evaluation(DataConfig())
    assert (training.examples, test.examples) == (1442, 355)
    images, targets = everything(test)
    assert images.shape == (355, 1, 8, 8) and images.dtype == torch.uint8
    assert images.max() == 255 and images.min() == 0
    counts = torch.bincount(targets)
    assert counts.min() >= 34 and counts.max() <= 37
    own = {image.numpy().tobytes() for image in images}
    others = {image.numpy().tobytes() for image in everything(training)[0]}
    assert not own & others  # the set has no double
    assert training.config.mean == test.config.mean


def test_pixels_and_labels_stay_together(folder, parquet, shards):
    for source in (folder, parquet, shards):
        config = DataConfig(source=str(source), evaluation_split="train", batch_size=4, image_size=12, crop_ratio=1)
        images, targets = everything(open_evaluation(config))
        found = images[:, 0, 0, 0].tolist()
        assert [number % 3 for number in found] == targets.tolist()
        assert sorted(found) == list(range(len(images)))


def test_split_folders(tmp_path):
    write_folder(tmp_path / "train", 9)
    write_folder(tmp_path / "val", 6, 12)
    config = DataConfig(source=str(tmp_path), batch_size=3)
    assert open_training(config).examples == 9
    data = open_evaluation(config)
    assert data.examples == 6 and data.class_names == CLASSES
    assert data.config.mean == open_training(config).config.mean


def test_nothing_is_copied(folder, parquet, shards, tmp_path, monkeypatch, no_network):
    cache = tmp_path / "cache"
    for source in (folder, parquet, shards):
        data = open_training(DataConfig(source=str(source), cache_folder=cache, in_memory=False, batch_size=2))
        next(iter(data))
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) == 0


def test_large_parquet_goes_through_the_cache(parquet, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr("normfree.data.sources.SMALL", 0)
    cache = tmp_path / "cache"
    config = DataConfig(source=str(parquet), cache_folder=cache, in_memory=False, batch_size=1, image_size=12)
    assert numbers(everything(open_training(config))[0]) == list(range(26))
    assert list(cache.rglob("*.arrow"))


def test_globs_and_braces(parquet, tmp_path):
    one = open_training(DataConfig(source=f"{parquet}/train-*.parquet", batch_size=2))
    two = open_training(DataConfig(source=f"{parquet}/train-{{0,1}}.parquet", batch_size=2))
    assert one.examples == two.examples == 26
    assert expand_braces("a-{08..11}-{x,y}") == [f"a-{n}-{w}" for n in ("08", "09", "10", "11") for w in "xy"]
    assert expand_braces("plain") == ["plain"]


def test_words_that_name_splits():
    assert split_of("cifar-val.parquet") == split_of("dev") == "validation"
    assert split_of("train-00000-of-00002.parquet") == "train"
    assert split_of("trainer") is None and split_of("n01440764") is None


def test_a_hub_name_is_asked_of_datasets(parquet, monkeypatch):
    """The hub itself stands in as files: names, splits and options go through unchanged."""
    files = {"train": [str(parquet / f"train-{i}.parquet") for i in range(2)], "test": [str(parquet / "test.parquet")]}
    load, asked = datasets.load_dataset, []

    def loaded(name, configuration, *, split, streaming, cache_dir):
        asked.append((name, configuration, split, streaming))
        return load("parquet", data_files=files, split=split, streaming=streaming, cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, configuration: ["train", "test"])
    config = DataConfig(source="hub:someone/insects:plain", batch_size=2, cache_folder=parquet / "cache")
    data = open_training(config)
    assert data.examples == 26 and data.class_names == CLASSES and data.config.in_memory
    assert open_evaluation(data.config).examples == 5
    assert ("someone/insects", "plain", "train", False) in asked
    assert ("someone/insects", "plain", "test", False) in asked
    with pytest.raises(ValueError, match=r"examples=None.*pass it"):
        open_training(DataConfig(source="hub:someone/insects", batch_size=2, streaming=True))
    streamed = DataConfig(source="hub:someone/insects", batch_size=2, streaming=True, examples=26, image_size=12)
    assert open_training(streamed).steps_per_epoch == 13


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_laid_out_like_the_hubs(tmp_path, streaming, no_network):
    """datasets itself, with nothing put in its place."""
    home = tmp_path / "insects"
    write_parquet(home / "data" / "train-00000-of-00001.parquet", [encoded(n) for n in range(26)], [0, 1] * 13)
    write_parquet(home / "data" / "test-00000-of-00001.parquet", [encoded(n) for n in range(5)], [2] * 5)
    examples = 26 if streaming else None
    config = DataConfig(
        source=f"hub:{home}",
        batch_size=2,
        image_size=12,
        streaming=streaming,
        examples=examples,
        cache_folder=tmp_path / "cache",
    )
    data = open_training(config)
    assert data.class_names == CLASSES
    images, targets = everything(data)
    assert numbers(images) == list(range(26))
    assert [number % 2 for number in images[:, 0, 0, 0].tolist()] == targets.tolist()
    assert everything(open_evaluation(config))[1].tolist() == [2] * 5


def test_a_hub_that_is_out_of_reach_is_one_line(monkeypatch):
    def refuse(*arguments):
        raise ConnectionError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(ValueError, match=r"hub:a/b.*cannot reach the hub\)") as caught:
        open_training(DataConfig(source="hub:a/b"))
    assert "\n" not in str(caught.value)


def test_words_as_labels_and_numbers_without_names(tmp_path):
    rows = {"picture": [{"bytes": encoded(n), "path": None} for n in range(6)], "kind": ["b", "a", "c"] * 2}
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = open_training(DataConfig(source=str(tmp_path), label_column="kind", batch_size=6))
    assert data.class_names == ("a", "b", "c")
    assert sorted(next(iter(data))[1].tolist()) == [0, 0, 1, 1, 2, 2]
    plain = {"image": [encoded(n) for n in range(4)], "label": [0, 3, 1, 0]}
    datasets.Dataset.from_dict(plain).to_parquet(tmp_path / "other" / "train.parquet")
    assert open_training(DataConfig(source=str(tmp_path / "other"), batch_size=2)).num_classes == 4


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_truth_values_are_two_classes_by_their_names(tmp_path, streaming, hub, no_network):
    """Also where a split has one of them only."""
    folder = tmp_path / "set"
    for split, truth in (("train", [False, True]), ("test", [True, True])):
        rows = {"image": [{"bytes": encoded(n), "path": None} for n in range(2)], "label": truth}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("bool")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    examples = {"examples": 2, "evaluation_examples": 2} if hub else {}
    source = f"hub:{folder}" if hub else str(folder)
    config = DataConfig(source=source, streaming=streaming, batch_size=2, cache_folder=tmp_path / "cache", **examples)
    for opener, targets in ((open_training, [0, 1]), (open_evaluation, [1, 1])):
        data = opener(config)
        assert data.class_names == ("False", "True")
        assert sorted(next(iter(data))[1].tolist()) == targets
    with pytest.raises(ValueError, match=r"classes \(False, True\) are not the model's \(cat, dog\)"):
        open_evaluation(config, classes=("cat", "dog"))
    with pytest.raises(ValueError, match="num_classes=3: the data declare 2 classes"):
        open_training(replace(config, num_classes=3))


def test_numbers_as_words_are_in_the_order_of_numbers(tmp_path):
    labels = [str(number) for number in range(11)]
    for names, order in ((labels, labels), ([*labels[:-1], "07"], sorted([*labels[:-1], "07"]))):
        rows = {"image": [encoded(n) for n in range(11)], "label": names}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        data = open_training(DataConfig(source=str(tmp_path), batch_size=11))
        assert data.class_names == tuple(order)
        images, targets = next(iter(data))
        assert {names[red]: order[target] for red, target in zip(images[:, 0, 0, 0], targets, strict=True)} == {
            name: name for name in names
        }


def test_grey_images_stay_grey_where_asked(folder):
    data = open_training(DataConfig(source=str(folder), in_channels=1, batch_size=2, image_size=8))
    images, _ = next(iter(data))
    assert images.shape == (2, 1, 8, 8)
    assert data.augmentation()(images, torch.zeros(2, dtype=torch.int64), step=0)[0].shape == (2, 1, 8, 8)


def test_files_are_counted_from_their_headers(parquet, shards):
    assert count_rows([str(parquet / "train-0.parquet"), str(parquet / "test.parquet")]) == [13, 5]
    assert scan_shards(expand_braces(shards)) == (21, 3)


def test_a_shard_is_looked_at_before_it_is_read(tmp_path):
    """What tarfile writes is read, and what it would take for the end of a shard is damage."""
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as shard:
            for number in range(4):
                member = tarfile.TarInfo(f"{'ä' * (300 if number < 3 else 3)}/{number}.cls")
                member.size, member.mtime = 1, 0.5
                shard.addfile(member, io.BytesIO(b"2"))
        assert scan_shards([str(tmp_path / "a.tar")]) == (4, 3)
    whole = (tmp_path / "a.tar").read_bytes()
    last = whole.rindex(b"ustar")
    (tmp_path / "a.tar").write_bytes(whole[:last] + b"USTAR" + whole[last + 5 :])
    with pytest.raises(ValueError, match=r"a\.tar'.*no whole shard \(bad checksum\)"):
        scan_shards([str(tmp_path / "a.tar")])


def test_a_file_that_is_called_as_a_pattern_is_that_file(tmp_path, monkeypatch, no_network):
    """Also to datasets, which takes names for patterns."""
    for place, number in (("d[1]", 1), ("d1", 2), ("{a,b}*?", 3)):
        write_parquet(tmp_path / f"{place}.parquet", [encoded(number)], [0])
        write_shards(tmp_path, 1, 1)
        (tmp_path / "train-000.tar").rename(tmp_path / f"{place}.tar")
    for name, streaming in (("d[1].parquet", False), ("d[1].parquet", True), ("{a,b}*?.parquet", True)):
        config = DataConfig(source=str(tmp_path / name), batch_size=1, streaming=streaming, image_size=12)
        assert numbers(everything(open_training(config))[0]) == [3 if "{" in name else 1]
    (tmp_path / "d1.tar").write_bytes(b"")
    for name in ("d[1].tar", "{a,b}*?.tar"):
        assert open_training(DataConfig(source=str(tmp_path / name), batch_size=1, image_size=12)).examples == 1
    (tmp_path / "home[1]").mkdir()
    (tmp_path / "d1.parquet").rename(tmp_path / "home[1]" / "train.parquet")
    monkeypatch.chdir(tmp_path / "home[1]")
    config = DataConfig(source="train.parquet", batch_size=1, streaming=True, image_size=12)
    assert numbers(everything(open_training(config))[0]) == [2]
    with pytest.raises(ValueError, match=r"home\[1\]': is read as a pattern by datasets; rename it"):
        open_training(DataConfig(source=f"hub:{tmp_path / 'home[1]'}"))
    monkeypatch.setattr("normfree.data.sources.SMALL", 0)
    config = DataConfig(source=str(tmp_path / "d[[]1].parquet"), cache_folder=tmp_path, batch_size=1, image_size=12)
    assert numbers(everything(open_training(config))[0]) == [1]


def test_hidden_files_are_passed_over_and_linked_folders_are_not(folder, tmp_path):
    def count():
        return open_training(DataConfig(source=str(folder), batch_size=1)).examples

    (folder / "ant" / "000.png").rename(folder / "ant" / "000.JFIF")
    assert count() == 20
    for name in ("ant/.ipynb_checkpoints/000.png", "ant/._001.png", ".cache/000.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(0))
    write_parquet(folder / ".cache" / "old.parquet", [encoded(0)], [0])
    assert count() == 20
    (folder / "ant" / "more").symlink_to(write_folder(tmp_path / "more", 9) / "ant")
    assert count() == 23
    write_parquet(folder / "old.parquet", [encoded(0)], [0])
    with pytest.raises(ValueError, match=r"images': holds parquet files \('.*old\.parquet'\) and folders of images"):
        count()
    config = DataConfig(source=f"{folder}/*.parquet", batch_size=1, image_size=12)
    assert open_training(config).examples == 1


def test_a_class_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    write_parquet(folder / "ant" / "old.parquet", [encoded(0)], [0])
    for source in (folder, folder / "**" / "*.parquet"):
        with pytest.raises(ValueError, match=r"source='.*bee': cannot be read \(Permission denied\)"):
            open_training(DataConfig(source=str(source), batch_size=1))


def test_all_endings_of_the_formats_that_are_decoded_are_taken():
    Image.init()
    assert {ending for ending, kind in Image.EXTENSION.items() if kind in {*FORMATS, "MPO"}} <= SUFFIXES


WRONG = {
    "nowhere": ("no such folder or file", {}),
    "empty": ("no class folders", {}),
    "hollow": ("hold no image", {}),
    "mixed/*": ("all be .parquet or all be .tar", {}),
    "table": ("image_column=None.*columns: x", {}),
    "broken.parquet": ("broken.parquet.*no whole parquet", {}),
    "broken.tar": ("broken.tar.*no whole shard", {}),
    "hollow.tar": ("no example", {}),
    "good": ("batch_size=500.*smaller", {"batch_size": 500}),
    "good ": ("training_split='valley'.*choose one of train", {"training_split": "valley"}),
    "good  ": ("image_column='picture'.*no such column", {"image_column": "picture"}),
    "good   ": ("image_column='label'.*holds no encoded images", {"image_column": "label"}),
    "good    ": ("num_classes=7.*declare 3", {"num_classes": 7}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_source_is_one_line(tmp_path, name, no_network):
    for folder in ("empty", "hollow/cat", "mixed", "good"):
        (tmp_path / folder).mkdir(parents=True)
    write_parquet(tmp_path / "good" / "train.parquet", [encoded(0), encoded(1)], [0, 1])
    (tmp_path / "mixed" / "a.parquet").write_bytes(b"")
    (tmp_path / "mixed" / "b.tar").write_bytes(b"")
    datasets.Dataset.from_dict({"x": [1.0, 2.0]}).to_parquet(tmp_path / "table" / "train.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    write_shards(tmp_path, 0, 1)
    (tmp_path / "train-000.tar").rename(tmp_path / "hollow.tar")
    message, options = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        open_training(DataConfig(source=str(tmp_path / name.strip()), **options))
    assert "\n" not in str(caught.value)


def test_no_split_to_evaluate_on(folder):
    with pytest.raises(ValueError, match="evaluation_split='train' to evaluate on that"):
        open_evaluation(DataConfig(source=str(folder)))
    with pytest.raises(ValueError, match=r"evaluation_split='test'.*choose one of train"):
        open_evaluation(DataConfig(source=str(folder), evaluation_split="test"))


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_labels_name_the_row(tmp_path, streaming):
    write_parquet(tmp_path / "train.parquet", [encoded(n) for n in range(4)], [0, 1, None, 2])
    config = DataConfig(source=str(tmp_path), streaming=streaming, batch_size=2, image_size=12)
    with pytest.raises(ValueError, match=r"train\.parquet row 2 \(2\.png\) has no class"):
        next(iter(open_training(config)))
    write_parquet(tmp_path / "train.parquet", [encoded(n) for n in range(4)], [0, 1, -1, 2])
    with pytest.raises(ValueError, match=r"has no class"):
        next(iter(open_training(config)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("batch_size", 0),
        ("workers", -1),
        ("seed", 2**63),
        ("seed", -1),
        ("in_channels", 2),
        ("in_memory", "yes"),
        ("on_bad_image", "ignore"),
        ("crop_ratio", 0),
        ("crop_ratio", 1.5),
        ("crop_ratio", 1e-6),
        ("mean", (0.5, 0.5, 0.5)),
        ("image_size", 0),
    ],
)
def test_the_config_is_checked(field, value):
    with pytest.raises(ValueError, match=field):
        DataConfig(**{field: value})


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="streamed or held in memory"):
        DataConfig(in_memory=True, streaming=True)
    with pytest.raises(ValueError, match="one number per channel"):
        DataConfig(mean=(0.5, 0.5), std=(0.2, 0.2))
    with pytest.raises(ValueError, match=r"image_size=16.*the digits have 8"):
        open_training(DataConfig(image_size=16))


def test_a_class_folder_without_an_image_is_named(tmp_path):
    for name, files in (("cat", ["1.png"]), ("dog", ["1.png"]), ("fish", ["notes.txt"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(encoded(1))
    with pytest.raises(ValueError, match="no image is in 1 of its class folders: 'fish'"):
        FolderSource(tmp_path).rows("train", streaming=False)


def test_a_link_to_nothing_is_a_damaged_image_and_has_no_size(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(1))
    (tmp_path / "cat" / "2.png").symlink_to(tmp_path / "nowhere.png")
    found = fingerprint(FolderSource(tmp_path), "train")
    assert (found["files"], found["bytes"]) == (3, 2 * len(encoded(1)))
