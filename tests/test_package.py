"""What is published: a wheel and a source archive that hold all that is needed, and a core that needs no extra."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from benchmarks.install import clean_environment, environment, link, pip, required_by
from normfree.common.checks import EXTRAS, SERVICES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.xdist_group("package")


def run(*command, **options):
    """What a command prints; its errors in the failure where it has any."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel that is built of what is in it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # of 3.11.4
    source = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """A virtual environment with the wheel and what it requires, nothing else: links to the packages that are here."""
    folder = tmp_path_factory.mktemp("bare")
    python, site = environment(folder)
    pip(python, "install", "--no-deps", "--no-index", str(built[1]))
    (own,) = metadata.distributions(path=[str(site)])
    link(required_by(own.requires), site)
    return folder


@pytest.fixture(scope="module")
def alone(bare, tmp_path_factory):
    """What ``core_alone.py`` finds there."""
    script, folder = Path(__file__).parent / "core_alone.py", tmp_path_factory.mktemp("alone")
    return json.loads(run(bare / "bin" / "python", script, cwd=folder, env=clean_environment()))


def test_the_wheel_has_what_the_package_reads_and_no_more(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        about = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    source = ROOT / "src"
    ours = {path.relative_to(source).as_posix() for path in (source / "normfree").rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    added = {name.partition("/")[2] for name in names - ours}
    assert ours <= names
    assert added == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "docs/signal.md",
        "licenses/LICENSE",
        "licenses/src/normfree/report/plotly-cartesian.LICENSE.txt",
    }
    data = {"py.typed", "report/plotly-cartesian.min.js", "report/page.html", "commands/models.csv"}
    assert {f"normfree/{name}" for name in data} <= names
    assert "License-Expression: Apache-2.0 AND MIT" in about
    assert "## Citation" in about  # the README


def test_the_source_archive_has_what_the_tests_read(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else []
    hidden = {name for name in tracked if name.startswith(".")}
    assert {name for name in tracked if (ROOT / name).exists()} - names <= hidden
    assert not any(part in name.split("/") for name in names for part in (".venv", "out", "__pycache__", "runs"))


def test_the_core_is_all_that_the_bare_environment_has(bare, alone):
    assert Path(alone["home"]).is_relative_to(bare)
    assert alone["importable"] == []
    assert "No broken requirements" in pip(bare / "bin" / "python", "check")


def test_the_command_is_installed(bare):
    command = bare / "bin" / "normfree"
    alone = {"env": clean_environment()}
    assert run(command, "--version", **alone) == f"normfree {PROJECT['version']}\n"
    assert "doctor" in run(command, "--help", **alone)
    assert "nf_resnet50" in run(command, "models", "nf_resnet*", **alone)
    page = (ROOT / "docs" / "signal.md").read_text(encoding="utf-8")
    told = run(command, "explain", "mean shift", **alone).strip()
    assert told.startswith("### mean_shift\n") and told in page


def test_the_core_measures_converts_folds_and_keeps_models(alone):
    assert {name: code for name, (code, _, _) in alone["answers"].items()} == dict.fromkeys(alone["answers"], 0)
    assert {"spp/spp.json", "spp/report.html", "doctor/conversion.json", "model.pt2"} <= set(alone["written"])
    assert not [name for name in alone["written"] if name.endswith(".png")]
    for command in ("spp", "doctor"):
        out = alone["answers"][command][1]
        assert out.splitlines()[0] == (
            "note: spp.png needs matplotlib, which is not installed; pip install 'normfree[plot]'; the numbers and the "
            "page are written without it"
        )
        assert "spp.png" not in out.partition("\n")[2]


def test_each_command_that_needs_more_names_the_extra_before_it_begins(alone):
    for extra, words, (code, out, err) in alone["refused"]:
        assert (code, out, err.count("\n")) == (2, "", 1), (words, out, err)
        assert err.endswith(f", which is not installed; pip install 'normfree[{extra}]'\n"), (words, err)
    assert {extra for extra, _, _ in alone["refused"]} == set(EXTRAS) - {"hub"}  # no command needs it
    assert alone["left"] == alone["written"]


def test_every_extra_installs_what_its_message_says():
    extras = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        named = {Requirement(text).name for text in extras[extra]} - {"normfree"}
        held = {name: {file.parts[0] for file in metadata.files(name) or ()} for name in named}
        assert set(packages) <= set().union(*held.values()), extra
        assert all(held[name] & set(packages) for name in named), extra
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == set(EXTRAS)
    for extra in ("test", "dev"):  # what `make` installs has all of it
        assert any({"all", "test"} & Requirement(text).extras for text in extras[extra])


def imported(node, *, called=False):
    """Each package that code imports by a statement, but for types alone, and whether a function imports it."""
    if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        yield from ((name.partition(".")[0], called) for name in names)
    for inner in ast.iter_child_nodes(node):
        yield from imported(inner, called=called or isinstance(node, ast.FunctionDef))


def test_what_the_core_lacks_is_asked_for_by_its_extra_wherever_it_is_imported():
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    theirs = {"triton", "pyarrow"}  # torch brings the one where it can; datasets the other
    optional = {package for packages in EXTRAS.values() for package in packages} | set(SERVICES)
    for file in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = {pair for pair in imported(tree) if pair[0] not in sys.stdlib_module_names and pair[0] != "normfree"}
        others = {name for name, _ in found}
        assert not {name for name, called in found if not called} & optional, file
        assert others <= core | theirs | optional, file
        asked = {
            str(node.args[0].value).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
            if isinstance(node.args[0], ast.Constant)
        }
        assert others & optional <= asked, file
        assert asked <= optional, file


def test_hubconf_asks_for_the_core_alone():
    spec = importlib.util.spec_from_file_location("hubconf_read_here", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.dependencies) <= {Requirement(text).name for text in PROJECT["dependencies"]}


def test_what_is_pinned_installs_on_the_oldest_python_that_is_supported():
    """Debian 12 has Python 3.11.2: a package that asks for 3.11.5 would end `make demo` there."""
    oldest = f"{next(iter(SpecifierSet(PROJECT['requires-python']))).version}.0"
    pins = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    asked = {name: metadata.metadata(name).get("Requires-Python") or "" for name in pins if _is_installed(name)}
    assert len(asked) > 100
    assert [name for name, needed in asked.items() if oldest not in SpecifierSet(needed)] == []


def _is_installed(name):
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
