"""`lora-compose methods`: lists the methods and their settings."""

import json
from typing import Annotated, Any

import typer

from lora_compose.compose.support.names import METHODS_FILE, check_method
from lora_compose.compose.support.terminal import echo, handle_errors


@handle_errors()
def methods(method: Annotated[str | None, typer.Argument(help="Show this one with all its settings.")] = None) -> None:
    """List methods: what they need, settings, defaults."""
    check_method(method)
    listed = json.loads(METHODS_FILE.read_text("utf-8"))
    known: dict[str, Any] = listed["methods"]
    presets: dict[str, Any] = listed["presets"]
    if method is None:
        for name, about in known.items():
            echo(f"{name}: {about['summary']}")
            echo(f"    needs {about['needs']}; settings: {', '.join(about['settings']) or 'none'}", style="dim")
        echo(f"\nWith the authors' settings: {', '.join(presets)}. One with its settings: lora-compose methods NAME")
        return
    about = known[method.partition(":")[0]]
    echo(f"{method}: {about['summary']}\nneeds {about['needs']}")
    for field, (default, text) in about["settings"].items():
        echo(f"\n--set {field}={presets.get(method, {}).get(field, default)}", style="bold")
        echo(text)
