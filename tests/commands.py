"""Commands as they are typed: `from commands import call`."""

import socket
from collections.abc import Callable
from functools import cache
from typing import Any

from typer import Typer, testing
from typer.testing import CliRunner

from lora_compose.compose.cli import app

# Typer reads the signatures of all commands for every call.
testing._get_command = cache(testing._get_command)


def call(*arguments: object, code: int = 0, of: Typer | Callable[..., Any] = app) -> Any:
    """Runs a command, of the program or of a script, and checks its exit code, and that no traceback is shown."""
    if not isinstance(of, Typer):
        function, of = of, Typer()
        of.command()(function)
    result = CliRunner().invoke(of, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output or repr(result.exception)
    assert "Traceback" not in result.output
    return result


def flat(text: str) -> str:
    """The words of a text that was wrapped for a terminal."""
    return " ".join(text.split())


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]
