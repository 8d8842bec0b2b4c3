"""Pages that open offline, with plotly's source inside.

``page.html`` and ``page.css`` are the frame of all pages; ``figures.js`` draws figures that plotly knows as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from normfree.common.files import write_atomically
from normfree.common.packages import required


def write_page(path: str | Path, *, title: str, body: str, data: Any, script: str, style: str = "") -> Path:
    """Write a page that requests nothing, as a whole or not at all.

    Args:
        path: where to write it.
        title: of the window, as text.
        body: the page's own HTML.
        data: what ``script`` draws, as JSON.
        script: JavaScript that reads ``data`` and draws with plotly.
        style: CSS of the page's own, beside that of all pages.

    Returns:
        The path.

    Raises:
        ImportError: if plotly is not installed.
    """
    parts = {
        "title": escape(title),
        "style": page_file("page.css") + ("\n" + style if style else ""),
        "body": body,
        "data": inert(data),
        "plotly": _plotly_source(),
        "script": script,
    }
    return write_atomically(path, filled(page_file("page.html"), parts))


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with its ``{{placeholders}}`` filled in.

    In one pass over the template alone: what looks like a placeholder inside a part stays as it is.
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def page_file(name: str) -> str:
    """The text of a template, style sheet or script of ours."""
    return resources.files("normfree.report").joinpath(name).read_text(encoding="utf-8").rstrip()


def _plotly_source() -> str:
    """Plotly's source, for a script element."""
    return required("plotly.offline", "the report").get_plotlyjs().replace("</script", "<\\/script")


def inert(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup, inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
