"""Ray clusters that are there, that are not, and that ask for a token; Ray Client."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusters import MARKS, a_head
from commands import free_port

pytest.importorskip("ray", reason="needs ray: the extra ray")
pytestmark = MARKS


def test_a_cluster_with_a_token_is_used_by_ray_client_and_refuses_others(tmp_path: Path) -> None:
    """Ray Client from here: a file is sent, a worker dies, no temporary file is left; other tokens are refused."""
    pytest.importorskip("grpc", reason="needs grpcio, for Ray Client")
    from lora_compose.compose.cluster.connecting import connected
    from lora_compose.compose.cluster.pool import Pool, object_packer

    (given := tmp_path / "file").write_text("contents")

    def opening(node: Any) -> Any:
        return node

    def call(node: Any, parcel: Any, dies: bool) -> Iterator[str]:
        if dies and not (mark := node.folder.with_name("died")).exists():
            mark.touch()
            os._exit(1)
        yield Path(node.unpack(parcel)(str(given))).read_text()

    with a_head(port := free_port()) as (address, folder):
        with connected(f"ray://{address.rpartition(':')[0]}:{port}"):
            parcel = object_packer().source(str(given))
            with Pool(opening, "cpu", 1, 1) as pool:
                ended = list(pool.map(call, {"a": (parcel, False), "b": (parcel, True)}))
            assert sorted(ended) == [("a", ["contents"]), ("b", ["contents"])]
            assert [path.name for path in folder.glob("lora-compose-*")] == []
        assert f"the Ray cluster at {address} refused the connection" in refused(address, "another")
        assert "refused the connection" in refused(address, None)


def refused(address: str, token: str | None) -> str:
    """What a process with another token, or none, is told."""
    code = (
        "import sys\nfrom lora_compose.compose.cluster.connecting import connected\nwith connected(sys.argv[1]): pass"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    environment |= {"HOME": "/nowhere"} if token is None else {"RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", code, address], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "RAY_AUTH_TOKEN" in done.stderr
    return done.stderr


def test_an_address_where_nothing_answers() -> None:
    from lora_compose.compose.cluster.connecting import connected

    with pytest.raises(OSError, match=r"there is no Ray cluster at 127\.0"), connected(f"127.0.0.1:{free_port()}"):
        pass


def test_a_client_where_nothing_answers() -> None:
    from lora_compose.compose.cluster.connecting import connected

    address = f"ray://127.0.0.1:{free_port()}"
    with pytest.raises(OSError, match=rf"no Ray cluster at {address}.*10001 of the head node"), connected(address):
        pass


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_that_accepts_and_is_no_cluster(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_compose.compose.cluster import connecting

    monkeypatch.setattr(connecting, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, kept = server.getsockname()[1], []

        def answer() -> None:
            kept.append(server.accept()[0])
            kept[0].sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="there is no Ray cluster at"), connecting.connected(f"127.0.0.1:{port}"):
            pass
        thread.join(10)
        kept[0].close()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="lists the open ports of Linux")
def test_a_local_cluster_listens_on_this_machine_alone() -> None:
    from lora_compose.compose.cluster.connecting import connected

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
