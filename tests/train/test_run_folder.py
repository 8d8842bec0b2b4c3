"""A run's folder that somebody else may have made: a training writes to it alone, and takes its files for one run's."""

import os
import shutil

import pytest
import torch
from tiny_run import tiny

from normfree.train import read_config, train
from normfree.train.checkpoint import WRITTEN

FILES, FOLDERS = (sorted(name for name, kind in WRITTEN.items() if kind == wanted) for wanted in ("file", "folder"))
QUICK = {"average_decay": None, "checkpoint_every": 1, "limit_eval_steps": 1, "signal_every": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run that ended after two steps."""
    return train(tiny(tmp_path_factory.mktemp("run") / "run", limit_train_steps=2, **QUICK)).folder


@pytest.fixture
def copy(two_steps, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(two_steps, tmp_path / "run")


def going_on(folder, **changes):
    """The config that goes on with it for a step."""
    return tiny(folder, **{"limit_train_steps": 3, **QUICK, **changes})


def contents(folder):
    """All that a folder holds, links as such."""
    files = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in files}


def test_all_that_a_run_leaves_is_known(two_steps):
    left = {path.name: "folder" if path.is_dir() else "file" for path in two_steps.iterdir()}
    assert left.items() <= WRITTEN.items()
    assert WRITTEN.keys() - left.keys() == {".lock", "loggers.json", "wandb"}  # while it trains, and with their loggers


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_link_in_the_place_of_what_a_run_writes_is_refused(name, dangling, copy, tmp_path):
    place, elsewhere = copy / name, tmp_path / "elsewhere"
    if place.exists():
        shutil.move(place, elsewhere)
    elif not dangling:
        elsewhere.mkdir() if name in FOLDERS else elsewhere.write_bytes(b"precious")
    if dangling and elsewhere.exists():
        (shutil.rmtree if elsewhere.is_dir() else os.unlink)(elsewhere)
    place.symlink_to("../elsewhere")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"^out='.*/{name}': is a link, and a run .*; remove the link$"):
        train(going_on(copy))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_folder_for_a_file_and_a_file_for_a_folder_are_refused_before_a_step(name, copy, tmp_path):
    if (place := copy / name).exists():
        shutil.move(place, tmp_path / "moved")
    place.mkdir() if name in FILES else place.write_bytes(b"precious")
    before = contents(tmp_path)
    rule = r"is a (file|folder), and a run has a (file|folder) there; move it elsewhere"
    with pytest.raises(ValueError, match=rf"^out='.*/{name}': {rule}$"):
        train(going_on(copy))
    assert contents(tmp_path) == before


def test_the_folder_itself_may_be_a_link(copy, tmp_path):
    (tmp_path / "link").symlink_to("run")
    assert train(going_on(tmp_path / "link")).metrics["step"] == 3
    assert (tmp_path / "link").is_symlink() and (copy / "checkpoints" / "step_0000000003").is_dir()


def test_a_settings_file_names_no_folder_behind_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    (here / "link").symlink_to(elsewhere)
    for setting in ("out", "data.cache_folder"):
        (here / "own.yaml").write_text(f"model: nf_resnet50\n{setting}: link/run\n")
        with pytest.raises(ValueError, match=rf"its {setting} is 'link/run', and no folder outside the current one"):
            read_config(here / "own.yaml")
        assert read_config(here / "own.yaml", code=[f"--{setting.replace('_', '-')}", "link/run"])
