"""``torch.hub`` finds every model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import normfree

ROOT = Path(__file__).parents[1]


def test_every_model_is_an_entry_and_builds():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("hubconf_under_test", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # What torch.hub lists: public callables.
    entries = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    assert sorted(entries) == sorted(normfree.list_models())
    assert sys.path == path


def test_what_an_import_puts_first_stays_there(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "normfree", Meddling(normfree))
    spec = importlib.util.spec_from_file_location("hubconf_under_test", ROOT / "hubconf.py")
    before = list(sys.path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert [entry for entry in sys.path if entry != "first"] == before
    assert sys.path[0] == "first"


class Meddling:
    """A module whose import puts a folder first."""

    def __init__(self, module):
        self.create_model, self._list = module.create_model, module.list_models

    @property
    def list_models(self):
        sys.path.insert(0, "first")
        return self._list


def test_torch_hub_loads_from_a_checkout():
    model = torch.hub.load(str(ROOT), "nf_resnet50", source="local", num_classes=4, width=1)
    common = {"num_classes": 4, "in_channels": 3, "padding": "symmetric"}
    assert model.config == {"name": "nf_resnet50", **common, "width": 1}
    with pytest.raises(ValueError, match="wdith=1: nf_regnet_b0 has no such override"):
        torch.hub.load(str(ROOT), "nf_regnet_b0", source="local", wdith=1)
