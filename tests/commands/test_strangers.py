"""What a stranger with a network of their own types: every answer is right, or says what it rests on or what helps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import normfree
from normfree.cli import main
from normfree.commands.convert import Changed, statistics_differ
from normfree.convert.verify import BatchStatistics, statistics_of_batch
from normfree.data.config import imagenet_statistics
from normfree.sources import build

NET = """
import torch
from torch import nn

def net(classes=2):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*parts, nn.Linear(8, classes))

def talking():
    class Talking(nn.Sequential):
        def forward(self, x):
            for _ in range(2000):
                print("what a forward pass prints", flush=True)
            return super().forward(x)
    return Talking(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(2, 3, 8, 8)
"""
RAW = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return x + self.inner(x)

def raw():
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *blocks, last), 255 * torch.rand(16, 1, 8, 8)
"""
MEAN, STD = (0.5, 0.5, 0.5), (8.0, 8.0, 8.0)
OPTIONS = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A network of two colours, trained (its statistics are) on images in which a deviation of 8 leaves little."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "nets.py").write_text(NET)
    rows = []
    for number in range(12):
        shade, kind = 40 + 10 * number, "red" if number % 2 else "blue"
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16, 16), (shade, 20, 0) if number % 2 else (0, 20, shade))
        image.putpixel((number, 3), (255, 255, 255))
        image.save(folder / "images" / kind / f"{number:02}.png")
        rows.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float())
    x = (torch.stack(rows) / 255 - 0.5) / 8
    model = build(f"{folder / 'nets.py'}:net").model
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1] * 6)).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "trained.pth")
    torch.save(model.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(model, folder / "whole.pth")
    assert (model.eval()(x).argmax(1) == torch.tensor([0, 1] * 6)).all()
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def command(*words):
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


CONVERT = ["convert", "nets.py:net", "--start", "pretrained", "--image-size", "16", "--out", "kept.safetensors"]
USE = ["kept.safetensors", "--original", "nets.py:net"]


def test_images_are_prepared_as_asked_and_it_is_said_how_where_nothing_says_it(run, tmp_path):
    assert run(*CONVERT, "--weights", "trained.pth")[0] == 0
    code, right, _ = run("evaluate", *USE, "--source", "images", *OPTIONS, "--json", "right.json")
    assert code == 0 and "accuracy 100.00 %" in right and "standardized" not in right
    assert json.loads((tmp_path / "right.json").read_text())["mean"] == list(MEAN)
    _, other, _ = run("evaluate", *USE, "--source", "images")
    assert "accuracy 100.00 %" not in other or "loss" in other
    assert other.startswith("images standardized with ") and "; --mean and --std say otherwise\n" in other
    words = ["predict", *USE, "images", "--top", "1", "--json"]
    _, told, said = run(*words)
    assert said == "images standardized with ImageNet's mean and deviation; --mean and --std say otherwise\n"
    assert told == run(*words, "--image-size", "16")[1]  # as it was converted; otherwise a line would say 224
    code, told, said = run(*words, "--image-size", "16", *OPTIONS)
    found = json.loads(told)
    assert said == "" and [one["image"] for one in found] == sorted(one["image"] for one in found)
    assert [one["predictions"][0]["index"] for one in found] == [0] * 6 + [1] * 6, "a folder's images, sorted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "0.5"], "--mean=(0.5,): means and deviations belong together"),
        (["--std", "1"], "--std=(1.0,): means and deviations belong together"),
        (["--mean", "0", "0", "--std", "1", "1"], "must have one number per channel"),
        (["--mean", "0", "0", "0", "--std", "1", "0", "1"], "must be a finite number above 0"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "predict", "spp", "doctor", "convert"])
def test_means_and_deviations_that_are_none(command, options, message, run):
    words = {"evaluate": USE, "predict": [*USE, "images"], "convert": ["nets.py:net", "--out", "m.safetensors"]}
    code, _, said = run(command, *words.get(command, ["nets.py:net"]), *options)
    assert code == 2 and message in said and said.count("\n") == 1


