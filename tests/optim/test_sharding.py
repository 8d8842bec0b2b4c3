"""Clipping and stepping a sharded network equals doing so with the whole, with two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_two_ranks_clip_and_step_as_one(tmp_path):
    worker = Path(__file__).with_name("sharded_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(worker), str(rank), str(tmp_path / "store")] for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
