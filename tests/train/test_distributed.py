"""Several ranks: what one process would have computed, and what survives when a rank is killed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import MODEL, rows, start, tiny

from normfree.cli import main
from normfree.train import train
from normfree.train.checkpoint import CheckpointStore
from normfree.train.distributed import launch

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# One step at learning rate 0 (the first of the warm-up), without decay: the momentum is the gradient.
ONE_STEP = {
    "limit_train_steps": 1,
    "limit_eval_steps": 1,
    "average_decay": None,
    "checkpoint_every": None,
    "optimizer": {"weight_decay": 0.0, "clip_factor": None},
}
PLAIN = {"crop": "none", "flip": False}
NETWORKS = {
    "nf": MODEL.replace("drop_rate=0.25,stochdepth_rate=0.1", "drop_rate=0,stochdepth_rate=0"),
    "bn": "resnetv2_50:depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar,drop_rate=0,stochdepth_rate=0",
}


def gradient(folder):
    state = CheckpointStore(folder / "checkpoints").newest().state()["optimizer"]["state"]
    return torch.cat([state[key]["momentum_buffer"].flatten().double() for key in sorted(state)])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("network", "size"), [("nf", 64), ("nf", 32), ("bn", 64)])
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_give_the_gradient_of_one_for_nf_and_not_for_bn(network, size, tmp_path):
    """Of 128 images: each rank takes one batch of 64, or accumulates over two of 32."""
    common = {**ONE_STEP, "model": NETWORKS[network]}
    process = start(tmp_path / "two", TORCHRUN, **common, data={"augmentation": PLAIN, "batch_size": size})
    split = train(tiny(tmp_path / "split", **common, data={"augmentation": PLAIN, "batch_size": 32}))
    whole = train(tiny(tmp_path / "whole", **common, data={"augmentation": PLAIN, "batch_size": 128}))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    reference = gradient(whole.folder)
    for folder in (tmp_path / "two", split.folder):
        difference = float((gradient(folder) - reference).norm() / reference.norm())
        if network == "nf":
            assert difference < 1e-6
        else:
            assert difference > 1e-2


def children(pid):
    """Processes that a process has started, by the kernel's own list."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun_starts_again_when_a_rank_is_killed(tmp_path):
    changes = {"average_decay": 0.9, "checkpoint_every": 3, "data": {"batch_size": 64}}
    whole = start(tmp_path / "whole", TORCHRUN, **changes)
    out = tmp_path / "killed"
    launcher = start(out, (*TORCHRUN, "--max-restarts", "1"), **changes)
    deadline = time.monotonic() + 120
    while rows(out) < 8:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(max(children(launcher.pid)), signal.SIGKILL)
    for process in (whole, launcher):
        told, errors = process.communicate(timeout=120)
        # Two ranks share a pipe: a line of one may lie within the other's.
        assert (process.returncode, told.count("finished")) == (0, 2), errors
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_several_processes_take_torchrun(tmp_path):
    with pytest.raises(ValueError, match=r"strategy='ddp': needs several processes; start with: torchrun"):
        train(tiny(tmp_path / "run", strategy="ddp"))


def test_the_command_says_it_too(tmp_path):
    words = ["train", "digits", "--strategy", "fsdp", "--out", str(tmp_path / "run")]
    code = f"import sys; from normfree.cli import main; sys.exit(main({words!r}))"
    run = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr


@pytest.mark.parametrize("rule", [pytest.param("sgd", marks=pytest.mark.slow), "muon"])
def test_sharded_training_is_the_unsharded_one_and_resumes(rule, tmp_path):
    """FSDP, with scalars that it cannot shard, clipping and averaging; weights to the rounding of another order."""
    common = {"limit_train_steps": 4, "limit_eval_steps": 1, "checkpoint_every": 2, "data": {"batch_size": 64}}
    common["data"] |= {"augmentation": PLAIN}
    common |= {"model": NETWORKS["nf"], "optimizer": {"rule": rule}}
    whole = start(tmp_path / "ddp", TORCHRUN, **common)
    first = start(tmp_path / "fsdp", TORCHRUN, **{**common, "limit_train_steps": 2}, strategy="fsdp")
    for process in (whole, first):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    second = start(tmp_path / "fsdp", TORCHRUN, **common, strategy="fsdp")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert CheckpointStore(tmp_path / "fsdp" / "checkpoints").newest().step == 4
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp", "ddp"))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("LOCAL_RANK", "y"), ("RANK", "-1"), ("LOCAL_WORLD_SIZE", "0"), ("WORLD_SIZE", ""), ("SLURM_NTASKS", "1.5")],
)
def test_a_variable_of_the_environment_that_is_no_number_is_named(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    for words in (["evaluate", "torchvision:resnet18", "--source", "digits"], ["train", "digits"], ["demo"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"normfree: {name}={value!r}: of the environment") and f"unset {name}" in error
        assert error.count("\n") == 1


def test_a_local_world_without_a_world_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=None: .*unset LOCAL_WORLD_SIZE"):
        launch("cpu", "fp32")