def test_noise_is_not_standardized(run):
    code, _, said = run("spp", "nets.py:net", *OPTIONS)
    assert code == 2 and "noise is not standardized" in said


def test_a_measurement_on_images_says_how_they_are_prepared(run, tmp_path):
    words = ["spp", "nets.py:net", "--input", "images", "--image-size", "16", "--out", "spp"]
    _, told, _ = run(*words)
    assert "images standardized with ImageNet's mean and deviation; --mean and --std say otherwise" in told
    _, told, _ = run(*words, *OPTIONS)
    (model,) = json.loads((tmp_path / "spp" / "spp.json").read_text())["models"]
    assert "standardized" not in told and model["input"]["std"] == list(STD)
    assert "--std 8.0 8.0 8.0" in model["configuration"]["command"]


DOCTOR = ["doctor", "nets.py:net", "--start", "pretrained", "--input", "images", "--image-size", "16", "--out", "d"]


def test_statistics_of_other_data_are_a_warning_that_names_the_norm(run):
    code, told, _ = run(*DOCTOR, "--weights", "trained.pth")
    told = " ".join(told.split())
    assert code == 0 and "warning: statistics — in training mode the mean square of output 0 is" in told
    assert "the input of 1 has a mean square about its running mean of " in told
    assert "Prepare the images as in its training: --mean and --std" in told
    assert "converted: no error, 1 warning (statistics)." in told and "--beta" not in told
    assert "in evaluation mode, which that start keeps" in told
    given, converted = json.loads(Path("d/spp.json").read_text())["models"]
    assert given["mode"] == converted["mode"] == "eval", "like is compared with like"
    for before, after in zip(given["outputs"], converted["outputs"], strict=True):
        assert after["avg_channel_var"] == pytest.approx(before["avg_channel_var"], rel=1e-4)
    code, told, _ = run(*DOCTOR, "--weights", "trained.pth", *OPTIONS)
    assert code == 0 and "statistics —" not in told, "the remedy works"


def test_the_statistics_of_a_batch_are_compared_at_the_first_norm_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    (first, second) = statistics_of_batch(model, 5 * torch.randn(64, 3, 8, 8) + 2)
    assert first.ratio == pytest.approx(29, rel=0.05), "5² + 2², beside a running variance of 1"
    assert second.ratio == pytest.approx(1, rel=0.01) and not first.trained
    assert torch.equal(model[0].running_mean, torch.zeros(3)) and model.training


def test_the_remedy_is_one_for_the_start_in_hand():
    new = statistics_differ("x", [BatchStatistics("bn", 500.0, False)], False)
    assert new.severity == "warning" and "--weights FILE, or choose --start fresh" in new.remedy
    given = statistics_differ("x", [BatchStatistics("bn", 500.0, True)], True)
    assert "--input FOLDER --mean" in given.remedy
    assert "running variance" not in statistics_differ("x", [BatchStatistics("bn", 1.1, True)], False).message


@pytest.mark.parametrize("beta", ["plan", "measured"])
def test_the_summary_counts_a_changed_output_as_the_exit_code_does(beta, run, monkeypatch):
    monkeypatch.setattr("normfree.commands.convert.OUTPUT_FACTOR", 1.0001)
    code, told, _ = run("doctor", "nets.py:net", "--image-size", "16", "--beta", beta, "--out", "d")
    assert code == 1 and "error: output — " in told and "converted: 1 error (output" in told
    assert ("or use --beta measured" in " ".join(told.split())) == (beta == "plan")
    assert Changed("error", "output", "", "").severity == "error"


def test_outputs_that_carry_the_size_of_the_inputs_are_a_warning(run, monkeypatch):
    """A stream of raw pixels reaches the outputs of the original; the converted model's have unit size, as is meant."""
    Path("raw.py").write_text(RAW)
    code, told, _ = run("doctor", "raw.py:raw", "--out", "d")
    told = " ".join(told.split())
    assert code == 0 and "warning: output — in training mode the mean square of output 0 is" in told
    assert "carry the size of its inputs (mean square 2.08e+04)" in told
    monkeypatch.setattr("normfree.commands.convert.UNITS_FACTOR", 1e9)
    assert run("doctor", "raw.py:raw", "--out", "d")[0] == 1


