"""A run's folder that somebody else may have made: a training writes to it alone, and takes its files for one run's."""

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import MODEL, tiny

from normfree.cli import main
from normfree.data.config import Preprocessing
from normfree.train import read_config, train
from normfree.train.checkpoint import MANIFEST, WRITTEN, CheckpointStore, _own_hash, hash_of

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


def edit(path, *keys, value):
    """Another value in a JSON file; without it for ``...``."""
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(document))


SETTINGS = {
    "epochs": (3, "3 instead of 2"),
    "label_smoothing": (0.5, "0.5 instead of 0.0"),
    "channels_last": (False, "False instead of True"),
    "optimizer.final_learning_rate": (0.01, "0.01 instead of 0.0"),
    "optimizer.learning_rate": (0.3, "0.3 instead of 0.02"),
    "optimizer.clip_norm": (0.01, "0.01 instead of None"),
    "optimizer.warmup_epochs": (0.0, "0.0 instead of 0.5"),
    "data.crop_ratio": (0.5, "0.5 instead of 0.875"),
    "data.augmentation.shift": (3, "3 instead of 1"),
    "model": (MODEL.replace("alpha=0.5", "alpha=0.9"), "….*alpha=0.9,.* instead of ….*alpha=0.5,.*"),
    "model (activation)": (f"{MODEL},activation=silu", "….*,activation=silu instead of ….*=0.1"),
}


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_knows_the_settings_that_made_it(name, steps, copy):
    """Whatever config.json says by now, and also where the run has ended."""
    value, told = SETTINGS[name]
    setting = name.partition(" ")[0]
    edit(copy / "config.json", "config", *setting.split("."), value=value)
    edit(copy / "config.json", "config", "out", value=str(copy))
    config = dataclasses.replace(read_config(copy, going_on(copy))[0], limit_train_steps=steps)
    before = contents(copy)
    rule = rf"its step_0000000002 was made with other settings, .*other bits \({setting} {told}\); restore them, or"
    with pytest.raises(ValueError, match=rf"^out='.*': {rule} pass --on-changed continue"):
        train(config)
    assert contents(copy) == before
    again = train(dataclasses.replace(config, on_changed="continue"))
    assert again.metrics["step"] == steps
    if steps == 3:
        assert train(config).repeated  # its newest checkpoint was made with these


def test_what_does_not_make_the_bits_may_change(copy):
    changes = {"checkpoint_every": None, "log_every": 3, "evaluate_every": 2, "keep": 5, "name": "other"}
    assert train(going_on(copy, **changes)).metrics["step"] == 3


CONDITIONS = {"torch": "1.0", "precision": "bf16-mixed", "device": "cuda", "threads": 64, "images": "0" * 64}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_checkpoint_knows_the_conditions_that_made_it(name, copy):
    forge(copy, name, CONDITIONS[name])
    with pytest.raises(ValueError, match=rf"^out='.*other conditions .*other bits \({name}.*--on-changed continue"):
        train(going_on(copy))
    assert train(going_on(copy, on_changed="continue")).metrics["step"] == 3


def forge(folder, condition, value):
    """Another condition in a checkpoint's manifest, all of it without a value."""
    path = CheckpointStore(folder / "checkpoints").newest().folder / MANIFEST
    document = json.loads(path.read_text())
    del document["sha256"]
    if value is ...:
        del document["made_by"]
    else:
        document["made_by"]["conditions"][condition] = value
    path.write_text(json.dumps({**document, "sha256": _own_hash(document)}))


def test_a_checkpoint_that_does_not_say_it_is_taken_up(copy):
    """As one of an earlier version."""
    forge(copy, "", ...)
    edit(copy / "config.json", "config", "label_smoothing", value=0.5)
    assert train(going_on(copy, label_smoothing=0.5)).metrics["step"] == 3


def other_notes(path, **changes):
    """The same tensors with other notes."""
    with safe_open(path, "pt") as file:
        notes, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = json.loads(notes[Preprocessing.METADATA])
    built = json.loads(notes["normfree"])
    if removed := changes.pop("removed", None):
        del notes[removed]
    else:
        notes[Preprocessing.METADATA] = json.dumps(said | {key: value for key, value in changes.items() if key in said})
        notes["normfree"] = json.dumps(built | {key: value for key, value in changes.items() if key in built})
    save_file(tensors, path, notes)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """The folder of a run from another seed."""
    config = tiny(tmp_path_factory.mktemp("other") / "run", limit_train_steps=2, seed=1, **QUICK)
    return train(config).folder


