"""A run: what it learns, what it leaves, what it refuses, and how its network is used afterwards."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from image_sets import CLASSES, write_folder
from PIL import Image
from safetensors.torch import load_file
from tiny_run import MODEL, tiny

import normfree
from normfree.cli import main
from normfree.data.config import Preprocessing
from normfree.export import to_onnx, to_program
from normfree.train import RECIPES, NonFiniteLossError, train
from normfree.train.config import from_dict
from normfree.train.evaluation import check_no_probabilities, logits_of
from normfree.train.records import read_rows
from normfree.train.trained import open_trained, preprocessing_of, weights_of
from normfree.train.trainer import Trainer

QUICK = {"average_decay": None, "checkpoint_every": None}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with everything on."""
    return train(tiny(tmp_path_factory.mktemp("run") / "digits", precision="auto", signal_every=5))


def test_a_run_leaves_what_it_says(run):
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "checkpoints", "config.json", "eval.csv", "metrics.json", "model.safetensors", "report.html", "signal.json",
        "tensorboard", "train.csv",
    }  # fmt: skip
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert {"versions", "commit", "command", "seed", "cpu"} <= set(metrics)
    confusion = metrics["evaluation"]["confusion"]
    correct = sum(confusion[index][index] for index in range(10))
    assert sum(map(sum, confusion)) == metrics["evaluation"]["examples"] == 355
    assert metrics["evaluation"]["top1"] == pytest.approx(correct / 355)
    assert metrics["evaluation"]["top5"] * 355 == pytest.approx(round(metrics["evaluation"]["top5"] * 355), abs=1e-3)
    recorded = json.loads((run.folder / "signal.json").read_text())["history"]
    assert metrics["signal"]["records"] == len(recorded) == 6  # at 0, 5, 10, 15, 20 and the end
    assert 0 < metrics["signal"]["share_of_time"] < 1
    rows = read_rows(run.folder / "train.csv")
    assert [row["step"] for row in rows] == list(range(1, 23))
    assert all(math.isfinite(row["loss"]) and 0 <= row["clip_fraction"] <= 1 for row in rows)


def test_the_learning_rate_follows_the_paper(run):
    rates = [row["learning_rate"] for row in read_rows(run.folder / "train.csv")]
    steps, warmup, peak = 22, round(0.5 * 11), 0.02
    for step, rate in enumerate(rates):
        cosine = peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert rate == pytest.approx(peak * step / warmup if step < warmup else cosine)


def test_what_was_chosen_is_written_down(run):
    described = json.loads((run.folder / "config.json").read_text())
    assert from_dict(type(RECIPES["digits"]()), described["config"]) == tiny(
        run.folder, precision="auto", signal_every=5
    )
    derived = described["derived"]
    assert (derived["accumulation"], derived["steps_per_epoch"], derived["steps"]) == (2, 11, 22)
    assert derived["data"]["mean"] is not None


def test_the_weights_are_what_normfree_loads(run):
    network = normfree.load(run.folder / "model.safetensors")
    assert network.config["alpha"] == 0.5
    assert weights_of(run.folder) == run.folder / "model.safetensors"
    newest = sorted((run.folder / "checkpoints").iterdir())[-1]
    assert weights_of(newest) == newest / "averaged.safetensors"
    averaged = normfree.load(newest / "averaged.safetensors").state_dict()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in network.state_dict().items())


def test_a_finished_run_is_told_again_and_not_trained_again(run):
    before = (run.folder / "train.csv").read_text()
    again = train(tiny(run.folder, precision="auto", signal_every=5))
    assert again.finished
    assert again.accuracy == run.accuracy
    assert (run.folder / "train.csv").read_text() == before


def test_another_runs_folder_is_refused(run):
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed\); pass another --out"):
        train(tiny(run.folder, precision="auto", seed=1))


