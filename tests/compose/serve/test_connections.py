"""Connections: how many, how long they may take, and how much they may send."""

import time
from contextlib import suppress
from typing import Any

import pytest

from served import answer, closed, connect, server

pytest.importorskip("fastapi", reason="the server needs fastapi: the extra serve")

from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.connections import Bounds
from lora_compose.compose.serve.engine import Engine

HALF = {
    "nothing": b"",
    "headers": b"GET /health HTTP/1.1\r\nHost: loc",
    "body": b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    "second request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
}


def bare(bounds: Bounds) -> Any:
    engine = Engine(None)  # nothing here reaches the model
    return server(make_app(engine, (64, 64), steps=25, guidance_scale=5.0), engine, bounds)


def test_what_is_half_sent_is_closed_in_time() -> None:
    with bare(Bounds(seconds=1.0)) as port:
        begun = time.monotonic()
        asked = {name: connect(port, sent) for name, sent in HALF.items()}
        still = connect(port, HALF["headers"])
        for _ in range(4):  # a letter now and then does not help
            time.sleep(0.2)
            still.sendall(b"a")
        assert {name: closed(one) for name, one in asked.items()} == dict.fromkeys(HALF, True)
        assert closed(still)
        assert 0.9 < time.monotonic() - begun < 15


def test_silent_connections_lock_nobody_out_and_leave_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with bare(Bounds(connections=16)) as port:
        silent = [connect(port, HALF["headers"]) for _ in range(80)]
        assert answer(port, "/health")[0] == 200
        assert all(closed(one) for one in silent[:60]), "the oldest make room"
        silent[-1].sendall(b"alhost\r\n\r\n")
        assert silent[-1].recv(100).startswith(b"HTTP/1.1 200"), "the newest are kept"
        for one in silent:
            one.close()
    assert caplog.records == []


def test_headers_are_bounded() -> None:
    with bare(Bounds()) as port:
        asked = connect(port, HALF["headers"] + b"x" * 20_000)
        assert asked.recv(100).startswith(b"HTTP/1.1 400")
        asked.close()


def test_requests_sent_ahead_are_answered_in_turn_and_bounded() -> None:
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with bare(Bounds(bytes=100_000)) as port:
        asked, got = connect(port, health * 3), b""
        while got.count(b"HTTP/1.1 200") < 3:
            got += asked.recv(1 << 16)
        asked.close()
        assert closed(connect(port, HALF["body"] + b" " * 8 + health * 10_000))


async def large(scope: Any, receive: Any, send: Any) -> None:
    """Answers with 16 MiB."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(2**24)})


def test_an_answer_may_be_read_slowly_but_not_left() -> None:
    with server(large, Engine(None), Bounds(seconds=0.5)) as port:
        asked = [connect(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(2)]
        read, begun = 0, time.monotonic()
        while read < 2**24:
            got = len(asked[0].recv(2**20))
            assert got, "a slow reader is not cut off"
            read += got
            if time.monotonic() - begun < 1.5:
                time.sleep(0.16)
        assert time.monotonic() - begun > 1.0, "it has taken longer than the bound"
        left = 0
        with suppress(ConnectionError):
            while got := asked[1].recv(2**20):
                left += len(got)
        assert left < 2**24
        for one in asked:
            one.close()
