"""The explorer of the service in a real browser, on a small catalogue and on a million items."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytest.importorskip("uvicorn")

import uvicorn
from playwright.sync_api import Error as PlaywrightError
from test_report_browser import SIDEWAYS, browser

from catalogue_cases import drawn_tokenizer, parallel_tokenizer
from semid.catalogue.bundle import CatalogueBundle
from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.serve import run
from semid.serve.app import create_app
from serve_cases import make_shop

pytestmark = pytest.mark.browser
__all__ = ["browser"]

DRAWN = "() => document.querySelectorAll('.map button').length"


@contextlib.contextmanager
def opened(browser: Any, app: Any, path: str = "", **options: Any) -> Iterator[Any]:
    """Serve an application in a thread and open its page; complaints of the page fail."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    page = browser.new_page(**options)
    page.set_default_timeout(60_000)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/{path}")
    try:
        yield page
        assert page.complaints == []
    finally:
        page.close()
        server.should_exit = True
        thread.join()


def test_the_live_tree_by_mouse_keyboard_and_link(browser, tmp_path):
    shop = make_shop(tmp_path, method="none")
    ids = CatalogueBundle(shop.bundle).read()
    app = create_app(shop.bundle, shop.tokenizer, items=shop.items)
    with opened(browser, app, viewport={"width": 1280, "height": 844}) as page:
        page.wait_for_function(DRAWN)
        assert page.inner_text("#live-title") == "rqkmeans on 300 items"
        first = page.locator(".map button").first
        code = int(first.get_attribute("data-node"))
        assert code == np.bincount(ids.codes[:, 0]).argmax()
        first.focus()
        page.keyboard.press("Enter")
        page.wait_for_function(f"() => location.hash === '#code={code}'")
        rows = ids.with_prefix([code])
        page.get_by_text(f"Code {code}", exact=True).wait_for()
        listed = page.locator(".detail .list li").all()
        assert {each.get_attribute("data-item") for each in listed} <= {ids.items[r] for r in rows}
        page.locator(".map button").first.focus()
        page.keyboard.press("Escape")
        page.wait_for_function("() => location.hash === '#code='")
        # Titles are text: the tags in them are shown and do nothing.
        page.fill("#explorer-search", "red number 299")
        page.wait_for_selector('.detail .list li[data-item="item-299"]')
        assert "Red <b>chair</b> number 299" in page.inner_text(".detail .list")
        # What another client adds shows without a reload.
        page.request.post(
            page.url.partition("#")[0] + "v1/items",
            data={"embeddings": shop.x[300:301].tolist(), "item_ids": ["item-300"]},
        )
        page.fill("#explorer-search", "item-300")
        page.wait_for_selector('.detail .list li[data-item="item-300"]')
        page.wait_for_function(
            "() => document.getElementById('live-title').textContent.includes('301')"
        )
        bucket = page.locator("ol.buckets [data-path]").first
        codes = bucket.inner_text().split(" · ")
        bucket.click()
        page.wait_for_function(f"() => location.hash === '#code={'.'.join(codes)}'")
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        page.wait_for_selector(".trail li:nth-child(3) [aria-current]")


def test_a_phone_in_the_dark_asks_for_the_token(browser, tmp_path):
    shop = make_shop(tmp_path)
    app = create_app(shop.bundle, shop.tokenizer, token="s3cret")
    size = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with opened(browser, app, **size) as page:
        page.fill("#live-token input", "wrong")
        page.click("#live-token button")
        page.wait_for_selector("#live-token:not([hidden])")
        page.fill("#live-token input", "s3cret")
        page.click("#live-token button")
        page.wait_for_function(DRAWN)
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate(SIDEWAYS) <= 390
        assert page.locator(".map button").count() == 8


def test_parallel_codebooks_have_a_tree_each(browser, tmp_path):
    tokenizer, x = parallel_tokenizer(sizes=(4, 8)), np.random.default_rng(0).normal(size=(90, 6))
    ids = tokenizer.encode(x.astype(np.float32), ids=[f"i{n}" for n in range(90)])
    CatalogueBundle.create(tmp_path / "b", ids)
    with opened(browser, create_app(tmp_path / "b", tokenizer)) as page:
        page.wait_for_function(DRAWN)
        page.select_option("#explorer-tree", "1")
        page.get_by_text("Codebook 2, all codes").wait_for()
        page.locator(".map button").first.click()
        page.wait_for_function("() => location.hash.startsWith('#code=2:')")
        page.wait_for_selector(".detail .list li")


# Milliseconds from an action to the detail that it changes.
ACT = """async ([selector, query]) => {
  const before = document.querySelector('.detail').firstChild, began = performance.now();
  const element = document.querySelector(selector);
  if (query) { element.value = query; element.dispatchEvent(new Event('input')); }
  else element.click();
  while (document.querySelector('.detail').firstChild === before)
    await new Promise((r) => setTimeout(r, 1));
  await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
  return Math.round(performance.now() - began);
}"""


def serve_items(folder: Any, port: int) -> None:
    run.serve(create_app(folder / "b", folder / "model", items=folder / "items.parquet"), port=port)


@pytest.mark.slow
def test_a_million_items(browser, tmp_path, capsys):
    sizes, items = (256, 256, 256), 1_000_000
    tokenizer = drawn_tokenizer(dim=16, sizes=sizes)
    tokenizer.save(tmp_path / "model")
    generator = np.random.default_rng(0)
    codes = np.minimum(generator.zipf(1.3, (items, 3)) - 1, 255).astype(np.uint16)
    names = pa.array(np.arange(items)).cast(pa.large_string())
    norms = generator.random(items, np.float32)
    ids = SemanticIds(ItemIds(names), codes, norms, tokenizer.codes_info())
    CatalogueBundle.create(tmp_path / "b", ids)
    colors = np.array(["red", "blue", "green"])[codes[:, 0] % 3]
    titles = np.char.add(np.char.add(colors, " chair number "), np.arange(items).astype(str))
    table = pa.table({"item_id": names, "title": pa.array(titles)})
    pq.write_table(table, tmp_path / "items.parquet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # In a process of its own, as it is used.
    process = multiprocessing.get_context("spawn").Process(
        target=serve_items, args=(tmp_path, port)
    )
    process.start()
    try:
        page = browser.new_page(viewport={"width": 1280, "height": 844})
        page.set_default_timeout(60_000)
        while True:
            assert process.is_alive()
            try:
                page.goto(f"http://127.0.0.1:{port}/")
                break
            except PlaywrightError:
                time.sleep(0.5)
        page.wait_for_function(DRAWN)
        time.sleep(8)  # the service makes the explorer ready
        times = {"paint": [], "click": [], "search": []}
        for _ in range(3):
            page.goto("about:blank")
            began = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function(DRAWN)
            times["paint"].append(round(1000 * (time.perf_counter() - began)))
        for _ in range(4):
            for selector in (".map button", ".map button", ".trail button"):
                times["click"].append(page.evaluate(ACT, [selector, ""]))
        for query in ("green 777777", "chair", "number 5", "123456", "nowhere"):
            times["search"].append(page.evaluate(ACT, ["#explorer-search", query]))
        assert page.inner_text(".detail .muted").startswith("0 items")
        assert page.locator(".map button").count() <= 400
        page.close()
    finally:
        process.terminate()
        process.join()
    with capsys.disabled():
        print({name: f"{min(each)} to {max(each)} ms" for name, each in times.items()})  # noqa: T201
