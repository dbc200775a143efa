"""Opening untrusted paths: regular files only, and never waiting."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_compose.pipelines.support.regular import open_regular


def test_a_file_is_read_whole_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content" * 100_000)
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content" * 100_000


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("make", [_pipe, _link("/dev/zero"), _link("/dev/null"), _socket, Path.mkdir],
                         ids=["pipe", "endless", "empty", "socket", "folder"])  # fmt: skip
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "it"
    make(path)
    raised: list[Exception] = []

    def opening() -> None:
        try:
            open_regular(path).close()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=opening, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "it waits"
    assert raised


def test_missing_things_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
