"""`normfree spp` as a user meets it: the files it writes, and one clear line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normfree.cli import main

FAST = ["--image-size", "32", "--batch-size", "2"]
BLOCK_KEYS = {
    "index",
    "name",
    "shape",
    "channel_axis",
    "transition",
    "avg_channel_sq_mean",
    "avg_channel_var",
    "residual_avg_channel_var",
    "expected_var",
}

FACTORIES = """
import torch
from torch import nn

class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        self.conv(x)

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, image, gain):
            return self.conv(image) * gain

    return Two(), (torch.randn(4, 3, 8, 8), torch.ones(4, 8, 1, 1))

def two_inputs_alone():
    return two_inputs()[0]

def starts_linear():
    return nn.Sequential(nn.Linear(32, 32), nn.Conv2d(5, 8, 1))

def returns_nothing():
    return Silent()

def no_module():
    return 3

def not_a_number():
    model = plain()
    model[2].weight.data[0, 0, 0, 0] = float("nan")
    return model

def misfit():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(5, 8, 3))

def fails():
    raise RuntimeError("no weights\\nhere")
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES)
    return file


def test_writes_plot_numbers_and_report_of_several_models(tmp_path, factories, capsys):
    out = tmp_path / "out"
    models = ["nf_resnet50:width=1", "torchvision:resnet18", f"{factories}:plain"]
    assert main(["spp", *models, *FAST, "--gradient", "--batches", "2", "--out", str(out)]) == 0
    document = json.loads((out / "spp.json").read_text())
    assert document["schema"] == 1
    assert [model["model"] for model in document["models"]] == models
    assert [len(model["blocks"]) for model in document["models"]] == [16, 8, 2]
    for model in document["models"]:
        assert {"model", "mode", "input", "entry", "blocks", "findings"} <= set(model)
        assert model["input"]["examples"] == 4
        assert all(set(block) >= BLOCK_KEYS and block["avg_sq_gradient"] > 0 for block in model["blocks"])
    assert document["models"][0]["blocks"][1]["expected_var"] == pytest.approx(1.08)
    assert (out / "spp.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "spp.json", "spp.png"]
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("layer2.0", "silenced branch", "report.html"))


def test_without_matplotlib_the_numbers_and_the_page_are_written_and_the_picture_is_said_to_lack(
    tmp_path, factories, capsys, monkeypatch
):
    out = tmp_path / "out"
    command = ["spp", f"{factories}:plain", *FAST, "--out", str(out)]
    assert main(command) == 0
    assert (out / "spp.png").exists()
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("note: spp.png needs matplotlib, which is not installed; pip install 'normfree[plot]'; ")
    assert {path.name for path in out.iterdir()} == {"spp.json", "report.html"}  # no picture of another run
    assert said.endswith(f"wrote {out / 'spp.json'} {out / 'report.html'}\n")


