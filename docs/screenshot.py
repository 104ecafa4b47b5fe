"""Take the screenshot of the app for the docs, docs/app.png.

Start `gridcap app` in one terminal and run `python docs/screenshot.py [URL]` in another.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DEFAULT_URL = "http://127.0.0.1:8501"
SAMPLE_INDEX, WORD_INDEX = 2, 2


def main() -> None:
    """Choose a sample, point at a word of its caption and save the page."""
    url = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_URL
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 720})
        page.goto(url)
        word = page.locator(".caption .word").nth(WORD_INDEX)
        word.wait_for()
        first_caption = page.locator(".caption").inner_text()
        page.locator(".samples button").nth(SAMPLE_INDEX).click()
        while page.locator(".caption").inner_text() == first_caption:
            page.wait_for_timeout(100)
        word.hover()
        page.wait_for_timeout(1500)  # ms, until the overlay has faded in
        page.screenshot(path=Path(__file__).with_name("app.png"))
        browser.close()


if __name__ == "__main__":
    main()
