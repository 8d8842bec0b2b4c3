"""How far a reader jumps between files to follow one call: the files of each function, in the order of first calls.

``PYTHONPATH=src:tests python -m reading_path`` prints the path of ``spp(model, x)`` and of ``convert(model, x)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import normfree

PACKAGE = Path(normfree.__file__).parent


def reading_path(call: Callable[[], Any]) -> list[str]:
    """Return the package's files as a reader enters them: one who opens each function when it is first called."""
    seen: set[Any] = set()
    path: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code in seen or not code.co_filename.startswith(str(PACKAGE)):
            return
        seen.add(code)
        file = str(Path(code.co_filename).relative_to(PACKAGE))
        if not path or path[-1] != file:
            path.append(file)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return path


def counts(path: list[str]) -> tuple[int, int]:
    """Return the number of files, and of returns to a file that was left before."""
    return len(set(path)), len(path) - len(set(path))


def main() -> None:
    """Print both paths."""
    import torch
    import torchvision

    model, x = torchvision.models.resnet18().eval(), torch.randn(2, 3, 64, 64)
    for name, call in (("spp", normfree.spp), ("convert", normfree.convert)):
        path = reading_path(lambda call=call: call(model, x))
        files, returns = counts(path)
        print(f"{name}: {files} files, {returns} returns")
        print("  " + " > ".join(path))


if __name__ == "__main__":
    main()
