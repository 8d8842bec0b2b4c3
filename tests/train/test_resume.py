"""Nothing lost: killed at any step and started again, a run ends with the weights it would have ended with."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import kill_after, start, tiny

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
