"""A model from a person's own file, whatever the file does to the process and whatever its model is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from normfree.cli import main
from normfree.sources import build

FILE = """
import os, signal, sys
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean((2, 3)))


class NoSetup(Net):
    def __init__(self):
        pass


class OwnMode(Net):
    def train(self, mode=True):
        raise RuntimeError("no mode")


def below_itself():
    net = Net()
    net.first._modules["up"] = net
    return net


def without_values():
    return Net().to("meta")


def one_buffer_without_values():
    net = Net()
    net.norm.running_mean = torch.empty(8, device="meta")
    return net


def exported():
    return torch.export.export(Net(), (torch.randn(2, 3, 16, 16),)).module()


def closes_output():
    sys.stdout.close()
    return Net()


def raises_later():
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.02)
    return Net()


def alarm(*_):
    raise ZeroDivisionError("in a handler of the file")


def goes_elsewhere():
    os.chdir("/")
    torch.set_default_device("meta")
    sys.stdout = sys.stderr = None
    with torch.device("cpu"):
        return Net()
"""
REFUSED = {
    "NoSetup": "super().__init__()",
    "OwnMode": "train() fails with RuntimeError: no mode",
    "below_itself": "first.up is the Net that holds it",
    "without_values": "meta device",
    "one_buffer_without_values": "cannot be put on cpu",
    "exported": "Calling train()",
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path


def run(command: str, factory: str) -> int:
    place = {"spp": ["--out", "measured"], "convert": ["--out", "converted.safetensors"]}[command]
    return main([command, f"net.py:{factory}", "--image-size", "16", "--batch-size", "4", *place])


@pytest.mark.parametrize("command", ["spp", "convert"])
@pytest.mark.parametrize("factory", REFUSED)
def test_a_model_that_cannot_be_measured_is_told_as_what_it_is(file, command, factory, capsys):
    assert run(command, factory) == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("normfree: model: ")]) == 1
    assert REFUSED[factory] in said[-1]


@pytest.mark.parametrize("command", ["spp", "convert"])
def test_the_process_is_as_it_was_before_the_factory(file, command, capsys):
    assert run(command, "goes_elsewhere") == 0
    assert Path.cwd() == file
    assert sys.stdout is not None
    assert (file / ("measured" if command == "spp" else "converted.safetensors")).exists()


def test_a_factory_that_closes_the_output_is_named(file, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", (file / "printed").open("w"))
    assert run("spp", "closes_output") == 2
    assert "closed the standard output" in capsys.readouterr().err


def test_what_the_file_raises_outside_of_any_call_of_its_own_is_named_by_its_line(file, capsys):
    import signal

    before = signal.getsignal(signal.SIGALRM)
    try:
        assert run("spp", "raises_later") == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "ZeroDivisionError: in a handler of the file" in capsys.readouterr().err


def test_half_a_character_in_a_name(file, capsys):
    (file / "net.py").write_text(
        "from torch import nn\n\n\ndef net():\n    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)\n"
        "    model = nn.Sequential()\n    for name, part in zip(('a', '\\ud800', 'c'), parts):\n"
        "        model.add_module(name, part)\n    return model\n"
    )
    assert run("spp", "net") == 0
    assert (file / "measured" / "report.html").exists()
    assert run("convert", "net") == 2
    assert "half a character in its name" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_output_is_told_as_what_it_is(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["models", "nf_resnet50"]) == 2
        monkeypatch.undo()
    assert "what is printed could not be written" in capsys.readouterr().err


def test_a_factory_is_not_blamed_for_an_output_that_was_closed_before(file, monkeypatch):
    closed = (file / "printed").open("w")
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr("sys.stdout", stream)
        assert isinstance(build("net.py:Net").model, nn.Module)
