"""The report: what is in the file, that it asks for nothing, and what a real browser makes of it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from normfree.report.page import MEANINGS, page_file
from normfree.report.signal_page import write_report
from normfree.signal.propagation import KINDS, BlockSignal, Entry, Finding, SignalPropagation

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = "<script>alert(1)</script>"
LONG = "timm:a_model_with_a_name_that_goes_on(width=2,alpha=0.2,activation=silu,depths=[1,2,3],use_se=True)"
FOUND = Finding(kind="explosion", severity="error", block=6, message="it <b>grows</b>", remedy="scale it")


def signal_of(model: str, count: int = 8, *, every: int = 4, sick: bool = False) -> SignalPropagation:
    """A healthy ladder, or one that overflows at its last two blocks."""
    blocks = tuple(
        BlockSignal(
            index=i,
            name=f"stages.{i // every}.{i % every}",
            kind="residual",
            shape=(2, 8, 4, 4),
            channel_axis=1,
            transition=i % every == 0,
            avg_channel_sq_mean=0.0 if sick and i == 1 else 0.01,
            avg_channel_var=math.inf if sick and i > count - 3 else 30.0**i if sick else 1 + 0.04 * (i % every),
            residual_avg_channel_var=None if sick and i == 2 else 1.0,
            expected_var=None if sick else 1 + 0.04 * (i % every + 1),
            input_correlation=0.5,
            woken=("gain",) if i == 3 else (),
        )
        for i in range(count)
    )
    entry = Entry(name="stem", shape=(2, 8, 4, 4), channel_axis=1, avg_channel_sq_mean=0.02, avg_channel_var=1.0)
    return SignalPropagation(
        model=model,
        mode="train",
        input={"kind": "gaussian", "examples": 2},
        entry=entry,
        blocks=blocks,
        findings=(FOUND,) if sick else (),
        configuration={"model": {"alpha": 0.2}, "versions": {"torch": "2.9"}, "path": EVIL},
    )


def page_of(text: str) -> str:
    """The page without plotly's source."""
    plotly = page_file("plotly-cartesian.min.js")
    assert plotly in text
    return text.replace(plotly, "")


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_one_file_that_refers_to_nothing_outside(tmp_path: Path) -> None:
    path = write_report([signal_of("a"), signal_of("b", sick=True)], tmp_path / "out" / "report.html")
    assert path == tmp_path / "out" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = page_of(path.read_text())
    assert not re.findall(r"https?://|\bfetch\(|XMLHttpRequest|@import|url\(|\bimport\(", page)
    assert re.findall(r'(?:src|href|srcset|action)\s*=\s*["\']?([^"\'\s>]+)', page) == ["data:,"]
    assert "default-src 'none'" in page
    assert "{{" not in page


def test_names_are_inert_everywhere(tmp_path: Path) -> None:
    evil = replace(signal_of(EVIL, sick=True), mode=EVIL, input={"kind": EVIL, EVIL: EVIL})
    evil = replace(evil, blocks=(replace(evil.blocks[0], name=EVIL, woken=(EVIL,)), *evil.blocks[1:]))
    evil = replace(evil, findings=(replace(FOUND, kind=EVIL, severity=EVIL, block=0, message=EVIL, remedy=EVIL),))
    page = page_of(write_report([evil], tmp_path / "r.html", title=EVIL + "{{data}}").read_text())
    assert EVIL not in page and "alert(1)&lt;/script" in page
    assert page.count("<script") == page.count("</script") == 3
    assert data_of(page)["models"][0]["name"] == EVIL
    assert "{{data}}" in page


def test_numbers_findings_and_configuration_are_there_without_javascript(tmp_path: Path) -> None:
    page = page_of(write_report([signal_of("sick", sick=True)], tmp_path / "r.html").read_text())
    assert "it &lt;b&gt;grows&lt;/b&gt;" in page and "scale it" in page and "block 6: stages.1.2" in page
    assert "<td class=bad>inf</td>" in page and "woken: gain" in page and "<td>7.29e+05</td>" not in page
    assert "non-finite from block 6 (stages.1.2)" in page and "1 error" in page
    assert "<th scope=row>model alpha</th><td>0.2</td>" in page and "<th scope=row>versions torch</th>" in page
    for element in (
        "scale-log",
        "scale-linear",
        "findings",
        "legend",
        "how-to-read",
        "numbers",
        "configuration",
    ):
        assert f'id="{element}"' in page


