"""Ray clusters on this machine, for tests: `from clusters import one_node, two_nodes`."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_niceness": "0",
}  # fmt: skip
"""Ray on slow machines, with workers as fast as the driver."""

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of these tests alone, 64 digits in real life"}
"""All clusters ask for it. Otherwise Ray would write one into the home folder of whoever runs the tests."""

os.environ |= TOKEN  # here, because Ray reads it when it is imported

MARKS = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")]


@contextmanager
def _quick() -> Iterator[Path]:
    """Fast nodes, and the folder of their files, which is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # Ray's own, which must be short
        patch.setenv("TMPDIR", folder)
        for name, value in QUICK.items():
            patch.setenv(name, value)
        yield Path(folder)


@contextmanager
def one_node(cpus: int = 2, gpus: int = 0) -> Iterator[None]:
    """A cluster of one node, connected; its GPUs need not be there."""
    import ray  # pyright: ignore[reportMissingImports]

    with _quick():
        ray.init(
            "local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def a_head(client_port: int) -> Iterator[tuple[str, Path]]:
    """The address of a cluster of one node, not connected, with a port for Ray Client; and the folder of its files."""
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    with _quick() as folder:
        head = {"num_cpus": 2, "include_dashboard": False, "ray_client_server_port": client_port}
        found = Cluster(initialize_head=True, head_node_args=head)
        try:
            host = found.address.rpartition(":")[0]
            _wait_until_it_listens(host, client_port)  # a process of its own, which the cluster does not wait for
            yield found.address, folder
        finally:
            found.shutdown()


def _wait_until_it_listens(host: str, port: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any, Path]]:
    """A connected cluster of two nodes with a processor each; its second node, which can be removed; their files."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    with _quick() as folder:
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(found.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield found, found.add_node(num_cpus=1), folder
        finally:
            ray.shutdown()
            found.shutdown()


def kill_a_worker() -> None:
    """Kills the process of a worker of this process's cluster."""
    started = psutil.Process().children(recursive=True)
    next(one for one in started if "ray::RemoteWorker" in " ".join(one.cmdline())).kill()
