"""Models from files of a person: whatever their module leaves behind, and whenever it imports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normfree
from normfree.cli import main
from normfree.sources import build

LATE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        {imports}
        return self.conv(x) * {value}

def net():
    return Net()
"""


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("imports", "value"),
    [
        ("import helper", "helper.FACTOR"),
        ("from helper import FACTOR", "FACTOR"),
        ("import importlib; helper = importlib.import_module('helper')", "helper.FACTOR"),
        ("import parts.helper", "parts.helper.FACTOR"),
        ("from indirect import factor", "factor()"),
    ],
)
def test_a_forward_may_import_what_lies_beside_its_file(tmp_path, imports, value):
    helpers = {"helper": "FACTOR = 3.0\n", "indirect": "def factor():\n    import helper\n    return helper.FACTOR\n"}
    folder = write(tmp_path, net=LATE.format(imports=imports, value=value), **helpers)
    write(folder / "parts", __init__="", helper="FACTOR = 3.0\n")
    model = build(f"{folder / 'net.py'}:net").model
    x = torch.randn(2, 3, 8, 8)
    try:
        with torch.no_grad():
            assert torch.equal(model(x), model.conv(x) * 3)
    finally:
        for name in ("helper", "indirect", "parts", "parts.helper"):
            sys.modules.pop(name, None)


def test_a_module_imported_twice_is_one_module(tmp_path):
    counting = "COUNT = 0\ndef counted():\n    global COUNT\n    COUNT += 1\n    return COUNT\n"
    early = "import helper\nhelper.counted()\n" + LATE.format(imports="import helper", value="helper.counted()")
    folder = write(tmp_path, net=early, helper=counting)
    model = build(f"{folder / 'net.py'}:net").model
    try:
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(model(x), model.conv(x) * 2)
    finally:
        sys.modules.pop("helper", None)


def test_other_files_do_not_see_the_folder(tmp_path):
    folder = write(
        tmp_path, net="from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n", plotly="1/0\n", other=""
    )
    path = list(sys.path)
    build(f"{folder / 'net.py'}:net")
    with pytest.raises(ModuleNotFoundError):
        __import__("other")
    assert sys.path == path


