"""The table of other people's architectures: what a row says of a model, and how the table goes on."""

import json
import time

import pytest
import torch
from torch import nn

from normfree.signal import write_atomically


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x.relu()))


def normalized():
    blocks = [Residual(8) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Conv2d(8, 2, 1)), torch.randn(8, 3, 10, 10)


def exploding():
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight)
    return nn.Sequential(*layers, nn.Linear(16, 2)), torch.randn(32, 16)


def broken():
    raise RuntimeError("no such weights\nin this build")


@pytest.fixture
def foreign(benchmarks, monkeypatch, tmp_path):
    module, case = benchmarks("foreign"), benchmarks("foreign_case").Case

    def described(name, build, **more):
        known = {"package": "torch", "field": "tests", "blocks": 0, "counted": "none", "because": "it is so"}
        return case(**{"name": name, "build": build, **known, **more})

    def run(*arguments):
        lines = []
        module.main([*arguments, "--out", str(tmp_path)], say=lines.append)
        rows = json.loads((tmp_path / "table.json").read_text())["models"]
        return lines, {row["model"]: row for row in rows}, (tmp_path / "README.md").read_text()

    cases = [
        described("own:normalized", normalized, blocks=lambda m: sum(isinstance(each, Residual) for each in m)),
        described("own:exploding", exploding, verdict="sick"),
        described("own:broken", broken),
    ]
    monkeypatch.setattr(module, "cases", lambda: cases)
    run.module, run.described, run.cases = module, described, cases
    return run


def test_a_row_has_blocks_verdicts_both_conversions_a_step_and_the_folds(foreign):
    _, rows, page = foreign("--only", "own:normalized", "own:exploding")
    row = rows["own:normalized"]
    assert row["failed"] == {} and row["blocks"] == row["stated"] == 3 and row["shapes"] == [[8, 3, 10, 10]]
    assert row["pretrained"]["error"] < 1e-5 and row["pretrained"]["left"] == []
    fresh = row["fresh"]
    assert fresh["norms"] == 3 and fresh["left"] == [] and fresh["step"] == "finite" and fresh["fold"] < 1e-5
    before, after = fresh["variances"]
    assert before / 10 < after < before * 10
    sick = rows["own:exploding"]
    assert "explosion" in {kind for severity, kind, _ in sick["findings"] if severity == "error"}
    assert sick["stated"] == sick["blocks"] == 0
    assert set(sick["failed"]) == {"pretrained"} and "normalizer" in sick["failed"]["pretrained"]
    assert "| with the verdict that an expert expects | 2 |" in page
    assert "| pretrained conversions, within 1e-4 | 1, 1 |" in page
    assert "Expected to be sick: it is so." in page


def test_a_model_that_cannot_be_built_is_one_line_of_the_table(foreign):
    lines, rows, page = foreign("--only", "own:broken")
    assert "crash: RuntimeError in test_foreign_table.py" in rows["own:broken"]["failed"]["build"]
    assert len(lines) == 1 and "no such weights" in page and "in this build" not in page


def test_rows_that_are_there_are_kept_and_measured_again_on_request(foreign, tmp_path):
    foreign("--only", "own:broken")
    stored = json.loads((tmp_path / "table.json").read_text())
    stored["models"][0]["version"] = "of before"
    write_atomically(tmp_path / "table.json", json.dumps(stored))
    assert foreign("--only", "own:broken")[1]["own:broken"]["version"] == "of before"
    assert foreign("--only", "own:broken", "--fresh")[1]["own:broken"]["version"] == torch.__version__.split("+")[0]


def test_a_row_that_takes_too_long_or_dies_is_aborted_and_the_others_are_measured(foreign, monkeypatch):
    foreign.cases[2:] = [
        foreign.described("own:slow", lambda: time.sleep(60)),
        foreign.described("own:dies", lambda: __import__("os")._exit(7)),
    ]
    monkeypatch.setattr(foreign.module, "LIMIT", 8.0)
    _, rows, _ = foreign("--only", "own:slow", "own:dies", "own:exploding")
    assert rows["own:slow"]["aborted"] == "not done after 8 seconds" and rows["own:dies"]["aborted"] == "exit code 7"
    assert "findings" in rows["own:exploding"]


def test_a_pattern_without_a_row_is_refused(foreign):
    with pytest.raises(SystemExit, match="--only no:such"):
        foreign("--only", "no:such")


def test_a_fusion_may_be_found_or_not(foreign):
    row = {"blocks": 5, "stated": 3, "fusions": 2}
    stated = foreign.module._has_stated
    assert stated(row) and stated({**row, "blocks": 3})
    assert not stated({**row, "blocks": 6}) and not stated({**row, "blocks": 2})


def test_every_row_has_a_name_of_its_own_and_its_library_is_pinned(benchmarks):
    module = benchmarks("foreign")
    pinned = (module.Path("constraints-foreign.txt")).read_text().lower().replace("_", "-")
    cases = module.cases()
    assert len({case.name for case in cases}) == len(cases) >= 60
    assert len({case.package for case in cases}) >= 12
    assert [case.package for case in cases if f"\n{case.package}==" not in pinned] == []