def test_data_for_the_curves(tmp_path: Path) -> None:
    data = data_of(write_report([signal_of("sick", 5, sick=True)], tmp_path / "r.html").read_text())
    (model,) = data["models"]
    assert model["curves"]["avg_channel_var"] == [1.0, 1.0, 30.0, 900.0, "inf", "inf"]
    assert model["gaps"]["avg_channel_var"] == 3 and model["gaps"]["avg_channel_sq_mean"] is None
    assert model["curves"]["residual_avg_channel_var"] == [None, 1.0, 1.0, None, 1.0, 1.0]
    logs = {panel["curve"]: panel["log"] for panel in data["panels"]}
    assert logs["avg_channel_var"] and not logs["residual_avg_channel_var"] and "avg_sq_gradient" not in logs


def test_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="signals"):
        write_report([], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_small_and_needs_no_plotly_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    path = write_report([signal_of("a", 50), signal_of("b", 50), signal_of("c", 50)], tmp_path / "r.html")
    assert path.stat().st_size < 1.6e6


def test_the_title_names_the_models(tmp_path: Path) -> None:
    signals = [signal_of(name) for name in ("a", "b", "<c>", "d")]
    page = page_of(write_report(signals, tmp_path / "r.html").read_text())
    assert "<h1>Signal propagation of a, b, &lt;c&gt; and 1 more</h1>" in page
    assert "<title>Signal propagation of a, b, &lt;c&gt; and 1 more</title>" in page


def test_layers_in_no_block_and_outputs_have_a_table(tmp_path: Path) -> None:
    signal = signal_of("net")
    blocks = tuple(replace(block, number=2 * block.index + 2) for block in signal.blocks)
    stem = replace(blocks[0], index=0, name="stem.conv", kind="layer", number=0, avg_channel_var=0.0625, woken=())
    head = replace(stem, index=1, name="fc", number=40, avg_channel_var=123.5, last=True)
    output = replace(stem, name="output 0", kind="output", avg_channel_var=77.25)
    signal = replace(signal, blocks=blocks, layers=(stem, head), outputs=(output,))
    page = page_of(write_report([signal], tmp_path / "r.html").read_text())
    table = page[page.index("weighted layers in no block, and outputs") :]
    rows = [re.sub(r"<[^>]*>+", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:4]]
    assert "before block 0" in rows[0] and "stem.conv" in rows[0] and "0.0625" in rows[0]
    assert "after block 7" in rows[1] and "123.5" in rows[1] and "last layer" in rows[1]
    assert "output" in rows[2] and "77.25" in rows[2]


def test_no_page_offers_to_upload_its_figure() -> None:
    """Plotly's default buttons have one that sends the figure to its cloud; ours are named one by one."""
    script = page_file("page.js")
    assert 'modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]' in script
    for name in ("signal_page.js", "figures.js", "records.js"):
        assert "page.config()" in page_file(name)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = [
        signal_of("ladder"),
        signal_of("sick", sick=True),
        signal_of("deep", 200, every=50),
        signal_of(EVIL),
    ]
    noisy = signal_of("_x")
    blocks = [replace(b, avg_channel_sq_mean=2e-15) if b.index == 2 else b for b in noisy.blocks]
    models += [signal_of(LONG), replace(noisy, blocks=tuple(blocks))]
    return write_report(models, tmp_path_factory.mktemp("report") / "r.html")


@pytest.fixture(scope="module")
def opened(browser: Browser, report: Path) -> Iterator[tuple[Page, list[str]]]:
    """The report, open and offline, and what it asked for or complained of: loaded once, for it is large."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, offline=True)
    page, noise = context.new_page(), []
    page.on("request", lambda request: noise.append(f"asked for {request.url}"))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
    page.on("dialog", lambda dialog: noise.append(dialog.message) or dialog.dismiss())
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-ready]", timeout=30_000)
    yield page, noise
    context.close()


@pytest.fixture
def page(opened: tuple[Page, list[str]], report: Path) -> Iterator[Page]:
    """The open report as it was at first; after each test it must have been silent."""
    page, noise = opened
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.locator("#reset-view").click()
    page.locator("#scale-auto").click()
    for item in page.locator("#legend button[aria-pressed=false]").all()[::-1]:
        item.click()
    yield page
    quiet = (f"asked for {report.as_uri()}", "asked for data:", "asked for blob:")
    assert [line for line in noise if not line.startswith(quiet)] == []


VISIBLE = "m => chart._fullData.filter(t => t.visible && t.meta?.model === m).map(t => t.yaxis)"
DRAWN = "() => document.querySelectorAll('#chart .scatterlayer .trace').length"
SCALES = "() => ['yaxis', 'yaxis2', 'yaxis3', 'yaxis4'].map(y => chart._fullLayout[y].type)"


def test_legend_click_hides_the_model_in_every_panel(page: Page) -> None:
    panels = ["y", "y2", "y2", "y3", "y4"]
    assert sorted(page.evaluate(VISIBLE, 0)) == panels
    before = page.evaluate(DRAWN)
    item = page.locator("#legend button").first
    item.click()
    assert page.evaluate(VISIBLE, 0) == [] and item.get_attribute("aria-pressed") == "false"
    assert page.evaluate(DRAWN) == before - len(panels)
    assert len(page.evaluate(VISIBLE, 1)) == 4
    item.click()
    assert sorted(page.evaluate(VISIBLE, 0)) == panels and page.evaluate(DRAWN) == before
    alone = [False, True, False, False, False, False]
    page.locator("#legend button").nth(1).dblclick()
    assert [bool(page.evaluate(VISIBLE, m)) for m in range(6)] == alone
    for other in (0, 2, 3, 4, 5):
        page.locator("#legend button").nth(other).click()
    page.locator("#legend button").nth(1).press("Shift+Enter")
    assert [bool(page.evaluate(VISIBLE, m)) for m in range(6)] == alone


def test_scale_switch_changes_the_axes(page: Page) -> None:
    assert page.evaluate(SCALES) == ["linear", "log", "linear", "linear"]
    page.locator("#scale-log").click()
    assert page.evaluate(SCALES) == ["log", "log", "log", "linear"]
    assert page.locator("#scale-log").get_attribute("aria-pressed") == "true"
    page.locator("#scale-linear").click()
    assert page.evaluate(SCALES) == ["linear"] * 4
    page.locator("#scale-auto").click()
    assert page.evaluate(SCALES) == ["linear", "log", "linear", "linear"]


def test_hover_tells_the_module_and_its_numbers(page: Page) -> None:
    page.locator("#legend button").first.dblclick()
    x, y = page.evaluate(
        """() => {
            const full = chart._fullLayout, box = chart.getBoundingClientRect();
            const curves = chart._fullData.filter((t) => t.visible && t.meta.kind === "curve");
            const trace = curves.find((t) => t.yaxis === "y2");
            const at = trace.x.indexOf(4);
            return [box.left + full.xaxis._offset + full.xaxis.d2p(4),
                    box.top + full.yaxis2._offset + full.yaxis2.d2p(trace.y[at])];
        }"""
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    text = page.locator(".hoverlayer .hovertext").first.text_content(timeout=5000) or ""
    for part in (
        "stages.1.0",
        "block 4, transition",
        "shape 2 \u00d7 8 \u00d7 4 \u00d7 4",
        "expected variance 1.04",
    ):
        assert part in text
    assert "ladder" in text and "input correlation 0.5" in text


def test_rounding_noise_is_drawn_as_zero(page: Page) -> None:
    squared = "m => chart._fullData.find(t => t.meta?.model === m && t.meta.curve === 'avg_channel_sq_mean').y[3]"
    assert page.evaluate(squared, 5) == 0
    page.locator("#scale-log").click()
    assert page.evaluate(squared, 5) is None
    assert "zeros not drawn" in (page.locator("#chart .annotation").first.text_content() or "")


def test_finding_click_shows_its_block(page: Page) -> None:
    page.locator("#legend button").nth(1).click()
    page.locator("#findings .locate").click()
    (band,) = page.evaluate("() => chart.layout.shapes.map(s => [s.x0, s.x1])")
    assert band == [5.5, 6.5] and len(page.evaluate(VISIBLE, 1)) == 4
    low, high = page.evaluate("() => chart._fullLayout.xaxis.range")
    assert low < 0 < high < 40
    page.locator("#reset-view").click()
    assert page.evaluate("() => chart.layout.shapes.length") == 0
    assert page.evaluate("() => chart._fullLayout.xaxis.range[1]") > 199


TEXTS = """(which) => [...document.querySelectorAll(which)].map((it) => {
    const box = it.getBoundingClientRect();
    return [it.textContent.trim(), box.left, box.right];
}).filter(([text]) => text)"""
ENTRY = "() => chart.getBoundingClientRect().left + chart._fullLayout.xaxis._offset + chart._fullLayout.xaxis.d2p(-1)"


@pytest.mark.parametrize("blocks", [5, 28, 300])
@pytest.mark.parametrize("width", [420, 1400])
def test_the_entry_is_named_once_however_many_blocks_there_are(browser: Browser, tmp_path: Path, blocks, width) -> None:
    signal = signal_of("a")
    many = tuple(replace(signal.blocks[0], index=i) for i in range(blocks))
    report = write_report([replace(signal, blocks=many)], tmp_path / "many.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(report.as_uri())
    page.wait_for_function("() => window.chart?._fullLayout?.xaxis?._offset")
    ((_, left, right),) = (each for each in page.evaluate(TEXTS, "#chart text") if each[0] == "entry")
    assert 0 <= left <= page.evaluate(ENTRY) <= right + 12
    ticks = page.evaluate(TEXTS, "#chart .xtick text")
    assert ticks and all(text == "entry" or (text.isdigit() and at >= right) for text, at, _ in ticks), (right, ticks)
    page.close()


def test_names_show_as_they_are(page: Page) -> None:
    assert page.locator("#legend button").nth(3).inner_text() == EVIL
    assert page.locator("#legend button").nth(4).get_attribute("title", timeout=1000).startswith(LONG)  # type: ignore[union-attr]


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function("w => Math.abs(chart._fullLayout.width - chart.clientWidth) < 2", arg=width)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    outside = "() => [...document.querySelectorAll('#chart text, h2, .legend button, .finding')].filter("
    outside += "e => { const b = e.getBoundingClientRect(); return b.left < 0 || b.right > innerWidth; }).length"
    assert page.evaluate(outside) == 0
    if width == 1400:
        cut = "() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert page.evaluate(cut) == 0


def test_only_what_is_drawn_is_explained(tmp_path: Path) -> None:
    """Of a chain no residual variance, of a plot without gradients no gradient, of a curve of one point nothing."""
    signal = signal_of("a")
    blocks = tuple(replace(b, kind="layer", residual_avg_channel_var=None, transition=False) for b in signal.blocks)
    blocks = tuple(replace(b, input_correlation=None if i else 0.5) for i, b in enumerate(blocks))
    page = page_of(write_report([replace(signal, blocks=blocks)], tmp_path / "chain.html").read_text())
    titles = ["Average channel squared mean", "Average channel variance"]
    assert re.findall(r"<dt>(.*?)</dt>", page) == [panel["title"] for panel in data_of(page)["panels"]] == titles
    assert "dotted line" not in page and "transition block" not in page and "input correlation</th>" in page
    page = page_of(write_report([signal], tmp_path / "blocks.html").read_text())
    assert "dotted line" in page and "Input correlation</dt>" in page and "transition block" in page


def test_what_a_finding_means_is_on_the_page(tmp_path: Path) -> None:
    found = replace(FOUND, docs="docs/signal.md#explosion")
    page = page_of(write_report([replace(signal_of("a"), findings=(found,))], tmp_path / "a.html").read_text())
    assert "docs/signal.md" not in page and "<summary>what explosion means</summary><p>Each block adds" in page
    assert set(MEANINGS) == set(KINDS)


HOSTILE = (
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 1</script>",
    '"><img src=x onerror=ran=1>',
    "</title></style></textarea><svg onload=ran=1>",
    "<a href='javascript:ran=1'>x</a><b>y</b>",
    "'`${window['ran'] = 1}`",
    "<!--<script>",
    "{{data}}{{body}}",
    "$&$1$`\\u003cscript\\u003e",
    "a\nb\u2028c",
    "__proto__",
    "constructor",
    "\u202eabc\x1b[31m",
    "x" * 3000,
)
NET = f"""import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)))

    def forward(self, x):
        return x + 3 * next(iter(self.children()))(x)

