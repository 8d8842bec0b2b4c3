"""`normfree export` as a user meets it: a file that runs without us, and one clear line for every mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normfree
from normfree.cli import main

TINY = "nf_resnet50:widths=(8,8,8,8),depths=(1,1,1,1),num_classes=3"

FACTORIES = """
import torch
from torch import nn

class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

class Two(nn.Module):
    def forward(self, image, gain):
        return image * gain

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def branching():
    return Branching(), torch.randn(2, 4)

def two():
    return Two(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 1, 1))

def unknown():
    return nn.ReLU()

def misfit():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(5, 8, 3))

def tokens():
    return nn.Linear(4, 3)
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES)
    return file


def told(captured) -> dict[str, str]:
    """What was printed, by the word a line starts with."""
    return dict(line.split(maxsplit=1) for line in captured.out.splitlines())


def test_a_fresh_model_by_name(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", TINY, "--image-size", "33", "--dynamic-batch"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    said = told(captured)
    assert list(said) == ["input", "operators", "folding", "file", "rehearsal", "note", "wrote"]
    assert said["input"] == "N×3×33×33, checked with N = 1, 2, 3"
    assert said["operators"].startswith("17 Conv, 13 Relu, 4 Add")
    assert said["operators"].endswith("(ONNX opset 20)")
    assert re.fullmatch(r"the file differs .* at most \d\.\de-\d\d, \d.* scale; tolerance 3\.5e-04", said["file"])
    assert "22 all-zero weights and biases" in said["rehearsal"]
    assert said["note"] == "these weights are random (seed 0); give a checkpoint to export trained ones"
    (file,) = tmp_path.rglob("*.onnx")
    assert file.parent == tmp_path / "out" / "export"
    assert said["wrote"] == f"{file.relative_to(tmp_path)} ({file.stat().st_size / 1000:.1f} kB)"


def test_a_checkpoint_as_a_program(tmp_path, capfd):
    torch.manual_seed(3)
    model = normfree.create_model("nfnet_f0", widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), group_size=4, in_channels=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint, out = normfree.save(model, tmp_path / "model.safetensors"), tmp_path / "new" / "model.pt2"
    assert main(["export", str(checkpoint), "--out", str(out), "--batch-size", "3"]) == 0
    said = told(capfd.readouterr())
    # the size the variant is tested at, which nobody has said
    assert said["input"] == "3×1×256×256; the image's size is assumed, --image-size N exports another"
    assert not {"note", "rehearsal"} & set(said)
    x = torch.randn(3, 1, 256, 256)
    torch.testing.assert_close(torch.export.load(out).module()(x), model.eval()(x).detach(), rtol=1e-4, atol=1e-4)


def test_seeds_draw_the_weights_and_leave_the_random_state(tmp_path, factories):
    state = torch.get_rng_state()
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        words = ["--image-size", "8", "--seed", seed, "--out", str(tmp_path / f"{name}.pt2")]
        assert main(["export", f"{factories}:plain", *words]) == 0
    weights = {n: torch.export.load(tmp_path / f"{n}.pt2").state_dict["0.weight"] for n in "abc"}
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])
    assert torch.equal(state, torch.get_rng_state())


def test_a_factory_may_say_what_its_model_takes(tmp_path, factories, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", f"{factories}:two", "--format", "pt2"]) == 0
    said = told(capfd.readouterr())
    assert said["input"] == "2×3×8×8 and 2×3×1×1"
    assert said["wrote"].startswith("out/export/factories-two.pt2")
    assert "note" not in said


MISTAKES = {
    "no model": ([], r"MODEL"),
    "unknown model": (["nf_resnet5"], r"nf_resnet5.*nf_resnet50"),
    "unknown format": (
        ["{file}:plain", "--format", "tflite"],
        r"format='tflite': unknown.*one of 'onnx', 'pt2'$",
    ),
    "another ending": (["{file}:plain", "--out", "{dir}/m.bin"], r"--out='.*m\.bin': does not end in \.onnx or \.pt2"),
    "two formats": (["{file}:plain", "--format", "pt2", "--out", "{dir}/m.onnx"], r"does not end in \.pt2; rename"),
    "batch of none": (["{file}:plain", "--batch-size", "0"], r"--batch-size=0"),
    "size of none": (["{file}:plain", "--image-size", "0"], r"--image-size=0"),
    "size too small": (["{file}:plain", "--image-size", "1"], r"model: .* failed on \[1, 3, 1, 1\]"),
    "size of no image": (
        ["{file}:tokens", "--image-size", "8"],
        r"--image-size=8: .* takes \[4\], not an image",
    ),
    "size beside a batch": (["{file}:two", "--image-size", "8"], r"--image-size=8: the factory gives the batch; leave"),
    "seed too large": (["{file}:plain", "--seed", str(2**63)], r"--seed=9223372036854775808: must be"),
    "tolerance below zero": (["{file}:plain", "--tolerance", "-1"], r"tolerance=-1\.0: must be"),
    "no difference allowed": (["{tiny}", "--image-size", "33", "--tolerance", "0"], r"differs from it by .* tolerance"),
    "unknown input": (["{file}:unknown"], r"the shape of its input cannot be inferred; let FACTORY"),
    "model that does not fit together": (["{file}:misfit"], r"\[1, 3, 224, 224\] with RuntimeError: .*; give"),
    "control flow on data": (["{file}:branching"], r"branches on the values of a tensor \(.*torch\.where"),
    "a file where a folder should be": (["{file}:plain", "--out", "{file}/m.onnx"], r"is a file, not a folder"),
    "two models": (["{file}:plain", "{file}:two"], r"Unrecognized|unrecognized"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(mistake, tmp_path, factories, capfd, monkeypatch):
    words, pattern = MISTAKES[mistake]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"file": str(factories), "dir": str(tmp_path / "here"), "tiny": TINY}
    assert main(["export", *(word.format(**places) for word in words)]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("normfree: ")
    assert re.search(pattern, captured.err.strip()), captured.err
    assert not list((tmp_path / "here").iterdir())


def test_the_installed_command_fails_in_one_line(factories, tmp_path):
    command = [str(Path(sys.executable).with_name("normfree")), "export", f"{factories}:branching"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)


def test_files_run_without_us_and_we_import_without_onnx(tmp_path, factories):
    assert main(["export", f"{factories}:plain", "--image-size", "8", "--out", str(tmp_path / "m.pt2")]) == 0
    code = f"""
import sys
import normfree.export
assert not {{"onnx", "onnxscript", "onnxruntime"}} & set(sys.modules)
for name in [name for name in sys.modules if name.partition(".")[0] == "normfree"]:
    sys.modules[name] = None
import torch
print(*torch.export.load({str(tmp_path / "m.pt2")!r}).module()(torch.randn(1, 3, 8, 8)).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "1 4 6 6", run.stderr
