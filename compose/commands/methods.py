"""`lora-compose methods`: lists the methods and their settings."""

from typing import Annotated

import typer

from lora_compose.compose.support.names import check_method
from lora_compose.compose.support.terminal import handle_errors, starting


@handle_errors()
def methods(method: Annotated[str | None, typer.Argument(help="Show this one with all its settings.")] = None) -> None:
    """List methods: what they need, settings, defaults."""
    check_method(method)
    with starting():
        from lora_compose.compose.generate.method_list import show_methods
    show_methods(method)
