"""Pictures of the page, docs/images/page.png and page-phone.png, taken in headless Chromium from a server that runs.

    redrafter serve &
    python docs/screenshot.py http://127.0.0.1:8000

Asks one question and runs one race, so that what the pictures show was really answered and measured. Needs the
``browser`` extra and a Chromium on the PATH.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
QUESTION = "Why is the sky blue?"
MINUTES = 10
SHAPES = {
    "page.png": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "page-phone.png": {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"},
}


def main(url: str) -> int:
    from playwright.sync_api import expect, sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no Chromium on the PATH: apt-get install chromium", file=sys.stderr)
        return 1
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, settings in SHAPES.items():
            tab = browser.new_context(**settings).new_page()
            tab.goto(url)
            tab.fill("#max-tokens", "96")
            tab.fill("#prompt", QUESTION)
            tab.press("#prompt", "Enter")
            expect(tab.locator(".turn .drafted").first).to_be_visible(timeout=MINUTES * 60_000)
            expect(tab.locator("#send")).to_be_enabled(timeout=MINUTES * 60_000)
            tab.click("#race-start")
            expect(tab.locator("#race-result")).not_to_be_empty(timeout=MINUTES * 60_000)
            tab.screenshot(path=IMAGES / name, full_page=True)
            print(IMAGES / name, tab.inner_text("#race-result"))
        browser.close()
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/screenshot.py URL")
    sys.exit(main(sys.argv[1]))
