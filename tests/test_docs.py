"""The examples of the documentation run, in order, as one program a page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDED = {
    "howto.md": "opacus",
    "models.md": "opacus",
    "optim.md": "plotly",
    "tutorials/convert_and_ship.md": "onnxruntime",
}


PAGES = ["index.md", "convert.md", "data.md", "howto.md", "models.md", "optim.md", "training.md"]
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
    for test in [value for name, value in names.items() if name.startswith("test_")]:
        test()


def test_the_example_of_several_ranks_runs_on_two(tmp_path):
    text = (DOCS / "tutorials/own_loop.md").read_text(encoding="utf-8")
    (example,) = (each for each in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "all_reduce" in each)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "example.py"]
    path = os.pathsep.join([str(DOCS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ended = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told = sorted(re.findall(r"rank \d of 2: done", ended.stdout))  # the ranks may write into one line
    assert told == ["rank 0 of 2: done", "rank 1 of 2: done"]


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


def test_the_papers_page_has_every_figure_and_table():
    from typing import get_args, get_type_hints

    from normfree.commands.paper import Paper

    names = get_args(get_args(get_type_hints(Paper, include_extras=True)["what"])[0])
    page = (DOCS / "paper.md").read_text()
    assert len(names) == 9
    assert [name for name in names if f"| `{name}` |" not in page] == []
