"""The screenshots of the page in the docs, made anew: `PYTHONPATH=tests python -m screenshots docs/images`.

Seconds on them are those of the machine, so nothing else should run meanwhile.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, expect, sync_playwright

from browsing import CHROMIUM, FLAGS, served, settled

PATIENCE = 300_000  # milliseconds
SIZES = {"page": (1280, 800), "page-narrow": (390, 844)}
"""Width and height of the window by the name of its screenshots."""
THEMES: tuple[tuple[Literal["light", "dark"], str], ...] = (("light", ""), ("dark", "-dark"))
"""Themes, and what they add to that name."""


def main(out: Path) -> None:
    """Writes page.png and page-narrow.png, with an image that was just made, each in both themes."""
    expect.set_options(timeout=PATIENCE)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, (width, height) in SIZES.items():
            for scheme, suffix in THEMES:
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                page = context.new_page()
                _made(page, address)
                if name == "page-narrow":
                    page.get_by_role("radio", name="Automatic", exact=True).evaluate("it => it.scrollIntoView()")
                page.screenshot(path=out / f"{name}{suffix}.png")
                context.close()
        browser.close()


def _made(page: Page, address: str) -> None:
    page.goto(address, timeout=PATIENCE)
    button = page.get_by_role("button", name=re.compile("^Generate 1 image"))
    expect(button).to_be_enabled()
    button.click()
    settled(page)
    expect(page.get_by_role("button", name="Download")).to_be_visible()
    settled(page)
    page.mouse.move(0, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
