"""Images held out of a training split: of every class, the same everywhere, and never one that is trained on."""

import os
import random
import unicodedata
from collections import Counter, defaultdict

import pyarrow
import pytest
import torch
from image_sets import CLASSES, encoded, write_folder, write_parquet, write_shards

from normfree.data import DataConfig, open_evaluation, open_training, with_holdout
from normfree.data.holdout import choose, group_copies
from normfree.data.records import open_split

EACH = {"batch_size": 1, "image_size": 12, "crop_ratio": 1}


def numbers(data):
    """The numbers that images carry in their red."""
    return [number for images, _ in data for number in images[:, 0, 0, 0].tolist()]


def both(source, **options):
    config = DataConfig(source=str(source), **{**EACH, "holdout": 0.2, **options})
    return open_training(config), open_evaluation(config)


@pytest.mark.parametrize("in_memory", [True, False])
def test_both_parts_together_are_all_images_and_each_has_its_label(folder, parquet, in_memory):
    for source, count in ((folder, 20), (parquet, 26)):
        training, evaluation = both(source, in_memory=in_memory)
        trained, held = numbers(training), numbers(evaluation)
        assert sorted(trained + held) == list(range(count))
        assert evaluation.held_out and len(held) == evaluation.examples == 3 * round(0.2 * count / 3)
        targets = torch.cat([targets for _, targets in evaluation]).tolist()
        assert [number % 3 for number in held] == targets and set(targets) == {0, 1, 2}
        assert training.class_names == evaluation.class_names == CLASSES
        assert training.config.holdout == 0.2


def test_the_share_of_each_class():
    """Rounded, at least one, never all; whatever names, shares and seeds."""
    draw = random.Random(0)
    for trial in range(200):
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 6))]
        labels = [str(label) for label, size in enumerate(sizes) for _ in range(size)]
        share = draw.uniform(0.001, 0.999)
        held = choose([f"{number}.png" for number in range(len(labels))], labels, range(len(labels)), share, trial)
        assert held == sorted(set(held))
        counts = Counter(labels[number] for number in held)
        for label, size in enumerate(sizes):
            assert counts[str(label)] == min(max(1, int(share * size + 0.5)), size - 1)


def test_the_choice_is_the_same_on_every_machine():
    """By sha256sum, by hand: the SHA-256 of seed, NUL and name, ascending."""
    names = [f"cat/{letter}.png" for letter in "abcdefghij"]
    assert [names[number] for number in choose(names, ["cat"] * 10, range(10), 0.3, 0)] == [
        "cat/c.png",
        "cat/d.png",
        "cat/i.png",
    ]
    others = {tuple(choose(names, ["cat"] * 10, range(10), 0.3, seed)) for seed in range(20)}
    assert len(others) > 10  # of 120
    shuffled = random.Random(0).sample(range(10), 10)
    found = choose([names[number] for number in shuffled], ["cat"] * 10, range(10), 0.3, 0)
    assert {shuffled[number] for number in found} == {2, 3, 8}


def held_names(source, **options):
    opened = open_split(DataConfig(source=str(source), holdout=0.3, **options), training=False)
    return sorted(os.path.relpath(row["path"], source) for row in opened.rows["image"])


def test_neither_the_place_nor_the_order_of_the_folder_matters(tmp_path, monkeypatch):
    write_folder(tmp_path / "one", 30)
    for file in sorted((tmp_path / "one").rglob("*.png"), reverse=True):
        twin = tmp_path / "deeper" / "two" / file.relative_to(tmp_path / "one")
        twin.parent.mkdir(parents=True, exist_ok=True)
        twin.write_bytes(file.read_bytes())
    held = held_names(tmp_path / "one")
    assert len(held) == 9
    assert held_names(tmp_path / "deeper" / "two") == held
    monkeypatch.chdir(tmp_path / "one")
    assert held_names(".") == held
    monkeypatch.chdir(tmp_path)
    assert held_names("one") == held
    assert held_names("one", holdout_seed=1) != held
    assert held_names("one", seed=1) == held


def test_a_name_is_the_same_however_a_system_writes_its_accents():
    plain = [f"{name}.png" for name in ("é", "ü", "ñ", "å", "ö", "ê", "ç", "õ")]
    composed, decomposed = ([unicodedata.normalize(form, name) for name in plain] for form in ("NFC", "NFD"))
    assert composed != decomposed
    for seed in range(5):
        chosen = [choose(names, ["a"] * 8, range(8), 0.3, seed) for names in (composed, decomposed)]
        assert chosen[0] == chosen[1]


def test_an_image_that_is_added_moves_one_other_at_most():
    names = [f"{number}.png" for number in range(50)]
    for added in range(20):
        more = [*names, f"added{added}.png"]
        before, after = (
            {some[number] for number in choose(some, ["a"] * len(some), range(len(some)), 0.1, 0)}
            for some in (names, more)
        )
        assert len(before - after) <= 1 and len(after - before) <= 1


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    """By name, by link, and in another class, where no label is to be trusted."""
    folder = write_folder(tmp_path / "images", 60)
    for number in range(0, 60, 3):  # each of class 0
        (folder / "ant" / f"copy{number}.png").write_bytes(encoded(number))
    for number in range(1, 60, 3):
        (folder / "bee" / f"link{number}.png").symlink_to(folder / "bee" / f"{number:03d}.png")
    for number in (2, 5, 8):
        os.link(folder / "cat" / f"{number:03d}.png", folder / "ant" / f"cat{number}.png")
    for seed in range(4):
        training, evaluation = both(folder, holdout_seed=seed)
        trained, held = numbers(training), numbers(evaluation)
        assert not set(trained) & set(held) and sorted({*trained, *held}) == list(range(60))
        assert not {2, 5, 8} & set(held)
        assert all(count == (1 if number % 3 == 2 else 2) for number, count in Counter(held).items())
    pairs = {"cat/a.png", "cat/b.png", "cat/c.png", "cat/d.png"}
    assert len(choose(sorted(pairs), ["cat"] * 4, [0, 0, 2, 2], 0.1, 0)) == 2  # no single image is left
    assert choose(["a", "b"], ["cat"] * 2, [0, 0], 0.5, 0) == []