@pytest.mark.parametrize("command", ["spp", "benchmark"])
@pytest.mark.parametrize(
    ("name", "told"),
    [("nf_resnet5O", "did you mean nf_resnet50"), ("timm:resnet18", r"pip install 'normfree\[timm\]'")],
)
def test_no_model_is_built_before_all_names_are_known(command, name, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    file = tmp_path / "never.py"
    file.write_text("raise RuntimeError('built')")
    assert main([command, f"{file}:build", name, "--out", str(tmp_path / "out")]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_is_reproducible_from_its_seed_and_changes_with_it(tmp_path):
    def numbers(seed: str, name: str) -> list:
        out = tmp_path / name
        assert main(["spp", "torchvision:resnet18", *FAST, "--input", "photos", "--seed", seed, "--out", str(out)]) == 0
        return json.loads((out / "spp.json").read_text())["models"][0]["blocks"]

    first = numbers("1", "a")
    torch.rand(3)  # whatever the generator's state
    assert first == numbers("1", "b")
    assert first != numbers("2", "c")


def test_a_checkpoint_is_a_model(tmp_path):
    import normfree

    model = normfree.create_model("nf_resnet50", num_classes=3, width=1)
    path = normfree.save(model, tmp_path / "model.safetensors")
    assert main(["spp", str(path), *FAST, "--out", str(tmp_path / "out")]) == 0


def broken_inputs(folder: Path) -> dict[str, Path]:
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    return {"empty": folder / "empty", "damaged": folder / "damaged", "missing": folder / "missing"}


MISTAKES = {
    "unknown model": (["nf_resnet5"], r"nf_resnet5.*nf_resnet50"),
    "unknown torchvision model": (["torchvision:resnet19"], r"resnet19.*resnet18"),
    "unknown timm model": (["timm:resnet5000"], r"resnet5000.*resnet50"),
    "unknown override": (["nf_resnet50:depth=3"], r"depth.*depths"),
    "bad override": (["nf_resnet50:width"], r"NAME=VALUE"),
    "override given twice": (["nf_resnet50:width=1,width=2"], r"NAME=VALUE"),
    "override of the name": (["nf_resnet50:name=x"], r"NAME=VALUE"),
    "override that is code": (["nf_resnet50:width=1)+g(y=2"], r"NAME=VALUE"),
    "override by dictionary": (["nf_resnet50:**{{}}"], r"NAME=VALUE"),
    "seed too large": (["{file}:plain", "--seed", str(2**70)], r"--seed=1180591620717411303424: must be"),
    "override out of range": (["nf_resnet50:width=0"], r"width=0"),
    "no such file": (["{dir}/none.py:f"], r"no file"),
    "no factory named": (["{file}"], r"FILE\.py:FACTORY"),
    "no such factory": (["{file}:plane"], r"'plane'.*plain"),
    "file that does not import": (["{bad}:f"], r"ModuleNotFoundError.*not_there"),
    "factory that fails": (["{file}:fails"], r"RuntimeError: no weights$"),
    "factory that returns no module": (["{file}:no_module"], r"returned int.*Module"),
    "model that returns nothing": (["{file}:returns_nothing"], r"returned NoneType"),
    "weights that are not finite": (["{file}:not_a_number"], r"'2\.weight' has 1 of 576"),
    "model that does not fit together": (["{file}:misfit"], r"\[2, 3, 32, 32\] in 1: RuntimeError"),
    "input of the wrong shape": (["torchvision:vit_b_32"], r"\[2, 3, 32, 32\].*Wrong image height"),
    "folder without images": (["{file}:plain", "--input", "{empty}"], r"holds no image"),
    "image that does not decode": (["{file}:plain", "--input", "{damaged}"], r"a\.jpg does not decode"),
    "no such folder": (["{file}:plain", "--input", "{missing}"], r"--input=.*no such folder"),
    "batch of none": (["{file}:plain", "--batch-size", "0"], r"--batch-size=0"),
    "size of none": (["{file}:plain", "--image-size", "0"], r"--image-size=0"),
    "word for a number": (["{file}:plain", "--seed", "one"], r"--seed.*'one'"),
    "model that takes something else": (["{file}:two_inputs_alone"], r"return \(model, batch\)"),
    "folder that cannot be made": (["{file}:plain", "--out", "{file}/below"], r"--out=.*is a file; give a folder"),
    "unknown option": (["{file}:plain", "--sed", "1"], r"--sed"),
    "unknown device": (["{file}:plain", "--device", "abacus"], r"abacus.*cpu"),
    "no model": ([], r"none given"),
    "output that is a file": (["{file}:plain", "--out", "{file}"], r"is a file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(mistake, tmp_path, factories, capsys):
    if "timm" in mistake:
        pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "bad.py").write_text("import not_there\n")
    places = {"file": factories, "bad": tmp_path / "bad.py", "dir": tmp_path, **broken_inputs(tmp_path)}
    words, pattern = MISTAKES[mistake]
    out = tmp_path / "out"
    default_out = [] if "--out" in words else ["--out", str(out)]
    assert main(["spp", *FAST, *default_out, *(word.format(**places) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("normfree: ")
    assert re.search(pattern, captured.err.strip()), captured.err
    assert not out.exists()


def test_two_files_may_import_helpers_of_one_name(tmp_path):
    for folder, channels in (("a", 4), ("b", 8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(f"CHANNELS = {channels}\n")
        source = "from net import CHANNELS\nfrom torch import nn\ndef build():\n    return nn.Conv2d(3, CHANNELS, 1)\n"
        (tmp_path / folder / "model.py").write_text(source)
    before = set(sys.modules)
    sources = [str(tmp_path / folder / "model.py") + ":build" for folder in ("a", "b")]
    assert main(["spp", *sources, *FAST, "--out", str(tmp_path / "out")]) == 0
    models = json.loads((tmp_path / "out" / "spp.json").read_text())["models"]
    assert [model["blocks"][0]["shape"][1] for model in models] == [4, 8]
    assert not [name for name in set(sys.modules) - before if name == "net" or "normfree_source" in name]


def test_a_factory_may_say_what_its_model_takes(tmp_path, factories):
    out = tmp_path / "out"
    sources = [f"{factories}:two_inputs", f"{factories}:starts_linear", f"{factories}:two_inputs"]
    assert main(["spp", *sources, *FAST, "--out", str(out)]) == 0
    first, second, third = json.loads((out / "spp.json").read_text())["models"]
    assert first["input"]["shape"] == [[4, 3, 8, 8], [4, 8, 1, 1]]
    assert second["input"]["shape"] == [2, 5, 32, 32]  # the size asked for, the channels of the first convolution
    assert [first["model"], third["model"]] == [f"{sources[0]} (1)", f"{sources[0]} (2)"]
    assert first["configuration"]["command"].endswith("--image-size 32 --batch-size 2")


def test_one_bad_model_of_two_writes_nothing(tmp_path, factories, capsys):
    out = tmp_path / "out"
    assert main(["spp", f"{factories}:plain", f"{factories}:not_a_number", *FAST, "--out", str(out)]) == 2
    assert not out.exists()


def test_the_installed_command_exits_with_2_and_no_traceback(tmp_path):
    command = [str(Path(sys.executable).with_name("normfree")), "spp", "nf_resnet5", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr


def test_no_word_at_all_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("spp", "models", "paper", "demo"))


def test_version_and_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("normfree 0.")
    assert main(["model"]) == 2
    assert capsys.readouterr().err == "normfree: there is no command 'model'; did you mean models, demo?\n"


def test_models_lists_by_pattern(capsys):
    assert main(["models", "nf_resnet*"]) == 0
    printed = capsys.readouterr().out
    assert "25,557,048" in printed
    assert main(["models", "nothing*"]) == 2


def test_the_table_of_a_chain_has_layers(tmp_path, factories, capsys):
    assert main(["spp", f"{factories}:plain", "--image-size", "8", "--out", str(tmp_path / "out")]) == 0
    head = next(line for line in capsys.readouterr().out.splitlines() if "sq. mean" in line)
    assert head.split()[0] == "layer"


def test_how_images_are_prepared_is_said_once_for_all_models(tmp_path, capsys):
    words = ["nf_resnet50:widths=(8,8,8,8),depths=(1,1,1,1)", "resnet50:widths=(8,8,8,8),depths=(1,1,1,1)"]
    options = ["--input", "photos", "--image-size", "32", "--batch-size", "2", "--out", str(tmp_path)]
    assert main(["spp", *words, *options]) == 0
    assert capsys.readouterr().out.count("images standardized with ImageNet's") == 1
