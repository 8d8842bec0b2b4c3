"""Settings from a file: a run's own config.json or YAML, changed by options, and every mistake named."""

import json
from dataclasses import replace

import pytest
from tiny_run import MODEL, tiny

import normfree
from normfree.cli import main
from normfree.train import RECIPES, read_config
from normfree.train.config import flatten, to_dict


@pytest.fixture
def written(tmp_path):
    def write(text, name="own.yaml"):
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
        return tmp_path / name

    return write


def described(config, **changes):
    """What a run's config.json has."""
    return {"config": to_dict(config), "derived": {}, "versions": {"normfree": normfree.__version__}, **changes}


@pytest.mark.parametrize("name", RECIPES)
def test_a_runs_config_comes_back(name, written, tmp_path):
    config = replace(RECIPES[name](), out=tmp_path, log=("tensorboard",))
    assert read_config(written(described(config), "config.json")) == (config, [])
    assert read_config(written(to_dict(config), "plain.json")) == (config, [])


def test_yaml_changes_a_recipe(written):
    text = """
    # nested or dotted, with underscores or hyphens
    data: {source: pets, in-memory: false, mean: [0.5, 0.4, 0.3], std: [1, 1, 1]}
    data.augmentation.crop: shift
    optimizer:
      weight-decay: 5e-4
      learning_rate: 2E-2
      clip_norm: None
      clip_factor: null
    epochs: 3
    compile: true
    log: [wandb]
    """
    config, lacking = read_config(written(text), RECIPES["cifar"]())
    cifar = RECIPES["cifar"]()
    data = {"source": "pets", "in_memory": False, "mean": (0.5, 0.4, 0.3), "std": (1, 1, 1)}
    data["augmentation"] = replace(cifar.data.augmentation, crop="shift")
    optimizer = replace(cifar.optimizer, weight_decay=5e-4, learning_rate=0.02, clip_norm=None, clip_factor=None)
    expected = replace(cifar, data=replace(cifar.data, **data), optimizer=optimizer, epochs=3, compile=True)
    assert (config, lacking) == (replace(expected, log=("wandb",)), [])
    alone, _ = read_config(written("model: nf_resnet50:width=1", "my try.yaml"))
    assert (alone.name, alone.model, alone.epochs) == ("my_try", "nf_resnet50:width=1", 90)


MISTAKES = {
    "epochss: 3": "epochss is no setting; did you mean epochs",
    "data: {sorce: x}": r"data\.sorce is no setting; did you mean data\.source",
    "lr: 0.1": r"lr is no setting; did you mean optimizer\.learning_rate\?",
    "optimizer: {wd: 0.1}": r"optimizer\.wd is no setting; did you mean optimizer\.weight_decay\?",
    "source: x": r"source is no setting; did you mean data\.source\?",
    "crop: x": r"crop is no setting; did you mean data\.augmentation\.crop\?",
    "data: pets": r"data is a section; give settings in it, such as data\.source",
    "epochs: {most: 3}": r"epochs\.most is no setting; did you mean epochs",
    "epochs: two": "epochs: 'two' is no int",
    "epochs: 1e1": "epochs: 10.0 is no int",
    "data: {workers: yes}": r"data\.workers: True is no int",
    "optimizer: {learning_rate: 1 e-4}": r"optimizer\.learning_rate: '1 e-4' is no float",
    "epochs: 0": "epochs=0: must be an integer of at least 1",
    "precision: fp8": "precision: 'fp8' is no",
    "- epochs": "holds list, no settings",
    "": "holds NoneType, no settings",
    "epochs: 1\nepochs: 2": "no YAML of settings.*epochs twice",
    "batch-size: 1\nbatch_size: 2": "has batch_size twice, in two spellings; say it once",
    "data.source: a\ndata: {source: b}": r"has data\.source twice, in two spellings",
    "epochs: 010": "no YAML of settings.*'010' is another number in YAML",
    "epochs: 1:30": "no YAML of settings.*'1:30' is another number in YAML",
    "optimizer: {learning_rate: 1:30.5}": "no YAML of settings.*'1:30.5' is another number in YAML",
    f"epochs: !!int '{':'.join(['59'] * 3000)}'": "no YAML of settings.*a number of 8,999 characters",
    "a: &a [1]\nb: *a": "no YAML of settings.*alias",
    "epochs: [": "no YAML of settings",
    "!!python/object/apply:os.mkdir [ran]": "no YAML of settings",
    "epochs: !!timestamp x": "no YAML of settings",
    "\x00": "no YAML of settings",
    "model: nf_resnet51": "did you mean nf_resnet50",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_names_file_and_setting(text, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"config='.*own\.yaml': .*{MISTAKES[text]}") as caught:
        read_config(written(text), RECIPES["digits"]())
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 500
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_other_files_are_refused(written, tmp_path):
    for name, message in (("own.txt", r"neither \.json nor \.yaml"), ("none.yaml", "is no file"), ("own.json", "JSON")):
        if name != "none.yaml":
            written("epochs: 3", name)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)
    with pytest.raises(ValueError, match="says no model; name a recipe to begin with: normfree train cifar --config"):
        read_config(written("epochs: 3"))
    with pytest.raises(ValueError, match="1,048,577 bytes, more than"):
        read_config(written("#" * (2**20 + 1)))


