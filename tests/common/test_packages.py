"""What is missing is told in one way, wherever it is missing."""

from __future__ import annotations

import sys

import pytest
import torch

import normfree
from normfree.cli import main
from normfree.common.checks import EXTRAS, require
from normfree.data.augmentation import CentreCrop
from normfree.data.config import DataConfig
from normfree.data.pipeline import read_digits
from normfree.data.probe import probe_named
from normfree.data.records import decode
from normfree.data.sources import find_source
from normfree.export import to_onnx
from normfree.signal.monitor import lightning_callback
from normfree.sources import build
from normfree.train import RECIPES, read_config, train
from normfree.weights.hub import hub_model_class

USES = {
    "matplotlib": lambda: normfree.spp(torch.nn.Linear(2, 2), torch.randn(4, 2)).plot(),
    "plotly": lambda: normfree.SignalHistory([(0, normfree.spp(torch.nn.Linear(2, 2), torch.randn(4, 2)))]).figure(),
    "lightning": lambda: lightning_callback(normfree.SignalMonitor(torch.nn.Linear(2, 2), torch.randn(4, 2))),
    "torchvision": lambda: (build("torchvision:resnet18"), CentreCrop(8)),
    "PIL": lambda: decode(b"no image"),
    "torchmetrics": lambda: train(RECIPES["digits"]()),
    "tensorboard": lambda: train(RECIPES["digits"]()),
    "onnx": lambda: to_onnx(torch.nn.Linear(2, 2), torch.randn(4, 2), "never_written.onnx"),
    "onnxscript": lambda: to_onnx(torch.nn.Linear(2, 2), torch.randn(4, 2), "never_written.onnx"),
    "onnxruntime": lambda: to_onnx(torch.nn.Linear(2, 2), torch.randn(4, 2), "never_written.onnx"),
    "huggingface_hub": lambda: normfree.from_pretrained("no/folder"),
    "timm": lambda: build("timm:nf_resnet50"),
    "sklearn": lambda: read_digits(training=True),
    "datasets": lambda: find_source(DataConfig(source="no/folder")),
    "yaml": lambda: read_config("own.yaml"),
}


@pytest.fixture
def without(monkeypatch):
    def hide(package):
        for name in [package, *sys.modules]:
            if name.split(".")[0] == package:
                monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_every_package_of_an_extra_is_tried():
    assert set(USES) == {package for packages in EXTRAS.values() for package in packages}


@pytest.mark.parametrize(("extra", "package"), [(extra, package) for extra in EXTRAS for package in EXTRAS[extra]])
def test_every_use_of_a_missing_package_says_the_same(extra, package, without, tmp_path, monkeypatch):
    without(package)
    monkeypatch.chdir(tmp_path)
    told = rf"^\S.* needs {package}, which is not installed; pip install 'normfree\[{extra}\]'$"
    with pytest.raises(ImportError, match=told) as caught:
        USES[package]()
    assert not list(tmp_path.iterdir())
    assert "\n" not in str(caught.value)
    assert caught.value.name == package


@pytest.mark.parametrize(("package", "extra"), [("torchvision", "vision"), ("sklearn", "train")])
def test_photographs_are_there_or_not_before_a_model_is_built(package, extra, without):
    without(package)
    with pytest.raises(ImportError, match=rf"needs {package}, .*; pip install 'normfree\[{extra}\]'$"):
        probe_named("photos")


def test_a_missing_class_is_a_missing_attribute(without):
    without("huggingface_hub")
    hub_model_class.cache_clear()  # another test may have had the class
    assert not hasattr(normfree, "HubModel")
    with pytest.raises(AttributeError, match="needs huggingface_hub, which is not installed; pip install") as caught:
        _ = normfree.HubModel
    assert isinstance(caught.value.__cause__, ImportError)
    with pytest.raises(ImportError, match="HubModel"):
        from normfree import HubModel  # noqa: F401


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    told = r"^the test needs timm, which cannot be imported \(No module named 'nothing_of_that_name'\); pip install"
    with pytest.raises(ImportError, match=told):
        require("timm", "the test")
    assert require("matplotlib.figure", "the test").Figure


def test_the_command_line_tells_it_in_one_line(without, capfd):
    without("timm")
    assert main(["spp", "timm:resnet18"]) == 2
    told = capfd.readouterr().err
    assert told == "normfree: timm:resnet18 needs timm, which is not installed; pip install 'normfree[timm]'\n"
