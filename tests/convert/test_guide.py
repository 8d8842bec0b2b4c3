"""The guide's examples run, and it stays short."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "convert.md"


def test_the_examples_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), namespace)
    assert (tmp_path / "conversion.json").is_file()
    assert "no normalizer left" in capsys.readouterr().out


def test_the_guide_is_short_and_its_picture_is_there():
    assert len(GUIDE.read_text().splitlines()) <= 200
    assert (GUIDE.parent / "images" / "convert.png").is_file()