def test_a_config_of_another_version(written):
    """What it lacks is at its default and named; what is no more, is named with the version that wrote it."""
    older = described(RECIPES["cifar"]())
    del older["config"]["data"]["holdout"], older["config"]["log"]
    config, lacking = read_config(written(older, "config.json"))
    assert config == RECIPES["cifar"]() and lacking == ["data.holdout", "log"]
    older["config"]["warmth"] = 1
    with pytest.raises(ValueError, match=r"warmth is no setting; did you mean"):
        read_config(written(older, "config.json"))
    older["versions"]["normfree"] = "0.0.1"
    told = rf"warmth is no setting of normfree {normfree.__version__}, and normfree 0\.0\.1 wrote the file; did you"
    with pytest.raises(ValueError, match=told):
        read_config(written(older, "config.json"))


def run(capsys, *words):
    code = main(["train", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_options_change_what_the_file_says(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = f"model: {MODEL!r}\nepochs: 5\nsignal_every: 0\nlimit_train_steps: 1\nlimit_eval_steps: 1\nseed: 7"
    file = written(settings)
    for words in (
        ("digits", "--config", file, "--epochs", "2"),
        ("--config", file, "digits", "--epochs", "2"),
        ("digits", "--epochs", "2", f"--config={file}"),
    ):
        code, out, err = run(capsys, *words, "--out", "run")
        assert code == 0, err
        chosen = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
        assert (chosen["epochs"], chosen["seed"], chosen["model"], chosen["name"]) == (2, 7, MODEL, "digits")
        assert chosen["batch_size"] == 64  # of the recipe
    code, out, err = run(capsys, "--config", "run/config.json", "--out", "again")
    assert code == 0 and "lacks" not in out and "says nothing" not in out, err
    again = json.loads((tmp_path / "again" / "config.json").read_text())["config"]
    assert again == {**chosen, "out": "again"}
    code, out, err = run(capsys, "--config", "run/config.json")
    assert code == 0 and "run holds this run already" in out


def test_a_run_of_an_older_version_is_begun_anew_and_says_what_it_lacks(written, tmp_path, capsys):
    config = tiny(tmp_path / "run", limit_train_steps=1, limit_eval_steps=1)
    older = described(config)
    del older["config"]["data"]["holdout"]
    file = written(older, "config.json")
    code, out, err = run(capsys, "--config", file, "--out", tmp_path / "run")
    assert code == 0 and out.startswith(
        f"{file} says nothing of these, which are at their defaults: data.holdout None\n"
    ), err


def test_a_file_without_a_recipe_names_what_recipes_choose_and_it_does_not(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = f"model: {MODEL!r}\ndata.source: digits\nepochs: 5\nsignal_every: 0\nlimit_eval_steps: 1"
    file = written(settings)
    code, out, err = run(capsys, "--config", file, "--limit-train-steps", "1", "--batch-size", "64")
    assert code == 0, err
    line = out.splitlines()[0]
    assert line.startswith(f"{file} says nothing of these, which are at their defaults: data.image_size None, ")
    for told in ("optimizer.learning_rate 0.1", "optimizer.clip_norm None", "label_smoothing 0.1"):
        assert f", {told}, " in line
    assert not any(f" {name} " in line for name in ("epochs", "batch_size", "seed", "log_every", "data.source"))
    assert read_config(file, RECIPES["cifar"]())[1] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifra", "--config", "own.yaml"], "recipe='cifra': there is no such recipe; did you mean cifar?"),
        (["cifar", "--config", "own.yaml", "--config", "own.yaml"], "--config: there are two files; give one"),
        (["cifar", "--config"], "Missing value for argument '--config'"),
        (["cifar", "--config", "none.yaml"], "--config='none.yaml': is no file"),
        (["cifar", "--config", "own.yaml", "--epochss", "3"], "Unrecognized options: --epochss, 3; perhaps you meant"),
        (["cifar", "--config", "own.yaml", "--epochs", "0"], "--epochs=0: must be an integer"),
        (["--config", "own.yaml"], "--config='own.yaml': says no model; name a recipe to begin with"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(words, message, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written("epochs: 3")
    code, _, err = run(capsys, *words)
    assert code == 2 and err.startswith(f"normfree: {message}") and err.count("\n") == 1, err


def test_help_shows_the_files_values(written, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = written("epochs: 123\ndata.source: pets")
    for words in (["cifar", "--config", file, "--help"], ["cifar", "--help"]):
        with pytest.raises(SystemExit):
            main(["train", *map(str, words)])
        text = capsys.readouterr().out
        assert "--config" in text and "--optimizer.learning-rate" in text and "--recipe" not in text
        assert ("(default: 123)" in text) == (file in words) == ("(default: pets)" in text)


def test_every_setting_has_a_name_of_its_own():
    """Names are flattened to compare, and told apart by their sections."""
    config = RECIPES["digits"]()
    assert len(flatten(to_dict(config))) > 60
    assert not any("-" in name for name in flatten(to_dict(config)))


FOREIGN = {
    "data.source": "http://127.0.0.1:9/train-0.tar",
    "data.cache_folder": "/somewhere/else",
    "out": "../elsewhere",
    "model": "nets.py:net",
}


@pytest.mark.parametrize("setting", FOREIGN)
def test_an_address_a_folder_and_code_are_followed_where_a_person_names_them(setting, written):
    word, option = FOREIGN[setting], f"--{setting.replace('_', '-')}"
    file = written({"model": "nf_resnet50", setting: word}, "stranger.json")
    with pytest.raises(ValueError, match=rf"stranger\.json'.*because a file names it.*{option} "):
        read_config(file)
    for words in ([word], [option, word], [f"{option}={word}"], [option, "another"]):
        assert read_config(file, code=words)[0].name == "stranger"


def test_an_address_of_a_strangers_run_is_asked_for_nothing(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path / "elsewhere")
    file = written(described(config), "run.json")
    assert main(["train", "--config", str(file), "--limit-train-steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "its out is" in error and error.count("\n") == 1 and not (tmp_path / "elsewhere").exists()
    config = replace(config, out=None, data=replace(config.data, source=FOREIGN["data.source"]))
    file = written(described(config), "run.json")
    assert main(["train", "--config", str(file), "--limit-train-steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "no address is opened" in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()
    words = ["--data.source=digits", "--out", str(tmp_path / "run"), "--limit-train-steps", "1"]
    assert main(["train", "--config", str(file), *words]) == 0


def test_a_run_goes_on_by_its_own_config(tmp_path):
    config = tiny(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(described(config)))
    assert read_config(tmp_path / "run")[0].out == tmp_path / "run"
    assert read_config(tmp_path / "run" / "config.json")[0].out == tmp_path / "run"
