"""What the site adds to docs/: notebooks, executed; the pages of results/ and the changes, which lie outside of it.

A notebook is kept without its outputs. The build runs it, cell by cell in one process as a kernel would, and shows what
each cell prints and what its last expression is: a build of the site is a test of its notebooks.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from functools import cache
from html import escape
from pathlib import Path
from pprint import pformat
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+(results/[^)#]+\.md|CHANGELOG\.md)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook, results/**/*.md, with their pictures, and CHANGELOG.md."""
    for path in sorted((ROOT / "docs").glob("**/*.ipynb")):
        page = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        download = f'<a href="{path.name}" download>Download this notebook</a>'
        # Its tables need the room of the contents, of which a notebook has none.
        content = f"---\nhide: [toc]\n---\n\n{executed(path.read_text())}\n\n{download}\n"
        files.append(File.generated(config, page, content=content))
    for path in sorted([*ROOT.glob("results/**/*.md"), *ROOT.glob("results/**/*.png"), ROOT / "CHANGELOG.md"]):
        if "runs" in path.parts:
            continue
        added = File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Point links that leave docs/, and those to notebooks, at the pages that were added."""
    markdown = re.sub(r"\]\(([^)]+)\.ipynb\)", r"](\1.md)", markdown)
    up = "../" * page.file.src_uri.count("/")
    markdown = OUTSIDE.sub(lambda match: f"]({up}{match[1]}", markdown)
    if page.file.src_uri.startswith("results/"):  # results/ refers to docs/ as a neighbour
        markdown = markdown.replace("](../../docs/", "](../../")
    return markdown


@cache
def executed(notebook: str) -> str:
    """Run a notebook and return it as Markdown, each cell with its output.

    Args:
        notebook: the text of its file.

    Raises:
        Exception: what a cell raises.
    """
    parts: list[str] = []
    names: dict[str, Any] = {}
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        if cell["cell_type"] == "code":
            parts.extend(_run(source, cell["id"], names))
    return "\n\n".join(parts)


def _run(source: str, name: str, names: dict[str, Any]) -> list[str]:
    """What a cell prints, and its last expression: as HTML where it has that form, as text otherwise."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)
    shown = [printed.getvalue()] if printed.getvalue() else []
    if hasattr(value, "_repr_html_"):
        return [*map(_text, shown), value._repr_html_()]
    return [_text(one) for one in [*shown, *([pformat(value)] if value is not None else [])]]


def _text(output: str) -> str:
    return f"<pre><code>{escape(output.rstrip())}</code></pre>"
