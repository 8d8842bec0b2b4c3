"""Checkpoints: whole or not there, checked before they are believed, and only the newest and the best kept."""

import errno
import json
import shutil
import warnings

import pytest
import torch

import normfree
from normfree.train.checkpoint import MANIFEST, STATE, WEIGHTS, CheckpointStore, verify_checkpoint


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def write(store, step, score=None):
    state = {"step": step, "momentum": torch.full((3,), float(step))}
    return store.write(step, state, {WEIGHTS: lambda path: path.write_bytes(b"weights" * step)}, score)


def steps(store):
    return [verify_checkpoint(folder).step for folder in store.folders()]


def test_what_was_written_comes_back(store):
    network = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), num_classes=3)
    momentum = torch.full((3,), 7.0)
    written = store.write(7, {"momentum": momentum}, {WEIGHTS: lambda path: normfree.save(network, path)}, 0.5)
    found = store.newest()
    assert found == written
    assert (found.step, found.score) == (7, 0.5)
    assert torch.equal(found.state()["momentum"], momentum)
    loaded = normfree.load(found.weights)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_the_newest_and_the_best_are_kept(store):
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1), (4, None), (5, 0.2)):
        write(store, step, score)
    assert steps(store) == [2, 4, 5]
    assert store.best().step == 2
    write(store, 6, 0.9)  # of equals the newest
    assert steps(store) == [5, 6]


def test_without_scores_only_the_newest_are_kept(store):
    for step in range(1, 5):
        write(store, step)
    assert steps(store) == [3, 4]
    assert store.best().step == 4


def test_a_step_written_again_replaces_the_first(store):
    write(store, 3, 0.1)
    write(store, 3, 0.2)
    assert [(found.step, found.score) for found in map(verify_checkpoint, store.folders())] == [(3, 0.2)]
    assert [path.name for path in store.folder.iterdir()] == ["step_0000000003"]


def test_an_interruption_leaves_the_earlier_ones_and_is_cleaned_up(store):
    write(store, 1)

    def fails(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(2, {}, {WEIGHTS: fails}, None)
    assert store.newest().step == 1
    write(store, 3)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_0000000001", "step_0000000003"]


def flip(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 4
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("harm", [flip, truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_gives_way_to_the_one_before(store, name, harm):
    write(store, 1)
    harm(write(store, 2).folder / name)
    with pytest.warns(RuntimeWarning, match=rf"step_0000000002' is damaged: {name} .*; step_0000000001 is used"):
        assert store.newest().step == 1


def test_every_bit_of_a_manifest_counts(store):
    folder = write(store, 2, 0.25).folder
    sound = (folder / MANIFEST).read_bytes()
    for position in range(0, len(sound), 7):
        for bit in (1, 16):
            data = bytearray(sound)
            data[position] ^= bit
            (folder / MANIFEST).write_bytes(bytes(data))
            try:
                found = verify_checkpoint(folder)
            except ValueError:
                continue
            assert (found.step, found.score) == (2, 0.25)  # white space, or the case of an escape


def test_damaged_ones_are_set_aside_on_request_and_never_deleted(store):
    write(store, 1)
    flip(write(store, 2).folder / STATE)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        store.newest(set_aside=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.newest().step == 1
    assert (store.folder / "damaged_step_0000000002" / STATE).is_file()


def test_when_all_are_damaged_nothing_is_believed(store):
    for step in (1, 2):
        flip(write(store, step).folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"step_0000000002' is damaged: .*and so are all 2 in .*start anew"):
        store.newest()
    assert CheckpointStore(store.folder / "none").newest() is None


def test_damaged_ones_are_no_reason_to_start_anew_however_often_one_asks(store):
    for step in (1, 2):
        flip(write(store, step).folder / WEIGHTS)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"all 2 in .*remove that folder to start anew"):
            store.newest(set_aside=True)
    assert [folder.name for folder in store.folders()] == ["step_0000000001", "step_0000000002"]
    for folder in store.folders():  # as a run of before 0.2 has set them aside
        folder.rename(folder.with_name(f"damaged_{folder.name}"))
    with pytest.raises(ValueError, match=r"damaged_step_0000000002' is damaged, and so are all 2"):
        store.newest()
    shutil.rmtree(store.folder)
    assert store.newest() is None


def test_a_full_disk_names_the_checkpoint_and_spares_those_before(store, monkeypatch):
    write(store, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"\] could not be written: No space left on device: '.*/step_0000000002'"):
            write(store, 2)
    assert [path.name for path in store.folder.iterdir()] == ["step_0000000001"]
    assert store.newest().step == 1


def test_links_are_removed_and_what_they_lead_to_stays(store, tmp_path):
    """A person may have moved checkpoints to another disk."""
    for step in (1, 2):
        write(store, step)
    for folder in store.folders():
        folder.rename(tmp_path / folder.name)
        folder.symlink_to(tmp_path / folder.name)
    (store.folder / ".step_x").symlink_to(tmp_path)
    (store.folder / "step_0000000003").symlink_to(tmp_path / "nothing")
    store.clean()
    with pytest.warns(RuntimeWarning, match="step_0000000003. is damaged"):
        assert store.newest().step == 2
    for step in (3, 4):
        write(store, step)
    assert [folder.name[-1] for folder in store.folders()] == ["3", "4"]
    assert verify_checkpoint(tmp_path / "step_0000000001").step == 1
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_that_cannot_be_removed_is_named(store, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "model.safetensors")

    for step in (1, 2):
        write(store, step)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError, match=r"could not be removed: Permission denied: '.*step_0000000001'"):
        write(store, 3)


def test_a_checkpoint_in_writing_is_not_removed_by_another_store(store):
    """Two processes that write at once: each has a place of its own."""
    other = CheckpointStore(store.folder)

    def meanwhile(path):
        path.write_bytes(b"weights")
        write(other, 5)

    store.write(4, {}, {WEIGHTS: meanwhile}, None)
    assert steps(store) == [4, 5]


def test_a_state_that_would_execute_code_is_refused(store):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    checkpoint = store.write(1, {"evil": Evil()}, {WEIGHTS: lambda path: path.write_bytes(b"")}, None)
    with pytest.raises(Exception, match="calls GLOBAL __builtin__"):
        checkpoint.state()


def test_the_manifest_says_what_is_there(store):
    folder = write(store, 4, 0.75).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {WEIGHTS, STATE}
    assert all((folder / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items())
