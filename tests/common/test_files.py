"""Files that are written whole or not at all, as what they were, and by name where they cannot be; and what is read."""

import errno
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from normfree.common.files import (
    DEEPEST,
    LONGEST_NUMBER,
    MOST_NODES,
    bounded_loader,
    file_error,
    folders_in,
    parse_json,
    read,
    read_json,
    remove_stale,
    sizes,
    temporary_path,
    walk,
    write_atomically,
)


@pytest.fixture
def umask():
    """A umask of one's own, which a test may not touch."""
    before = os.umask(0o027)
    yield 0o027
    assert os.umask(before) == 0o027


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask, monkeypatch):
    monkeypatch.setattr("os.umask", lambda mask: pytest.fail("the process's umask is every thread's"))
    assert write_atomically(tmp_path / "deep" / "file", "new").stat().st_mode & 0o777 == 0o666 & ~umask
    monkeypatch.undo()


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    for name, target in (("link", tmp_path / "there" / "file"), ("relative", "there/file"), ("new", "there/another")):
        (tmp_path / name).symlink_to(target)
        assert write_atomically(tmp_path / name, name) == tmp_path / name
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == name
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["another", "file"]


@pytest.mark.parametrize("path", ["/dev/null", ""])
def test_what_is_no_file_is_not_replaced(path, tmp_path):
    with pytest.raises(ValueError, match="is a device, no file" if path else "is a folder, no file"):
        write_atomically(path or tmp_path, "text")


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'$") as caught:
        write_atomically(tmp_path / "file", "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_file_in_a_folder_that_cannot_be_written_is_told_once():
    error = OSError(errno.ENOSPC, "No space left on device")
    told = file_error(file_error(error, "folder/file"), "folder")
    assert str(told) == "[Errno 28] could not be written: No space left on device: 'folder'"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "c": 0, "a": 1}}', '{"b": [{"a": {}, "a": 1}]}'])
def test_a_key_that_comes_twice_is_no_sound_json(text, tmp_path):
    with pytest.raises(ValueError, match="it has 'a' twice"):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json': is no sound JSON file \(it has 'a' twice\); give"):
        read_json(tmp_path / "config.json")


KILLED = """
import os, sys
from normfree.common.files import write_atomically
os.fsync = lambda handle: os.kill(os.getpid(), 9)
write_atomically(sys.argv[1], "half")
"""


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_not(tmp_path):
    path = tmp_path / "file"
    for name in ("file", "another"):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
        assert killed.returncode == -9
    mine = temporary_path(path)
    mine.write_text("being written")
    (tmp_path / ".file.of-mine.tmp").write_text("somebody's")
    assert len(list(tmp_path.iterdir())) == 4
    write_atomically(path, "whole")
    left = {mine.name, "file", ".file.of-mine.tmp"}
    assert len({path.name for path in tmp_path.iterdir()} - left) == 1  # of another file
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left
    remove_stale(tmp_path, locked=True)
    assert {path.name for path in tmp_path.iterdir()} == left - {mine.name}


def test_tensors_of_a_file_are_bounded_in_number(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert sizes(tmp_path / "m.safetensors") == (2, 2)
    monkeypatch.setattr("normfree.common.files.MOST_TENSORS", 1)
    for reading in (read, sizes):
        with pytest.raises(ValueError, match=r"m\.safetensors': has 2 tensors, more than 1"):
            reading(tmp_path / "m.safetensors")


def files_of(folder):
    for name in ("a.png", ".hidden.png", "one/b.png", "one/._c.png", "one/.checkpoints/d.png", "two/e.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_walk_passes_over_what_is_hidden_and_follows_links_once(tmp_path):
    home = files_of(tmp_path / "home")
    (files_of(tmp_path / "other") / "again").symlink_to(home / "two")
    (home / "linked").symlink_to(tmp_path / "other")
    (home / "linked too").symlink_to(tmp_path / "other")
    found = sorted(str(path.relative_to(home)) for path in walk(home))
    beside = [f"linked/{name}" for name in ("a.png", "again/e.png", "one/b.png", "two/e.png")]
    assert found == ["a.png", *beside, "one/b.png"]  # two is what linked/again leads to
    assert [path.name for path in folders_in(home)] == ["linked", "linked too", "one", "two"]


@pytest.mark.parametrize("where", ["one", "one/deep"])
def test_a_link_to_a_folder_that_it_lies_in_is_named(where, tmp_path):
    (files_of(tmp_path) / where).mkdir(exist_ok=True)
    (tmp_path / where / "loop").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "one"):
        with pytest.raises(ValueError, match=r"images='.*loop': is a link to a folder that it lies in; remove it"):
            list(walk(folder, "images"))


@pytest.mark.parametrize("reading", [walk, folders_in])
def test_a_folder_that_cannot_be_read_is_named(reading, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ValueError, match=r"images='.*inner': cannot be read \(Permission denied\); make it readable"):
        list(reading(tmp_path / "inner", "images"))


NESTED = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)


def load_yaml(text):
    return yaml.load(text, bounded_loader("a test"))


def test_plain_values_are_read():
    text = f"a: {{b: [1, 2.5, yes, null, word, 2020-01-01]}}\nn: {'9' * LONGEST_NUMBER}\nd: {NESTED}\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a", "alias"),
        (f"[{'1,' * MOST_NODES}]", "100,000 values"),
        (f"[[{NESTED}]]", "64 in each other"),
        ("a: 1" + "0" * LONGEST_NUMBER, "a number of 19 characters"),
        ("a: {1: 2, 0x1: 3}", "1 twice"),
        ("a: 1\nb: 2\na: 3", "a twice"),
    ],
)
def test_what_may_take_long_or_be_meant_otherwise_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)