def test_copies_are_found_as_by_comparing_all_bytes(tmp_path):
    draw = random.Random(0)
    heads = [draw.randbytes(3) for _ in range(3)]
    tails = [bytes(5000), bytes([1]) * 5000, b"", b"short"]
    contents = [draw.choice(heads) + draw.choice(tails) for _ in range(60)]
    expected, first = [], defaultdict(lambda: len(expected))
    for content in contents:
        expected.append(first[content])
    assert 3 < len(set(expected)) < 15
    assert group_copies(pyarrow.chunked_array([contents[:20], contents[20:]])) == expected
    rows = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        inside = number % 2
        rows.append({"bytes": content if inside else None, "path": None if inside else str(path)})
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    assert group_copies(pyarrow.chunked_array([pyarrow.array(rows, kind)])) == expected
    gone = [{"bytes": None, "path": str(tmp_path / "gone")}, {"bytes": None, "path": str(tmp_path)}, None]
    assert group_copies(pyarrow.chunked_array([pyarrow.array(2 * gone, kind)])) == list(range(6))


def test_a_class_of_one_image_is_trained_on(tmp_path):
    folder = write_folder(tmp_path / "images", 9)
    (folder / "dog").mkdir()
    (folder / "dog" / "only.png").write_bytes(encoded(9))
    training, evaluation = both(folder)
    assert 9 in numbers(training) and evaluation.absent_classes() == ["dog"]
    assert evaluation.examples == 3
    for name in CLASSES:
        for file in sorted((folder / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(ValueError, match=r"holdout=0\.2: no class has two different images.*evaluation_split='train'"):
        both(folder)


def test_a_damaged_image_is_called_what_it_is_in_the_whole(tmp_path):
    images = [encoded(number) for number in range(26)]
    write_parquet(tmp_path / "train-0.parquet", images[:13], [number % 3 for number in range(13)])
    write_parquet(tmp_path / "train-1.parquet", images[13:], [number % 3 for number in range(13, 26)])
    held = numbers(both(tmp_path)[1])[-1]
    images[held] = b"no image"
    write_parquet(tmp_path / "train-1.parquet", images[13:], [number % 3 for number in range(13, 26)])
    assert held >= 13
    with pytest.raises(ValueError, match=rf"train-1\.parquet row {held - 13} \({held - 13}\.png\) does not decode"):
        numbers(both(tmp_path, in_memory=False)[1])


def test_a_tenth_is_held_out_where_nothing_else_is_to_evaluate_on(folder, parquet, shards, tmp_path):
    asked = {"holdout": 0.0}, {"holdout": 0.3}, {"evaluation_split": "train"}
    for source, expected in ((str(folder), 0.1), (str(parquet), None), (shards, None), ("digits", None)):
        assert with_holdout(DataConfig(source=source)).holdout == expected
        for options in asked:
            config = DataConfig(source=source, **options)
            assert with_holdout(config) == config
    assert with_holdout(DataConfig(source=str(folder), streaming=True)).holdout is None
    write_folder(tmp_path / "split" / "train", 6)
    assert with_holdout(DataConfig(source=str(tmp_path / "split"))).holdout == 0.1
    write_folder(tmp_path / "split" / "val", 6)
    assert with_holdout(DataConfig(source=str(tmp_path / "split"))).holdout is None


def test_what_is_held_out_goes_before_other_splits_and_can_be_left_aside(tmp_path):
    write_folder(tmp_path / "train", 30)
    write_folder(tmp_path / "test", 9)
    training, evaluation = both(tmp_path)
    assert (training.examples, evaluation.examples, evaluation.held_out) == (24, 6, True)
    _, test = both(tmp_path, evaluation_split="test")
    assert (test.examples, test.held_out) == (9, False)
    _, trained = both(tmp_path, evaluation_split="train")
    assert sorted(numbers(trained)) == sorted(numbers(training))


def test_both_parts_are_known_by_all_files(folder):
    (training, evaluation), whole = both(folder), open_training(DataConfig(source=str(folder), batch_size=1))
    files = {name: value for name, value in whole.identity().items() if name != "examples"}
    assert training.identity() == {"examples": 17, **files}
    assert evaluation.opened is not None
    assert evaluation.opened.source.files("holdout") == evaluation.opened.source.files("train")


WRONG = {
    "shards": (r"holdout=0\.2: images that are read in the order of their files.*evaluation_split", {}),
    "digits": (r"holdout=0\.2: the digits have a split to test on; leave it out", {}),
    "folder": (r"holdout=1\.0: must be a number of at least 0 and below 1", {"holdout": 1.0}),
    "folder ": (r"holdout_seed=-1: must be an integer", {"holdout_seed": -1}),
    "folder  ": (r"holdout=0\.2: images that are read in the order", {"streaming": True}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_held_out_is_one_line(name, folder, tmp_path):
    sources = {"shards": write_shards(tmp_path / "s", 6, 2), "digits": "digits", "folder": folder}
    message, options = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        both(sources[name.strip()], **{"image_size": None, **options})
    assert "\n" not in str(caught.value)