def test_an_option_that_a_factorys_batch_leaves_no_room_for_is_said(run):
    Path("raw.py").write_text(RAW)
    code, told, _ = run("spp", "raw.py:raw", "--image-size", "16", "--out", "d")
    assert code == 0 and "raw.py:raw gives a batch of its own, and --image-size is not for it" in " ".join(told.split())


def test_the_word_of_a_wrong_original_is_named(run):
    Path("raw.py").write_text(RAW)
    assert run("convert", "raw.py:raw", "--out", "raw.safetensors")[0] == 0
    code, _, said = run("spp", "raw.safetensors", "--original", "nets.py:net", "--out", "d")
    assert code == 2 and "--original='nets.py:net': it is not the model that" in said


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_exported_file_says_the_size_and_the_channels_of_its_images(suffix, channels, run):
    pytest.importorskip("onnxruntime")
    shapes = {"depths": (1, 1, 1, 1), "widths": (16, 16, 16, 16), "num_classes": 2, "in_channels": channels}
    normfree.save(normfree.create_model("nf_resnet50", **shapes), "m.safetensors")
    assert run("export", "m.safetensors", "--image-size", "32", "--out", f"m.{suffix}")[0] == 0
    trust = ["--trust-code"] if suffix == "pt2" else []
    code, _, said = run("predict", f"m.{suffix}", "images/red/01.png", *trust)
    assert code == 0, said
    code, _, said = run("evaluate", f"m.{suffix}", "--source", "images", *trust)
    assert code == 0, said


@pytest.mark.parametrize("command", ["spp", "doctor", "export", "convert"])
def test_a_closed_output_ends_a_command_quietly_whatever_runs(command, made, tmp_path):
    out = {"export": ["--out", str(tmp_path / "m.pt2")], "convert": ["--out", str(tmp_path / "m.safetensors")]}
    words = [command, f"{made / 'nets.py'}:talking", *out.get(command, ["--out", str(tmp_path / "o")])]
    line = [sys.executable, "-m", "normfree", *words]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 1', "bash", *line], capture_output=True, text=True, check=False
    )
    assert "SystemExit" not in done.stderr and "BrokenPipe" not in done.stderr and "normfree:" not in done.stderr


def test_the_end_of_a_program_is_blamed_on_a_model_only_where_it_was_the_model(run, tmp_path, monkeypatch):
    from normfree.commands.shared import Terminal

    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = isatty = lambda self: False

    with pytest.raises(BrokenPipeError):
        Terminal(file=Closed()).say("x")
    Terminal(file=Closed()).announce("x")


def test_arguments_of_foreign_constructors(run):
    model = build("torchvision:mobilenet_v3_small:num_classes=10").model
    assert model.classifier[-1].out_features == 10
    for word, message in {
        "torchvision:mobilenet_v3_small:num_clases=10": "num_clases is no option here; did you mean num_classes",
        "torchvision:resnet18:block=3": "it is not built with block",
        "torchvision:resnet18:weights_backbone=DEFAULT": "weights_backbone is no option here",
        "torchvision:resnet18:num_classes=10,weights=DEFAULT": "expected value 1000 but got 10",
        "torchvision:resnet18:norm_layer={}": "norm_layer is no number, word or list of them",
        "torchvision:swin_t:depths=(1000000,1)": "any may count blocks",
        "torchvision:resnet18:num_classes=100000000000": "GiB, and this machine has",
    }.items():
        code, _, said = run("spp", word)
        assert code == 2 and message in said and said.count("\n") == 1, said


