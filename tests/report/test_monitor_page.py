"""The figure with its slider, and the page around it: what is in them, and what a real browser makes of it."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import pytest

from normfree.report.monitor_page import MOST_FRAMES
from normfree.report.page import page_file
from normfree.signal import SignalHistory
from normfree.signal.propagation import BlockSignal, Entry, Finding, SignalPropagation

EVIL = "</script><script>alert(1)</script>"


def signal_of(variance: float, name: str = "net", findings: tuple[Finding, ...] = ()) -> SignalPropagation:
    """Three blocks whose variance grows from one to the next by this factor."""
    blocks = tuple(
        BlockSignal(
            index=i,
            name=f"{name}.{i}",
            kind="residual",
            shape=(2, 8, 4, 4),
            channel_axis=1,
            transition=i == 0,
            avg_channel_sq_mean=0.01,
            avg_channel_var=variance**i,
            residual_avg_channel_var=1.0,
            expected_var=1.0 + 0.04 * i,
        )
        for i in range(3)
    )
    entry = Entry(name="stem", shape=(2, 8, 4, 4), channel_axis=1, avg_channel_sq_mean=0.02, avg_channel_var=1.0)
    given = {"kind": "given", "examples": 2}
    return SignalPropagation(model=name, mode="train", input=given, entry=entry, blocks=blocks, findings=findings)


FOUND = Finding(kind="explosion", severity="error", block=2, message="it <b>grows</b>", remedy="scale it")
HISTORY = SignalHistory([(0, signal_of(1.1)), (50, signal_of(20.0, findings=(FOUND,))), (100, signal_of(2.0))])


def test_the_entry_is_named_however_many_blocks_there_are():
    """By its tick where each block has one, beside those that plotly chooses elsewhere."""
    few = HISTORY.figure().layout
    assert few.xaxis.labelalias["-1"] == "entry" and few.xaxis.dtick == 1
    blocks = tuple(replace(signal_of(1.1).blocks[0], index=i) for i in range(27))
    many = SignalHistory([(step, replace(signal_of(1.1), blocks=blocks)) for step in (0, 1)]).figure().layout
    (entry,) = (note for note in many.annotations if note.text == "entry")
    assert (entry.x, entry.xref) == (-1, "x") and "entry" not in many.xaxis.labelalias.values()
    assert not any(note.text == "entry" for note in few.annotations)


def test_a_frame_for_each_step_moves_the_curves_and_nothing_else():
    figure = HISTORY.figure()
    assert [frame.name for frame in figure.frames] == ["0", "50", "100"]
    assert [step.label for step in figure.layout.sliders[0].steps] == ["0", "50", "100"]
    assert figure.layout.sliders[0].active == 2
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "<b>Average channel squared mean</b>",
        "<b>Average channel variance</b>",
        "<b>Residual average channel variance</b>",
    ]
    frame = figure.frames[1]
    drawn = [figure.data[number] for number in frame.traces]
    assert [trace.name for trace in drawn] == ["this step"] * 3
    assert list(frame.data[1].y) == [1.0, 1.0, 20.0, 400.0] and list(drawn[1].y) == [1.0, 1.0, 2.0, 4.0]
    first = next(trace for trace in figure.data if trace.name == "first record" and trace.yaxis == "y2")
    assert list(first.y) == pytest.approx([1.0, 1.0, 1.1, 1.21])
    low, high = figure.layout.yaxis2.range
    assert figure.layout.yaxis2.type == "log" and 10**low < 1 and 10**high > 400  # holds for every frame


def test_long_histories_are_thinned_with_their_ends_kept():
    history = SignalHistory((step, signal_of(1.0)) for step in range(0, 5000, 10))
    thin = history.thinned(MOST_FRAMES)
    assert len(thin) == len(set(thin.steps)) == MOST_FRAMES and (thin.steps[0], thin.steps[-1]) == (0, 4990)
    assert len(history.figure().frames) == MOST_FRAMES


def test_values_that_are_not_finite_are_gaps():
    broken = SignalHistory([(0, signal_of(1.0)), (1, signal_of(math.inf))])
    assert list(broken.figure().frames[1].data[1].y) == [1.0, 1.0, None, None]


def test_the_page_asks_for_nothing_and_tells_what_matters_without_javascript(tmp_path):
    path = HISTORY.to_html(tmp_path / "out" / "signal.html")
    assert [file.name for file in path.parent.iterdir()] == ["signal.html"]
    text = path.read_text()
    plotly = page_file("plotly-cartesian.min.js")
    assert plotly in text
    page = text.replace(plotly, "")
    assert not re.findall(r"https?://|\bfetch\(|XMLHttpRequest|@import|url\(|\bimport\(", page)
    assert "default-src 'none'" in page and "{{" not in page
    assert "net: 3 records, steps 0 to 100" in page and "Numbers of step 100" in page
    assert "it &lt;b&gt;grows&lt;/b&gt;" in page and "step 50, then gone" in page and "scale it" in page


def test_names_are_inert(tmp_path):
    evil = replace(FOUND, message=EVIL, remedy=EVIL)
    history = SignalHistory([(0, signal_of(1.0, EVIL)), (1, signal_of(1.0, EVIL, (evil,)))])
    page = history.to_html(tmp_path / "r.html", title=EVIL + "{{data}}").read_text()
    assert EVIL not in page and page.count("<script") == page.count("</script") == 3 + page.count("<\\/script")


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no records"):
        SignalHistory().to_html(tmp_path / "r.html")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"pip install 'normfree\[plot\]'"):
        HISTORY.figure()
    assert list(tmp_path.iterdir()) == []
    HISTORY.to_html(tmp_path / "r.html")


def becomes(page, expression, value):
    """Whether an expression takes a value within two seconds; the page's policy forbids playwright's own waiting."""
    for _ in range(40):
        if page.evaluate(expression) == value:
            return True
        page.wait_for_timeout(50)
    return False


VARIANCE = "chart.data.find(t => t.name === 'this step' && t.yaxis === 'y2').y"
SQUARED = "chart.data.find(t => t.name === 'this step' && t.yaxis === 'y').y"
HEADINGS = "[...document.querySelectorAll('#chart .annotation')].map(it => it.textContent.replaceAll('\\u00a0', ' '))"


@pytest.fixture
def opened(browser, tmp_path, request):
    """The page of HISTORY at a width and in a scheme, where it must stay silent."""
    width, scheme = request.param
    path, noise = HISTORY.to_html(tmp_path / "signal.html"), []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("console", lambda message: noise.append(message.text))
    page.on("request", lambda request: noise.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]", timeout=30_000)
    yield page
    page.close()
    assert [line for line in noise if not line.startswith((path.as_uri(), "data:", "blob:"))] == []


@pytest.mark.browser
@pytest.mark.parametrize("opened", [(1400, "light"), (400, "dark")], indirect=True)
def test_in_a_browser_keys_and_play_move_the_curves(opened):
    page = opened
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    buttons = "[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"
    assert not any("cloud" in title.lower() for title in page.evaluate(buttons))
    ticks = "[...document.querySelectorAll('.xtick text')].map(tick => tick.textContent)"
    assert page.evaluate(ticks) == ["entry", "0", "1", "2"]
    assert page.evaluate(VARIANCE) == [1, 1, 2, 4]
    slider = page.get_by_role("slider", name="Record")
    slider.press("ArrowLeft")
    assert becomes(page, VARIANCE, [1, 1, 20, 400])
    assert page.locator("#step").text_content() == slider.get_attribute("aria-valuetext") == "step 50"
    slider.press("Home")
    assert becomes(page, f"{VARIANCE}[2]", 1.1) and page.locator("#step").text_content() == "step 0"
    page.get_by_role("button", name="Play").press("Enter")
    assert becomes(page, VARIANCE, [1, 1, 2, 4])
    assert page.locator("#step").text_content() == "step 100" and page.locator("#play").text_content() == "Play"
    told = page.evaluate("() => [1, 2].map(() => { play.click(); return play.textContent; })")
    assert told == ["Pause", "Play"] and page.locator("#step").text_content() == "step 0"


@pytest.mark.browser
@pytest.mark.parametrize("opened", [(1400, "light")], indirect=True)
def test_in_a_browser_the_scale_is_chosen_and_told(opened):
    page = opened
    scales = "['yaxis', 'yaxis2', 'yaxis3'].map(name => chart._fullLayout[name].type)"
    for name, expected in (("auto", ["linear", "log", "linear"]), ("log", ["log"] * 3), ("linear", ["linear"] * 3)):
        page.locator(f"#scale-{name}").press("Enter")
        assert becomes(page, scales, expected)
        assert [text.split("  ")[1].split()[0] for text in page.evaluate(HEADINGS)] == expected
        assert page.locator("[data-scale][aria-pressed=true]").get_attribute("id") == f"scale-{name}"
    low, high = page.evaluate("chart._fullLayout.yaxis2.range")
    assert low <= 0 and high > 400  # of all records, the shown one ends at 4


@pytest.mark.browser
def test_rounding_noise_is_zero_on_the_page_and_in_the_figure(browser, tmp_path):
    steady = signal_of(2.0)
    noisy = replace(steady.blocks[1], avg_channel_sq_mean=1e-13)
    other = replace(steady.blocks[2], avg_channel_sq_mean=1.0)
    history = SignalHistory([(0, steady), (1, replace(steady, blocks=(steady.blocks[0], noisy, other)))])
    figure = history.figure()
    drawn = next(trace for trace in figure.data if trace.name == "this step" and trace.yaxis == "y")
    assert figure.layout.yaxis.type == "linear" and list(drawn.y) == [0.02, 0.01, 0.0, 1.0]
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(history.to_html(tmp_path / "signal.html").as_uri())
    page.wait_for_selector("body[data-ready]", timeout=30_000)
    assert page.evaluate(SQUARED) == [0.02, 0.01, 0, 1]
    page.locator("#scale-log").click()
    assert becomes(page, SQUARED, [0.02, 0.01, None, 1])
    assert "zeros not drawn" in page.evaluate(HEADINGS)[0] and "zeros" not in page.evaluate(HEADINGS)[1]
    page.close()
