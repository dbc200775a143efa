"""The page, served and looked at in a browser: what browser tests and screenshots share."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect

from commands import free_port

CHROMIUM = shutil.which("chromium")
# As root and offline: no sandbox, and none of the connections that a browser makes by itself.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@contextmanager
def served(out: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A page of its own, with its temporary files in a folder that can be looked at, and further arguments of `ui`."""
    port = free_port()
    command = [sys.executable, "-m", "lora_compose", "ui", *arguments]
    command += ["--port", str(port), "--no-browser", "--out", str(out)]
    (out / "temporary").mkdir(parents=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(out / "temporary")}
    said = out / "said.txt"
    with said.open("w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/_stcore/health")
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise RuntimeError(f"the page does not start: {said.read_text()}")
        assert f"http://localhost:{port}" in said.read_text()
        yield f"http://localhost:{port}", server
    finally:
        server.terminate()
        server.wait()


def settled(page: Page) -> None:
    """Waits until the page's script has run to its end."""
    page.wait_for_timeout(300)
    expect(page.locator('[data-testid="stApp"][data-test-script-state="running"]')).to_have_count(0)
