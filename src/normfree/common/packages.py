"""Packages that only some of what is here takes: imported where they are used, and their absence told in one way."""

from __future__ import annotations

import importlib
from types import ModuleType

from normfree.common.text import all_lines


def required(module: str, purpose: str, install: str | None = None) -> ModuleType:
    """Import a package's module, or say what needs it and how to install it.

    Args:
        module: its dotted name, such as ``"plotly.graph_objects"``.
        purpose: what needs it, such as ``"the report"``.
        install: what pip calls it; the module's first name by default.

    Returns:
        The module.

    Raises:
        ImportError: it is missing or broken; one line.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)  # first, so that what is missing is told by its own name
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "is not installed" if missing else f"cannot be imported ({all_lines(error)})"
        told = f"{purpose} needs {package}, which {reason}; pip install {install or package}"
        raise ImportError(told, name=package) from error
