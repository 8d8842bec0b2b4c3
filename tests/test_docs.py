"""The examples of the documentation run, in order, as one program a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["data.md", "models.md"])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    if page == "models.md":
        pytest.importorskip("opacus")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    names = {}
    for example in examples:
        exec(compile(example, page, "exec"), names)
        check_stated_values(example, names)


def check_stated_values(example, names):
    """A line that is an expression with ``# [`` behind it states the expression's value."""
    for expression, value in re.findall(r"^(\S.*?)  # (\[.*\])$", example, re.MULTILINE):
        if "=" not in expression:
            assert eval(expression, names) == eval(value), expression
