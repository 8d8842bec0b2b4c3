"""The house's rules, executable: imports run one way, and what must import on a bare machine does."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from normfree.common.checks import EXTRAS

SOURCE = Path(__file__).parents[1] / "src" / "normfree"

# What each folder may import of ours: science → models → training → face, never upwards.
ALLOWED = {
    "common": {"common"},
    "trace": {"trace", "common"},
    "signal": {"signal", "trace", "report", "common"},
    "nn": {"nn", "common"},
    "models": {"models", "nn", "common"},
    "weights": {"weights", "convert", "models", "nn", "trace", "common"},
    "optim": {"optim", "nn", "common"},
    "data": {"data", "nn", "signal", "trace", "common"},
    "convert": {"convert", "nn", "signal", "trace", "report", "common"},
    "export": {"export", "nn", "trace", "common"},
    "report": {"report", "signal", "common"},
    "paper": {"paper", "benchmark", "convert", "models", "nn", "signal", "sources", "report", "train", "common"},
    "train": {"train", "convert", "data", "models", "nn", "optim", "signal", "trace", "weights", "report", "common"},
}

# Files that belong to no folder.
ALLOWED_FILES = {
    "terminal": {"common"},
    "sources": {"convert", "models", "train", "weights", "trace", "common"},
    "benchmark": {"nn", "export", "sources", "common"},
    "cli": {"commands", "terminal", "common"},
    "__main__": {"cli"},
}


def imports_of(file: Path) -> set[str]:
    """Our own packages a file imports, wherever in the file."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in modules if name.startswith("normfree.")}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    files = list((SOURCE / folder).glob("*.py"))
    assert files
    for file in files:
        assert imports_of(file) <= ALLOWED[folder], file.name


@pytest.mark.parametrize("name", ALLOWED_FILES)
def test_imports_of_files_run_one_way(name):
    assert imports_of(SOURCE / f"{name}.py") <= ALLOWED_FILES[name]


def test_nothing_below_imports_the_command_line():
    for folder in ALLOWED:
        for file in (SOURCE / folder).glob("*.py"):
            assert not imports_of(file) & {"commands", "cli"}, file


def test_every_file_and_folder_has_its_rule():
    files = {path.stem for path in SOURCE.glob("*.py")}
    assert files == {"__init__", *ALLOWED_FILES}
    folders = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*ALLOWED, "commands"}


def test_the_core_imports_without_what_only_the_face_needs():
    """And torch only when something is asked for; every package with a page in the reference can be."""
    missing = ["rich", "tyro", *itertools.chain(*EXTRAS.values())]  # the first two are for the command line
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in missing)
    code = f"""import sys, types
{block}
import normfree
names = dir(normfree)
assert "torch" not in sys.modules
print(*[name for name in names if isinstance(getattr(normfree, name), types.ModuleType)])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    documented = {page.stem for page in (SOURCE.parents[1] / "docs" / "reference").glob("*.md")} - {"normfree"}
    assert documented and documented <= set(run.stdout.split()), run.stderr
