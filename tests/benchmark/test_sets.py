"""The committed comparisons: complete, and they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_target_of_the_project_is_in_the_cpu_set(benchmarks):
    targets = [target for part in benchmarks("sets").cpu().parts for target in part.targets]
    assert {(target.at_most, target.quantity) for target in targets} == {
        *((limit, "time") for limit in (1.02, 0.88, 0.84, 1.01, 0.50, 0.80, 0.60, 1 / 0.95)),
        (0.60, "memory"),
        (0.75, "memory"),
    }


@pytest.mark.slow
def test_the_gpu_set_rehearses_on_a_cpu_end_to_end(benchmarks, tmp_path):
    code = benchmarks("networks").main(["--set", "gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert code == 0
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {result["name"] for result in results} >= {"resnet50-bf16-256", "resnet50-inference-1", "regnet-b0-training"}
    assert all(result["quick"] for result in results)
    assert not [found for result in results for found in result["contenders"].values() if "failed" in found]
    assert "rehearsal" in (tmp_path / "README.md").read_text()


def test_a_part_that_fails_costs_no_other(benchmarks, tmp_path, monkeypatch):
    networks = benchmarks("networks")
    measure = networks.measure

    def failing(part, **options):
        if part.name == "cifar-nf-resnet50":
            raise RuntimeError("out of memory")
        return measure(part, **options)

    monkeypatch.setattr(networks, "measure", failing)
    assert networks.main(["--quick", "--only", "cifar-*", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "cifar-nf-resnet26.json").exists()
    assert "- cifar-nf-resnet50: RuntimeError: out of memory" in (tmp_path / "README.md").read_text()


def test_a_part_that_takes_too_long_is_given_up(benchmarks, tmp_path):
    networks, sets = benchmarks("networks"), benchmarks("sets")
    part = next(part for part in sets.cpu().parts if part.name == "cifar-nf-resnet26")
    options = networks.parsed(["--only", part.name, "--out", str(tmp_path)])
    assert networks.run_apart(part, options, tmp_path, 0.01) == "given up after 0 s"


def test_results_go_where_out_says(benchmarks, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "there"))
    assert benchmarks("networks").main(["--quick", "--only", "cifar-nf-resnet26"]) == 0
    assert (tmp_path / "there" / "README.md").exists()


def test_the_sets_import_on_a_bare_machine():
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in ("timm", "rich", "tyro", "plotly", "sklearn", "onnx"))
    code = f"import sys\n{block}\nimport benchmarks.networks\nprint('fine')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stdout.strip() == "fine", run.stderr
