"""What a person waits for first: names that import what they need when they are asked for, help without torch."""

from __future__ import annotations

import copy
import csv
import importlib
import inspect
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import normfree
import normfree.convert as convert_package
from normfree import cli
from normfree.commands import COMMANDS, command_class
from normfree.commands.models import COLUMNS, TABLE, built_rows


def in_fresh_process(code: str) -> list[str]:
    """The lines that some code prints in a process of its own."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["models", "nf_*"], ["models", "--help"], []])
def test_torch_is_not_imported_for(words):
    code = (
        "import sys, contextlib, io\n"
        "from normfree.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "    try:\n"
        f"        code = main({words!r})\n"
        "    except SystemExit as stop:\n"
        "        code = stop.code\n"
        "print(code, len(said.getvalue()) > 5, sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert in_fresh_process(code) == ["0 True []"]


def test_torch_is_not_imported_by_the_package_alone():
    code = "import normfree, sys; print('torch' in sys.modules, normfree.spp.__name__, 'torch' in sys.modules)"
    assert in_fresh_process(code) == ["False spp True"]


def test_a_command_imports_no_other_commands_module():
    code = (
        "import sys\n"
        "from normfree.cli import main\n"
        "try:\n    main(['export', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted(name for name in sys.modules if name in ('normfree.commands.train', 'normfree.commands.demo')))"
    )
    assert in_fresh_process(code)[-1] == "[]"


def test_every_command_is_listed_with_the_first_line_of_its_help():
    for name, summary in COMMANDS.items():
        assert inspect.getdoc(command_class(name)).splitlines()[0] == summary


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line[:3].strip() and line.startswith("  ")] == [*COMMANDS]


def test_a_wrong_option_is_one_line_that_names_it(capsys):
    assert cli.main(["models", "--bogus"]) == 2
    error = capsys.readouterr().err
    assert "--bogus" in error
    assert error.count("\n") == 1


def test_the_table_of_models_is_that_of_the_models():
    with TABLE.open(newline="") as lines:
        table = [tuple(row) for row in csv.reader(lines)]
    assert table == [COLUMNS, *((name, str(count), channels, family) for name, count, channels, family in built_rows())]


def test_every_public_name_is_there_and_listed():
    for name in normfree.__all__:
        assert getattr(normfree, name) is not None
        assert name in dir(normfree)
    code = "import normfree; print(*dir(normfree))"
    assert set(normfree.__all__) | {"signal", "nn", "models", "weights"} <= set(in_fresh_process(code)[0].split())


@pytest.mark.parametrize("name", ["signal", "convert"])
def test_a_package_is_an_attribute_before_it_is_imported(name):
    assert in_fresh_process(f"import normfree; print(normfree.{name}.__name__)") == [f"normfree.{name}"]


def test_a_name_from_the_package():
    code = "from normfree import spp, fold, convert; print(spp.__name__, fold.__name__, callable(convert))"
    assert in_fresh_process(code) == ["spp fold True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'normfree' has no attribute 'nonsense'"):
        _ = normfree.nonsense  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="nonsense"):
        exec("from normfree import nonsense")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_convert_is_the_package_and_the_function():
    assert normfree.convert is convert_package is importlib.import_module("normfree.convert")
    assert isinstance(convert_package, types.ModuleType)
    assert convert_package.conversion_of is convert_package.pipeline.conversion_of
    converted = normfree.convert(network(), torch.randn(4, 3, 8, 8), start="pretrained")
    assert convert_package.conversion_of(converted) is not None
    function = importlib.import_module("normfree.convert.pipeline").convert
    assert inspect.signature(normfree.convert) == inspect.signature(function)


@pytest.mark.parametrize("home", ["normfree", "normfree.weights"])
def test_a_converted_file_is_read_where_convert_was_not_imported_before(home, tmp_path):
    path = tmp_path / "converted.safetensors"
    x = torch.randn(4, 3, 8, 8)
    converted = normfree.convert(network(), x, start="pretrained")
    normfree.save(converted, path)
    code = (
        "import torch\nfrom torch import nn\n"
        f"from {home} import load\n"
        "original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))\n"
        f"print(type(load({str(path)!r}, original=original)).__name__)"
    )
    assert in_fresh_process(code) == [type(converted).__name__]


def test_convert_is_called_whichever_way_it_was_imported_first():
    for first in ("import normfree.convert as c", "from normfree.convert import convert as c", "import normfree as c"):
        code = f"{first}\nimport normfree, types\nprint(callable(normfree.convert), type(normfree.convert).__name__)"
        assert in_fresh_process(code) == ["True CallablePackage"]


def test_convert_is_pickled_and_copied_as_a_reference():
    assert pickle.loads(pickle.dumps(normfree.convert)) is normfree.convert
    assert copy.deepcopy(normfree.convert) is normfree.convert