def test_arguments_of_timm_s_constructors(run):
    pytest.importorskip("timm")
    assert build("timm:resnet18:num_classes=7,in_chans=1").model.fc.out_features == 7
    for option in ("checkpoint_path=x", "pretrained_cfg=x", "cache_dir=x", "scriptable=True"):
        code, _, said = run("spp", f"timm:resnet18:{option}")
        assert code == 2 and "is no option here" in said


def test_a_word_with_arguments_is_recorded_and_loads_again(run):
    words = ["torchvision:resnet18:num_classes=5", "--image-size", "32", "--batch-size", "2", "--out", "c.safetensors"]
    assert run("convert", *words)[0] == 0
    assert build("c.safetensors").model.fc.out_features == 5


def test_weights_of_another_number_of_classes_say_how_to_ask_for_it(run):
    torch.save(build("torchvision:resnet18:num_classes=5").model.state_dict(), "w.pth")
    code, _, said = run("convert", "torchvision:resnet18", "--weights", "w.pth", "--out", "c.safetensors")
    assert code == 2 and "torchvision:resnet18:num_classes=N" in said and "FILE.py:FACTORY" in said


def test_a_download_that_fails_names_its_address(run, monkeypatch):
    import socket
    from urllib.error import URLError

    def offline(*args, **options):
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except OSError as error:
            raise URLError(error) from error

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "hub")
    code, _, said = run("spp", "torchvision:resnet18:weights=DEFAULT")
    said = said.splitlines()[-1]
    assert code == 2 and re.search(r"the download of https://\S+/models/resnet18-", said)
    assert "Name or service not known" in said and "--weights FILE" in said


def test_a_pickled_model_is_said_to_be_one(run):
    code, _, said = run(*CONVERT, "--weights", "whole.pth")
    assert code == 2 and said.count("\n") == 1 and "\\x1b" not in said
    assert "holds a pickled torch.nn.modules.container.Sequential" in said and "state_dict()" in said
    code, _, said = run(*CONVERT, "--weights", "nets.py")
    assert code == 2 and "holds no state dict; give a .safetensors file, or a .pth file of torch.save" in said
    assert run(*CONVERT, "--weights", "legacy.pth")[0] == 0, "as versions before 1.6 wrote it"


@pytest.mark.parametrize("file", ["trained.pth", "legacy.pth", "plain.safetensors"])
@pytest.mark.parametrize("words", [["evaluate", "--source", "images"], ["export"], ["spp"], ["predict", "images"]])
def test_weights_without_a_model_point_to_what_takes_them(words, file, run):
    from safetensors.torch import save_file

    save_file(torch.load("trained.pth", weights_only=True), "plain.safetensors")
    code, _, said = run(words[0], file, *words[1:])
    assert code == 2 and said.count("\n") == 1
    assert "normfree convert FILE.py:FACTORY --weights FILE --start pretrained --out model.safetensors" in said
    assert "--original FILE.py:FACTORY" in said


def test_pretrained_conversion_of_a_factory_s_own_weights_says_whose_they_are(run):
    assert "note: weights as nets.py:net made them" in run(*CONVERT)[1]
    assert "note: weights" not in run(*CONVERT, "--weights", "trained.pth")[1]


def test_a_file_in_the_place_of_a_result_is_replaced_only_by_its_kind(run, tmp_path):
    from safetensors.torch import save_file

    assert "in the place" not in run(*CONVERT)[1]
    assert "wrote kept.safetensors kept.json, in the place of an earlier kept.safetensors kept.json" in run(*CONVERT)[1]
    (tmp_path / "kept.json").write_text('{"name": "a package"}')
    assert "is no record of a conversion" in run(*CONVERT)[2]
    assert json.loads((tmp_path / "kept.json").read_text()) == {"name": "a package"}
    save_file(torch.load("trained.pth", weights_only=True), "plain.safetensors")
    for weights in ((), ("--weights", "plain.safetensors")):
        code, _, said = run("convert", "nets.py:net", "--out", "plain.safetensors", *weights)
        assert code == 2 and "plain.safetensors" in said
    (tmp_path / "m.pt2").write_text("notes")
    code, _, said = run("export", "nets.py:net", "--image-size", "16", "--out", "m.pt2")
    assert code == 2 and "exists, and is no pt2 file" in said and (tmp_path / "m.pt2").read_text() == "notes"
    (tmp_path / "m.pt2").unlink()
    told = [run("export", "nets.py:net", "--image-size", "16", "--out", "m.pt2")[1] for _ in range(2)]
    assert "in the place" not in told[0] and "in the place of an earlier one" in told[1]


