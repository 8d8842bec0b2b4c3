"""Nothing lost: killed at any step and started again, a run ends with the weights it would have ended with.

And nothing silently else: one process writes to a folder, and a run goes on as it began or is told to go on otherwise.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from image_sets import write_folder
from safetensors.torch import load_file
from tiny_run import MODEL, kill_after, rows, start, tiny

from normfree.cli import main
from normfree.data.order import Share
from normfree.train import train
from normfree.train.checkpoint import CheckpointStore


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights and curves of a run that nothing happened to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    summary = train(tiny(tmp_path_factory.mktemp("whole") / "run"))
    torch.set_num_threads(threads)
    assert summary.finished
    return summary.folder


def assert_same_end(folder, other):
    for name in ("model.safetensors", "averaged.safetensors"):
        mine, theirs = (
            load_file(CheckpointStore(run / "checkpoints").newest().folder / name) for run in (folder, other)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    states = [CheckpointStore(run / "checkpoints").newest().state() for run in (folder, other)]
    momenta = [[entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    curves = [[line.split(",")[:6] for line in (run / "train.csv").read_text().splitlines()] for run in (folder, other)]
    assert curves[0] == curves[1]


def test_a_killed_run_ends_as_if_nothing_had_happened(uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    kill_after(process, out, 6)  # between the checkpoints of steps 4 and 8
    assert process.returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    again = start(out)
    kill_after(again, out, 17)  # in the second epoch
    assert again.returncode == -signal.SIGKILL
    last = start(out)
    told, errors = last.communicate(timeout=120)
    assert (last.returncode, told.strip()) == (0, "finished"), errors
    assert_same_end(out, uninterrupted)


def test_sigterm_checkpoints_and_ends_cleanly(uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(out, checkpoint_every=None)
    told, errors = kill_after(process, out, 3, signal.SIGTERM)
    assert (process.returncode, told.strip()) == (0, "stopped"), errors
    step = CheckpointStore(out / "checkpoints").newest().step
    assert 3 <= step < 22
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["status"], metrics["step"], metrics["evaluation"]) == ("stopped", step, None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train(tiny(out)).finished
    torch.set_num_threads(threads)
    assert_same_end(out, uninterrupted)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path):
    """Data that workers decode, of a few steps an epoch."""
    folder = write_folder(tmp_path / "images", 60)
    return {"source": str(folder), "in_memory": False, "evaluation_split": "train", "workers": 2, "batch_size": 16}


def test_sigterm_to_all_processes_ends_as_to_the_one(images, tmp_path):
    """As GNU timeout, systemd and Slurm send it: the workers have it too."""
    out = tmp_path / "run"
    process = start(out, own_group=True, data=images, batch_size=16, epochs=500, evaluate_every=500)
    told, errors = kill_after(process, out, 4, signal.SIGTERM, group=True)
    assert (process.returncode, told.strip()) == (0, "stopped"), errors
    assert CheckpointStore(out / "checkpoints").newest().step >= 4
    assert not (out / ".lock").exists()


def test_a_worker_that_the_system_kills_is_one_line_with_a_remedy(images, tmp_path, monkeypatch, capsys):
    def killed(decoder, examples):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("normfree.data.pipeline.Decoder.__getitems__", killed)
    words = ["--data.source", images["source"], "--data.in-memory", "False", "--data.evaluation-split", "train"]
    words += ["--data.workers", "1", "--data.image-size", "8", "--model", MODEL, "--out", str(tmp_path / "run")]
    assert main(["train", "digits", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("normfree: --data.workers: a process that decodes images was killed") and "0" in error
    assert error.count("\n") == 1 and len(error) < 500


@pytest.mark.usefixtures("one_thread")
def test_one_process_writes_to_a_folder(images, tmp_path):
    out, data = tmp_path / "run", {"data": images, "batch_size": 16, "epochs": 500, "evaluate_every": 500}
    process = start(out, **data)
    deadline = time.monotonic() + 120
    while rows(out) < 6:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again = tiny(out, **data, limit_train_steps=20, limit_eval_steps=1)
    with pytest.raises(ValueError, match=rf"out='.*run': process {process.pid} on .* since .*writing to it; wait"):
        train(again)
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert (out / ".lock").exists()
    assert train(again).metrics["step"] == 20  # at once: the workers of the killed process do not hold it
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("kind", ["a symbolic link", "a hard link", "a named pipe"])
def test_a_lock_that_is_another_file_is_not_written_to(kind, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    lock = tmp_path / "run" / ".lock"
    if kind == "a named pipe":
        os.mkfifo(lock)
    else:
        (lock.symlink_to if kind == "a symbolic link" else lock.hardlink_to)(tmp_path / "precious")
    with pytest.raises((ValueError, OSError), match=r"\.lock"):
        train(tiny(tmp_path / "run"))
    assert (tmp_path / "precious").read_text() == "text"


def test_a_folder_that_a_failed_start_made_is_removed(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        train(tiny(tmp_path / "run", data={"source": str(tmp_path / "none")}))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def begun(tmp_path):
    """A run of three steps on one thread, and the config that goes on with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = tiny(tmp_path / "run", limit_train_steps=3, limit_eval_steps=1, checkpoint_every=1)
    train(config)
    yield replace(config, limit_train_steps=4)
    torch.set_num_threads(threads)


