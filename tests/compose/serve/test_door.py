"""What is refused before the application sees it: hosts, tokens, kinds and sizes of bodies."""

import json
import socket
from collections.abc import Iterator

import pytest

from served import answer, closed, connect, server

pytest.importorskip("fastapi", reason="the server needs fastapi: the extra serve")

from lora_compose.compose.serve.app import make_app
from lora_compose.compose.serve.door import MOST_BYTES, Access
from lora_compose.compose.serve.engine import Engine

TOKEN = "0123456789abcdef"
HEAD = b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    engine = Engine(None)  # nothing here reaches the model
    with server(make_app(engine, (64, 64), steps=25, guidance_scale=5.0), engine) as port:
        yield port


@pytest.mark.parametrize(
    ("access", "known", "unknown"),
    [
        (Access(), ["localhost", "LOCALHOST:8500", "127.0.0.1:8500", "127.0.0.2", "[::1]:8500"],
         ["", "evil.example", "localhost.evil.example", "1.2.3.4", "localhost:80:80", "[evil]", "a@localhost", "::1"]),
        (Access("192.168.0.2"), ["localhost", "192.168.0.2:1"], ["192.168.0.3", "evil.example"]),
        (Access("0.0.0.0"), ["localhost", "192.168.0.2:1", "[fe80::1]"], ["evil.example", "gpu.example"]),
        (Access("0.0.0.0", hosts=("GPU.example",)), ["gpu.example:8500"], ["evil.example", "a.gpu.example"]),
    ],
)  # fmt: skip
def test_a_server_is_known_by_its_own_names_alone(access: Access, known: list[str], unknown: list[str]) -> None:
    assert [host for host in known if not access.knows(host)] == []
    assert [host for host in unknown if access.knows(host)] == []


def test_another_host_is_refused(port: int) -> None:
    assert answer(port, "/health")[0] == 200
    for path in ("/health", "/loras", "/openapi.json"):
        assert answer(port, path, headers={"Host": "evil.example"})[0] == 421
    assert answer(port, "/images", {"prompt": "a"}, {"Host": f"evil.example:{port}"})[0] == 421


def test_nothing_is_loaded_from_another_server(port: int) -> None:
    assert [answer(port, path)[0] for path in ("/docs", "/redoc")] == [404, 404]
    described = json.loads(answer(port, "/openapi.json")[1])
    assert "guidance_scale" in described["components"]["schemas"]["ImageRequest"]["properties"]


def test_every_request_needs_the_token_if_there_is_one() -> None:
    engine = Engine(None)
    with server(make_app(engine, (64, 64), access=Access(token=TOKEN), steps=25, guidance_scale=5.0), engine) as port:
        assert answer(port, "/health", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        for given in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer é"},
        ):
            for path, body in (("/health", None), ("/openapi.json", None), ("/images", {"prompt": "a"})):
                code, data, headers = answer(port, path, body, given)
                assert (code, headers["www-authenticate"]) == (401, "Bearer")
                assert TOKEN not in data.decode()


@pytest.mark.parametrize(
    ("value", "code", "expected"),
    [
        (b"NaN", 422, "guidance_scale: Input should be a finite number"),
        (b"-Infinity", 422, "guidance_scale: Input should be a finite number"),
        (b"1e400", 422, "guidance_scale: Input should be a finite number"),
        (b'"\\ud800"', 422, "guidance_scale: Input should be a valid"),
        (b'1, "\\ud800": 1', 422, "unicode"),
        (b'1, "negative_prompt": "\\ud800"', 422, "negative_prompt: Input should be a valid string"),
        (b'1, "concepts": [' + b"1," * 30_000 + b"1]", 422, "there are 30001 concepts; at most 8"),
        (b'1, "concepts": ' + b"[" * 30_000 + b"]" * 30_000, 400, "parsing"),
        (b"9" * 5000, 400, "parsing"),
        (b"1", 422, None),
    ],
    ids=range(10),
)
def test_numbers_and_texts_that_json_has_and_nothing_else_has_are_refused_in_few_words(
    port: int, value: bytes, code: int, expected: str | None
) -> None:
    """Never by 500."""
    answered, data, _ = answer(port, "/images", b'{"prompt": "", "guidance_scale": ' + value + b"}")
    assert answered == code
    assert len(data) < 500
    assert (expected or "prompt: String should have at least 1 character") in json.loads(data)["detail"]


def test_only_json_is_read_which_another_website_cannot_send(port: int) -> None:
    assert answer(port, "/images", {"prompt": "a"}, {"Content-Type": "text/plain"})[0] == 415
    assert answer(port, "/images", {"prompt": ""}, {"Content-Type": "application/json; charset=utf-8"})[0] == 422


def test_a_large_body_is_refused_before_it_is_read(port: int) -> None:
    code, data, headers = answer(port, "/images", b"[" + b"1," * 250_000 + b"1]")
    assert (code, headers["connection"]) == (413, "close")
    assert len(data) < 200
    asked = connect(port, HEAD + b"Content-Length: 9999999999999999999\r\n\r\n")
    assert asked.recv(1000).startswith(b"HTTP/1.1 413")
    asked.close()


def test_an_endless_body_is_cut_off(port: int) -> None:
    asked = connect(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    sent = _flood(asked, b"10000\r\n" + b" " * 65536 + b"\r\n")
    assert sent < 2**25, "most of it is in buffers of the system"
    assert closed(asked)


def test_chunks_of_one_letter_are_cut_off_by_the_bytes_that_they_take(port: int) -> None:
    asked = connect(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    assert _flood(asked, (b"1;" + b"x" * 8000 + b"\r\n \r\n") * 8) < 2**25
    assert closed(asked)


def test_the_longest_valid_request_is_not_too_large() -> None:
    wide = "\U0001f43b"  # 12 letters when it is escaped
    named = [{"name": wide * 200, "weight": -1.2345678901234567, "region": [0.1234567890123456] * 4, "role": "subject"}]
    longest = {"prompt": wide * 2000, "negative_prompt": wide * 2000, "concepts": named * 8}
    smaller = {**longest, "concepts": [{**named[0], "name": wide * 50}] * 8}
    assert len(json.dumps(smaller).encode()) < MOST_BYTES
    assert len(json.dumps(longest, ensure_ascii=False).encode()) < MOST_BYTES


def _flood(asked: socket.socket, piece: bytes) -> int:
    sent = 0
    try:
        while sent < 2**26:
            asked.sendall(piece)
            sent += len(piece)
    except ConnectionError:
        pass
    return sent
