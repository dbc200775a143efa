"""Workers on a Ray cluster that fail and die."""

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from clusters import MARKS, one_node
from commands import free_port

pytest.importorskip("ray", reason="needs ray: the extra ray")
pytestmark = MARKS


def test_calls_that_fail_and_calls_that_kill_their_workers_do_not_stop_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora_compose.compose.cluster.pool import Pool

    def opening(node: Any) -> Path:
        (node.folder / "file").touch()
        return node.folder

    def call(opened: Path, node: Any, number: int) -> tuple:
        if number == 1:
            os._exit(1)
        if number == 2:
            raise KeyError("two")
        return str(opened), torch.get_num_threads(), number

    with one_node():
        with Pool(opening, "cpu", 3, 1) as pool:
            ended = {one.name: one for one in pool.map(call, {str(number): (number,) for number in range(4)})}
        folder, *rest = ended["0"].result
        assert (rest, ended["3"].result[2]) == ([3, 0], 3)
        assert ended["2"][1:] == (None, "KeyError: 'two'")
        assert "3 workers have died of it" in (ended["1"].error or "")
        assert capsys.readouterr().err.count("a worker has died; another does its work") == 2
        assert not Path(folder).exists()


def test_workers_that_cannot_open_anything_end_the_run() -> None:
    from lora_compose.compose.cluster.pool import Pool

    def fails(node: Any) -> None:
        raise ValueError(f"there is nothing in {node.folder.name[:12]}")

    def dies(node: Any) -> None:
        os._exit(1)

    with one_node():
        with Pool(fails, "cpu", 1, 2) as pool, pytest.raises(ValueError, match="there is nothing in lora-compose"):
            list(pool.map(print, {"a": ()}))
        with (
            Pool(dies, "cpu", 1, 1) as pool,
            pytest.raises(OSError, match="3 workers have died before"),
        ):
            list(pool.map(print, {"a": ()}))


def test_an_address_where_nothing_answers() -> None:
    from lora_compose.compose.cluster.pool import connected

    with pytest.raises(OSError, match=r"there is no Ray cluster at 127\.0"), connected(f"127.0.0.1:{free_port()}"):
        pass


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_that_accepts_and_is_no_cluster(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_compose.compose.cluster import pool

    monkeypatch.setattr(pool, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, kept = server.getsockname()[1], []

        def answer() -> None:
            kept.append(server.accept()[0])
            kept[0].sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="there is no Ray cluster at"), pool.connected(f"127.0.0.1:{port}"):
            pass
        thread.join(10)
        kept[0].close()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="lists the open ports of Linux")
def test_a_local_cluster_listens_on_this_machine_alone() -> None:
    from lora_compose.compose.cluster.pool import connected

    before = open_to_others()
    with connected("local"):
        assert open_to_others() <= before


def open_to_others() -> set[str]:
    """Ports of this machine that others can reach."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and not address.startswith(("0100007F", "0000000000000000FFFF00000100007F")):
                found.add(address)
    return found
