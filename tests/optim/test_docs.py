"""The examples of docs/optim.md run, one after the other."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "optim.md"


def test_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["monitor"].history.steps == [0, 2, 3]
    assert names["history"] == names["monitor"].history
    assert {file.name for file in tmp_path.iterdir()} == {"signal.json", "signal.html"}
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 120
