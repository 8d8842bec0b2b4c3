"""The examples of the documentation run, in order, as one program a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDED = {"models.md": "opacus", "optim.md": "plotly", "tutorials/convert_and_ship.md": "onnxruntime"}


PAGES = ["index.md", "convert.md", "data.md", "models.md", "optim.md", "training.md"]
TUTORIALS = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.glob("tutorials/*.md"))]


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    names = {}
    for example in examples:
        exec(compile(example, page, "exec"), names)
        check_stated_values(example, names)


def check_stated_values(example, names):
    """A line that is an expression with ``# [`` or ``# (`` behind it states the expression's value."""
    for expression, value in re.findall(r"^(\S.*?)  # (\[.*\]|\(.*\))$", example, re.MULTILINE):
        if "=" not in expression:
            assert eval(expression, names) == eval(value), expression


@pytest.mark.parametrize(
    "page",
    sorted(path.relative_to(DOCS.parent).as_posix() for path in (*DOCS.glob("**/*.md"), DOCS.parent / "README.md")),
)
def test_links_and_pictures_are_there(page):
    path = DOCS.parent / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target
