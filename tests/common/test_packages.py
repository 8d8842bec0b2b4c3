"""What is missing is told in one way, wherever it is missing."""

from __future__ import annotations

import sys

import pytest
import torch

import normfree
from normfree.cli import main
from normfree.common.checks import required
from normfree.data.pipeline import read_digits
from normfree.data.probe import Photographs
from normfree.export import to_onnx
from normfree.signal.monitor import lightning_callback
from normfree.sources import build

USES = {
    "plotly": lambda: normfree.SignalHistory([(0, normfree.spp(torch.nn.Linear(2, 2), torch.randn(4, 2)))]).figure(),
    "lightning": lambda: lightning_callback(normfree.SignalMonitor(torch.nn.Linear(2, 2), torch.randn(4, 2))),
    "onnxruntime": lambda: to_onnx(torch.nn.Linear(2, 2), torch.randn(4, 2), "never_written.onnx"),
    "huggingface_hub": lambda: normfree.from_pretrained("no/folder"),
    "timm": lambda: build("timm:nf_resnet50"),
    "sklearn": lambda: (read_digits(training=True), Photographs(32).load(0)),
    "datasets": lambda: build_source(),
}


def build_source():
    from normfree.data.config import DataConfig
    from normfree.data.sources import HubSource

    return HubSource(DataConfig(source="hub:no/set"))


@pytest.fixture
def without(monkeypatch):
    def hide(package):
        for name in [package, *sys.modules]:
            if name.split(".")[0] == package:
                monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize("package", USES)
def test_every_use_of_a_missing_package_says_the_same(package, without):
    without(package)
    with pytest.raises(ImportError, match=rf"^\S.* needs {package}, which is not installed; pip install \S+") as caught:
        USES[package]()
    assert "\n" not in str(caught.value)
    assert caught.value.name == package


def test_a_missing_class_is_a_missing_attribute(without):
    without("huggingface_hub")
    assert not hasattr(normfree, "HubModel")
    with pytest.raises(AttributeError, match="needs huggingface_hub, which is not installed; pip install") as caught:
        _ = normfree.HubModel
    assert isinstance(caught.value.__cause__, ImportError)
    with pytest.raises(ImportError, match="HubModel"):
        from normfree import HubModel  # noqa: F401


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = r"^the test needs half_there, which cannot be imported \(No module named 'nothing_of_that_name'\); pip"
    with pytest.raises(ImportError, match=told):
        required("half_there", "the test")
    assert required("json.decoder", "the test").JSONDecoder


def test_the_command_line_tells_it_in_one_line(without, capfd):
    without("timm")
    assert main(["spp", "timm:resnet18"]) == 2
    told = capfd.readouterr().err
    assert told == "normfree: timm:resnet18 needs timm, which is not installed; pip install 'normfree[timm]'\n"
