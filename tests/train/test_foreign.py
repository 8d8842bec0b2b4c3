"""Networks that are none of ours are trained by the same recipes, and their runs are models to every command."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_run import tiny
from torch import nn

import normfree
from normfree.cli import main
from normfree.convert import conversion_of
from normfree.sources import build, network_factory, word_of
from normfree.train import TrainConfig, read_config, train
from normfree.weights import load, save

FILE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return x + self.inner(x)

def net():
    first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(first, Block(), Block(), last)

def with_batch():
    return net(), torch.randn(8, 1, 8, 8)

def with_a_small_batch():
    return net(), 0.1 * torch.randn(8, 1, 8, 8)

def of_five():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def of_two_outputs():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)), x
    return Two(64, 10)

def of_colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return str(path)


@pytest.fixture
def converted(file, tmp_path):
    path = tmp_path / "converted.safetensors"
    assert main(["convert", f"{file}:with_batch", "--out", str(path)]) == 0
    return str(path)


def run_of(out, word, original=None, **changes):
    config = tiny(out, model=word, original=original, optimizer={"clip_factor": None}, **changes)
    return train(config, network=network_factory(word, original))


def tensors(path, model):
    return {name: tensor.clone() for name, tensor in load(path, original=model).state_dict().items()}


def test_a_network_of_a_file_is_trained_saved_and_opened(file, tmp_path, capsys):
    word, out = f"{file}:net", tmp_path / "run"
    summary = run_of(out, word)
    assert summary.finished and summary.accuracy is not None
    assert json.loads((out / "config.json").read_text())["config"]["model"] == word
    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 2
    assert "--original" in capsys.readouterr().err  # a file may not decide what is run
    assert main(["evaluate", str(out), "--original", word, "--precision", "fp32"]) == 0
    assert f"accuracy {100 * summary.accuracy:.2f} %" in capsys.readouterr().out
    assert main(["spp", str(out), "--original", word, "--out", str(tmp_path / "spp")]) == 0
    measured = json.loads((tmp_path / "spp" / "spp.json").read_text())["models"][0]
    assert measured["input"]["shape"][1:] == [1, 8, 8] and len(measured["blocks"]) == 2
    assert main(["export", str(out), "--original", word, "--out", str(tmp_path / "net.onnx")]) == 0


def test_a_converted_network_is_trained_averaged_and_opened(file, converted, tmp_path, capsys):
    original, out = f"{file}:net", tmp_path / "run"
    summary = run_of(out, converted, original)
    model = load(out / "model.safetensors", original=build(original).model)
    assert conversion_of(model) is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    capsys.readouterr()
    assert main(["evaluate", str(out), "--original", original, "--precision", "fp32"]) == 0
    assert f"accuracy {100 * summary.accuracy:.2f} %" in capsys.readouterr().out


def test_a_network_converted_in_other_units_is_said_to_be(file, tmp_path, capsys):
    """A tenth of the deviation is a hundredth of the mean square; that of Gaussian noise is that of the digits."""
    for word, said in ((f"{file}:with_a_small_batch", True), (f"{file}:with_batch", False)):
        out = tmp_path / f"{said}.safetensors"
        assert main(["convert", word, "--out", str(out)]) == 0
        capsys.readouterr()
        words = ["--model", str(out), "--original", f"{file}:net", "--epochs", "1", "--out", str(tmp_path / str(said))]
        assert main(["train", "digits", *words]) == 0
        assert ("mean square 0.01" in (told := capsys.readouterr().out)) == said
        assert ("--input digits" in told) == said


@pytest.mark.parametrize("kind", ["file", "converted"])
def test_an_interrupted_run_ends_with_the_same_bits(kind, file, converted, tmp_path):
    original = f"{file}:net"
    word, given = (original, None) if kind == "file" else (converted, original)
    whole = run_of(tmp_path / "whole", word, given)
    stopped = run_of(tmp_path / "parts", word, given, limit_train_steps=5)
    assert stopped.metrics["step"] == 5
    parts = run_of(tmp_path / "parts", word, given)
    assert parts.finished and parts.accuracy == whole.accuracy
    model = build(original).model
    ended, expected = (tensors(one.folder / "model.safetensors", model) for one in (parts, whole))
    assert all(torch.equal(ended[name], expected[name]) for name in expected) and ended.keys() == expected.keys()


def test_weights_go_on_from_those_of_another_run(file, tmp_path):
    word = f"{file}:net"
    run_of(tmp_path / "first", word)
    again = network_factory(str(tmp_path / "first" / "model.safetensors"), word)(10, 1)
    expected = tensors(tmp_path / "first" / "model.safetensors", build(word).model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_torchvisions_end_in_the_classes_of_the_data():
    factory = network_factory("torchvision:resnet18")
    assert factory(7, 3).fc.out_features == 7
    assert network_factory("torchvision:resnet18:num_classes=5")(7, 3).fc.out_features == 5
    assert network_factory("torchvision:resnet18:zero_init_residual=True")(7, 3).fc.out_features == 7
    assert network_factory("nf_resnet50:width=1") is None


def test_a_run_of_torchvisions_needs_no_original(tmp_path):
    model = build("torchvision:squeezenet1_1:num_classes=3").model
    from normfree.weights.checkpoint import built_by, save_trained

    path = save_trained(model, tmp_path / "m.safetensors", "torchvision:squeezenet1_1", 3)
    assert built_by(path) == ("torchvision:squeezenet1_1", 3)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(build(str(path)).model.eval()(x), model.eval()(x))
    assert word_of(str(path)) == "torchvision:squeezenet1_1:num_classes=3"


def test_the_word_of_an_own_network_builds_another_like_it(tmp_path):
    model = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), activation="silu")
    word = word_of(str(save(model, tmp_path / "m.safetensors")))
    shapes, expected = ({name: t.shape for name, t in one.state_dict().items()} for one in (build(word).model, model))
    assert shapes == expected and "activation='silu'" in word


@pytest.mark.parametrize(
    ("name", "named"),
    [("of_five", "[2, 5]"), ("of_two_outputs", "tuple"), ("of_colour", "3 channels")],
)
def test_what_gives_no_logits_of_the_classes_is_one_line(name, named, file, tmp_path, capsys):
    assert main(["train", "digits", "--model", f"{file}:{name}", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "nf_resnet5"], "nf_resnet50"),
        (["--model", "torchvision:resnet1"], "resnet18"),
        (["--model", "nf_resnet50", "--original", "net.py:net"], "--original"),
        (["--model", "missing.safetensors"], "missing.safetensors"),
        (["--model", "missing.py:net"], "missing.py"),
    ],
)
def test_a_model_that_there_is_not_is_one_line(words, named, tmp_path, capsys):
    assert main(["train", "digits", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_without_what_builds_it_the_error_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="network="):
        train(tiny(tmp_path / "run", model="torchvision:resnet18"))


def test_any_factory_is_a_network(tmp_path):
    def network(classes, channels):
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes))

    summary = train(tiny(tmp_path / "run", model="./mine", optimizer={"clip_factor": None}), network=network)
    assert summary.finished
    assert load(summary.folder / "model.safetensors", original=network(10, 1))(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_no_code_is_run_because_a_settings_file_names_it(file, tmp_path, capsys):
    settings = tmp_path / "own.yaml"
    settings.write_text(f"model: {file}:net\n")
    with pytest.raises(ValueError, match="no code is run"):
        read_config(settings)
    config, _ = read_config(settings, code=[f"{file}:net"])
    assert config.model == f"{file}:net"
    out = tmp_path / "run"
    assert main(["train", "digits", "--config", str(settings), "--out", str(out), "--limit-train-steps", "1"]) == 2
    assert "--model" in capsys.readouterr().err and not out.exists()
    words = ["--config", str(settings), "--model", f"{file}:net", "--out", str(out), "--limit-train-steps", "1"]
    assert main(["train", "digits", *words]) == 0


def test_sharding_is_for_networks_of_ours(file):
    config = TrainConfig(name="x", model=f"{file}:net")
    assert config.is_foreign and config.model_overrides == {}
    assert not replace(config, model="nf_resnet50:width=1").is_foreign
