"""What the commands say of a model is so: whose weights, which size, which option; and no mistake is a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_run import tiny
from torch import nn

import normfree
from normfree.cli import main
from normfree.commands import COMMANDS, command_class
from normfree.commands.shared import _options, option_meant, with_option_names
from normfree.common.checks import OTHER_NAMES
from normfree.sources import build

FAST = ["--image-size", "32", "--batch-size", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a trained run on the digits, of 8 × 8 pixels with one channel."""
    from normfree.train import train

    out = tmp_path_factory.mktemp("run") / "digits"
    return train(tiny(out, epochs=1, limit_train_steps=1, evaluate_every=1)).folder


def test_a_run_is_exported_at_its_own_size_and_its_weights_are_not_called_random(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "m.pt2")]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["input"] == "1×1×8×8"
    assert "note" not in said


@pytest.mark.parametrize("which", ["folder", "weights", "checkpoint"])
def test_a_run_is_measured_at_its_own_size(run, which, tmp_path):
    path = {"folder": run, "weights": run / "model.safetensors", "checkpoint": run / "checkpoints"}[which]
    assert main(["spp", str(path), "--batch-size", "2", "--out", str(tmp_path)]) == 0
    (model,) = json.loads((tmp_path / "spp.json").read_text())["models"]
    assert model["input"]["shape"] == [2, 1, 8, 8]


def test_a_run_that_has_not_ended_is_said_to_be_one(run, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "model.safetensors").unlink()
    steps = json.loads((run / "config.json").read_text())["derived"]["steps"]
    with pytest.warns(UserWarning, match=f"has not ended.*step 1 of {steps:,}"):
        assert main(["evaluate", str(unfinished)]) == 0
    with pytest.warns(UserWarning, match="has not ended"):
        assert main(["export", str(unfinished), "--out", str(tmp_path / "m.onnx")]) == 0
    asked = [sys.executable, "-m", "normfree", "evaluate", str(unfinished)]
    told = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert told.stderr.startswith("note: the run in ") and len(told.stderr.splitlines()) == 1
    assert "of 355 images (test)" in told.stdout


def test_a_checkpoint_of_one_channel_is_timed(run, tmp_path):
    words = ["benchmark", str(run), "--batch-size", "1", "--rounds", "1", "--task", "inference", "--out", str(tmp_path)]
    assert main(words) == 0
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert (result["channels"], result["image_size"]) == (1, 8)
    assert "1×1×8×8" in (tmp_path / "benchmark.md").read_text()


def test_pretrained_conversion_of_random_weights_says_so(tmp_path, capsys):
    words = ["convert", "torchvision:resnet18", *FAST, "--out", str(tmp_path / "m.safetensors")]
    assert main([*words, "--start", "pretrained"]) == 0
    told = capsys.readouterr().out
    assert "note: the weights of torchvision:resnet18 are random (seed 0); give --weights FILE or " in told
    assert "torchvision:resnet18:weights=DEFAULT" in told
    assert main(words) == 0
    assert "random" not in capsys.readouterr().out  # fresh weights are drawn in any case


@pytest.fixture
def published(monkeypatch):
    """ResNet-18 as if its published weights had been downloaded: all its classifier's weights are 0.5."""
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = torchvision.models.resnet18(weights=None).state_dict()
    state["fc.weight"].fill_(0.5)
    downloads = []

    def download(self, *args, **kwargs):
        downloads.append(self)
        return state

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", download)
    return downloads


def test_torchvision_s_published_weights_are_converted(published, tmp_path, capsys):
    source = "torchvision:resnet18:weights=DEFAULT"
    words = ["convert", source, *FAST, "--start", "pretrained", "--out", str(tmp_path / "m.safetensors")]
    assert main(words) == 0
    assert "random" not in capsys.readouterr().out
    assert len(published) == 1
    # To read it again takes no download: the file has the weights.
    model = build(str(tmp_path / "m.safetensors")).model
    assert torch.all(model.fc.weight == 0.5) and len(published) == 1
    assert not build(source).random and build("torchvision:resnet18").random