def test_errors_of_the_parser_point_to_the_command_s_help(run):
    code, _, said = run("evaluate")
    assert code == 2 and said.rstrip().endswith("see normfree evaluate --help")


def test_folders_of_images_are_bounded(run, tmp_path, monkeypatch):
    assert run(*CONVERT)[0] == 0
    monkeypatch.setattr("normfree.commands.evaluate.MOST_IMAGES", 5)
    assert "comes to more images than the 5" in run("predict", *USE, "images")[2]
    (tmp_path / "empty").mkdir()
    assert "holds no image" in run("predict", *USE, "empty")[2]


def test_grey_images_have_the_average_of_imagenet_s_statistics():
    assert imagenet_statistics(1) == (pytest.approx((0.449,)), pytest.approx((0.226,)))


def test_a_run_s_folder_stands_for_its_config(tmp_path):
    from normfree.train.config import read_config

    settings = {"model": "nf_resnet50", "name": "mine", "epochs": 7}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json.*is no file"):
        read_config(tmp_path / "..")


def test_a_model_by_a_word_is_evaluated_with_its_weights_as_the_converted_one_is(run):
    words = ["--source", "images", "--image-size", "16", *OPTIONS, "--precision", "fp32"]
    code, before, _ = run("evaluate", "nets.py:net", "--weights", "trained.pth", *words)
    assert code == 0 and "accuracy 100.00 %" in before
    assert run(*CONVERT, "--weights", "trained.pth")[0] == 0
    after = run("evaluate", *USE, "--source", "images", *OPTIONS, "--precision", "fp32")[1]
    assert after == before, "at the size it was converted on"
    code, told, _ = run("predict", "nets.py:net", "images", "--weights", "trained.pth", *words[2:-2], "--json")
    assert code == 0 and [one["predictions"][0]["index"] for one in json.loads(told)] == [0] * 6 + [1] * 6


def test_random_weights_and_bf16_are_said(run):
    code, told, _ = run(
        "evaluate", "torchvision:squeezenet1_1:num_classes=2", "--source", "images", "--image-size", "32"
    )
    assert code == 0 and "random; --weights FILE" in told
    told = run("evaluate", *USE_NET, "--precision", "bf16")[1]
    assert "in bf16; --precision fp32" in told and "bf16" not in run("evaluate", *USE_NET, "--precision", "fp32")[1]


USE_NET = ["nets.py:net", "--weights", "trained.pth", "--source", "images", "--image-size", "16", *OPTIONS]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([*USE, "--weights", "trained.pth"], "--weights"),
        (["nets.py:net", "--weights", "missing.pth"], "missing.pth"),
        (["nets.py:absent"], "absent"),
        (["torchvision:resnet1"], "resnet18"),
        (["nets.py:net", "--weights", "trained.pth", "--run", "images"], "--run"),
    ],
)
def test_weights_that_do_not_belong_are_one_line(words, named, run):
    assert run(*CONVERT, "--weights", "trained.pth")[0] == 0
    code, _, error = run("evaluate", *words, "--source", "images")
    assert code == 2 and named in error and error.count("\n") == 1


