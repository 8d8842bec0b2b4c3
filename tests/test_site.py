"""The site builds without a warning, its schema fits what is written, its pages are legible and request nothing."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch
import torchvision
from accessibility import problems

import normfree
from normfree.signal import write_json

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's folder."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def test_every_public_function_and_class_is_in_the_reference(site):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")}
    for stem, text in pages.items():
        module = normfree if stem == "normfree" else importlib.import_module(f"normfree.{stem}")
        public = [name for name in module.__all__ if isinstance(getattr(module, name), (type, FunctionType))]
        assert public
        shown = set(re.findall(r'id="normfree\.([\w.]+)"', text))
        names = {one.rpartition(".")[2] for one in shown}
        assert set(public) <= names, (stem, set(public) - names)


def test_the_notebook_is_executed_and_shows_what_its_cells_give(site):
    text = (site / "tutorials" / "notebook.html").read_text(encoding="utf-8")
    shown = re.findall(r'<div class="normfree">.*?<strong>(.*?)</strong>: (.*?)</p>', text, re.DOTALL)
    assert [title for title, _ in shown] == [
        "ResNet-34, norms deleted",
        "Conversion",
        "ResNet-34, converted",
        "ResNet",
    ]
    assert re.search(r"error", shown[0][1]) and shown[2][1].endswith("healthy")
    assert "&lt;SignalPropagation of ResNet-34, converted: 16 blocks, healthy&gt;" in text
    assert text.count('src="data:image/png;base64,') == 3
    assert (site / "tutorials" / "notebook.ipynb").exists()


def test_notebooks_are_kept_without_outputs():
    notebooks = list((ROOT / "docs").glob("**/*.ipynb"))
    assert notebooks
    for path in notebooks:
        document = json.loads(path.read_text())
        assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
        for cell in document["cells"]:
            assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]+)"', text)
        assert not loaded, (path.name, loaded)


PAGES = ["index", "tutorials/diagnose", "tutorials/notebook", "reference/export", "gallery", "results/amd-epyc-2/index"]


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_breaks_no_serious_rule_and_fits(site, browser, name):
    # The theme's own markup has landmarks without names and empty table heads, which are moderate and minor.
    assert problems(browser, site / f"{name}.html", impacts=("serious", "critical")) == []


def test_the_schema_fits_what_is_written(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "schema" / "spp.schema.json").read_text())
    plots = [
        normfree.spp(torchvision.models.resnet18(), torch.randn(2, 3, 32, 32)),
        normfree.spp(
            torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.ones(3, 4)
        ),
    ]
    write_json(tmp_path / "spp.json", plots)
    written = json.loads((tmp_path / "spp.json").read_text())
    jsonschema.validate(written, schema)
    del written["models"][0]["blocks"][0]["name"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, schema)
