"""Workers on a Ray cluster that fail and die."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clusters import MARKS, one_node

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
        assert not list(Path(folder).parent.glob("lora-compose-*"))


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


def test_each_gpu_has_a_worker_that_sees_it_alone() -> None:
    """The GPUs are numbers of the cluster's resources only."""
    from lora_compose.compose.cluster.pool import Pool

    def opening(node: Any) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def call(opened: str, node: Any, workers: int) -> str:
        """Waits for as many workers, which have one folder because they are on one node."""
        (node.folder / f"gpu-{opened}").touch()
        while len(list(node.folder.glob("gpu-*"))) < workers:
            time.sleep(0.1)
        return opened

    with one_node(cpus=1, gpus=2):
        with Pool(opening, None, 1, None) as pool:
            seen = [one.result for one in pool.map(call, {"a": (2,), "b": (2,)})]
        with Pool(opening, "cpu", 1, None) as pool:
            (on_cpu,) = pool.map(call, {"a": (1,)})
    assert sorted(seen) == ["0", "1"]
    assert on_cpu.result == ""
