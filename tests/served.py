"""Servers on this machine for tests: `from served import answer, server`."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from commands import free_port


@contextmanager
def server(app: Any, engine: Any, bounds: Any = None) -> Iterator[int]:
    """The port of a server that runs in a thread; it must end within its bounds."""
    from lora_compose.compose.serve.launch import Server

    port = free_port()
    web = Server(app, engine, "127.0.0.1", port, bounds)
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield port
    finally:
        web.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def answer(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer; a body that is no bytes is sent as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, given)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), _lower(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), _lower(error.headers)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def connect(port: int, sent: bytes = b"") -> socket.socket:
    """A connection that has sent something."""
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    made.sendall(sent)
    return made


def closed(connection: socket.socket) -> bool:
    """Whether the server closes a connection within its time; an answer before is read."""
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True
