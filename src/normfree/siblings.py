"""The modules beside a person's FILE.py: importable from files of its folder, also long after it was run.

A model's forward may import a sibling when it first runs. Siblings are therefore found by who asks: an import made by a
file of the folder looks in that folder first, while imports of ours, and of installed packages, never do.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any


class _Siblings(importlib.abc.MetaPathFinder):
    """Finds top-level modules of a folder for imports that its own files make."""

    def __init__(self) -> None:
        self.modules: dict[Path, dict[str, ModuleType]] = {}
        """Of each folder, what was imported from it when its file was run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find a module for a file that asks from one of the folders; None for all others."""
        folder = None if path is not None else self._asking(sys._getframe(1))
        if folder is None:
            return None
        if (known := self.modules[folder].get(name)) is not None:
            return importlib.machinery.ModuleSpec(name, _Again(known))
        return importlib.machinery.PathFinder.find_spec(name, [str(folder)])

    def _asking(self, frame: FrameType | None) -> Path | None:
        """The folder of the file whose code imports."""
        while frame is not None and frame.f_code.co_filename.startswith(_IMPORTING):
            frame = frame.f_back
        file = Path("" if frame is None else frame.f_code.co_filename)
        if "site-packages" in file.parts:
            return None
        return max((folder for folder in self.modules if file.is_relative_to(folder)), key=_depth, default=None)


class _Again(importlib.abc.Loader):
    """Gives a module that was imported before."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: Any) -> ModuleType:
        """Return it."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it has run."""


_IMPORTING = ("<frozen importlib", importlib.__file__)
_FINDER = _Siblings()


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Run code of a folder: its modules are importable as in a script of it, and later by its own files.

    Its modules do not stay in ``sys.modules``, for another folder may have the same names.

    Args:
        folder: resolved.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.modules[folder] = {}
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = _file_of(sys.modules[name])
            if file and file.is_relative_to(folder) and "site-packages" not in file.parts:
                _FINDER.modules[folder][name] = sys.modules.pop(name)


def _depth(folder: Path) -> int:
    return len(folder.parts)


def _file_of(module: Any) -> Path | None:
    """The file of a module, without asking its ``__getattr__``, which may raise anything."""
    try:
        file = object.__getattribute__(module, "__dict__").get("__file__")
        return Path(file).resolve() if isinstance(file, str) else None
    except (AttributeError, OSError, ValueError):  # not every entry of sys.modules is a module
        return None
