"""A folder of one's own: it trains as it is, says what it does, and is evaluated on what it was not trained on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from image_sets import encoded, write_folder
from tiny_run import MODEL, tiny

from normfree.cli import main
from normfree.train import RECIPES, train
from normfree.train.checkpoint import CheckpointStore
from normfree.train.records import read_rows

WORDS = ["--model", MODEL, "--precision", "fp32", "--signal-every", "0"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A working folder with 60 images of three classes in pets/."""
    write_folder(tmp_path / "pets", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_an_epoch_of_few_steps_says_how_many_images_it_leaves_out(at_home, capsys):
    text = told(capsys, "train", "cifar", "--data.source", "pets", "--epochs", "1", "--batch-size", "32", *WORDS)
    said = "an epoch is 1 step of 32 images and leaves out 22, others each time; --batch-size 8 makes it 4 or more"
    assert said in text.splitlines()
    text = told(capsys, "train", "cifar", "--data.source", "pets", "--epochs", "1", "--batch-size", "12", *WORDS)
    assert "leaves out" not in text


def test_a_folder_of_class_folders_trains_as_it_is(at_home, capsys):
    text = told(capsys, "train", "cifar", "--data.source", "pets", "--epochs", "1", *WORDS)
    assert text.splitlines()[:5] == [
        "training on 54 images of 3 classes (ant, bee, cat)",
        "evaluating on 6 more, held out by class (--data.holdout 0.1), for the data have no split to evaluate on",
        "--batch-size 8 instead of 128, for there are too few images",
        "batch 8: learning rate 0.0125 (0.2 × 8 / 128), the gradient's norm at most 4 (1 × √(128 / 8))",
        "--optimizer.warmup-epochs 0.25 instead of 1, a quarter of the run's 1",
    ]
    assert "leaves out" not in text
    described = json.loads((at_home / "runs/cifar/config.json").read_text())
    assert described["config"]["data"]["holdout"] is None and described["config"]["batch_size"] == 128
    assert described["derived"]["data"]["holdout"] == 0.1
    assert (described["derived"]["batch_size"], described["derived"]["warmup_epochs"]) == (8, 0.25)
    assert described["derived"]["learning_rate"] == pytest.approx(0.2 * 8 / 128)
    assert (described["config"]["optimizer"]["clip_norm"], described["derived"]["clip_norm"]) == (1, 4)
    metrics = json.loads((at_home / "runs/cifar/metrics.json").read_text())
    assert [sum(row) for row in metrics["evaluation"]["confusion"]] == [2, 2, 2]

    for words in ((), ("--split", "holdout")):
        found = told(capsys, "evaluate", "runs/cifar", "--precision", "fp32", *words)
        assert f"loss {metrics['evaluation']['loss']:.4f}  of 6 images" in found
    assert "of 54 images" in told(capsys, "evaluate", "runs/cifar", "--split", "train")
    assert "%" in told(capsys, "predict", "runs/cifar", "pets/ant/000.png")


@pytest.fixture
def held(at_home, capsys):
    """What a run on pets/ prints, and its folder."""
    words = ["train", "digits", "--data.source", "pets", "--epochs", "2", *WORDS]
    assert "held out" in told(capsys, *words)
    return words


def test_the_same_images_elsewhere_are_held_out_again_and_others_taken_whole(held, at_home, capsys):
    shutil.copytree("pets", "moved/animals")
    write_folder(at_home / "others", 30)
    assert [row["step"] for row in read_rows(at_home / "runs/digits/train.csv")] == [6, 12]  # though --log-every is 20
    first = told(capsys, "evaluate", "runs/digits")
    assert "of 6 images" in first
    assert told(capsys, "evaluate", "runs/digits", "--source", "moved/animals") == first
    others = told(capsys, "evaluate", "runs/digits", "--source", "others")
    assert "of 30 images (all)" in others and "the network may have been trained on some" in others


def test_a_model_out_of_its_run_says_that_all_images_are_taken_and_how_to_take_those_held_out(held, capsys):
    shutil.copy("runs/digits/model.safetensors", "alone.safetensors")
    text = told(capsys, "evaluate", "alone.safetensors", "--source", "pets")
    assert "of 60 images (all)" in text
    assert "all images of 'pets' are taken, for they have no split to evaluate on; the network may have been" in text
    assert "--run RUN takes those that its run held out" in text
    text = told(capsys, "evaluate", "alone.safetensors", "--source", "pets", "--run", "runs/digits")
    assert "of 6 images (holdout)" in text and "taken" not in text, "the remedy works"
    assert "of 60 images (train)" in told(
        capsys, "evaluate", "alone.safetensors", "--source", "pets", "--split", "train"
    )


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "renamed"])
def test_a_changed_folder_holds_out_others_and_is_refused(change, held, at_home, capsys):
    file = at_home / "pets" / "bee" / "001.png"
    if change == "added":
        file.with_name("new.png").write_bytes(encoded(90))
    elif change == "removed":
        file.unlink()
    elif change == "replaced":
        file.write_bytes(encoded(90, 13))
    else:
        file.rename(file.with_name("other.png"))
    assert main(["evaluate", "runs/digits"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("normfree: --source='pets': has other images than the run held some out of")
    assert error.count("\n") == 1
    assert main(["evaluate", "runs/digits", "--split", "train"]) == 0


def test_a_run_goes_on_with_what_it_held_out(at_home, tmp_path):
    data = {"source": "pets", "batch_size": 16, "holdout_seed": 3}
    changes = {"data": data, "batch_size": 16, "checkpoint_every": 2, "limit_eval_steps": 1}
    whole = train(tiny(tmp_path / "whole", **changes))
    train(tiny(tmp_path / "part", **changes, limit_train_steps=4))
    part = train(tiny(tmp_path / "part", **changes))
    states = [CheckpointStore(run.folder / "checkpoints").newest().folder for run in (whole, part)]
    assert (states[0] / "model.safetensors").read_bytes() == (states[1] / "model.safetensors").read_bytes()
    assert whole.metrics["evaluation"] == part.metrics["evaluation"]
    begun = tiny(tmp_path / "begun", **changes, limit_train_steps=2)
    train(begun)
    for name, value in (("holdout", 0.3), ("holdout_seed", 4)):
        with pytest.raises(ValueError, match=rf"holds a run with other settings \(data\.{name}\); pass another --out"):
            train(replace(begun, data=replace(begun.data, **{name: value})))
    (at_home / "pets" / "bee" / "new.png").write_bytes(encoded(90))
    with pytest.raises(ValueError, match=r"other bits \(images\).*--on-changed continue"):
        train(replace(begun, limit_train_steps=4))


def test_a_run_of_a_version_without_a_field_goes_on(tmp_path):
    config = tiny(tmp_path / "run", limit_train_steps=2, limit_eval_steps=1)
    train(config)
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    del document["config"]["data"]["holdout"], document["config"]["data"]["holdout_seed"]
    path.write_text(json.dumps(document))
    assert train(replace(config, limit_train_steps=3)).metrics["step"] == 3
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(data\.holdout\);"):
        train(replace(config, data=replace(config.data, holdout=0.1)))


# Schedules of few images and few epochs


def test_what_fits_is_left_alone():
    for name, recipe in RECIPES.items():
        config = recipe()
        assert config.fit_to_data(config.batch_size, 1) == config, name


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_batch_that_the_images_do_not_fill_gives_four_steps(world_size):
    for examples in (*range(world_size, 130), 1000, 4095):
        config = replace(RECIPES["nfnet_imagenet"](), batch_size=4104)  # a multiple of all ranks
        batch = config.fit_to_data(examples, world_size).batch_size
        assert batch % world_size == 0 and batch <= examples
        assert batch == world_size or 4 * batch <= examples
        assert batch == world_size or 4 * (2 * batch + 2 * world_size) > examples  # and no smaller than need be
    cifar = RECIPES["cifar"]().fit_to_data(40, 1)
    assert (cifar.batch_size, cifar.optimizer.largest_norm(8)) == (8, 4.0)  # one over the root of a sixteenth
    assert cifar.optimizer.peak(cifar.batch_size) == pytest.approx(0.2 / 16)


def test_a_warm_up_is_at_most_half_of_the_run_or_else_a_quarter():
    config = RECIPES["resnet_imagenet"]()
    for epochs, warmup in ((90, 5), (10, 5), (9, 2.25), (5, 1.25), (1, 0.25)):
        assert replace(config, epochs=epochs).fit_to_data(10**6, 1).optimizer.warmup_epochs == warmup


def test_rate_and_bound_follow_from_the_batch_whoever_chose_it(at_home, capsys):
    text = told(capsys, "train", "cifar", "--data.source", "pets", "--epochs", "1", "--batch-size", "8", *WORDS)
    said = "batch 8: learning rate 0.0125 (0.2 × 8 / 128), the gradient's norm at most 4 (1 × √(128 / 8))"
    assert said in text.splitlines()
    assert json.loads((at_home / "runs/cifar/config.json").read_text())["derived"]["clip_norm"] == 4
    optimizer = RECIPES["cifar"]().optimizer
    assert [optimizer.largest_norm(batch) for batch in (2, 32, 128, 1024)] == [8, 2, 1, 1]
    assert replace(optimizer, reference_batch=None).largest_norm(8) == 1
    assert replace(optimizer, clip_norm=None).largest_norm(8) is None
    words = {
        (128, "cifar"): "batch 128: learning rate 0.2, the gradient's norm at most 1",
        (1024, "cifar"): "batch 1024: learning rate 1.6 (0.2 × 1024 / 128), the gradient's norm at most 1",
        (64, "nf_regnet_imagenet"): "batch 64: learning rate 0.4, gradients not clipped",
        (512, "nfnet_imagenet"): "batch 512: learning rate 0.2 (0.1 × 512 / 256), each unit's at most 0.01 of its "
        "weight's at any batch",
    }
    for (batch, name), line in words.items():
        assert RECIPES[name]().optimizer.describe(batch) == line
    muon = replace(optimizer, rule="muon", clip_norm=None).describe(64)
    assert (
        muon == "batch 64: learning rate 0.1 (0.2 × 64 / 128), 0.05 of what Muon does not step, gradients not clipped"
    )


# Folders


def test_a_new_run_has_a_new_folder_and_the_same_one_its_own(at_home, capsys):
    words = ["train", "digits", "--limit-eval-steps", "1", *WORDS, "--epochs"]
    short = ["--limit-train-steps", "1"]
    assert "wrote runs/digits\n" in told(capsys, *words, "1", *short)
    second = told(capsys, *words, "2", *short)
    assert second.startswith(
        "runs/digits holds a run with other settings (epochs): this one's folder is runs/digits-2\n"
    )
    assert "wrote runs/digits-3\n" in told(capsys, *words, "3", *short)
    on = told(capsys, *words, "2", "--limit-train-steps", "2")
    assert "this one's folder is runs/digits-2\n" in on and "going on from step 1 of 2\n" in on
    again = told(capsys, *words, "2", "--limit-train-steps", "2")
    assert "runs/digits-2 holds this run already: nothing was trained; another --out trains it again" in again
    assert "wrote" not in again
    assert main([*words, "4", "--out", "runs/digits-2"]) == 2
    error = capsys.readouterr().err
    assert (
        "holds a run with other settings (epochs); pass another --out, or the run's own settings to go on with it"
        in error
    )
    assert sorted(path.name for path in (at_home / "runs").iterdir()) == ["digits", "digits-2", "digits-3"]


def test_a_training_that_ends_at_chance_says_where_to_look():
    from normfree.commands.train import _is_at_chance

    assert _is_at_chance([[10, 0], [10, 0]]) and _is_at_chance([[3, 2, 2], [3, 2, 2], [3, 2, 2]])
    assert not _is_at_chance([[9, 1], [1, 9]]) and not _is_at_chance([[40, 0, 0], [0, 0, 40], [0, 0, 40]])
