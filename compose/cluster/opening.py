"""Opens workers: this process, or those of a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_compose.compose.cluster.packing import Packer
from lora_compose.compose.cluster.work import Opening, ThisProcess, Workers


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster: machines that share no folder, to which this one sends files, and from which it gets results.

    Attributes:
        address: As `ray.init` takes it; "local" starts a cluster on this machine.
        workers: How many; None is one per GPU, or per node if there are none.
    """

    address: str
    workers: int | None = None


@contextmanager
def workers(
    opening: Callable[[Packer | None], Opening], device: str | None, threads: int | None, cluster: Cluster | None
) -> Iterator[Workers]:
    """The workers of a cluster with so many CPU threads each, or this process. Raises OSError if there is none.

    `opening` packs the files that workers need; its packer is None in this process, which has them.
    """
    if cluster is None:
        yield ThisProcess(opening(None))
        return
    from lora_compose.compose.cluster.connecting import connected
    from lora_compose.compose.cluster.pool import Pool, object_packer

    with connected(cluster.address), Pool(opening(object_packer()), device, threads, cluster.workers) as pool:
        yield pool
