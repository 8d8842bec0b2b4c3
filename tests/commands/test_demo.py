"""The demo says what the README says it does."""

import json

import pytest

from normfree.cli import main
from normfree.commands import demo as demo_command


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--epochs", "2"]) == 0
    return out


def test_deleting_the_normalizers_explodes_and_the_other_two_are_healthy(demo):
    models = json.loads((demo / "spp.json").read_text())["models"]
    errors = {
        model["model"]: [finding["kind"] for finding in model["findings"] if finding["severity"] == "error"]
        for model in models
    }
    assert errors == {
        "ResNet-50, BatchNorm": [],
        "ResNet-50, normalizers deleted": ["explosion"],
        "NF-ResNet-50": [],
    }
    assert all(model["input"]["kind"] == "photos" and len(model["blocks"]) == 16 for model in models)
    assert (demo / "report.html").stat().st_size > 1_000_000  # plotly is inside: it opens offline
    assert (demo / "spp.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracies_stand_beside_the_plots(demo):
    models = json.loads((demo / "digits" / "spp.json").read_text())["models"]
    told = dict(one["model"].removesuffix(")").split(" (") for one in models)
    assert list(told) == ["BatchNorm", "normalizers deleted", "normalizer-free"]
    assert float(told["normalizer-free"].split()[0]) > 40  # two epochs; chance is 10
    assert told["normalizers deleted"].startswith("diverged at step ")
    assert all(len(model["blocks"]) == 32 and model["input"]["shape"] == [64, 1, 8, 8] for model in models)
    shifted = {one["model"].split(" (")[0] for one in models if any(f["kind"] == "mean_shift" for f in one["findings"])}
    assert shifted == {"normalizers deleted"}


def test_divergence_is_told_with_its_step():
    learned = demo_command.learn("normalizers deleted", 0, epochs=1)
    assert learned.accuracy is None
    assert learned.outcome == f"diverged at step {learned.diverged}"
