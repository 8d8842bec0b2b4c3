"""The report of a training run: its axes say what they show."""

from __future__ import annotations

import shutil

import pytest

from normfree.report.page import page_file, write_page
from normfree.report.training_page import curve_figures

NORMS = [1.8, 1.2, 0.7, 0.3, 0.09, 0.04, 0.012, 0.006]


def test_the_axis_of_the_gradient_norm_is_labelled_with_numbers_that_are_there(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is missing")
    playwright = pytest.importorskip("playwright.sync_api")
    rows = [
        {"step": step, "loss": 1.0, "learning_rate": 0.1, "images_per_second": 100.0, "gradient_norm": norm}
        for step, norm in enumerate(NORMS)
    ]
    figures = {"speed": curve_figures(rows, [])["speed"]}
    page_of = {"title": "t", "body": '<div id="speed"></div>', "data": figures, "script": page_file("figures.js")}
    path = write_page(tmp_path / "r.html", **page_of)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        ticks = page.evaluate("[...document.querySelectorAll('.y2tick text')].map(tick => tick.textContent)")
        browser.close()
    assert ticks == ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
