"""The screenshots of the page in the docs, made anew: `PYTHONPATH=tests python -m screenshots docs/images`.

Seconds on them are those of the machine, so nothing else should run meanwhile.
"""

import re
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from browsing import CHROMIUM, FLAGS, served, settled

PATIENCE = 300_000  # milliseconds


def main(out: Path) -> None:
    """Writes page.png, wide and light, and page-narrow.png, narrow and dark, where the model looked."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        wide = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light").new_page()
        _made(wide, address)
        wide.screenshot(path=out / "page.png")
        narrow = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark").new_page()
        _made(narrow, address)
        narrow.get_by_role("radio", name="Understand", exact=True).click()
        settled(narrow)
        expect(narrow.get_by_text("decided where each LoRA acts")).to_be_visible(timeout=PATIENCE)
        narrow.screenshot(path=out / "page-narrow.png")
        browser.close()


def _made(page: Page, address: str) -> None:
    page.goto(address, timeout=PATIENCE)
    button = page.get_by_role("button", name=re.compile("^Generate 1 image"))
    expect(button).to_be_enabled(timeout=PATIENCE)
    button.click()
    settled(page)
    expect(page.get_by_role("button", name="Download")).to_be_visible(timeout=PATIENCE)
    settled(page)
    page.mouse.move(0, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
