"""The pages in a real browser: from disk, without a network, by mouse and by keyboard.

Chromium is looked for as ``chromium``, ``chromium-browser`` or ``google-chrome``, or where
SEMID_CHROMIUM says.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from report_cases import FixedParallel, FixedResidual, blobs, healthy, logs, titles
from semid.report import compare, diagnose

pytestmark = pytest.mark.browser

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
PATIENCE = 240_000  # milliseconds: plotly's bundle is large, and test machines can be slow
FAST = {"replicates": 20, "threads": 1}
IDS = [f"item-{i}" for i in range(600)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("SEMID_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium found; install it, or set SEMID_CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


SIDEWAYS = "document.documentElement.scrollWidth"

CLICK_TO_THE_TOP = """() => {
    const top = document.querySelector('.trail li:first-child button');
    if (top) top.click();
}"""

# A cell's label begins with its path: "Code 17 · 203, 12 items, ...".
CLICK_CODE = """(code) => {
    const last = (cell) => cell.getAttribute('aria-label').split(',')[0].split(/[ ·]+/).pop();
    const cell = [...document.querySelectorAll('.map button')].find((c) => last(c) === `${code}`);
    if (cell) cell.click();
    return Boolean(cell);
}"""


class Visit:
    """A page opened from disk that remembers every complaint and every outside request."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self._console(message))
        self.page.on("request", lambda request: self._request(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _request(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"request to {url}")

    def script(self, text: str) -> Any:
        return self.page.evaluate(text)

    def resize(self, width: int) -> None:
        """Change the width and wait until the figures have followed."""
        self.page.set_viewport_size({"width": width, "height": 844})
        self.page.wait_for_function(
            """(width) => innerWidth === width && [...document.querySelectorAll('.plot .main-svg')]
                .every((svg) => svg.getBoundingClientRect().width <= width)""",
            arg=width,
        )

    def close(self) -> None:
        self.page.close()
        assert self.complaints == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x, tok = healthy()
    d = diagnose(tok, x, ids=IDS, items=titles(600, hostile=True), interactions=logs(600), **FAST)
    return d.write(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def desktop(browser: Any, report: Path) -> Iterator[Visit]:
    """The report at desk width in the light theme; loading it once a test would take minutes."""
    visit = Visit(browser, report, viewport={"width": 1280, "height": 844}, color_scheme="light")
    yield visit
    visit.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_opens_from_disk_in_any_size_and_theme(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    visit = Visit(browser, report, viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert visit.script("document.documentElement.dataset.theme") == scheme
    assert visit.script(SIDEWAYS) <= width, "no sideways scrolling"
    drawn = visit.script("document.querySelectorAll('.plot .main-svg').length")
    assert drawn >= visit.script("semid.plots.length")
    assert visit.script("window.broken") is None, "item texts must not run"
    visit.page.click("#theme")
    assert visit.script("document.documentElement.dataset.theme") != scheme
    other = 1670 - width
    visit.resize(other)
    assert visit.script(SIDEWAYS) <= other
    visit.close()


def test_explorer_by_keyboard_alone(desktop: Visit) -> None:
    page = desktop.page
    page.focus("#explorer-search")
    for _ in range(2):  # past the choice of color, into the map
        page.keyboard.press("Tab")
    first = desktop.script("document.activeElement.dataset.node")
    assert first is not None, "one Tab stop leads into the map"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert desktop.script("document.activeElement.dataset.node") != first
    page.keyboard.press("Enter")
    assert page.inner_text(".trail [aria-current]").startswith("Level 1")
    assert "items" in page.inner_text("#explorer [role=status]")
    page.keyboard.press("Escape")
    assert page.inner_text(".trail [aria-current]") == "All codes"
    nameless = desktop.script(
        """[...document.querySelectorAll('button, select, input, a')].filter(e =>
            !(e.innerText || e.getAttribute('aria-label') || e.labels?.length)).length"""
    )
    assert nameless == 0
    assert desktop.complaints == []


def test_search_by_word_finds_items_and_codes(desktop: Visit) -> None:
    desktop.page.fill("#explorer-search", "kind ddd")
    desktop.page.get_by_text("75 items match").first.wait_for(state="attached")
    assert "Thing 11 of kind ddd" in desktop.page.inner_text(".detail .list")
    desktop.page.fill("#explorer-search", "")
    assert desktop.complaints == []


def test_the_color_scale_is_that_of_all_levels_and_cells_name_items(desktop: Visit) -> None:
    page = desktop.page
    page.evaluate(CLICK_TO_THE_TOP)
    legend = page.inner_text("#explorer .legend")
    assert "one scale for all levels" in legend
    assert page.locator(".map button span").count() > 0
    assert "Thing" in page.get_attribute(".map button >> nth=1", "title")
    page.click(".map button >> nth=0")
    assert page.inner_text("#explorer .legend") == legend
    page.evaluate(CLICK_TO_THE_TOP)
    assert desktop.complaints == []


def test_most_of_256_codes_have_words_on_a_phone(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_560, 8)).astype(np.float32)
    tok = FixedResidual(x[:256])
    names = [f"{'abcdefghijklmnop'[row // 160] * 4}{row % 16} thing" for row in range(2_560)]
    items = pa.table({"item_id": [f"item-{i}" for i in range(2_560)], "title": names})
    d = diagnose(tok, x, ids=items["item_id"], items=items, **FAST)
    path = d.write(tmp_path / "phone.html")
    visit = Visit(browser, path, viewport={"width": 390, "height": 844})
    assert visit.page.locator(".map button").count() == 256
    assert visit.page.locator(".map button:has(span)").count() > 128
    visit.close()


def test_bucket_opens_in_the_explorer(desktop: Visit) -> None:
    codes = desktop.page.inner_text("ol.buckets [data-path] >> nth=0")
    desktop.page.click("ol.buckets [data-path] >> nth=0")
    assert codes.split(" · ")[0] in desktop.page.inner_text(".trail")
    assert desktop.complaints == []


def test_parallel_codebooks_can_be_chosen(browser: Any, tmp_path: Path) -> None:
    x, centers, _ = blobs()
    tok = FixedParallel(centers, centers * 0.9)
    d = diagnose(tok, x, ids=IDS, items=titles(600), **FAST)
    visit = Visit(browser, d.write(tmp_path / "parallel.html"))
    visit.page.select_option("#explorer-tree", "1")
    assert "Codebook 2" in visit.page.inner_text(".trail")
    visit.page.click(".map button >> nth=0")
    assert visit.page.locator(".detail .list li").count() > 0
    visit.close()


def test_comparison_opens_from_disk(browser: Any, tmp_path: Path) -> None:
    x, centers, offsets = blobs()
    models = {
        "residual": FixedResidual(centers, offsets),
        "parallel": FixedParallel(centers, centers * 0.9),
    }
    c = compare(models, x, ids=IDS, interactions=logs(600), **FAST)
    visit = Visit(browser, c.write(tmp_path / "c.html"), viewport={"width": 1280, "height": 844})
    assert visit.script(SIDEWAYS) <= 1280
    assert visit.page.locator(".plot .main-svg").count() > 0
    visit.resize(390)
    assert visit.script(SIDEWAYS) <= 390
    visit.close()


@pytest.mark.slow
def test_real_items_are_reached_by_search_and_by_clicks(
    browser: Any, real_data: Path, tmp_path: Path
) -> None:
    from semid.tokenizers.rqkmeans import RQKMeans

    folder = real_data / "amazon2014_beauty"
    embeddings, table = folder / "embeddings.f16.npy", folder / "items.parquet"
    tok = RQKMeans(levels=3, codebook_size=64, kmeans={"max_iter": 4})
    tok.fit(embeddings, ids=table)
    d = diagnose(tok, embeddings, ids=table, flip_sample=500, geometry_sample=2000)
    path = d.write(tmp_path / "beauty.html")
    assert path.stat().st_size < 10_000_000
    assert d.explorer is not None
    visit = Visit(browser, path)
    page = visit.page
    codes = np.array(d.explorer["codes"]).reshape(-1, 3)
    chosen = np.random.default_rng(0).choice(len(codes), 50, replace=False)
    for row in chosen.tolist():
        item = d.explorer["ids"][row]
        page.fill("#explorer-search", item)
        page.wait_for_selector(f'.detail .list li:first-child[data-item="{item}"]')
        page.fill("#explorer-search", "")
        page.evaluate(CLICK_TO_THE_TOP)
        for code in codes[row].tolist():  # down the tree, as far as it is split
            if not page.evaluate(CLICK_CODE, code):
                break
        while page.locator(f'.detail .list li[data-item="{item}"]').count() == 0:
            page.click(".pager button")
    visit.close()
