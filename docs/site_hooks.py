"""What the site adds to the pages of docs/: the pages of results/ and the changes, which lie outside that folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+(results/[^)#]+\.md|CHANGELOG\.md)")


def on_files(files: Files, config: Any) -> Files:
    """Add results/**/*.md, with their pictures, and CHANGELOG.md."""
    for path in sorted([*ROOT.glob("results/**/*.md"), *ROOT.glob("results/**/*.png"), ROOT / "CHANGELOG.md"]):
        if "runs" in path.parts:
            continue
        added = File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Point links that leave docs/ at the pages that were added."""
    up = "../" * page.file.src_uri.count("/")
    markdown = OUTSIDE.sub(lambda match: f"]({up}{match[1]}", markdown)
    if page.file.src_uri.startswith("results/"):  # results/ refers to docs/ as a neighbour
        markdown = markdown.replace("](../../docs/", "](../../")
    return markdown