class Net(nn.Sequential):
    pass

def net():
    model = Net()
    model.register_module("stem", nn.Conv2d(3, 3, 3, padding=1))
    for name in {[name.replace(".", " ") for name in HOSTILE]!r} + ["\\udcff"]:
        model._modules[name] = Block(name)
    for name, layer in ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(3, 4)):
        model.register_module(name, layer)
    Net.__name__ = {HOSTILE[0]!r}
    return model
"""


@pytest.mark.browser
def test_nothing_runs_whatever_layers_files_and_classes_are_called(browser: Browser, tmp_path: Path) -> None:
    """The pages of the commands: of a hostile module tree, in a file and on images of hostile names."""
    from image_sets import encoded, write_parquet

    from normfree.cli import main

    file, images = tmp_path / "n'\"<img src=x onerror=ran=1>&{{title}}.py", tmp_path / "<img src=x onerror=ran=1>"
    file.write_text(NET, encoding="utf-8", errors="surrogatepass")
    numbers = list(range(len(HOSTILE)))
    for split in ("train", "test"):
        labels = [name.replace("\x1b", "") for name in HOSTILE]
        write_parquet(images / f"{split}.parquet", [encoded(n) for n in numbers] * 2, numbers * 2, names=labels)
    assert main(["spp", f"{file}:net", "--image-size", "8", "--out", str(tmp_path / "spp")]) in (0, 1)
    assert main(["doctor", f"{file}:net", "--image-size", "8", "--out", str(tmp_path / "doctor")]) in (0, 1)
    words = ["--batch-size", "4", "--epochs", "1", "--optimizer.warmup-epochs", "0", "--signal-every", "2"]
    model = "nf_resnet50:depths=(1,1,1,1),widths=(8,8,16,16),stem=cifar"
    train = ["train", "digits", "--data.source", str(images), "--data.in-channels", "3", "--model", model]
    assert main([*train, *words, "--out", str(tmp_path / "run<img src=x onerror=ran=1>")]) == 0
    pages = sorted(tmp_path.glob("*/report.html"))
    assert len(pages) == 3
    for path in pages:
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, offline=True)
        page, noise = context.new_page(), list[str]()
        page.on("pageerror", lambda error, noise=noise: noise.append(str(error)))
        page.on("console", lambda message, noise=noise: "MathJax" in message.text or noise.append(message.text))
        page.on("dialog", lambda dialog, noise=noise: noise.append(dialog.message) or dialog.dismiss())
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        for item in page.locator("summary, #legend button").all():
            item.click()
        assert page.evaluate("[typeof ran, document.querySelectorAll('img').length]") == ["undefined", 0]
        assert page.evaluate("[...document.querySelectorAll('a')].every(a => a.hash || a.href.startsWith('data:'))")
        assert HOSTILE[2 if path.parent.name != "doctor" else 0] in page.inner_text("body")
        assert page.locator("svg.main-svg").count() > 0 and noise == []
        context.close()
