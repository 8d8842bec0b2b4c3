"""An error a user can cause is shown at the line that caused it: the frames of the checks are hidden."""

import ast
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import normfree
import normfree.export
import normfree.optim
from normfree.common import checks
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation
from normfree.train import RECIPES, train

SOURCE = Path(normfree.__file__).parent

POINT = {"name": "a", "shape": (2, 2), "channel_axis": 1, "avg_channel_sq_mean": 0.0, "avg_channel_var": 1.0}
SICK = SignalPropagation(
    model="net",
    mode="train",
    input={},
    entry=Entry(**POINT),
    blocks=(BlockSignal(index=0, kind="residual", residual_avg_channel_var=1.0, **POINT),),
    findings=(Finding(kind="explosion", severity="error", block=0, message="it grows", remedy="scale it"),),
)
LAYER, BATCH = nn.Linear(2, 2), torch.eye(2)
CALLS = {
    "a measurement in a plot": SICK.assert_healthy,
    "a kind of finding": partial(SICK.assert_healthy, ignore=["none-such"]),
    "a choice": partial(normfree.spp, nn.Linear(2, 2), torch.eye(2), mode="none-such"),
    "a seed": partial(normfree.spp, nn.Linear(2, 2), torch.eye(2), seed=-1),
    "weights": partial(normfree.spp, nn.Linear(2, 2).requires_grad_(False).apply(lambda m: m.weight.fill_(torch.nan))),
    "a conversion": partial(normfree.convert, nn.Linear(2, 2), torch.eye(2), alpha=-1),
    "a model of ours": partial(normfree.save, nn.Linear(2, 2), "net.safetensors"),
    "a file": partial(normfree.load, "none-such.safetensors"),
    "a size": partial(normfree.create_model, "nf_resnet50", num_classes=-1),
    "a rate": partial(normfree.create_model, "nf_resnet50", drop_rate=2),
    "a flag": partial(normfree.create_model, "nf_resnet50", use_se=1),
}


OWN_LINE = {
    "a mode": partial(normfree.spp, LAYER, BATCH, mode="none-such"),
    "a batch that is not finite": partial(normfree.spp, LAYER, BATCH * torch.nan),
    "no module": partial(normfree.spp, "net"),
    "a start": partial(normfree.convert, LAYER, BATCH, start="none-such"),
    "no module to convert": partial(normfree.convert, "net", BATCH),
    "no module to fold": partial(normfree.fold, "net"),
    "a name": partial(normfree.create_model, "none-such"),
    "an override": partial(normfree.create_model, "nf_resnet50", none_such=1),
    "a model that has no file": partial(normfree.save, LAYER, "net.safetensors"),
    "no file": partial(normfree.load, "none-such.safetensors"),
    "an example": partial(normfree.export.to_onnx, LAYER, torch.ones(2, 5), "net.onnx"),
    "a number of steps": partial(normfree.signal.SignalMonitor, LAYER, BATCH, every=-1),
    "a bound": partial(normfree.optim.AdaptiveGradientClipping, torch.optim.SGD(LAYER.parameters(), 0.1), LAYER, -1),
    "no matrix": partial(normfree.optim.Muon, [nn.Parameter(torch.ones(4))], 0.1),
    "a decay": partial(normfree.optim.parameter_groups, LAYER, -1),
    "a learning rate": partial(normfree.optim.nesterov_sgd, LAYER, -1),
    "nothing to centre": partial(normfree.optim.InputCentring, LAYER),
    "a recipe's model": partial(replace, RECIPES["digits"](), model="none-such"),
    "two networks": partial(train, RECIPES["digits"](), network=lambda classes, channels: LAYER),
    "no network": partial(train, replace(RECIPES["digits"](), model="./mine"), network=LAYER.weight),
}


@pytest.mark.parametrize("what", OWN_LINE)
def test_the_last_line_shown_is_none_of_ours(what):
    with pytest.raises(ValueError, match=r"[=:]") as caught:
        OWN_LINE[what]()
    last = caught.traceback.filter(caught)[-1]
    assert not Path(last.path).is_relative_to(SOURCE), last


def shown(caught):
    """The functions whose frames pytest shows, from the test on."""
    visible = caught.traceback.filter(caught)
    return [entry.name for entry in visible]


@pytest.mark.parametrize("what", CALLS)
def test_no_frame_of_a_check_is_shown(what):
    with pytest.raises((ValueError, AssertionError)) as caught:
        CALLS[what]()
    ran = [entry.name for entry in caught.traceback]
    assert any(name.startswith(("check_", "_check", "assert_")) for name in ran), "one did run"
    assert not [name for name in shown(caught) if name.startswith(("check_", "assert_")) or name == "_check"]


def test_a_test_that_asserts_health_fails_at_its_own_line():
    with pytest.raises(AssertionError) as caught:
        SICK.assert_healthy()
    assert shown(caught) == ["test_a_test_that_asserts_health_fails_at_its_own_line"]


def test_a_missing_package_is_shown_where_it_is_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError) as caught:
        checks.require("timm", "this")
    assert shown(caught) == ["test_a_missing_package_is_shown_where_it_is_wanted"]


def test_every_check_hides_its_frame():
    """The name says that it is one: `check_…`."""
    found = [
        function
        for file in SOURCE.rglob("*.py")
        if file.parent.name != "commands"
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name.startswith("check_")
    ]
    assert len(found) > 20
    for function in found:
        has_docstring = ast.get_docstring(function) is not None
        assert ast.unparse(function.body[has_docstring]) == "__tracebackhide__ = True", function.name
