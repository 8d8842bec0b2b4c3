"""Every page that we write, judged by axe in light and dark, on a phone and a desk; and that the judge sees faults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from accessibility import problems
from tiny_run import tiny

import normfree
from normfree.cli import main
from normfree.report.signal_page import write_report
from normfree.signal import SignalHistory
from normfree.train import train

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def signals() -> list[normfree.SignalPropagation]:
    """Healthy, planned, sick with all severities of findings, and with values that are not finite."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        healthy = torchvision.models.resnet18()
        planned = normfree.create_model("nf_resnet50", depths=(1, 1, 1, 1), widths=(16, 32, 64, 128))
        sick = torchvision.models.resnet18(norm_layer=torch.nn.Identity)
        broken = torchvision.models.resnet18(norm_layer=torch.nn.Identity)
        with torch.no_grad():
            broken.layer3[0].conv1.weight.mul_(1e30)
        models = {"healthy": healthy, "planned": planned, "sick": sick, "broken": broken}
        found = [normfree.spp(model, IMAGES, name=name) for name, model in models.items()]
    assert {one.severity for signal in found for one in signal.findings} == {"info", "warning", "error"}
    return found


def write_signal(folder: Path) -> Path:
    return write_report(signals(), folder / "report.html")


def write_doctor(folder: Path) -> Path:
    model = "resnetv2_50:depths=(1,1,1,1),widths=(16,32,64,128)"
    main(["doctor", model, "--image-size", "32", "--batch-size", "2", "--out", str(folder)])
    return folder / "report.html"


def write_monitor(folder: Path) -> Path:
    records = [(step, signal.renamed("net")) for step, signal in enumerate(signals()[2:])]
    return SignalHistory(records).to_html(folder / "signal.html")


def write_training(folder: Path) -> Path:
    train(tiny(folder, signal_every=4))
    return folder / "report.html"


WRITERS = [write_signal, write_doctor, write_monitor, write_training]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_a_page_breaks_no_rule_and_fits(browser: Browser, tmp_path: Path, write) -> None:
    path = write(tmp_path / "out")
    assert problems(browser, path) == []
    text = path.read_text()
    for section in ("how-to-read", "findings", "configuration"):
        assert text.count(f'id="{section}"') == 1
    assert text.count('role="figure" aria-label="') >= 1


SOUND = """<!DOCTYPE html><html lang="en"><title>t</title>
<style>:root { color-scheme: light dark } @media (prefers-color-scheme: dark) { body { background: #111 } }</style>
<body><main><h1>t</h1><!-- here --></main></html>"""
FAULTS = {
    "critical image-alt": "<img src='data:,'>",
    "serious color-contrast": "<p style='color: #888; background: #777'>grey on grey</p>",
    "serious scrollable-region-focusable": "<div style='overflow: auto; width: 99px'>"
    "<table><tr><td><pre>one row that is long</pre></table></div>",
    "light, 390 px: the page is": "<p style='width: 600px'>wide</p>",
    "light, 1400 px: a table is cut: 'one": "",
    "light and dark have one background": "<style>body { background: #777 !important }</style>",
}


def test_the_judge_sees_faults_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "sound.html").write_text(SOUND)
    (tmp_path / "faulty.html").write_text(SOUND.replace("<!-- here -->", "".join(FAULTS.values())))
    assert problems(browser, tmp_path / "sound.html") == []
    found = problems(browser, tmp_path / "faulty.html")
    for fault in FAULTS:
        assert any(fault in line for line in found), (fault, found)
