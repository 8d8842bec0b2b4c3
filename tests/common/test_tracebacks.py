"""An error a user can cause is shown at the line that caused it: the frames of the checks are hidden."""

import ast
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import normfree
from normfree.common import checks
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation

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