LAZY = """
import sys, types
from torch import nn, randn

class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise ImportError(f"lazy import of {name} failed")

def net():
    sys.modules["left_behind"] = Lazy("left_behind")
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 10, 6), nn.Flatten()
    return nn.Sequential(*layers), randn(2, 1, 8, 8)
"""
COMMANDS = {
    "spp": (),
    "doctor": (),
    "convert": ("--out", "m.safetensors"),
    "export": ("--out", "m.onnx"),
    "benchmark": ("--rounds", "1"),
    "train": ("--epochs", "1", "--limit-train-steps", "1"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_lazy_module_left_behind_does_no_harm(tmp_path, command):
    """In a process of its own, where no earlier test has imported what looks through all modules."""
    write(tmp_path, net=LAZY)
    model = ["digits", "--model", "net.py:net"] if command == "train" else ["net.py:net"]
    words = [sys.executable, "-m", "normfree", command, *model, *COMMANDS[command]]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "lazy import" not in run.stderr, run.stderr
    assert len(list(tmp_path.iterdir())) > 1  # what the command wrote


def test_a_measurement_imports_no_compiler():
    """It takes a second; what has been imported before compiles none of the recording."""
    code = (
        "import sys, torch, normfree; from torch import nn\n"
        "model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 8, 8)\n"
        "first = normfree.spp(model, x); normfree.convert(model, x)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch._dynamo\n"
        "assert normfree.spp(model, x).to_dict() == first.to_dict()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


ENDINGS = {
    "nothing said": ("raise RuntimeError", "failed with RuntimeError$"),
    "an empty message": ("raise ValueError('')", "failed with ValueError$"),
    "an assertion": ("assert 1 == 2", "failed with AssertionError$"),
    "exit": ("import sys; sys.exit()", "failed with SystemExit$"),
    "exit with a code": ("import sys; sys.exit(3)", "failed with SystemExit: 3$"),
    "SystemExit": ("raise SystemExit('enough')", "failed with SystemExit: enough$"),
    "terminal escapes": ("raise ValueError('\\x1b[31mred\\x07')", r"failed with ValueError: \\x1b\[31mred\\x07$"),
    "a long message": ("raise ValueError('x' * 10**6)", "…$"),
    "recursion": ("net()", "failed with RecursionError"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_however_a_factory_ends_it_is_one_line(tmp_path, ending, capsys):
    code, pattern = ENDINGS[ending]
    folder = write(tmp_path, net=f"def net():\n    {code}\n")
    assert main(["spp", f"{folder / 'net.py'}:net", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and len(told) <= 520
    assert re.search(pattern, told.strip()), told


def test_a_file_that_is_none_is_refused_without_being_opened(tmp_path, capsys):
    os.mkfifo(tmp_path / "net.py")
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "pipe")
    for source in ("net.py:net", "model.safetensors", "pipe"):
        assert main(["spp", str(tmp_path / source)]) == 2
        assert "named pipe" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a device"):
        normfree.load("/dev/zero")


NET = """\
from torch import nn

def net(): ...

class Other(nn.Module):
    def __init__(self, width): ...

def _own(): ...
"""
WIDE = """\
from torch import nn

def wide(width, /, bias=True, *more, depth, **rest): ...

def optional(width=3, *more, **rest):
    return nn.Linear(width, 2)
"""


def test_a_factory_whose_arguments_have_defaults_is_called(tmp_path):
    write(tmp_path, wide=WIDE)
    assert build(str(tmp_path / "wide.py:optional")).model.in_features == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("net.py", r"does not say which function builds the model; the file defines net, Other; FILE.py:FACTORY names"),
        ("net.py:", r"does not say which function builds the model; the file defines net"),
        (
            "none.py",
            r"there is no file '.*none.py'; FILE.py:FACTORY names a function of the file that takes no argument",
        ),
        ("none.py:net", r"there is no file '.*none.py'; FILE.py:FACTORY names"),
        ("net.py:nett", r"defines no function 'nett'; did you mean net"),
        ("wide.py:wide", r"^model: wide of .*wide.py needs arguments \(width, depth\); a FACTORY takes none: give"),
        ("net.py:Other", r"^model: Other of .*net.py needs arguments \(width\); a FACTORY takes none"),
    ],
)
def test_what_a_factory_is_is_said(words, told, tmp_path):
    write(tmp_path, net=NET, wide=WIDE)
    with pytest.raises(ValueError, match=told):
        build(str(tmp_path / words))


def test_what_a_files_model_is_run_with_is_said(tmp_path, capsys):
    text = "from torch import nn\n\n\ndef net():\n    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())\n"
    write(tmp_path, net=f"{text}    return model\n", sized=f"{text}    model.img_size = (9, 11)\n    return model\n")
    for name, shape in (("net", "[2, 1, 224, 224]"), ("sized", "[2, 1, 9, 11]")):
        for command in ("spp", "doctor"):
            main([command, f"{tmp_path / name}.py:net", "--batch-size", "2", "--out", str(tmp_path / "out")])
            told = f"gives no batch; it is run on Gaussian noise {shape}: return (model, batch) from it; or pass"
            assert told in capsys.readouterr().out
    main(["spp", f"{tmp_path / 'net'}.py:net", "--image-size", "12", "--out", str(tmp_path / "out")])
    assert "gives no batch" not in capsys.readouterr().out


def test_a_module_and_a_name_in_it_point_to_the_file(tmp_path, monkeypatch):
    write(tmp_path, nets="from torch import nn\nnet = nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^model='nets:net': .*nets\.py:net"):
        build("nets:net")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        build("nf_resnet50:net")
