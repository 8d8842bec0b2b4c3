"""Where curves go besides the CSV files: TensorBoard's as before, others by Lightning's loggers, which may fail."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_run import tiny

from normfree.cli import main
from normfree.train import records, train
from normfree.train.config import FREE
from normfree.train.records import read_rows

SHORT = {"limit_train_steps": 3, "limit_eval_steps": 1, "average_decay": None, "signal_every": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Remote:
    """Stands in for one of Lightning's loggers, and keeps what it is told."""

    def __init__(self, key, fails=()):
        self.version, self.fails = key or "fresh", fails
        self.known, self.settings, self.rows, self.ends = key, [], [], []

    def log_hyperparams(self, settings):
        if "settings" in self.fails:
            raise RuntimeError("no settings\nsecond line")
        self.settings.append(settings)

    def log_metrics(self, scalars, step):
        if "log" in self.fails and self.rows:
            raise ConnectionError("the network is gone\nsecond line")
        self.rows.append((step, scalars))


@pytest.fixture
def remote(monkeypatch):
    """A logger called wandb, each made one in a list."""
    made, fails = [], set()

    def start(folder, key):
        made.append(Remote(key, fails))
        return made[-1], made[-1].ends.append

    monkeypatch.setitem(records.START, "wandb", start)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    return SimpleNamespace(made=made, fails=fails)


def scalars(folder):
    """All that TensorBoard's files hold: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = found.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}


def test_all_loggers_get_all_curves_and_the_signal(remote, tmp_path):
    run = train(tiny(tmp_path / "run", **SHORT, log=("tensorboard", "wandb")))
    board, (logger,) = scalars(run.folder / "tensorboard"), remote.made
    told = {}
    for step, row in logger.rows:
        for name, value in row.items():
            told.setdefault(name, []).append((step, value))
    assert set(told) == set(board)
    for name, points in told.items():
        assert [step for step, _ in points] == [step for step, _ in board[name]], name
        assert [value for _, value in board[name]] == pytest.approx([value for _, value in points], rel=1e-6)
    rows = read_rows(run.folder / "train.csv")
    assert told["train/loss"] == [(row["step"], row["loss"]) for row in rows]
    assert [step for step, _ in told["signal/avg_channel_var/000"]] == [0, 2, 3]
    assert [step for step, _ in told["eval/top1"]] == [3]
    assert len(logger.rows) == 3 + 1 + 3  # the signal's many scalars together
    (settings,) = logger.settings
    assert settings["batch_size"] == 128 and settings["derived"]["steps"] == 22 and "classes" not in settings["derived"]
    assert logger.ends == ["finished"]


def test_a_run_that_goes_on_has_its_own_name_there(remote, tmp_path):
    config = {"log": ("wandb",), **SHORT, "signal_every": 0, "checkpoint_every": 1}
    train(tiny(tmp_path / "run", **{**config, "limit_train_steps": 2}))
    assert json.loads((tmp_path / "run" / "loggers.json").read_text()) == {"wandb": "fresh"}
    train(tiny(tmp_path / "run", **config))
    first, second = remote.made
    assert (first.known, second.known, len(first.settings), second.settings) == (None, "fresh", 1, [])
    assert [step for step, row in second.rows if "train/loss" in row] == [3]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_how_the_run_ended_is_told(remote, tmp_path):
    optimizer = {"learning_rate": 1e30, "clip_factor": None, "warmup_epochs": 0}
    with pytest.raises(ValueError, match="loss at step"):
        train(tiny(tmp_path / "bad", log=("wandb",), **SHORT, optimizer=optimizer))
    assert remote.made[0].ends == ["failed"]


def test_a_logger_that_fails_does_not_end_the_run(remote, tmp_path):
    remote.fails.add("log")
    with pytest.warns(
        RuntimeWarning, match=r"log='wandb': it has failed \(ConnectionError: the network is gone\)"
    ) as told:
        run = train(tiny(tmp_path / "run", **SHORT, log=("wandb", "tensorboard")))
    assert len([one for one in told if "has failed" in str(one.message)]) == 1
    assert run.finished and len(scalars(run.folder / "tensorboard")["train/loss"]) == 3
    assert remote.made[0].ends == []


def test_a_logger_that_does_not_start_is_one_line(remote, tmp_path, capsys):
    remote.fails.add("settings")
    words = ["train", "digits", "--out", str(tmp_path / "run"), "--log", "wandb", "--signal-every", "0"]
    assert main(words) == 2
    error = capsys.readouterr().err
    told = "--log='wandb': it does not start (RuntimeError: no settings); wandb login, or set WANDB_MODE=offline"
    assert error == f"normfree: {told}\n"


@pytest.mark.parametrize("package", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_done(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "digits", "--out", str(tmp_path / "run"), "--log", package]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normfree: --log {package} needs {package}, which is not installed; pip install ")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_may_do_without_and_may_change_its_loggers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = train(tiny(tmp_path / "run", **SHORT, log=()))
    assert run.finished and not (run.folder / "tensorboard").exists() and len(read_rows(run.folder / "train.csv")) == 3
    assert "log" in FREE


@pytest.mark.parametrize("log", ["tensorboard", ("wandb", "wandb"), ("paper",), ["tensorboard"]])
def test_loggers_are_checked(log, tmp_path):
    with pytest.raises(ValueError, match="log="):
        tiny(tmp_path, log=log)


# The services themselves, where they are installed; neither is asked for anything beyond this machine


def test_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"log": ("wandb",), **SHORT, "checkpoint_every": 1}
        train(tiny(tmp_path / "run", **{**config, "limit_train_steps": 2}))
        train(tiny(tmp_path / "run", **config))
    key = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    runs = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{key}"))
    assert runs and all(list(run.glob("*.wandb")) for run in runs)
    import wandb

    assert wandb.run is None


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"log": ("mlflow",), **SHORT, "checkpoint_every": 1}
        train(tiny(tmp_path / "run", **{**config, "limit_train_steps": 2}))
        train(tiny(tmp_path / "run", **config, on_nonfinite="skip"))
    client = mlflow.MlflowClient()
    key = json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"]
    found = client.get_run(key)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["derived/steps"] == "22" and found.data.params["on_nonfinite"] == "error"
    losses = [(one.step, one.value) for one in client.get_metric_history(key, "train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in read_rows(tmp_path / "run" / "train.csv")]
    mlflow.set_tracking_uri("nowhere://")
    with pytest.raises(ValueError, match=r"log='mlflow': it does not start .*MLFLOW_TRACKING_URI"):
        train(tiny(tmp_path / "bad", **config))
