"""The table of converted models goes on where it was stopped, and loses nothing."""

import json

import pytest


@pytest.fixture
def table(benchmarks, monkeypatch, tmp_path):
    module = benchmarks("convert")
    asked = []

    def apart(part, name, steps):
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
    return run


def row(name, **more):
    return {"model": name, "failure": "before", **more}


def test_measuring_some_again_keeps_the_others(table):
    table.page([row(name) for name in table.names])
    asked, rows = table("--only", "timm:resnet26", "--fresh")
    assert asked == ["check timm:resnet26"]
    assert len(rows) == len(table.names)
    assert rows["timm:resnet26"]["failure"] == "refused" and rows["timm:resnet26d"]["failure"] == "before"


def test_what_was_aborted_is_tried_again_and_what_was_refused_is_not(table):
    table.page([{"model": "timm:resnet26", "aborted": "not done"}, row("timm:resnet26d")])
    asked, _ = table("--only", "timm:resnet26*")
    assert asked == ["check timm:resnet26"]


def test_results_of_another_machine_are_not_mixed(table, tmp_path):
    table.page([row("timm:resnet26")])
    file = tmp_path / "models.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="measured elsewhere"):
        table("--only", "timm:resnet26d")
