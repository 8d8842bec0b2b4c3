"""`normfree convert` and `normfree doctor` as a user meets them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import normfree
from normfree.cli import main
from normfree.commands.convert import Convert, Doctor
from normfree.commands.shared import Terminal
from normfree.convert import Conversion
from normfree.sources import build

FACTORIES = """
import torch
from torch import nn

def batch_norm(factor=1.0):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())]
    layers += [Block() for _ in range(3)]
    return nn.Sequential(*layers), torch.randn(4, 3, 12, 12)

class Block(nn.Module):
    def __init__(self, scale=1.0, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(8, 8, 3, padding=1), norm(8), scale

    def forward(self, x):
        return x + self.norm(self.conv(x)) * self.scale

class Nothing(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x

def exploding():
    return nn.Sequential(nn.Conv2d(3, 8, 3), *(Block(8.0, Nothing) for _ in range(12))), torch.randn(4, 3, 12, 12)

def loaded():
    import normfree
    return normfree.load("model.safetensors", original=batch_norm()[0])
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FACTORIES)
    return "nets.py:batch_norm"


def run(*words):
    return main([str(word) for word in words])


def test_convert_writes_a_checkpoint_that_other_commands_take(source, tmp_path, capsys):
    assert run("convert", source, "--out", "model.safetensors", "--skip-gain", "0.5") == 0
    told = capsys.readouterr().out
    assert "4 ScaledWSConv2d, 4 Identity; no normalizer left" in told
    assert "wrote model.safetensors model.json" in told
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["source"] == source and len(record["changes"]) == 8
    built = build("model.safetensors", source)
    assert tuple(built.batch.shape) == (4, 3, 12, 12)
    assert float(built.model.state_dict()["1.conv.skip_gain"]) == 0.5
    assert run("spp", "model.safetensors", "--original", source, "--out", "spp") == 0
    assert run("export", "model.safetensors", "--original", source, "--out", "model.pt2") == 0
    assert (tmp_path / "model.pt2").is_file() and (tmp_path / "spp" / "spp.json").is_file()


TAKES_A_MODEL = {
    "spp": (),
    "doctor": (),
    "benchmark": (),
    "export": ("--out", "m.onnx"),
    "convert": ("--out", "m.safetensors"),
    "evaluate": ("--source", "digits"),
    "predict": ("image.png",),
}


@pytest.mark.parametrize("command", TAKES_A_MODEL)
def test_no_command_runs_code_because_a_file_names_it(command, source, tmp_path, capsys):
    assert run("convert", source, "--out", "model.safetensors") == 0
    (tmp_path / "nets.py").write_text("open('ran', 'w')\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    capsys.readouterr()
    assert run(command, "model.safetensors", *TAKES_A_MODEL[command]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--original" in told and "nets.py:batch_norm" in told
    assert not (tmp_path / "ran").exists()


def forged(source, tmp_path):
    """A converted checkpoint whose record names another source."""
    from safetensors import safe_open

    built = build("nets.py:batch_norm")
    path = normfree.save(normfree.convert(built.model, built.batch), tmp_path / "model.safetensors")
    with safe_open(path, framework="pt") as file:
        notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    record = {**json.loads(notes["normfree.conversion"]), "source": source}
    save_file(tensors, path, {"normfree.conversion": json.dumps(record)})
    return str(path)


@pytest.mark.parametrize(
    "named",
    [
        "nets.py:batch_norm",
        "./nets.py:batch_norm",
        "timm:hf-hub:someone/model",
        "timm:./nets.py",
        "other.safetensors",
        "nf_resnet50",  # a file of this name lies beside it: the name of ours goes before
        "nf_resnet50:depths=(1000000000,1,1,1)",
        "nf_resnet50:width=4000000",
        "torchvision:vit_h_14",  # 2.5 GB for a file of a few thousand numbers
        "torchvision:regnet_y_128gf",
        "",
        "\x1b[31m",
    ],
)
def test_what_a_file_says_of_its_original_is_followed_for_names_alone(named, source, tmp_path, capsys):
    path = forged(named, tmp_path)
    (tmp_path / "nets.py").write_text("open('ran', 'w')\n")
    (tmp_path / "nf_resnet50").write_text("no checkpoint")
    assert run("spp", path) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "model.safetensors" in told and "\x1b" not in told
    assert not (tmp_path / "ran").exists()


def test_an_original_for_what_was_not_converted_is_refused(source, tmp_path, capsys):
    model = normfree.create_model("nf_resnet50", num_classes=3, depths=(1, 1, 1, 1), widths=(16, 16, 16, 16))
    path = str(normfree.save(model, tmp_path / "plain.safetensors"))
    for words in (("export", path, "--out", "m.onnx"), ("spp", path), ("spp", "nf_resnet50"), ("doctor", source)):
        assert run(*words, "--original", source) == 2
        assert "leave --original out" in capsys.readouterr().err


def test_a_model_may_stand_in_the_file_itself(source, tmp_path):
    (tmp_path / "made.py").write_text("from torch import nn\nmade = nn.Sequential(nn.Linear(2, 2))\n")
    assert type(build("made.py:made").model) is torch.nn.Sequential


def test_convert_keeps_the_function_of_given_weights(source, tmp_path):
    model = build(source).model
    with torch.no_grad():
        model[0][1].running_mean += 0.5
        model[1].norm.running_var *= 3
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    words = ("--start", "pretrained", "--weights", "trained.safetensors", "--out", "kept.safetensors")
    assert run("convert", source, *words) == 0
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(build("kept.safetensors", source).model(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_model_of_ones_own_is_loaded_with_its_original(source, tmp_path):
    built = build(source)
    model = normfree.convert(built.model, built.batch)
    normfree.save(model, tmp_path / "model.safetensors")
    assert run("spp", "model.safetensors", "--out", "spp") == 2
    assert isinstance(build("nets.py:loaded").model[0][1], torch.nn.Identity)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "model.bin"), "is no checkpoint's name; give one that ends in .safetensors"),
        (("--out", "m.safetensors", "--batch-size", "0"), "--batch-size=0: must be"),
        (("--out", "m.safetensors", "--weights", "none.safetensors"), "is no file"),
        (("--out", "m.safetensors", "--alpha", "-1"), "--alpha=-1.0: must be a finite number"),
        (("--out", "m.safetensors", "--device", "cuda:7"), "--device='cuda:7': is not to be had here"),
    ],
)
def test_mistakes_are_one_line(source, capsys, words, message):
    assert run("convert", source, *words) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


@pytest.mark.parametrize("command", [Convert, Doctor])
def test_model_and_input_go_to_the_device_asked_for(command, tmp_path):
    options = command(model="torchvision:resnet18", device="meta", image_size=32, out=tmp_path / "m.safetensors")
    model, batch, _ = options.prepare(Terminal())
    assert {each.device.type for each in (*model.parameters(), batch)} == {"meta"}


def test_weights_of_another_model(source, tmp_path, capsys):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert run("convert", source, "--out", "m.safetensors", "--weights", "other.safetensors") == 2
    assert "give its own state dict" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_what_is_converted_is_evaluated(source, tmp_path, capsys):
    layers = "nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)"
    factory = f"from torch import nn, zeros\n\ndef made():\n    return nn.Sequential({layers}), zeros(2, 1, 8, 8)\n"
    (tmp_path / "digits.py").write_text(factory)
    assert run("convert", "digits.py:made", "--out", "net.safetensors", "--start", "pretrained") == 0
    assert (
        run(
            "evaluate",
            "net.safetensors",
            "--original",
            "digits.py:made",
            "--source",
            "digits",
            "--limit-eval-steps",
            "1",
        )
        == 0
    )
    assert "accuracy" in capsys.readouterr().out


def test_doctor_overlays_both_signals_and_lists_the_changes(source, tmp_path):
    assert run("doctor", source, "--out", "doctor") == 0
    found = json.loads((tmp_path / "doctor" / "spp.json").read_text())["models"]
    assert [one["model"] for one in found] == [source, f"{source}, converted"]
    page = (tmp_path / "doctor" / "report.html").read_text()
    assert '<section id="conversion">' in page and "1.conv" in page and "ScaledWSConv2d(" in page
    assert len(json.loads((tmp_path / "doctor" / "conversion.json").read_text())["changes"]) == 8
    assert (tmp_path / "doctor" / "spp.png").is_file()


def test_the_report_names_the_command_with_its_options(source, tmp_path):
    assert run("doctor", source, "--alpha", "0.1", "--start", "fresh", "--out", "doctor") == 0
    configuration = json.loads((tmp_path / "doctor" / "spp.json").read_text())["models"][0]["configuration"]
    assert configuration["command"] == f"normfree doctor {source} --alpha 0.1"
    page = (tmp_path / "doctor" / "report.html").read_text()
    assert "dashed line" not in page, "the converted model has no plan of its own"


def test_what_a_factory_gives_is_not_overruled(source, capsys):
    assert run("convert", source, "--out", "m.safetensors", "--image-size", "64") == 2
    assert "gives a batch of its own; leave it out, or give --input too" in capsys.readouterr().err


def test_an_input_that_is_named_goes_before_a_factorys_batch(source, tmp_path):
    size = build(source).batch.shape
    for name in ("gaussian", "photos"):
        assert run("spp", source, "--input", name, "--batch-size", "3", "--out", "spp") == 0
        (measured,) = json.loads((tmp_path / "spp" / "spp.json").read_text())["models"]
        assert measured["input"]["kind"] == name
        assert measured["input"]["shape"] == [3, *size[1:]], "of the factory's size, for nothing else is asked"


GREY = """
import torch
from torch import nn

def net():
    first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
"""


def test_conversion_on_what_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey.py").write_text(GREY)
    assert run("convert", "grey.py:net", "--input", "digits", "--out", "m.safetensors") == 0
    record = Conversion.from_dict(json.loads((tmp_path / "m.json").read_text()))
    assert record.input_shapes == ((8, 1, 8, 8),), "the digits' own size, and not 224"
    assert 0.5 < record.input_mean_squares[0] < 2, "standardized as in training"
    capsys.readouterr()
    assert run("convert", "grey.py:net", "--input", "digit", "--out", "m.safetensors") == 2
    assert "--input='digit'" in capsys.readouterr().err


def test_a_long_table_has_a_row_for_each_kind_of_change_and_their_number(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch.nn as nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]\n"
        "        self.f = nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))\n"
        "    def forward(self, x):\n"
        "        return (x + self.f(x)).relu()\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), *[Block() for _ in range(7)], nn.Conv2d(8, 2, 1))\n"
    )
    assert main(["convert", "nets.py:net", "--image-size", "16", "--out", "m.safetensors"]) == 0
    told = capsys.readouterr().out
    for row in ("1.f.0, 7 in all", "1.f.1, 14 in all", "1.f.3, 7 in all"):
        assert row in told
    assert "alpha=0.2" in told and "one of each kind; all 30 are in the record" in told
