"""Pictures of the demo's report for the README: ``make screenshots`` writes docs/images."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PLACES = {"report": "body", "explorer": "#explore"}
"""Name of the picture -> the element whose top is at its top."""


def main(page: Path, folder: Path) -> None:
    """Write one picture of the upper part of each place of a page."""
    chromium = os.environ.get("SEMID_CHROMIUM") or shutil.which("chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1000, "height": 560}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("html[data-drawn]", state="attached")
        for name, place in PLACES.items():
            script = "place => document.querySelector(place).scrollIntoView({behavior: 'instant'})"
            tab.evaluate(script, place)
            tab.wait_for_timeout(500)
            tab.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
