"""Take the screenshots of the docs: docs/app.png and docs/report.png.

Start `gridcap app` in one terminal, in a repository whose pipeline has run. Then run `python docs/screenshot.py [URL]`
there in another.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

DOCS = Path(__file__).parent
DEFAULT_URL = "http://127.0.0.1:8501"
REPORT = Path("results/report.html")
SAMPLE_INDEX, APP_WORD_INDEX, REPORT_WORD_INDEX = 2, 2, 4
FADE_IN = 1500
"""Milliseconds until the attention overlay is fully visible."""


def capture_app(browser: Browser, url: str) -> None:
    """Choose a sample, point at a word of its caption and save the page."""
    page = browser.new_page(viewport={"width": 1200, "height": 720})
    page.goto(url)
    word = page.locator(".caption .word").nth(APP_WORD_INDEX)
    word.wait_for()
    first_caption = page.locator(".caption").inner_text()
    page.locator(".samples button").nth(SAMPLE_INDEX).click()
    while page.locator(".caption").inner_text() == first_caption:
        page.wait_for_timeout(100)
    word.hover()
    page.wait_for_timeout(FADE_IN)
    page.screenshot(path=DOCS / "app.png")


def capture_report(browser: Browser) -> None:
    """Point at a noun of the first example and save the first row of examples."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(REPORT.resolve().as_uri())
    cards = page.locator("article.card")
    cards.first.scroll_into_view_if_needed()
    cards.first.locator(".word").nth(REPORT_WORD_INDEX).hover()
    page.wait_for_timeout(FADE_IN)
    boxes = [box for box in (cards.nth(index).bounding_box() for index in range(3)) if box]
    left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    right, bottom = max(box["x"] + box["width"] for box in boxes), max(box["y"] + box["height"] for box in boxes)
    clip = {"x": left - 8, "y": top - 8, "width": right - left + 16, "height": bottom - top + 16}
    page.screenshot(path=DOCS / "report.png", clip=clip)


def main() -> None:
    """Take both screenshots."""
    url = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_URL
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        capture_app(browser, url)
        capture_report(browser)
        browser.close()


if __name__ == "__main__":
    main()
