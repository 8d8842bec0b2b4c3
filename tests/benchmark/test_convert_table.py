"""The table of converted models goes on where it was stopped, and loses nothing."""

import json
import time

import pytest

from normfree.benchmark import hardware

CHECKED = {
    "changes": 1,
    "norms": 1,
    "norms_left": 0,
    "unscaled": 0,
    "millions": 1,
    "image_size": 64,
    "gaussian": [],
    "photos": [],
    "leak": 0,
    "pretrained": 1e-7,
}


@pytest.fixture
def table(benchmarks, monkeypatch, tmp_path):
    module = benchmarks("convert")
    asked = []

    def apart(part, name, options):
        asked.append(f"{part} {name}")
        return {"failure": "refused"}

    monkeypatch.setattr(module, "apart", apart)

    def run(*arguments):
        asked.clear()
        module.main([*arguments, "--out", str(tmp_path)], say=lambda line: None)
        rows = json.loads((tmp_path / "models.json").read_text())["models"]
        return sorted(asked), {row["model"]: row for row in rows}

    run.page = lambda rows: (tmp_path / "models.json").write_text(module.page(rows))
    run.names = module.names()
    run.module = module
    return run


def row(name, **more):
    return {"model": name, "machine": "this", "failure": "before", **more}


def test_measuring_some_again_keeps_the_others(table):
    table.page([row(name) for name in table.names])
    asked, rows = table("--only", "timm:resnet26", "--fresh")
    assert asked == ["check timm:resnet26"]
    assert len(rows) == len(table.names)
    assert rows["timm:resnet26"]["failure"] == "refused" and rows["timm:resnet26d"]["failure"] == "before"


def test_what_was_aborted_is_tried_again_and_what_was_refused_is_not(table):
    table.page([{"model": "timm:resnet26", "machine": "this", "aborted": "not done"}, row("timm:resnet26d")])
    asked, _ = table("--only", "timm:resnet26*")
    assert asked == ["check timm:resnet26"]


def test_each_row_keeps_where_it_was_measured(table, tmp_path):
    table.page([row("timm:resnet26", machine="another machine")])
    _, rows = table("--only", "timm:resnet26*")
    here = rows["timm:resnet26d"]["machine"]
    assert rows["timm:resnet26"]["machine"] == "another machine" != here
    where = (tmp_path / "README.md").read_text().split("## Where")[1]
    assert "Checked on another machine" in where and here in where


def test_the_page_says_what_adam_trained(table):
    def ran(deleted, converted):
        ends = {"loss": [2.3, 1.0], "peak": 3.0}
        return {"rate": 0.2, "deleted": {"outcome": deleted, **ends}, "converted": {"outcome": converted, **ends}}

    training = {"machine": "this", **ran("learns nothing", "diverges"), "adam": ran("learns nothing", "trains")}
    page = table.module.table([{**row("timm:lcnet_050"), **CHECKED, "training": training}])
    assert "the norm-deleted one does not | 0 |" in page and "with SGD | 1 of 1 |" in page
    assert "`timm:lcnet_050`, rate 0.2, norms deleted 2.30 → 1.00, learns nothing, converted 2.30 → 1.00." in page


def test_what_is_done_is_written_and_nothing_more_begun_once_something_breaks(table, monkeypatch, tmp_path):
    begun = []

    def apart(part, name, options):
        begun.append(name)
        if name == "timm:resnet26d":
            raise KeyboardInterrupt
        time.sleep(0.1)
        return {"failure": "refused"}

    monkeypatch.setattr(table.module, "apart", apart)
    with pytest.raises(KeyboardInterrupt):
        table("--only", "timm:*", "--workers", "1")
    assert begun[:2] == ["timm:resnet26", "timm:resnet26d"] and len(begun) < 6
    assert "timm:resnet26" in (tmp_path / "models.json").read_text()


def test_a_gpu_is_named_where_it_was_used(table, monkeypatch):
    monkeypatch.setattr(table.module, "hardware", lambda: {**hardware(), "gpu": "A GPU"})
    _, rows = table("--only", "timm:resnet26", "--device", "cuda")
    assert "A GPU" not in rows["timm:resnet26"]["machine"]
    for device, named in (("cuda", True), ("cpu", False)):
        table.page([{**row("timm:resnet26"), **CHECKED}])
        _, rows = table("--only", "timm:resnet26", "--device", device)
        assert ("A GPU" in rows["timm:resnet26"]["training"]["machine"]) == named
