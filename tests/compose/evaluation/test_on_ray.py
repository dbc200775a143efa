"""An evaluation on a Ray cluster: the results of one without Ray, whatever dies."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusters import MARKS, kill_a_worker, one_node, two_nodes
from evaluations import contents
from lora_compose.compose.cluster.opening import Cluster
from lora_compose.compose.evaluation import runner
from lora_compose.compose.evaluation.planning import plan_batches
from lora_compose.compose.evaluation.results import CLAIMS, MADE, batch_folder, is_done
from lora_compose.compose.evaluation.runner import evaluate
from lora_compose.compose.evaluation.suite import Suite, read_suite
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.playground.assets import assets_dir

pytest.importorskip("ray", reason="needs ray: the extra ray")
pytestmark = MARKS

PLAYGROUND = assets_dir() / "playground"
SCENE = {
    "name": "both", "prompt": "a xlo bear and a qrt robot on grass", "concepts": ["bear", "robot"],
    "regions": {"bear": [0, 0, 64, 128], "robot": [64, 0, 128, 128]}, "image": "start.png", "strength": 0.9,
}  # fmt: skip
SUITE: dict[str, Any] = {
    "name": "tiny", "model": "model", "encoder": "./judge", "methods": ["merge", "regional"], "scenes": [SCENE],
    "concepts": [
        {"name": name, "lora": f"{name}.safetensors", "trigger": trigger, "class_word": name, "references": given}
        for name, trigger, given in (("bear", "xlo", "./bear"), ("robot", "qrt", ["robot/0.png", "robot/1.png"]))
    ],
    "seeds": [0, 1, 2], "batch_size": 2, "steps": 2, "guidance_scale": 4, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the suite names, in a folder that no worker gets."""
    folder = tmp_path_factory.mktemp("given") / "files"
    for name in ("model", "judge"):
        shutil.copytree(PLAYGROUND / name, folder / name)
    for name in ("bear", "robot"):
        shutil.copytree(PLAYGROUND / "references" / name, folder / name)
        shutil.copy(PLAYGROUND / f"loras/{name}.safetensors", folder)
    shutil.copy(PLAYGROUND / "references/bear/0.png", folder / "start.png")
    return folder


def read(folder: Path, **changes: Any) -> Suite:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return read_suite(str(path))


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run without Ray."""
    out = tmp_path_factory.mktemp("finished")
    evaluate(read(folder), out)
    return out


@pytest.mark.parametrize("dies", ["node", "worker"])
def test_the_results_are_those_without_ray_though_something_dies(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """No worker can read the driver's files, and images that are there already are only scored."""
    suite, killed = read(folder), []
    plan = plan_batches(suite).batches
    shutil.copytree(batch_folder(finished, plan[0].key), batch_folder(tmp_path, plan[0].key))
    (batch_folder(tmp_path, plan[0].key) / plan[0].scores).unlink()
    hidden, pack = folder.with_name("hidden"), runner.pack

    def pack_and_hide(*given: Any) -> Any:
        found = pack(*given)
        folder.rename(hidden)
        return found

    monkeypatch.setattr(runner, "pack", pack_and_hide)
    with two_nodes() as (cluster, node, files):

        def kill(done: float, text: str = "") -> None:
            if done >= 2 and not killed:
                killed.append(dies)
                cluster.remove_node(node, allow_graceful=False) if dies == "node" else kill_a_worker()

        try:
            evaluate(suite, tmp_path, kill, cluster=Cluster(cluster.address, 2))
        finally:
            hidden.rename(folder)
        assert not list(files.glob("lora-compose-*")), "also of what was killed"
    assert killed
    assert len(contents(finished)) == 10 * 2 + 15, "cost and scores of each batch, and the images"
    assert contents(tmp_path) == contents(finished)
    assert not list((tmp_path / CLAIMS).iterdir())


def test_what_is_wrong_is_found_before_anything_is_made_and_others_may_join(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_compose.compose.cluster import pool

    (folder / "broken.png").write_bytes(b"no image")
    broken = [{**SUITE["concepts"][0], "references": ["broken.png"]}, SUITE["concepts"][1]]
    outside = [{**SCENE, "regions": {"bear": [0, 0, 64, 300], "robot": [0, 0, 9, 9]}}]
    with one_node():
        for changes in ({"concepts": broken}, {"scenes": outside}):
            told = []
            for cluster in (None, Cluster("local")):
                with pytest.raises(ValueError, match=r"cannot be read|leaves the canvas") as error:
                    evaluate(read(folder, **changes), tmp_path / "none", cluster=cluster)
                told.append(str(error.value))
            assert told[0] == told[1]
        assert not list(tmp_path.rglob("*.png"))

        suite, out = read(folder), tmp_path / "out"
        *_, last = plan_batches(suite).batches
        others = Claims(out / CLAIMS).claim(last.key)

        def another_process(done: float, text: str = "") -> None:
            """Has claimed the last batch all the time, and makes it when the others have been made."""
            if done == len(plan_batches(suite).batches) - 1:
                shutil.copytree(batch_folder(finished, last.key), batch_folder(out, last.key))
                others.__exit__(None, None, None)

        assert others.__enter__() is not None
        monkeypatch.setattr(pool, "LOOK_AGAIN", 0.1)
        evaluate(suite, out, another_process, cluster=Cluster("local"))
    assert all(is_done(out, planned) for planned in plan_batches(suite).batches)
    assert contents(out) == contents(finished)
    made = (folder / MADE for folder in (batch_folder(finished, last.key), batch_folder(out, last.key)))
    assert len({path.read_bytes() for path in made}) == 1, "that of the other process"
