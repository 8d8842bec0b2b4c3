"""What a notebook shows: every result in one line of text, and as HTML that is whole, bounded and harmless."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import normfree
from normfree.report.notebook import MOST_ROWS
from normfree.report.page import page_file
from normfree.signal import SignalHistory
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation
from normfree.train import Summary

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>\n'


def signal_of(blocks: int = 8, name: str = "net", found: int = 2) -> SignalPropagation:
    """Variances 1, 1.5, 2, …, and errors at the first block."""
    point = {"shape": (2, 8, 4, 4), "channel_axis": 1, "avg_channel_sq_mean": 0.0125}
    own = {**point, "kind": "residual", "residual_avg_channel_var": 0.75}
    return SignalPropagation(
        model=name,
        mode="train",
        input={"kind": name},
        entry=Entry(name=name, **point, avg_channel_var=1.0),
        blocks=tuple(BlockSignal(index=i, name=f"{name}.{i}", avg_channel_var=1 + i / 2, **own) for i in range(blocks)),
        layers=tuple(BlockSignal(index=i, name=name, avg_channel_var=1.0, **own) for i in range(blocks)),
        findings=(Finding(kind="explosion", severity="error", block=0, message=name, remedy=name),) * found,
    )


def converted(name: str, modules: int = 3) -> normfree.convert.Conversion:
    parts = [layer for _ in range(modules) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    record = normfree.convert(nn.Sequential(*parts), torch.randn(4, 3, 4, 4)).conversion
    changes = tuple(replace(change, name=name, reason=name) for change in record.changes)
    return replace(record, model=name, changes=changes, notes=(name,))


def monitor(name: str) -> normfree.SignalMonitor:
    watched = normfree.SignalMonitor(nn.Linear(2, 2))
    watched.history = SignalHistory([(0, signal_of(name=name)), (50, signal_of(name=name))])
    return watched


def summary(name: str, folder) -> Summary:
    folder = folder / name.replace("/", "-")
    folder.mkdir()
    (folder / "eval.csv").write_text("step,epoch,loss,top1,top5,examples,seconds\n40,1,0.5,0.875,,360,1\n")
    (folder / "report.html").touch()
    confusion = [[1] * 100] * 100
    evaluation = {"top1": 0.875, "confusion": confusion}
    return Summary(folder, {"status": "finished", "step": 40, "evaluation": evaluation})


RESULTS = {
    "plot": lambda name, folder: signal_of(name=name),
    "conversion": lambda name, folder: converted(name),
    "history": lambda name, folder: monitor(name).history,
    "monitor": lambda name, folder: monitor(name),
    "training": summary,
}
PARTS = {
    "block": lambda name, folder: signal_of(name=name).blocks[0],
    "finding": lambda name, folder: signal_of(name=name).findings[0],
    "change": lambda name, folder: converted(name).changes[0],
}


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("kind", RESULTS)
def test_names_and_messages_are_text_whatever_they_hold(kind, tmp_path):
    page = Elements(RESULTS[kind](EVIL.strip(), tmp_path)._repr_html_())
    assert not page.open, "every element is closed"
    assert EVIL.strip().replace("/", "-") in page.text.replace("/", "-")
    known = {"div", "style", "p", "strong", "ol", "ul", "li", "span", "img", "details", "summary"}
    known |= {"table", "thead", "tbody", "tr", "th", "td"}
    plain = {"class", "width", "alt", "src", "scope", "tabindex", "role", "aria-label", "open"}
    for tag, attributes in page.elements:
        assert tag in known and set(attributes) <= plain, (tag, attributes)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")


@pytest.mark.parametrize("kind", [*RESULTS, *PARTS])
def test_the_text_is_one_short_line_whatever_the_result_holds(kind, tmp_path):
    told = repr((RESULTS | PARTS)[kind](EVIL[:60] + "long" * 30, tmp_path))
    assert "\n" not in told and len(told) < 500, told
    assert "script" in told


def test_what_the_text_says(tmp_path):
    assert repr(signal_of()) == "<SignalPropagation of net: 8 blocks, 2 errors (explosion)>"
    assert repr(signal_of(1, found=0)) == "<SignalPropagation of net: 1 block, healthy>"
    assert repr(monitor("net").history) == (
        "<SignalHistory of net: 2 records, steps 0 to 50; explosion (steps 0 to 50, the last record)>"
    )
    assert repr(SignalHistory()) == "<SignalHistory with no record>"
    assert repr(summary("run", tmp_path)) == f"<Summary of {tmp_path / 'run'}: finished at step 40, top-1 87.50 %>"
    plain = normfree.spp(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.eye(2))
    assert plain.size == "2 weighted layers"
    errors = normfree.signal.Finding(kind="mean_shift", severity="warning", block=None, message="", remedy="")
    assert replace(signal_of(found=1), findings=(errors, *signal_of(found=1).findings)).verdict == "1 error, 1 warning"


def test_a_plot_shows_its_verdict_findings_curves_and_numbers():
    html = signal_of()._repr_html_()
    page = Elements(html)
    assert "8 blocks, mode train: 2 errors" in page.text and "block 0 (net.0)" in page.text
    assert all(f"<td>{1 + i / 2:.4g}</td>" in html for i in range(8))
    assert next(one for tag, one in page.elements if tag == "img")["alt"] == "Signal propagation plot of net"
    assert len(html) < 200_000


def test_without_matplotlib_the_numbers_stand_open_in_the_place_of_the_plot(monkeypatch):
    assert "<details open>" not in signal_of()._repr_html_()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for html in (signal_of()._repr_html_(), monitor("net")._repr_html_()):
        assert "<img" not in html and html.count("<details open>") == 1 and "<td>2.5</td>" in html


def test_long_tables_are_cut_in_the_middle_and_say_so():
    html = signal_of(blocks=600)._repr_html_()
    assert html.count("500 rows in the middle are left out") == 2
    assert (
        html.count("<tr>") == 2 * MOST_ROWS + 3 and "net.49<" in html and "net.550<" in html and "net.50<" not in html
    )
    long = converted("net", modules=60)
    assert len(long.rows()) == 120 and "20 rows in the middle are left out" in long._repr_html_()


def test_a_conversion_shows_what_changed_and_why():
    text = Elements(converted("net")._repr_html_()).text
    assert "net converted (fresh): 3 ScaledWSConv2d, 3 Identity; no normalizer left" in text
    assert "6 modules" in text and "BatchNorm2d" in text


def test_a_history_shows_when_and_a_few_of_many_records():
    history = SignalHistory((step, signal_of(name="net")) for step in range(0, 100, 10))
    text = Elements(history._repr_html_()).text
    assert "10 records, steps 0 to 90" in text and "steps 0 to 90, the last record" in text
    assert "no record yet" in SignalHistory()._repr_html_()


def test_a_training_shows_its_evaluations(tmp_path):
    text = Elements(summary("run", tmp_path)._repr_html_()).text
    assert "finished at step 40, top-1 87.50 %" in text and "0.875" in text and "report.html" in text
    assert len(json.dumps(text)) < 5000  # the confusion matrix is for the report


def test_the_colours_are_those_of_the_page_around():
    assert not re.search(r"[;{\s]color\s*:", page_file("notebook.css"))
