"""ComfyUI's server with our nodes, as `install` puts them there; for tests that are run with `-m comfyui`."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import free_port
from lora_compose.compose.comfyui.installing import install

OWN = ("custom_nodes", "models", "output", "input", "temp", "user")
TESTS = Path(__file__).resolve().parent
LORAS = TESTS.parent / "assets/playground/loras"
Ask = Callable[..., Any]


def checkout(root: Path) -> Path:
    """The checkout, with folders of its own for what is installed and made; and the small world as a node."""
    for entry in Path(os.environ["COMFYUI_PATH"]).iterdir():
        if entry.name not in OWN:
            (root / entry.name).symlink_to(entry)
    for name in (*OWN, "models/checkpoints", "models/loras", "custom_nodes/small_world", "models/loras/world"):
        (root / name).mkdir(parents=True)
    for lora in LORAS.glob("*.safetensors"):
        (root / "models/loras/world" / lora.name).symlink_to(lora)
    node = f"import sys\n\nsys.path.append({str(TESTS)!r})\nfrom comfy_small_world import comfy_entrypoint\n"
    (root / "custom_nodes/small_world/__init__.py").write_text(node, encoding="utf-8")
    install(root)
    return root


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, Ask]]:
    """The server's address while it runs, and what asks it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(root),
        "--dont-print-server", "--disable-api-nodes",
    ]  # fmt: skip

    def asked(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 900
            while True:
                assert server.poll() is None, (root / "log").read_text()[-3000:]
                try:
                    asked("system_stats")
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert time.monotonic() < end
                    time.sleep(0.5)
            yield address, asked
        finally:
            server.terminate()
            server.wait()
