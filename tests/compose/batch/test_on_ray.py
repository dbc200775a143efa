"""A batch on a Ray cluster: the same images, and a node that is killed in the middle loses nothing."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clusters import MARKS, kill_a_worker, one_node, two_nodes
from lora_compose.compose.batch.entries import read_entries
from lora_compose.compose.batch.results import STATE, Result
from lora_compose.compose.batch.runner import run_batch
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.cluster.opening import Cluster
from lora_compose.compose.playground.assets import assets_dir

pytest.importorskip("ray", reason="needs ray: the extra ray")
pytestmark = MARKS

PLAYGROUND = assets_dir() / "playground"
ROWS = ["name,animal,trigger,seeds", "bear,bear,xlo,0-3", "robot,robot,qrt,0-3", "again,bear,xlo,8-9", "odd,rabbit,,5"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Entries and settings with model and LoRAs in folders whose names no worker gets."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(PLAYGROUND / "model", folder / "model")
    for name in ("bear", "robot", "rabbit"):
        shutil.copy(PLAYGROUND / f"loras/{name}.safetensors", folder)
    (folder / "rows.csv").write_text("\n".join(ROWS))
    (folder / "form.yaml").write_text(
        'prompt: "a {trigger} {animal} on grass"\n'
        'concepts: [{name: "{animal}", lora: "{animal}.safetensors", trigger: "{trigger}", class_word: "{animal}"}]\n'
    )
    fields = {"steps": 1, "guidance_scale": 4, "threads": 1, "device": "cpu", "method": "tara"}
    entries = read_entries([folder / "rows.csv"], folder / "form.yaml").entries
    return entries, BatchSettings(model=str(folder / "model"), **fields)


@pytest.fixture(scope="module")
def finished(given: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run without Ray."""
    out = tmp_path_factory.mktemp("finished")
    entries, settings = given
    run_batch(entries, settings, out)
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def check(results: Sequence[Result], out: Path, finished: Path) -> None:
    """Whether all is as after an undisturbed run without Ray."""
    assert len(contents(finished)) == 10
    assert contents(out) == contents(finished), "every byte, records included"
    assert [one.seed for one in results if one.error] == [5], "the row without a trigger, as without Ray"
    assert not list((out / STATE).glob("failed/*"))
    assert not list((out / STATE).glob("claims/*"))
    checked = [{path.name: path.read_text() for path in (folder / STATE / "checked").iterdir()} for folder in (
        finished, out
    )]  # fmt: skip
    assert checked[0] == checked[1]


def test_a_worker_that_is_killed_in_the_middle_loses_nothing(
    given: Any, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (entries, settings), killed = given, []

    def kill(done: float, text: str = "") -> None:
        if len(contents(tmp_path)) >= 3 and not killed:
            killed.append(True)
            kill_a_worker()

    with one_node():
        results = run_batch(entries, settings, tmp_path, kill, cluster=Cluster("local", 2))
    assert killed
    assert "a worker has died; another does its work" in capsys.readouterr().err
    check(results, tmp_path, finished)


def test_a_node_that_is_killed_in_the_middle_loses_nothing(given: Any, finished: Path, tmp_path: Path) -> None:
    (entries, settings), killed = given, []
    with two_nodes() as (cluster, node, files):

        def kill(done: float, text: str = "") -> None:
            if len(contents(tmp_path)) >= 3 and not killed:
                killed.append(node)
                cluster.remove_node(node, allow_graceful=False)

        results = run_batch(entries, settings, tmp_path, kill, cluster=Cluster(cluster.address, 2))
        assert not list(files.glob("lora-compose-*")), "also of the node that was killed"
    assert killed
    check(results, tmp_path, finished)
