"""The demo says what the README says it does."""

import json

import pytest

from normfree.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out)]) == 0
    return out


def test_deleting_the_normalizers_explodes_and_the_other_two_are_healthy(demo):
    models = json.loads((demo / "spp.json").read_text())["models"]
    errors = {
        model["model"]: [finding["kind"] for finding in model["findings"] if finding["severity"] == "error"]
        for model in models
    }
    assert errors == {
        "ResNet-50, BatchNorm": [],
        "ResNet-50, normalizers deleted": ["explosion", "mean_shift"],
        "NF-ResNet-50": [],
    }
    assert all(model["input"]["kind"] == "photos" and len(model["blocks"]) == 16 for model in models)
    assert (demo / "report.html").stat().st_size > 1_000_000  # plotly is inside: it opens offline
    assert (demo / "spp.png").read_bytes().startswith(b"\x89PNG")