COMMANDS = {
    "evaluate": ["evaluate", "RUN", "--limit-eval-steps", "1"],
    "predict": ["predict", "RUN", "IMAGE"],
    "export": ["export", "RUN", "--out", "OUT/m.onnx"],
    "spp": ["spp", "RUN", "--out", "OUT/spp"],
}


def run_command(name, folder, tmp_path):
    """The exit code of a command on a run."""
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    places = {"RUN": folder, "IMAGE": tmp_path / "image.png", "OUT": tmp_path / "out"}
    words = COMMANDS[name]
    return main([re.sub("RUN|IMAGE|OUT", lambda match: str(places[match[0]]), word) for word in words])


EXCHANGED = {
    "weights of another run": lambda run, other: shutil.copy(other / "model.safetensors", run),
    "metrics of another run": lambda run, other: shutil.copy(other / "metrics.json", run),
    "weights without their classes": lambda run, _: other_notes(
        run / "model.safetensors", removed=Preprocessing.METADATA
    ),
    "weights with another alpha": lambda run, _: other_notes(run / "model.safetensors", alpha=0.9),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("exchange", EXCHANGED)
def test_weights_that_a_run_has_not_written_are_refused(exchange, command, copy, other_run, tmp_path, capsys):
    EXCHANGED[exchange](copy, other_run)
    assert run_command(command, copy, tmp_path) == 2
    error = capsys.readouterr().err
    rule = (
        r"is not the file that this run wrote, by the SHA-256 in its metrics\.json; restore both .*, or name the file"
    )
    assert error.count("\n") == 1 and re.search(rf"model\.safetensors'?: {rule}", error), error


@pytest.mark.parametrize("exchange", EXCHANGED)
def test_a_finished_run_with_other_weights_is_not_told(exchange, copy, other_run):
    EXCHANGED[exchange](copy, other_run)
    config = going_on(copy, limit_train_steps=2)
    with pytest.raises(ValueError, match=r"model.safetensors': is not the file that this run wrote.*remove metrics"):
        train(config)
    (copy / "metrics.json").unlink()
    summary = train(config)
    assert not summary.repeated and summary.metrics["model_sha256"] == hash_of(copy / "model.safetensors")
    assert train(config).repeated


def test_a_file_is_used_where_it_is_named_itself(copy, other_run, tmp_path):
    shutil.copy(other_run / "model.safetensors", copy)
    words = ["--run", str(copy), "--limit-eval-steps", "1"]
    assert main(["evaluate", str(copy / "model.safetensors"), *words]) == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["image_size", "crop_ratio", "classes", "mean", "model"])
def test_a_run_and_its_weights_say_the_same(name, command, copy, tmp_path, capsys):
    """Also where metrics.json does not know the weights, as an earlier version's."""
    edit(copy / "metrics.json", "model_sha256", value=...)
    assert run_command(command, copy, tmp_path) == 0
    keys, value, rule = {
        "image_size": (("derived", "data", "image_size"), 16, r"its run.* does not \(image_size\)"),
        "crop_ratio": (("derived", "data", "crop_ratio"), 0.5, r"its run.* does not \(crop_ratio\)"),
        "classes": (("derived", "classes"), list("9876543210"), r"its run.* does not \(classes\)"),
        "mean": (("derived", "data", "mean"), [0.9], r"its run.* does not \(mean\)"),
        "model": (
            ("config", "model"),
            MODEL.replace("alpha=0.5", "alpha=0.9"),
            r"another network than its run's config",
        ),
    }[name]
    edit(copy / "config.json", *keys, value=value)
    capsys.readouterr()
    assert run_command(command, copy, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(rf"model\.safetensors'?: .*{rule}", error), error


def test_a_checkpoint_and_its_run_say_the_same(copy, tmp_path, capsys):
    checkpoint = CheckpointStore(copy / "checkpoints").newest().folder
    assert run_command("evaluate", checkpoint, tmp_path) == 0
    edit(copy / "config.json", "config", "model", value="nf_resnet101")
    assert run_command("evaluate", checkpoint, tmp_path) == 2
    assert "another network than its run's config.json says (nf_resnet101)" in capsys.readouterr().err
