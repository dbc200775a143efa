"""Workers on a Ray cluster that fail and die."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clusters import MARKS, one_node
from lora_compose.compose.cluster.work import Failure

pytest.importorskip("ray", reason="needs ray: the extra ray")
pytestmark = MARKS


def test_calls_that_fail_and_calls_that_kill_their_workers_do_not_stop_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora_compose.compose.cluster.pool import Pool

    def opening(node: Any) -> Path:
        (node.folder / "file").touch()
        return node.folder

    def call(opened: Path, number: int) -> Iterator[Any]:
        if number == 1:
            os._exit(1)
        if number == 2:
            raise KeyError("two")
        yield opened
        yield torch.get_num_threads(), number
        if number == 3:
            raise KeyError("three")

    with one_node():
        with Pool(opening, "cpu", 3, 1) as pool:
            ended = {name: [*results] for name, results in pool.map(call, {str(i): (i,) for i in range(4)})}
        folder, told = ended["0"]
        assert told == (3, 0)
        assert ended["2"] == [Failure("KeyError: 'two'")]
        assert ended["3"] == [folder, (3, 3), Failure("KeyError: 'three'")]
        (died,) = ended["1"]
        assert "3 workers have died of it" in died.error
        assert capsys.readouterr().err.count("a worker has died; another does its work") == 2
        assert not list(folder.parent.glob("lora-compose-*"))


def test_workers_that_cannot_open_anything_end_the_run() -> None:
    from lora_compose.compose.cluster.pool import Pool

    def fails(node: Any) -> None:
        raise ValueError(f"there is nothing in {node.folder.name[:12]}")

    def dies(node: Any) -> None:
        os._exit(1)

    with one_node():
        with Pool(fails, "cpu", 1, 2) as pool, pytest.raises(ValueError, match="there is nothing in lora-compose"):
            list(pool.map(list, {"a": ()}))
        with (
            Pool(dies, "cpu", 1, 1) as pool,
            pytest.raises(OSError, match="3 workers have died before"),
        ):
            list(pool.map(list, {"a": ()}))


def test_each_gpu_has_a_worker_that_sees_it_alone() -> None:
    """The GPUs are numbers of the cluster's resources only."""
    from lora_compose.compose.cluster.pool import Pool

    def opening(node: Any) -> Any:
        return node

    def call(node: Any, workers: int) -> Iterator[str]:
        """Waits for as many workers, which have one folder because they are on one node."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        (node.folder / f"gpu-{seen}").touch()
        while len(list(node.folder.glob("gpu-*"))) < workers:
            time.sleep(0.1)
        yield seen

    with one_node(cpus=1, gpus=2):
        with Pool(opening, None, 1, None) as pool:
            seen = [one for _, results in pool.map(call, {"a": (2,), "b": (2,)}) for one in results]
        with Pool(opening, "cpu", 1, None) as pool:
            ((_, on_cpu),) = pool.map(call, {"a": (1,)})
    assert sorted(seen) == ["0", "1"]
    assert on_cpu == [""]
