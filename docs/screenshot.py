"""Take the README's picture of the app: `gridcap app` in one terminal, `python docs/screenshot.py` in another."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

URL = "http://127.0.0.1:8501"
SAMPLE, WORD = 2, 2


def main() -> None:
    """Choose a sample, point at a word and save what the page then shows."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 720})
        page.goto(sys.argv[1] if len(sys.argv) > 1 else URL)
        word = page.locator(".caption .word").nth(WORD)
        word.wait_for()
        before = page.locator(".caption").inner_text()
        page.locator(".samples button").nth(SAMPLE).click()
        while page.locator(".caption").inner_text() == before:
            page.wait_for_timeout(100)
        word.hover()
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(__file__).with_name("app.png"))
        browser.close()


if __name__ == "__main__":
    main()