def edit(config, *keys, value):
    """Another value in a run's config.json."""
    path = config.folder / "config.json"
    document = json.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(document))


CONDITIONS = {
    "torch": (("versions", "torch"), "1.0"),
    "precision": (("derived", "precision"), "bf16-mixed"),
    "device": (("derived", "device"), "cuda:0"),
    "images": (("derived", "training_data"), {"examples": 1442, "files": 1}),
    "classes": (("derived", "classes"), ["a", "b"]),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_run_goes_on_under_the_conditions_it_began_with(condition, begun):
    keys, value = CONDITIONS[condition]
    edit(begun, *keys, value=value)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"out=.*would go on to other bits \({condition}.*--on-changed continue"):
            train(begun)
    assert train(replace(begun, on_changed="continue")).metrics["step"] == 4


def test_a_run_goes_on_with_as_many_threads(begun):
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match=r"threads 2 instead of 1\); restore them, or pass --on-changed continue"):
        train(begun)
    torch.set_num_threads(1)
    assert train(begun).metrics["step"] == 4


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_with_the_images_it_began_with(images, tmp_path):
    config = tiny(
        tmp_path / "run", data={**images, "workers": 0}, batch_size=16, limit_train_steps=1, limit_eval_steps=1
    )
    train(config)
    again = replace(config, limit_train_steps=2)
    file = next((tmp_path / "images").rglob("*.png"))
    content = file.read_bytes()
    for change in (lambda: file.write_bytes(content + b"more"), lambda: file.rename(file.with_name("other.png"))):
        change()
        with pytest.raises(ValueError, match=r"other bits \(images\).*--on-changed continue"):
            train(again)
        file.with_name("other.png").unlink(missing_ok=True)
        file.write_bytes(content)
    assert train(again).metrics["step"] == 2


@pytest.mark.usefixtures("one_thread")
def test_how_images_are_read_may_change(images, tmp_path):
    """What the error of a damaged image recommends, and whatever decides nothing of what is learned."""
    third_step = list(Share(examples=60, batch_size=4).indices(0))[2]
    sorted((tmp_path / "images").rglob("*.png"))[third_step[0]].write_bytes(b"no image")
    images |= {"workers": 0}
    config = tiny(tmp_path / "run", data=images, batch_size=4, checkpoint_every=1, limit_eval_steps=1)
    with pytest.raises(ValueError, match=r"pass on_bad_image='skip'"):
        train(config)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest().step == 2
    changes = {"on_bad_image": "skip", "workers": 1, "prefetch": 3, "cache_folder": tmp_path / "cache"}
    again = replace(config, data=replace(config.data, **changes))
    summary = train(again)
    assert summary.finished and len(summary.metrics["bad_images"]) == 1
    with pytest.raises(ValueError, match=r"holds a run with other settings \(data\.crop_ratio\); pass another --out"):
        train(replace(again, data=replace(again.data, crop_ratio=0.5)))


def test_checkpoints_without_their_config_are_not_taken_up(begun):
    config = (begun.folder / "config.json").read_bytes()
    (begun.folder / "config.json").unlink()
    before = sorted(begun.folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds checkpoints and no config\.json .*restore config\.json"):
            train(begun)
    assert sorted(begun.folder.rglob("*")) == before
    (begun.folder / "config.json").write_bytes(config)
    assert train(begun).metrics["step"] == 4


def test_a_run_whose_checkpoints_are_all_damaged_waits_for_a_decision(begun):
    for folder in (begun.folder / "checkpoints").iterdir():
        (folder / "state.pt").write_bytes(b"")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"is damaged: state\.pt .*remove that folder to start anew"):
            train(begun)
    shutil.rmtree(begun.folder / "checkpoints")
    assert train(begun).metrics["step"] == 4


LIMITED = """
import resource, sys
from normfree.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_takes_no_more_is_one_line_that_names_the_file(tmp_path):
    words = ["train", "digits", "--out", str(tmp_path / "run"), "--limit-train-steps", "1", "--signal-every", "0"]
    run = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert f"File too large: '{tmp_path / 'run' / 'checkpoints' / 'step_0000000001'}'" in run.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_what_killed_processes_have_left_is_removed(begun):
    """Of this machine or another: the folder is this process's alone."""
    left = [begun.folder / ".config.json.0123abcd-99-0123abcd.tmp", begun.folder / "checkpoints" / ".step_0000000009"]
    left.append(begun.folder / "checkpoints" / ".step_0000000009.0123abcd-99-0123abcd.tmp")
    left[0].write_text("half")
    for folder in left[1:]:
        folder.mkdir()
        (folder / "state.pt").write_text("half")
    train(begun)
    assert not any(path.exists() for path in left)
