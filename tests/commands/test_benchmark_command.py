"""``normfree benchmark``: what it compares, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest

from normfree.cli import main
from normfree.commands.benchmark import Benchmark

SMALL = "nf_resnet50:width=0.25,depths=(1,1,1,1)"


def test_models_meet_their_limit_and_their_folded_self(tmp_path, capsys):
    words = ["benchmark", SMALL, "--batch-size", "1", "--image-size", "32", "--rounds", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    training, inference = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert list(training["contenders"]) == [SMALL, f"{SMALL}, limit"]
    assert list(inference["contenders"]) == [SMALL, f"{SMALL}, folded"]
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out


def test_what_is_asked_for_takes_part(tmp_path):
    command = Benchmark(models=(SMALL, "torchvision:resnet18"), task="inference", compile=True, onnx=True, out=tmp_path)
    (part,) = command.parts()
    assert part.image_size == 224
    steps = [contender.steps for contender in part.contenders]
    assert steps == [(), ("folded",), ("folded", "compiled"), ("folded", "onnx"), (), ("compiled",), ("onnx",)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "models=(): none given"),
        (["nf_resnet5"], "did you mean nf_resnet50"),
        ([SMALL, "--rounds", "0"], "--rounds=0: must be an integer of at least 1"),
        ([SMALL, "--seconds", "0"], "--seconds=0.0: must be more than 0"),
        ([SMALL, "--onnx", "--precision", "bfloat16"], "--onnx=True: ONNX Runtime runs inference in float32"),
        ([SMALL, "--device", "cuda:7"], "--device='cuda:7': is not to be had here"),
    ],
)
def test_refusals_are_one_line(words, message, tmp_path, capsys):
    assert main(["benchmark", *words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