def test_timm_s_published_weights_are_asked_for(monkeypatch):
    timm = pytest.importorskip("timm")
    asked = []
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append(pretrained) or made(name))
    assert not build("timm:resnet18:pretrained=True").random
    assert build("timm:resnet18").random and build("timm:resnet18:pretrained=False").random
    assert asked[0] and len(asked) >= 3 and not any(asked[1:])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet18:weights=BEST", "torchvision has no weights 'BEST' of resnet18; choose one of IMAGENET"),
        ("torchvision:resnet18:pretrained=True", "pretrained is no option here; "),
        ("timm:resnet18:pretrained=yes", "pretrained=yes is neither True nor False"),
        ("timm:resnet18:classes=3", "classes is no option here; did you mean num_classes"),
    ],
)
def test_what_is_no_way_to_ask_for_weights_is_one_line(source, message, capsys):
    assert main(["spp", source, *FAST]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


@pytest.fixture
def trained(tmp_path):
    """A FILE.py:FACTORY of a small net, and a state dict of it."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn, randn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), randn(2, 3, 8, 8)\n"
    )
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return f"{tmp_path / 'nets.py'}:net", net


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}], ids=["plain", "wrapped"])
def test_weights_that_torch_saved_are_read_as_tensors(trained, wrap, tmp_path):
    source, net = trained
    torch.save(wrap({f"module.{name}": tensor for name, tensor in net.state_dict().items()}), tmp_path / "w.pth")
    out = tmp_path / "m.safetensors"
    words = ["convert", source, "--start", "pretrained", "--weights", str(tmp_path / "w.pth"), "--out", str(out)]
    assert main(words) == 0
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(build(str(out), source).model(x), net.eval()(x), rtol=1e-4, atol=1e-5)


class Runs:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("content", ["code", "a tensor", "damage", "names"])
def test_weights_of_torch_that_are_no_state_dict_are_refused_and_run_nothing(trained, content, tmp_path, capsys):
    source, _ = trained
    path = tmp_path / "w.pth"
    held = {"code": {"a": Runs(tmp_path / "ran")}, "a tensor": torch.zeros(3), "names": {"a": "b"}}.get(content)
    torch.save(held, path)
    if content == "damage":
        path.write_bytes(path.read_bytes()[:-40] + b"\0" * 40)
    assert main(["convert", source, "--weights", str(path), "--out", str(tmp_path / "m.safetensors")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("normfree: --weights=") and told.count("\n") == 1 and "w.pth" in told
    assert not (tmp_path / "ran").exists() and not (tmp_path / "m.safetensors").exists()


OPTIONS = {
    "split of the data": (
        ["train", "digits", "--data.evaluation-split", "nowhere"],
        "--data.evaluation-split='nowhere': the data have no such split",
    ),
    "augmentation": (
        ["train", "digits", "--data.augmentation.mixup", "-1"],
        "--data.augmentation.mixup=-1.0: must be a finite number",
    ),
    "count": (
        ["spp", "nf_resnet50", "--batch-size", "0"],
        "--batch-size=0: must be an integer of at least 1; pass --batch-size=1 ",
    ),
    "setting of a figure": (
        ["paper", "figure1", "--image-size", "1"],
        "--image-size=1: must be an integer of at least 32",
    ),
    "argument of the library": (
        ["convert", "torchvision:resnet18", "--skip-gain", "nan", "--out", "m.safetensors", *FAST],
        "--skip-gain=nan: must be",
    ),
    "word without a name": (["spp", "nf_resnet5"], "name='nf_resnet5'"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_errors_name_the_options_of_the_command_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, message = OPTIONS[case]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"normfree: {message}"), told


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_parser_s_frame_is_no_part_of_an_error(encoding):
    """Its lines are hyphens where the terminal has no others."""
    code = "import sys; from normfree.cli import main; [main(['spp', 'x', *words]) for words in {words}]"
    words = [["--sed", "1"], ["--batch-size", "0"]]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code.format(words=words)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert run.stderr.splitlines() == [
        "normfree: Unrecognized options: --sed, 1; perhaps you meant --seed, --std",
        "normfree: --batch-size=0: must be an integer of at least 1; pass --batch-size=1 or more",
    ]


MEANT = {
    "--optimizer.learning-rate": ["--optimizer.lr", "--lr", "--lr=0.1", "--learning-rate", "--learning_rate"],
    "--optimizer.weight-decay": ["--wd", "--weight-decay", "--optimizer.wd"],
    "--optimizer.rule": ["--optimizer", "--opt"],
    "--optimizer.clip-norm": ["--clip", "--max-grad-norm", "--clip-norm"],
    "--epochs": ["--epoch", "--num-epochs"],
    "--batch-size": ["--bs", "--batch"],
    "--data.workers": ["--num-workers", "--num_workers", "--workers"],
    "--data.source": ["--data", "--dataset", "--source"],
    "--data.holdout": ["--val-split"],
    "--accelerator": ["--device", "--gpu"],
    "--precision": ["--amp", "--fp16"],
    "--out": ["--output", "--output-dir", "-o"],
}


@pytest.mark.parametrize(("option", "word"), [(option, word) for option, words in MEANT.items() for word in words])
def test_what_other_programs_call_an_option_leads_to_it(option, word, capsys):
    assert main(["train", "digits", word, *(() if "=" in word else ("1",))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("normfree: Unrecognized options: ") and error.endswith(f"; perhaps you meant {option}\n")


def test_each_other_name_is_of_an_option_and_none_itself():
    known = set().union(*(_options(command_class(name)) for name in COMMANDS))
    for word, fields in OTHER_NAMES.items():
        assert set(fields) <= known, word
    told = {
        "spp": ("--size", "--image-size"),
        "evaluate": ("--data", "--source"),
        "doctor": ("--pretrained", "--start"),
    }
    for command, (word, option) in told.items():
        assert option_meant(word, command_class(command)) == option
    assert option_meant("--scheduler", command_class("train")) is None


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
def test_help_says_nothing_of_a_value_that_nobody_can_type(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "None" not in text
    if command != "models":
        assert "(default: " in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["spp", "m", "--image-size", "8", "12"], "--image-size does not take it as well"),
        (["spp", "m", "--image-size", "8", "--seed", "8", "8"], "--seed does not take it as well"),
        (["train", "digits", "--data.mean", "0.5", "--epochs", "3", "4"], "--epochs does not take it as well"),
        (["train", "digits", "more"], "see normfree train --help"),
    ],
)
def test_a_value_too_many_names_the_option_before_it(words, hint, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"normfree: Unrecognized options: {words[-1]}; {hint}")


def test_a_remedy_names_them_too():
    train, evaluate = command_class("train"), command_class("evaluate")
    told = "evaluation_split=None: none is there; pass evaluation_split='train' to evaluate on that"
    option = "--data.evaluation-split"
    assert with_option_names(told, train) == f"{option}=None: none is there; pass {option}='train' to evaluate on that"
    assert with_option_names(told, evaluate).startswith("--split=None: none is there; pass --split='train'")
    for plain in ("padding='same': no; pass padding='same'", "no argument at all", ""):
        assert all(with_option_names(plain, command_class(name)) == plain for name in COMMANDS)


def test_doctor_has_written_its_report_when_nobody_reads_what_it_prints(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn, randn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), randn(2, 3, 8, 8)\n"
    )
    words = ["doctor", f"{tmp_path / 'nets.py'}:net", "--out", str(tmp_path / "doctor")]
    command = [sys.executable, "-m", "normfree", *words]
    shell = ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *command]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "doctor").iterdir()) == [
        "conversion.json",
        "report.html",
        "spp.json",
        "spp.png",
    ]


def test_doctor_without_a_report_fails(tmp_path, monkeypatch, capsys):
    from normfree.commands import convert

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_signals", full)
    assert main(["doctor", "torchvision:resnet18", *FAST, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "No space left" in captured.err and "findings" not in captured.out


def test_a_model_that_cannot_be_measured_is_one_line(tmp_path, capsys):
    model = normfree.create_model("nf_resnet50", num_classes=3, widths=(16, 16, 16, 16), depths=(1, 1, 1, 1))
    nn.init.constant_(model.classifier.weight, float("nan"))
    path = normfree.save(model, tmp_path / "m.safetensors")
    assert main(["doctor", str(path), *FAST, "--out", str(tmp_path / "doctor")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out.startswith("Examining ")
    assert not (tmp_path / "doctor").exists()