def test_an_exported_file_of_another_size_than_its_runs_is_said(run, tmp_path):
    options = ["--epochs", "1", "--limit-train-steps", "2", "--out", "made", "--data.image-size", "16"]
    assert run("train", "cifar", "--data.source", "images", "--model", "nets.py:net", *options)[0] == 0
    original = ["--original", "nets.py:net"]
    assert run("export", "made", *original, "--out", "same.onnx")[0] == 0
    assert run("export", "made", *original, "--image-size", "32", "--out", "other.onnx")[0] == 0
    assert "32 × 32" not in run("evaluate", "same.onnx", "--run", "made")[1]
    assert "taken at 32 × 32" in run("evaluate", "other.onnx", "--run", "made")[1]


def test_an_exported_file_keeps_what_a_person_says_of_its_images(run, tmp_path):
    assert run(*CONVERT, "--weights", "trained.pth")[0] == 0
    export = ["export", *USE, "--image-size", "16", "--out", "m.onnx"]
    assert "metadata   none: --source DATA keeps" in run(*export)[1]
    code, told, said = run(*export, "--source", "images", *OPTIONS, "--crop-ratio", "1")
    assert code == 0 and "crop, means and deviations of images, 2 classes" in told, said
    Path("m.onnx").rename(tmp_path.parent / "alone.onnx")
    _, right, _ = run("predict", *USE, "images", "--top", "2", "--json", "--image-size", "16", *OPTIONS)
    code, told, said = run("predict", str(tmp_path.parent / "alone.onnx"), "images", "--top", "2", "--json")
    assert code == 0 and said == ""
    for mine, theirs in zip(json.loads(told), json.loads(right), strict=True):
        assert [one["class"] for one in mine["predictions"]] == [
            ("blue", "red")[one["index"]] for one in theirs["predictions"]
        ]
        for one, other in zip(mine["predictions"], theirs["predictions"], strict=True):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    for words, message in (
        (OPTIONS, "--mean=(0.5, 0.5, 0.5): it is of the data that --source names"),
        (["--crop-ratio", "0.5"], "--crop-ratio=0.5: it is of the data that --source names"),
        (["--source", "none"], "--source='none': there is no such folder or file"),
        (["--source", "digits"], "--in-channels=3"),
    ):
        code, _, said = run(*export, *words)
        assert code == 2 and said.count("\n") == 1, (words, said)
        assert message in said or words[1] == "digits", said


def test_a_crop_that_nothing_says_is_said(run, tmp_path):
    assert run(*CONVERT, "--weights", "trained.pth")[0] == 0
    Image.open(tmp_path / "images" / "red" / "01.png").resize((40, 30)).save(tmp_path / "wide.png")
    words = ["predict", *USE, "wide.png", "--image-size", "16", "--json"]
    _, whole, said = run(*words, *OPTIONS)
    assert said == (
        "the centre 0.875 of the shorter side of images of another size than 16 × 16 is taken; "
        "--crop-ratio says otherwise\n"
    )
    _, other, said = run(*words, *OPTIONS, "--crop-ratio", "0.5")
    assert said == "" and json.loads(other) != json.loads(whole)
    code, _, said = run(*words, "--crop-ratio", "2")
    assert code == 2 and "--crop-ratio=2.0: must be above 0 and at most 1" in said


def test_spp_of_a_model_that_is_not_healthy_says_what_to_run_next(run, tmp_path):
    layers = "[k for i in range(20) for k in (nn.Conv2d(3 if i == 0 else 8, 8, 3, bias=False, padding=1), nn.ReLU())]"
    (tmp_path / "sick.py").write_text(f"from torch import nn\ndef net():\n    return nn.Sequential(*{layers})\n")
    _, told, said = run("spp", "sick.py:net", "nf_resnet50", "--input", "images", "--image-size", "16", "--out", "spp")
    assert "\nwhat conversion would change: normfree doctor sick.py:net --input images --image-size 16\n" in told, said
    command = told.split("would change: normfree ")[1].splitlines()[0].split()
    code, told, said = run(*command, "--out", "doctor")
    assert code in (0, 1) and "What conversion changes" in told, said
    _, told, _ = run("spp", "nf_resnet50", "--input", "images", "--image-size", "16", "--out", "spp")
    assert "mends it" not in told
