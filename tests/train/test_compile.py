"""Compilation: on a GPU by itself; where it fails the run says so and trains on; a trial leaves no trace."""

import json

import pytest
import torch
from tiny_run import tiny

from normfree.train import networks as module
from normfree.train import train

CENTRED = "nf_resnet50:depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar,centred=True,drop_rate=0.25"
NORMED = "resnet50:depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar"


def compiled(folder):
    return json.loads((folder / "config.json").read_text())["derived"]["compiled"]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def failing(network):
    """A network as ``torch.compile`` gives it where there is no compiler."""

    def forward(*_):
        raise RuntimeError("no compiler here")

    found = torch.nn.Module()
    found.forward = forward
    return found


def run(out, **options):
    return train(tiny(out, limit_train_steps=3, limit_eval_steps=1, signal_every=0, **options))


@pytest.mark.parametrize("model", [CENTRED, NORMED])
def test_what_is_tried_leaves_no_trace(model, tmp_path, monkeypatch):
    run(tmp_path / "plain", model=model)
    monkeypatch.setattr(torch, "compile", lambda network: network)  # a compiler whose results have the same bits
    run(tmp_path / "compiled", model=model, compile=True)
    assert not compiled(tmp_path / "plain") and compiled(tmp_path / "compiled")
    assert weights(tmp_path / "plain") == weights(tmp_path / "compiled")


def test_where_it_pays_it_is_compiled_without_being_asked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda network: calls.append(network) or network)
    run(tmp_path / "cpu")
    assert not calls
    monkeypatch.setattr(module, "COMPILED_ON", ("cpu",))
    run(tmp_path / "off", compile=False)
    assert not calls
    run(tmp_path / "on")
    assert len(calls) == 1 and compiled(tmp_path / "on")


def test_a_run_that_cannot_compile_says_so_and_trains_on(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    run(tmp_path / "plain")
    monkeypatch.setattr(module, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(torch, "compile", failing)
    config = tiny(tmp_path / "run", limit_train_steps=3, limit_eval_steps=1, signal_every=0)
    assert train(config, Console()).finished
    assert "not compiled, so that steps take longer: no compiler here" in capsys.readouterr().out
    assert not compiled(tmp_path / "run")
    assert weights(tmp_path / "plain") == weights(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^compile=True: .*no compiler here.*--compile False"):
        run(tmp_path / "asked", compile=True)


def test_going_on_uncompiled_is_another_condition(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network)
    options = {"limit_eval_steps": 1, "signal_every": 0}
    train(tiny(tmp_path / "run", limit_train_steps=2, compile=True, **options))
    with pytest.raises(ValueError, match=r"compiled False instead of True.*--on-changed continue"):
        train(tiny(tmp_path / "run", limit_train_steps=3, **options))
    assert train(tiny(tmp_path / "run", limit_train_steps=3, compile=True, **options)).finished
