"""What an installation costs beyond PyTorch: size and time of the core and of each extra.

``python -m benchmarks.install [--out results/install]`` writes ``install.json`` and ``README.md``.
It needs the network.

Each is installed by pip, without its cache, at the versions of ``constraints.txt``, into a virtual environment of its
own that has PyTorch already: links to the one here and to what that requires, at whose versions pip is held, for what
it replaced it would remove here. What pip adds is counted, bytecode too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from normfree.benchmark import hardware
from normfree.common.checks import EXTRAS
from normfree.signal import write_atomically

ROOT = Path(__file__).parents[1]
TARGET = 150
"""MB of the core, beyond PyTorch."""


def required_by(requirements: Iterable[str]) -> list[metadata.Distribution]:
    """Return the distributions installed here that requirements name, with all that those require in turn.

    Args:
        requirements: as a project's metadata state them; of those of an extra, none.
    """
    found: dict[tuple[str, str], metadata.Distribution] = {}
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, stated_in = waiting.pop()
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": stated_in}):
            continue
        for extra in ("", *asked.extras):
            if (asked.name, extra) not in found:
                found[asked.name, extra] = metadata.distribution(asked.name)
                waiting += [(inner, extra) for inner in found[asked.name, extra].requires or ()]
    return list({one.name: one for one in found.values()}.values())


def environment(folder: Path) -> tuple[Path, Path]:
    """Make a virtual environment without anything in it; return its Python and its site-packages."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin" / "python", site


def link(distributions: Iterable[metadata.Distribution], site: Path) -> None:
    """Make distributions that are installed here importable, and known to pip, from another site-packages."""
    for one in distributions:
        for name in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (site / name).is_symlink():
                (site / name).symlink_to(str(one.locate_file(name)))


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder; what a link leads to does not count."""
    return sum(
        os.lstat(os.path.join(place, name)).st_size
        for place, _, names in os.walk(folder)
        for name in names
        if not os.path.islink(os.path.join(place, name))
    )


def pip(python: Path, *words: str) -> str:
    """Run this Python's pip for another's site-packages; return what it prints."""
    command = [sys.executable, "-m", "pip", "--python", str(python), *words]
    return subprocess.run(command, env=clean_environment(), check=True, stdout=subprocess.PIPE, text=True).stdout


def clean_environment() -> dict[str, str]:
    """Return the process's environment without what would lead Python to other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def measure(extra: str, wheel: Path) -> dict[str, Any]:
    """Install the wheel with an extra ("" for the core alone) beside PyTorch, and say what came."""
    with tempfile.TemporaryDirectory() as folder:
        python, site = environment(Path(folder))
        linked = required_by(["torch"])
        link(linked, site)
        before = {path.name for path in site.iterdir()}
        held = Path(folder) / "linked.txt"
        held.write_text("".join(f"{one.name}=={one.version}\n" for one in linked))
        constraints = [word for file in (held, ROOT / "constraints.txt") for word in ("--constraint", str(file))]
        began = time.perf_counter()
        pip(python, "install", "--quiet", "--no-cache-dir", *constraints, f"{wheel}[{extra}]" if extra else str(wheel))
        seconds = time.perf_counter() - began
        packages = sorted(path.name.partition("-")[0] for path in site.glob("*.dist-info") if path.name not in before)
        return {"extra": extra, "bytes": size(site), "seconds": seconds, "packages": packages}


def page(rows: list[dict[str, Any]], found: dict[str, Any], torch_bytes: int) -> str:
    """Return the table as Markdown."""
    lines = [
        "# What an installation costs beyond PyTorch",
        "",
        f"Installed beside PyTorch {found['torch']} (itself {torch_bytes / 1e9:.2g} GB with what it requires, as the "
        f"default index has it for Linux), without pip's cache, once each. Python {found['python']}, {found['cores']} "
        f"cores; the seconds are mostly the network's. Target: the core at most {TARGET} MB. Made by `python -m "
        "benchmarks.install`.",
        "",
        "| `pip install` | MB | s | distributions |",
        "|---|---|---|---|",
    ]
    for row in rows:
        name = f"'normfree[{row['extra']}]'" if row["extra"] else "normfree"
        lines.append(f"| `{name}` | {row['bytes'] / 1e6:.0f} | {row['seconds']:.0f} | {len(row['packages'])} |")
    met = "met" if rows[0]["bytes"] <= TARGET * 1e6 else "missed"
    return "\n".join([*lines, "", f"The core's target is {met}.", ""])


def main() -> None:
    """Build the wheel, install it with each extra, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "install")
    out = parser.parse_args().out
    torch_bytes = sum(
        file.size or 0 for one in required_by(["torch"]) for file in one.files or () if file.parts[0] != ".."
    )
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = Path(folder).glob("*.whl")
        rows = [measure(extra, wheel) for extra in ("", *EXTRAS, "plot,vision", "all")]
    found = hardware()
    result = {"hardware": found, "torch_bytes": torch_bytes, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "install.json", json.dumps(result, indent=1) + "\n")
    print(f"wrote {write_atomically(out / 'README.md', page(rows, found, torch_bytes))}")


if __name__ == "__main__":
    main()
