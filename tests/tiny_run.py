"""The smallest runs that still have everything: a network of four blocks on digits, in seconds."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from normfree.data import AugmentationConfig, DataConfig
from normfree.train import RECIPES, OptimizerConfig

MODEL = (
    "nf_resnet50:depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar,alpha=0.5,skipinit_gain=1,"
    "drop_rate=0.25,stochdepth_rate=0.1"
)

VARIED = {"crop": "shift", "shift": 1, "flip": False, "mixup": 0.2, "cutmix": 1.0}


def tiny(out, **changes):
    """A run of 2 epochs of 11 steps on one thread: accumulation, dropout, averaging, clipping, mixing."""
    data = changes.pop("data", {})
    optimizer = changes.pop("optimizer", {})
    config = RECIPES["digits"]()
    return replace(
        config,
        **{
            "out": out,
            "model": MODEL,
            "data": DataConfig(
                **{
                    "source": "digits",
                    "batch_size": 64,
                    **data,
                    "augmentation": AugmentationConfig(**data.get("augmentation", VARIED)),
                }
            ),
            "optimizer": OptimizerConfig(
                **{
                    "learning_rate": 0.02,
                    "warmup_epochs": 0.5,
                    "clip_factor": 0.02,
                    "reference_batch": None,
                    **optimizer,
                }
            ),
            "epochs": 2,
            "batch_size": 128,
            "average_decay": 0.99,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": 4,
            "evaluate_every": 1,
            "signal_every": 0,
            **changes,
        },
    )


CODE = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tiny_run import tiny
from normfree.train import train
summary = train(tiny(Path({out!r}), **{changes!r}))
print(summary.metrics["status"])
"""


def start(out, launcher=(), *, own_group=False, **changes):
    """A process that runs :func:`tiny`, in a group with its children alone where asked."""
    code = CODE.format(tests=str(Path(__file__).parent), out=str(out), changes=changes)
    script = Path(out).parent / f"{Path(out).name}.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, *launcher, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(out):
    """Rows of train.csv that are complete."""
    file = out / "train.csv"
    return max(0, file.read_text().count("\n") - 1) if file.is_file() else 0


def kill_after(process, out, step, how=signal.SIGKILL, *, group=False):
    """Send a signal, to the process or its group, once a step is noted; the process must still be running then."""
    deadline = time.monotonic() + 120
    while rows(out) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if group:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    return process.communicate(timeout=120)
