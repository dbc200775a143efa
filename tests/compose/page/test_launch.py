"""The page as it is served: a real server in a process of its own, and no browser."""

import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

from browsing import served
from lora_compose.compose.support.network import url_of


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("page")) as (address, _):
        yield address


def headers_of(url: str) -> Message:
    try:
        with urllib.request.urlopen(url) as response:
            return response.headers
    except urllib.error.HTTPError as error:
        return error.headers


def test_no_other_website_can_show_the_page_in_a_frame(address: str) -> None:
    with urllib.request.urlopen(address) as response:
        script = re.search(rb"static/js/[^\"]+", response.read())
    assert script is not None
    paths = ("", script[0].decode(), "nowhere/at/all", "media/nothing.png", "_stcore/health", "_stcore/upload_file/a/b")
    for path in paths:
        headers = headers_of(f"{address}/{path}")
        assert headers.get_all("Content-Security-Policy") == ["frame-ancestors 'self'"], path
        assert headers.get_all("X-Frame-Options") == ["SAMEORIGIN"], path


@pytest.mark.parametrize(
    ("host", "origin", "answer"),
    [
        ("localhost:{port}", "http://localhost:{port}", 101),
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 101),
        ("localhost:{port}", "http://strange.example", 403),
        ("localhost:{port}", "null", 403),
        ("strange.example:{port}", "http://strange.example:{port}", 403),  # its name has been given our address
    ],
)
def test_strange_websites_get_no_session(address: str, host: str, origin: str, answer: int) -> None:
    port = int(address.rpartition(":")[2])
    request = (f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\n"
               "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
               "Sec-WebSocket-Version: 13\r\n\r\n")  # fmt: skip
    with socket.create_connection(("localhost", port)) as connection:
        connection.sendall(request.format(port=port).encode())
        assert connection.recv(100).split()[1] == str(answer).encode()


@pytest.mark.slow
def test_ctrl_c_ends_a_page_with_open_sessions_and_removes_their_files(tmp_path: Path) -> None:
    with served(tmp_path) as (address, server):
        asked = BackMsg()
        asked.rerun_script.query_string = ""
        with connect(f"{address.replace('http', 'ws')}/_stcore/stream") as session:
            session.send(asked.SerializeToString())
            while ForwardMsg.FromString(session.recv(60, decode=False)).WhichOneof("type") != "script_finished":
                pass
            assert list((tmp_path / "temporary").glob("lora-compose-page-*"))
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        assert list((tmp_path / "temporary").glob("lora-compose-*")) == []


def test_urls_have_brackets_around_addresses_with_colons() -> None:
    assert url_of("localhost", 8501) == "http://localhost:8501"
    assert url_of("::1", 8501) == "http://[::1]:8501"
