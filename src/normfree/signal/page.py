"""Pages that open offline: templates beside this file, filled in, with plotly's source inside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from normfree.signal.files import write_atomically
from normfree.signal.packages import required


def write_page(path: str | Path, template: str, parts: Mapping[str, str]) -> Path:
    """Fill the ``{{placeholders}}`` of a template and write the page, as a whole or not at all; returns the path."""
    # One pass over the page alone: what looks like a placeholder inside the data stays as it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page_file(template))
    return write_atomically(path, page)


def page_file(name: str) -> str:
    """The text of a template, style sheet or script of ours."""
    return resources.files("normfree.signal").joinpath(name).read_text(encoding="utf-8").rstrip()


def plotly_source() -> str:
    """Plotly's source, for a script element.

    Raises:
        ImportError: if plotly is not installed.
    """
    return required("plotly.offline", "the report").get_plotlyjs().replace("</script", "<\\/script")


def inert(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup, inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
