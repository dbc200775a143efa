"""Ray clusters on this machine, for tests: `from clusters import one_node, two_nodes`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_niceness": "0",
}  # fmt: skip
"""Ray on slow machines, with workers as fast as the driver."""

MARKS = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")]


@contextmanager
def _quick() -> Iterator[None]:
    """Fast nodes, whose files are gone afterwards, also those of a node that was killed."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # Ray's own, which must be short
        patch.setenv("TMPDIR", folder)
        for name, value in QUICK.items():
            patch.setenv(name, value)
        yield


@contextmanager
def one_node(cpus: int = 2) -> Iterator[None]:
    """A cluster of one node, connected."""
    import ray  # pyright: ignore[reportMissingImports]

    with _quick():
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes with a processor each, connected; and its second node, which can be removed."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    with _quick():
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(found.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield found, found.add_node(num_cpus=1)
        finally:
            ray.shutdown()
            found.shutdown()


def kill_a_worker() -> None:
    """Kills the process of a worker of this process's cluster."""
    started = psutil.Process().children(recursive=True)
    next(one for one in started if "ray::RemoteWorker" in " ".join(one.cmdline())).kill()
