"""The report of a training run: its axes say what they show."""

from __future__ import annotations

import pytest

from normfree.report.page import figures_script, write_page
from normfree.report.panels import shorten
from normfree.report.training_page import LONGEST_NAME, confusion_figure, curve_figures

TICKS = "[...document.querySelectorAll('.y2tick text')].map(tick => tick.textContent)"


@pytest.mark.browser
@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        (
            [1.8, 1.2, 0.7, 0.3, 0.09, 0.04, 0.012, 0.006],
            ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"],
        ),
        ([0.27, 0.21, 0.16, 0.18], ["0.16", "0.18", "0.2", "0.22", "0.24", "0.26"]),
    ],
)
def test_the_axis_of_the_gradient_norm_is_labelled_with_numbers_that_are_there(browser, tmp_path, norms, expected):
    rows = [
        {"step": step, "loss": 1.0, "learning_rate": 0.1, "images_per_second": 100.0, "gradient_norm": norm}
        for step, norm in enumerate(norms)
    ]
    figures = {"speed": curve_figures(rows, [])["speed"]}
    page_of = {"title": "t", "body": '<div id="speed"></div>', "data": figures, "script": figures_script()}
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(write_page(tmp_path / "r.html", **page_of).as_uri())
    page.wait_for_selector("body[data-ready]", timeout=30_000)
    assert page.evaluate(TICKS) == expected
    page.close()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_titles_say_what_is_shown(clip):
    row = {"step": 1, "loss": 2.0, "learning_rate": 0.1, "images_per_second": 9.0, "gradient_norm": 3.0}
    figure = curve_figures([row | {"clip_fraction": clip}], [])["rate"]
    assert figure["layout"]["yaxis"]["title"]["text"] == "Learning rate" + (" and clipped fraction" if clip else "")
    assert len(figure["data"]) == (2 if clip else 1)


NAMES = ["<b>bold</b>", "__proto__", "constructor", "toString", "x" * 3000, "a\nb", " ", "1", "1.0"]


@pytest.mark.browser
def test_every_class_has_its_row_and_column_whatever_it_is_called(browser, tmp_path):
    """Categories of plotly's are keys of an object, in which some are there already."""
    confusion = [[10 * row + column for column in range(len(NAMES))] for row in range(len(NAMES))]
    figures = {"confusion": confusion_figure(confusion, NAMES)}
    page_of = {"title": "t", "body": '<div id="confusion"></div>', "data": figures, "script": figures_script()}
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto(write_page(tmp_path / "r.html", **page_of).as_uri())
    page.wait_for_selector("body[data-ready]", timeout=30_000)
    labels = page.locator("#confusion .ytick text").all_text_contents()
    assert labels == [shorten(name, LONGEST_NAME) for name in NAMES if name.strip()]
    cells = page.locator("#confusion .nsewdrag").bounding_box()
    for column, row in ((1, 2), (0, 4), (3, 0)):
        x, y = ((place + 0.5) / len(NAMES) for place in (column, row))
        page.mouse.move(cells["x"] + x * cells["width"], cells["y"] + y * cells["height"])
        page.wait_for_function("document.querySelector('#confusion .hovertext text')")
        told = page.locator("#confusion .hovertext text").first.text_content()
        assert f"predicted {NAMES[column]}: {confusion[row][column]} (" in told
        page.mouse.move(1, 1)
        page.wait_for_function("!document.querySelector('#confusion .hovertext text')")