def test_the_users_random_state_is_left_alone(tmp_path):
    state = torch.get_rng_state()
    train(tiny(tmp_path / "run", limit_train_steps=1, limit_eval_steps=1, **QUICK))
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulating_changes_no_weight(tmp_path):
    """The mean of two halves' gradients is the gradient of the whole, up to float32's rounding."""
    common = {"model": MODEL.replace("drop_rate=0.25,stochdepth_rate=0.1", "drop_rate=0,stochdepth_rate=0")}
    common |= {"limit_train_steps": 4, "limit_eval_steps": 1, **QUICK}
    plain = {"crop": "none", "flip": False}
    networks = [
        normfree.load(
            train(tiny(tmp_path / str(size), **common, data={"batch_size": size, "augmentation": plain})).folder
            / "model.safetensors"
        ).state_dict()
        for size in (128, 32)
    ]
    for name, tensor in networks[0].items():
        torch.testing.assert_close(networks[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_the_whole_gradient_is_clipped_to_its_norm(tmp_path):
    """Nesterov's first step is lr * (1 + momentum) * gradient: its length is known once the gradient's is."""
    lengths = {}
    for largest in (1e-9, 0.05, 1e9):
        optimizer = {"clip_norm": largest, "clip_factor": None, "weight_decay": 0.0, "warmup_epochs": 0}
        run = train(
            tiny(tmp_path / str(largest), limit_train_steps=1, limit_eval_steps=1, optimizer=optimizer, **QUICK)
        )
        weights = normfree.load(run.folder / "model.safetensors").state_dict()
        lengths[largest] = torch.cat([tensor.flatten() for tensor in weights.values()]).double()
        norm = read_rows(run.folder / "train.csv")[0]["gradient_norm"]
    start = lengths.pop(1e-9)
    for largest, end in lengths.items():
        assert (end - start).norm().item() == pytest.approx(0.02 * 1.9 * min(largest, norm), rel=1e-3)
    assert norm > 0.05


@pytest.mark.parametrize(("rule", "centred"), [("sgd", ""), ("muon", ""), ("muon", ",centred=True")])
def test_each_rule_steps_every_parameter_and_goes_on_to_the_same_bits(rule, centred, tmp_path):
    options = {"optimizer": {"rule": rule, "warmup_epochs": 0}, "limit_eval_steps": 1, "checkpoint_every": 2}
    options |= {"average_decay": None, "model": MODEL + centred}
    whole = train(tiny(tmp_path / "whole", **options, limit_train_steps=4))
    train(tiny(tmp_path / "part", **options, limit_train_steps=2))
    train(tiny(tmp_path / "part", **options, limit_train_steps=4))
    first = train(tiny(tmp_path / "first", **options, limit_train_steps=1))
    ends = [load_file(run / "model.safetensors") for run in (whole.folder, tmp_path / "part", first.folder)]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
        if tensor.dim() < 4 or tensor[0].numel() > 2:  # a standardized filter of two weights is a sign alone
            assert not torch.equal(tensor, ends[2][name]), name
    assert any(name.endswith("input_mean") for name in ends[0]) == bool(centred)
    if rule == "muon":
        torch.testing.assert_close(*(end["stages.0.0.conv1.weight"].flatten(1).norm(dim=1) for end in ends[::2]))


OWN_RATES = {
    "classifier_lr_scale": ("classifier.weight", lambda name: name.startswith("classifier.")),
    "gain_lr_scale": (
        "stages.0.0.conv1.bias",
        lambda name: not name.startswith("classifier.") and name.endswith(("gain", "bias")),
    ),
}


@pytest.mark.parametrize("field", OWN_RATES)
def test_a_part_learns_at_its_own_rate(field, tmp_path):
    """In the first step a weight moves by its rate times a gradient that does not depend on the rates."""
    one, is_part = OWN_RATES[field]
    moves = {}
    for scale in (1e-9, 0.1, 1.0):
        optimizer = {field: scale, "clip_factor": None, "weight_decay": 0.0, "warmup_epochs": 0}
        run = train(tiny(tmp_path / str(scale), limit_train_steps=1, limit_eval_steps=1, optimizer=optimizer, **QUICK))
        moves[scale] = normfree.load(run.folder / "model.safetensors").state_dict()
    start = moves.pop(1e-9)
    whole, tenth = (moves[scale][one] - start[one] for scale in (1.0, 0.1))
    torch.testing.assert_close(tenth, whole / 10, rtol=1e-3, atol=1e-7)
    assert whole.norm() > 1e-5
    for name in (name for name in start if not is_part(name)):
        assert torch.equal(moves[0.1][name], moves[1.0][name]), name


def test_a_loss_that_is_not_finite_names_the_module_and_spares_the_checkpoint(tmp_path):
    config = tiny(tmp_path / "run", limit_train_steps=3, **QUICK)
    train(config)
    good = (tmp_path / "run/checkpoints/step_0000000003/model.safetensors").read_bytes()
    huge = dataclasses.replace(config, limit_train_steps=None, out=tmp_path / "huge")
    huge = dataclasses.replace(
        huge, optimizer=dataclasses.replace(huge.optimizer, learning_rate=1e30, clip_factor=None, warmup_epochs=0)
    )
    with pytest.raises(
        NonFiniteLossError, match=r"loss at step \d+ \(epoch 0\): .*(stages|stem|classifier).*; lower the lea"
    ):
        train(huge)
    assert (tmp_path / "run/checkpoints/step_0000000003/model.safetensors").read_bytes() == good
    skipped = train(dataclasses.replace(huge, on_nonfinite="skip", limit_train_steps=6, limit_eval_steps=1))
    assert skipped.metrics["skipped_steps"] > 0
    assert skipped.metrics["step"] == 6


@pytest.mark.parametrize("centred", [False, True])
def test_a_skipped_step_leaves_nothing_behind(centred, tmp_path, monkeypatch):
    """Neither in running statistics nor in the input means of centred weights."""
    prepare = Trainer.prepare

    def spoil(self, batch, number):
        images, targets = prepare(self, batch, number)
        if self.step == 1:
            images[0, 0, 0, 0] = math.inf
        return images, targets

    monkeypatch.setattr(Trainer, "prepare", spoil)
    options = {"model": f"{MODEL},centred={centred}", "on_nonfinite": "skip", "limit_train_steps": 4, **QUICK}
    metrics = train(tiny(tmp_path / "run", **options)).metrics
    assert metrics["skipped_steps"] == 1 and metrics["step"] == 4


def test_gradients_that_are_finite_may_have_no_finite_norm(tmp_path, monkeypatch):
    """Values beyond 1e19 square to more than float32 holds: nothing is infinite but the norm."""
    monkeypatch.setattr("torch.nn.CrossEntropyLoss.forward", lambda self, x, y: 1e30 * x.square().mean())
    with pytest.raises(
        NonFiniteLossError, match=r"the gradient's norm overflows: it reaches .*e\+\d\d in '\w+"
    ) as told:
        train(tiny(tmp_path / "run", precision="fp32", **QUICK))
    assert told.value.step == 0


def test_images_to_evaluate_on_that_are_all_damaged_are_one_line(tmp_path):
    write_folder(tmp_path / "images" / "train", 12)
    for name in CLASSES:
        (tmp_path / "images" / "test" / name).mkdir(parents=True)
        (tmp_path / "images" / "test" / name / "a.png").write_bytes(b"no image")
    data = {"source": str(tmp_path / "images"), "in_memory": False, "on_bad_image": "skip", "batch_size": 4}
    for every in (0, 5):  # first met in the evaluation, or by the monitor
        config = tiny(tmp_path / str(every), data=data, batch_size=4, signal_every=every, limit_train_steps=1)
        with pytest.raises(ValueError, match=r"holds no image to evaluate on: 3 do not decode, .*a\.png first; mend"):
            train(config)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run's network as ONNX (any batch) and as a program (batches of one)."""
    folder = tmp_path_factory.mktemp("exported")
    weights = str(run.folder / "model.safetensors")
    for name, options in (("m.onnx", ["--dynamic-batch"]), ("m.pt2", ["--batch-size", "16"])):
        assert main(["export", weights, "--image-size", "8", "--out", str(folder / name), *options]) == 0
    return folder


def test_every_form_of_the_network_is_evaluated_alike(run, exported, tmp_path, capsys):
    forms = {"run": run.folder, "onnx": exported / "m.onnx", "pt2": exported / "m.pt2"}
    forms["checkpoint"] = sorted((run.folder / "checkpoints").iterdir())[-1]
    losses = {}
    for form, source in forms.items():
        path = tmp_path / f"{form}.json"
        words = ["evaluate", str(source), "--run", str(run.folder), "--precision", "fp32", "--json", str(path)]
        assert main(words + ["--trust-code"] * (form == "pt2")) == 0
        losses[form] = json.loads(path.read_text())
    capsys.readouterr()
    for found in losses.values():
        assert found["examples"] == 355
        assert found["loss"] == pytest.approx(losses["run"]["loss"], rel=1e-4)


@pytest.fixture
def alone(run, exported, tmp_path):
    """The run's files where no run is."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for path in (run.folder / "model.safetensors", exported / "m.onnx", exported / "m.pt2"):
        shutil.copy(path, folder / path.name)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "m.onnx", "m.pt2"])
def test_a_file_says_itself_how_images_are_prepared_and_what_the_classes_are(run, alone, name, tmp_path, capsys):
    image = tmp_path / "digit.png"
    digit_image(image)
    trust = ["--trust-code"] * name.endswith(".pt2")
    predictions = []
    for more in ([], ["--run", str(run.folder)]):
        assert main(["predict", str(alone / name), str(image), *trust, "--json", *more]) == 0
        told = capsys.readouterr()
        predictions.append(json.loads(told.out))
        assert told.err == ""
    assert predictions[0] == predictions[1]
    # A class that nothing names is called by its number, as these are.
    assert open_trained(alone / name, trust_code=True).class_names == tuple("0123456789")
    losses = []
    for number, source in enumerate((alone / name, run.folder)):
        path = tmp_path / f"{number}.json"
        words = ["evaluate", str(source), *trust, "--precision", "fp32", "--source", "digits", "--json", str(path)]
        assert main(words) == 0
        losses.append(json.loads(path.read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "standardized" not in capsys.readouterr().out


def test_what_is_made_of_a_file_says_it_too(run, alone, tmp_path, capsys):
    said = preprocessing_of(run.folder)
    assert said is not None and said.classes == tuple("0123456789") and said.image_size == 8
    assert preprocessing_of(alone / "model.safetensors") == said
    assert (
        main(["export", str(alone / "model.safetensors"), "--image-size", "12", "--out", str(tmp_path / "m.onnx")]) == 0
    )
    assert "metadata   normfree.preprocessing" in capsys.readouterr().out
    assert open_trained(tmp_path / "m.onnx").preprocessing == dataclasses.replace(said, image_size=12)
    assert main(["spp", str(alone / "model.safetensors"), "--input", "photos", "--out", str(tmp_path / "spp")]) == 0
    (measured,) = json.loads((tmp_path / "spp" / "spp.json").read_text())["models"]
    assert measured["input"]["mean"] == list(said.mean) and measured["input"]["shape"][1:] == [1, 8, 8]


def test_a_line_feed_in_a_name_begins_no_line(alone, tmp_path, capsys):
    image = tmp_path / "one.png\n  99.99 %  dog"
    digit_image(image)
    assert main(["predict", str(alone / "m.onnx"), str(image), "--top", "1"]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 2 and "\\x0a  99.99 %  dog" in told


def test_a_file_in_another_run_is_refused(run, alone, capsys):
    config = json.loads((run.folder / "config.json").read_text())
    config["derived"]["classes"] = [f"class {number}" for number in range(10)]
    (alone / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "m.onnx"):
        assert main(["evaluate", str(alone / name)]) == 2
        told = capsys.readouterr().err
        assert name in told and "its run, the one it lies in" in told and told.count("\n") == 1


def test_a_finished_run_whose_weights_are_gone_writes_them_again(run, tmp_path, capsys):
    copy = tmp_path / "digits"
    shutil.copytree(run.folder, copy)
    whole = (copy / "model.safetensors").read_bytes()
    config = tiny(copy, precision="auto", signal_every=5)
    assert train(config).repeated
    for damage in (Path.unlink, lambda path: path.write_bytes(whole[:100])):
        damage(copy / "model.safetensors")
        assert not train(config).repeated
        assert (copy / "model.safetensors").read_bytes() == whole
    capsys.readouterr()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.flatten(1)[:, :10].argmax(1, keepdim=True), "returns int64, as of an argmax, and no logits"),
        (lambda x: x.flatten(1)[:, :10] > 0, "returns bool, as of an argmax"),
        (lambda x: x.flatten(1)[:, :1], "returns one number for each image, which tells no classes apart"),
    ],
)
def test_answers_that_are_no_logits_are_refused(answer, message):
    class Answering(torch.nn.Module):
        def forward(self, x):
            return answer(x)

    with pytest.raises(ValueError, match=message):
        logits_of(Answering(), torch.randn(4, 1, 8, 8), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_told_from_logits(dtype):
    logits = torch.randn(64, 1000)
    check_no_probabilities(logits.to(dtype))
    check_no_probabilities(torch.zeros(4, 10, dtype=dtype))
    with pytest.raises(ValueError, match=r"^model: it returns probabilities, as of a softmax"):
        check_no_probabilities(logits.softmax(1).to(dtype))


class Answering(torch.nn.Module):
    """One layer, and something of what it gives."""

    def __init__(self, answer):
        super().__init__()
        self.linear, self.answer = torch.nn.Linear(64, 10), answer

    def forward(self, x):
        return self.answer(self.linear(x.flatten(1)))


ANSWERS = {
    "several results": (lambda y: (-y, y), "returns 2 results"),
    "random numbers": (lambda y: y + torch.rand_like(y), "gives the same images another answer each time"),
    "dropout in training": (lambda y: torch.nn.functional.dropout(y), "gives the same images another answer each time"),
    "a softmax": (lambda y: y.softmax(1), "it returns probabilities"),
}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_file_whose_answer_is_not_its_logits_is_one_line(answer, suffix, tmp_path, capsys):
    function, message = ANSWERS[answer]
    image, path = tmp_path / "image.png", tmp_path / f"m{suffix}"
    Image.new("L", (8, 8), 90).save(image)
    write = {".onnx": to_onnx, ".pt2": to_program}[suffix]
    write(Answering(function), torch.randn(2, 1, 8, 8), path, tolerance=1e9)
    capsys.readouterr()
    assert main(["predict", str(path), str(image), "--trust-code"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_network_with_a_softmax_is_not_trained(tmp_path):
    def network(classes, channels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes), torch.nn.Softmax(1))

    config = tiny(tmp_path / "run", model="./mine", optimizer={"clip_factor": None})
    with pytest.raises(ValueError, match="it returns probabilities, as of a softmax"):
        train(config, network=network)


def test_an_address_that_a_run_names_is_not_opened(run, tmp_path, capsys):
    config = json.loads((run.folder / "config.json").read_text())
    config["derived"]["data"]["source"] = "http://127.0.0.1:9/test.parquet"
    shutil.copytree(run.folder, tmp_path / "digits")
    (tmp_path / "digits" / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(tmp_path / "digits")]) == 2
    assert "an address is opened where --source names it" in capsys.readouterr().err


def test_one_class_is_nothing_to_learn(tmp_path):
    write_folder(tmp_path / "images", 6)
    for name in CLASSES[1:]:
        shutil.rmtree(tmp_path / "images" / name)
    config = tiny(tmp_path / "run")
    data = dataclasses.replace(config.data, source=str(tmp_path / "images"), image_size=None, in_channels=None)
    with pytest.raises(ValueError, match=r"images of one class alone .ant.; give images of two classes at least"):
        train(dataclasses.replace(config, data=data))
    assert not (tmp_path / "run" / "config.json").exists()


FORGED = {
    "no JSON": "{",
    "no object": "[]",
    "a missing value": {"classes": None},
    "a class twice": {"classes": ["a"] * 10},
    "no class": {"classes": []},
    "classes that are numbers": {"classes": list(range(10))},
    "two channels": {"mean": [0.5, 0.5], "std": [1.0, 1.0]},
    "a deviation of 0": {"std": [0.0]},
    "a mean that is none": {"mean": [float("nan")]},
    "a size beyond range": {"image_size": 10**9},
    "a negative size": {"image_size": -1},
    "a ratio of 0": {"crop_ratio": 0},
    "an unknown value": {"resize": 9},
}


@pytest.mark.parametrize("forged", FORGED)
def test_forged_metadata_are_one_line_that_names_the_file(alone, forged, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path, image = alone / "model.safetensors", tmp_path / "digit.png"
    digit_image(image)
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    change = FORGED[forged]
    sound = json.loads(notes[Preprocessing.METADATA])
    notes[Preprocessing.METADATA] = change if isinstance(change, str) else json.dumps({**sound, **change})
    save_file(load_file(path), path, notes)
    for words in (["predict", str(path), str(image)], ["evaluate", str(path), "--source", "digits"]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "model.safetensors" in told and "are damaged" in told and len(told) < 500


def digit_image(path):
    from PIL import Image
    from sklearn.datasets import load_digits

    Image.fromarray((load_digits().images[0] * 255 / 16).astype("uint8")).save(path, "PNG")


def test_images_are_named(run, exported, tmp_path, capsys):
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = []
    for index in range(3):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray((digits.images[index] * 255 / 16).astype("uint8")).save(files[-1])
    told = []
    for source in (run.folder, exported / "m.pt2"):
        words = ["predict", str(source), *files, "--run", str(run.folder), "--json", "--top", "3"]
        assert main(words + ["--trust-code"] * (source.suffix == ".pt2")) == 0
        told.append(json.loads(capsys.readouterr().out))
    for mine, theirs in zip(*told, strict=True):
        assert [one["class"] for one in mine["predictions"]] == [one["class"] for one in theirs["predictions"]]
        assert len(mine["predictions"]) == 3
        assert mine["predictions"][0]["probability"] == pytest.approx(theirs["predictions"][0]["probability"], rel=1e-3)
    trained = open_trained(run.folder)
    assert trained.class_names == tuple("0123456789")
    assert main(["predict", str(run.folder), files[0]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


MISTAKES = {
    "no such model": (["evaluate", "{dir}/none"], "there is no .*; give a run's folder"),
    "no run": (["evaluate", "{dir}/m.onnx"], "lies in no run, so its data are not known; pass --source or --run"),
    "an empty folder": (["evaluate", "{dir}/empty"], "holds no run and no sound checkpoint"),
    "not a run": (["evaluate", "{dir}/m.onnx", "--run", "{dir}/empty"], "is no run's folder"),
    "a damaged file": (["predict", "{dir}/bad.onnx", "{dir}/text.png"], "ONNX Runtime does not run"),
    "no image": (["predict", "{run}", "{dir}/text.png"], "does not decode as an image"),
    "no file": (["predict", "{run}", "{dir}/none.png"], "is no file; give an image"),
    "a quoted pattern": (["predict", "{run}", "{dir}/*.png"], r"\*\.png': is no file; .*the pattern without quotes"),
    "an address": (["predict", "{run}", "http://127.0.0.1:9/x.png"], "is no file; download it first"),
    "a link to nothing": (["predict", "{run}", "{dir}/links"], "links/a.png': is no file"),
    "a name that is too long": (["predict", "{run}", "x" * 5000], "images='xx.*': is no file"),
    "another format": (["predict", "{run}", "{dir}/a.ico"], "no image of a known format: JPEG, PNG, WEBP"),
    "top": (["predict", "{run}", "{dir}/text.png", "--top", "0"], "top=0"),
    "a program": (["evaluate", "{dir}/m.pt2", "--run", "{run}"], r"m\.pt2.*runs code.*--trust-code"),
    "a program to predict with": (["predict", "{dir}/m.pt2", "{dir}/text.png"], r"m\.pt2.*runs code.*--trust-code"),
    "recipe": (["train", "digitz"], "digitz"),
    "field": (["train", "digits", "--epochs", "0"], "epochs=0: must be an integer"),
    "model": (["train", "digits", "--model", "nf_resnet51"], "did you mean nf_resnet50"),
    "source": (["train", "cifar", "--data.source", "{dir}/none", "--out", "{dir}/o"], "there is no such folder"),
    "a file for a folder": (["train", "digits", "--out", "{dir}/text.png"], "is a file; give a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, run, exported, capsys):
    words, pattern = MISTAKES[mistake]
    (exported / "empty").mkdir(exist_ok=True)
    (exported / "bad.onnx").write_bytes(b"nothing")
    (exported / "text.png").write_text("no image")
    Image.new("L", (8, 8)).save(exported / "a.ico")
    if not (exported / "links").exists():
        (exported / "links").mkdir()
        (exported / "links" / "a.png").symlink_to("nothing.png")
    assert main([word.format(dir=exported, run=run.folder) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("normfree: ")
    assert re.search(pattern, captured.err), captured.err


def test_the_report_opens_offline_and_says_what_happened(run):
    page = (run.folder / "report.html").read_text()
    data = json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    assert set(data) == {"loss", "accuracy", "rate", "speed", "signal", "confusion"}
    assert len(data["loss"]["data"][0]["x"]) == 22
    assert len(data["signal"]["records"]) >= 4  # steps 0, 5, 10, ... and the last
    assert "default-src 'none'" in page
    assert f"{100 * run.accuracy:.2f} %" in page
    assert "http" not in page.partition("<script>")[0].replace("http-equiv", "")


def test_the_guides_examples_run(tmp_path, monkeypatch, capsys):
    guide = Path(__file__).parents[2] / "docs" / "training.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("epochs=2", "epochs=2, limit_train_steps=3, signal_every=0"), str(guide), "exec"), {})
    assert capsys.readouterr().out.startswith("True ")
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()
