"""What is wrong with a page: rules of axe that it breaks, what does not fit; light and dark, on a phone and a desk."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE, DESK = 390, 1400
IMPACTS = ("minor", "moderate", "serious", "critical")

OPEN_ALL = "document.querySelectorAll('details').forEach(it => { it.open = true; })"
AT_REST = "* { transition: none !important; animation: none !important; }"  # colours on their way are no one's
TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
CUT = """() => {
    const cut = (table) => {
        const right = table.getBoundingClientRect().right;
        for (let box = table.parentElement; box; box = box.parentElement) {
            const clips = getComputedStyle(box).overflowX !== 'visible';
            if (clips && right > box.getBoundingClientRect().right + 1) return true;
        }
        return false;
    };
    return [...document.querySelectorAll('table')].filter(cut).map(table => table.innerText.slice(0, 60));
}"""


def problems(browser: Browser, path: Path, *, impacts: Collection[str] = IMPACTS) -> list[str]:
    """Open a page with all that is folded away, and say what is wrong with it.

    Args:
        browser: the tests' own.
        path: of the page.
        impacts: of the rules of axe that count, among IMPACTS.

    Returns:
        A line for each broken rule, with the first element that breaks it, and for what does not fit: the page at 390
        pixels, a table at 1400.
    """
    axe = pytest.importorskip("axe_playwright_python.base").AXE_SCRIPT
    found: list[str] = []
    backgrounds = set()
    for scheme, widths in (("light", (PHONE, DESK)), ("dark", (DESK, PHONE))):
        page = browser.new_page(offline=True, color_scheme=scheme)  # anew: the site keeps its palette
        page.on("pageerror", lambda error, found=found: found.append(f"script: {error}"))
        page.goto(path.as_uri())
        if page.locator("meta[name=generator][content=normfree]").count():
            page.wait_for_selector("body[data-ready]", timeout=30_000)
        page.evaluate(OPEN_ALL)
        page.add_style_tag(content=AT_REST)
        page.evaluate(axe)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate(TWO_FRAMES)
            where = f"{scheme}, {width} px"
            found += [f"{where}: {line}" for line in broken(page, impacts)]
            backgrounds.add(page.evaluate(BACKGROUND))
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                found.append(f"{where}: the page is {wide} pixels wide")
            if width == DESK:
                found += [f"{where}: a table is cut: {text!r}" for text in page.evaluate(CUT)]
        page.close()
    if len(backgrounds) < 2:
        found.append("light and dark have one background")
    return found


def broken(page: Page, impacts: Collection[str]) -> list[str]:
    """The rules of axe that the open page breaks; axe is loaded."""
    result = page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{rule['impact']} {rule['id']}, {len(rule['nodes'])} times: {rule['nodes'][0]['html'][:160]} "
        f"{(rule['nodes'][0]['failureSummary'] or '').splitlines()[1:2]}"
        for rule in result["violations"]
        if rule["impact"] in impacts
    ]
