"""Running an evaluation: interruptions, several processes, failures, and what is kept."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import cpu_offload
from PIL import Image
from typer.testing import CliRunner

from compose.cli import app
from compose.evaluation import runner
from compose.evaluation.planning import make_plan
from compose.evaluation.results import Failed, Made, Scores, batch_folder, picture_path, read
from compose.evaluation.runner import FAILED, MADE, evaluate, is_done, open_worker
from compose.evaluation.suite import Suite, batches, read_suite
from compose.files import read_pixels, read_record
from compose.savers import Saver
from pipelines.methods import METHODS, Regional

CONCEPTS = [
    {
        "name": name,
        "lora": f"playground:{name}",
        "trigger": trigger,
        "class_word": name,
        "references": f"playground:{name}",
    }
    for name, trigger in (("bear", "xlo"), ("robot", "qrt"))
]
SCENE = {
    "name": "both",
    "prompt": "a xlo bear and a qrt robot on grass",
    "concepts": ["bear", "robot"],
    "regions": {"bear": [0, 0, 64, 128], "robot": [64, 0, 128, 128]},
}
SUITE: dict[str, Any] = {
    "name": "tiny",
    "model": "playground",
    "encoder": "playground:judge",
    "concepts": CONCEPTS,
    "scenes": [SCENE],
    "methods": ["merge", "regional"],
    "seeds": [0, 1, 2],
    "batch_size": 2,
    "threads": 1,
    "steps": 2,
    "guidance_scale": 4,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    path.write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def suite(suite_file: Path) -> Suite:
    return read_suite(str(suite_file))


@pytest.fixture(scope="session")
def finished(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("finished")
    assert evaluate(suite, out)
    return out


def contents(out: Path) -> dict[str, Any]:
    """Everything in an evaluation's folder that does not tell of time and memory."""
    found: dict[str, Any] = {}
    for path in sorted((out / "batches").rglob("*.*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".png":
            found[name] = read_pixels(path).tobytes(), read_record(path)
        elif path.name == MADE:
            made = read(path, Made)
            assert made is not None
            found[name] = made.model_copy(update={"cost": made.cost.model_copy(update={
                "seconds": 0.0, "preparation_seconds": 0.0, "peak_bytes": None
            })})  # fmt: skip
        else:
            found[name] = path.read_bytes()
    return found


def test_every_batch_is_made_and_scored(suite: Suite, finished: Path) -> None:
    plan = make_plan(suite)
    assert len(plan.batches) == 2 * 5  # seeds 0 and 1, then 2; no LoRA, two alone, merge, regional
    assert all(is_done(finished, planned) for planned in plan.batches)
    assert not list(finished.rglob("*.part"))
    for planned in plan.batches:
        scores = read(batch_folder(finished, planned.key) / planned.scores, Scores)
        assert scores is not None
        assert set(scores.pictures) == set(planned.seeds)


def test_every_picture_carries_its_run(suite: Suite, finished: Path) -> None:
    planned = next(planned for planned in make_plan(suite).batches if planned.arm == "regional")
    record = read_record(picture_path(finished, planned.key, 1))
    assert (record.run.method, record.run.seed, record.run.steps) == ("regional", 1, 2)
    assert record.run.scene.prompt == SCENE["prompt"]
    assert record.batch == (0, 1)


def test_pictures_of_other_defaults_are_not_taken_for_todays(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    today = {planned.arm: planned.key for planned in make_plan(suite).batches}
    monkeypatch.setitem(METHODS, "regional", partial(Regional, rows="all"))
    other = {planned.arm: planned.key for planned in make_plan(suite).batches}
    assert {arm for arm in today if today[arm] != other[arm]} == {"regional"}


def test_a_picture_of_a_batch_can_be_made_again(suite: Suite, finished: Path) -> None:
    planned = next(planned for planned in make_plan(suite).batches if planned.arm == "merge")
    result = CliRunner().invoke(app, ["replay", str(picture_path(finished, planned.key, 1))])
    assert result.exit_code == 0, result.output
    assert "identical" in result.output


def test_cost_is_what_the_methods_take(suite: Suite, finished: Path) -> None:
    costs = {}
    for planned in make_plan(suite).batches:
        made = read(batch_folder(finished, planned.key) / MADE, Made)
        assert made is not None
        costs[planned.arm] = made.cost
    assert {name: cost.rows_forward for name, cost in costs.items()} == dict.fromkeys(costs, 4.0)  # 2 steps, guidance
    assert all(0 < cost.flops < 1e12 and cost.seconds > 0 for cost in costs.values())
    assert all(cost.peak_bytes and cost.peak_bytes > 50e6 for cost in costs.values())  # the weights alone in fp32


def test_an_offloaded_model_is_measured_where_it_runs(suite: Suite, tmp_path: Path) -> None:
    saving = suite.model_copy(update={"save_memory": (Saver.GRADIENT_CHECKPOINTING,)})
    worker = open_worker(saving, tmp_path, "cpu")
    assert worker.pipe.unet.is_gradient_checkpointing
    for model in (worker.pipe.text_encoder, worker.pipe.unet, worker.pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert worker.pipe.device.type == "meta"
    assert worker.device == torch.device("cpu")
    (planned, *_), (batch, *_) = make_plan(saving).batches, batches(saving)
    worker.do(batch, planned, lambda _: None)
    made = read(batch_folder(tmp_path, planned.key) / MADE, Made)
    assert made is not None
    assert made.machine.device == "cpu"
    assert made.cost.peak_bytes


def test_a_rerun_makes_nothing_again(suite: Suite, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "batches").rglob("*.*")}
    evaluate(suite, out)
    assert {path: path.stat().st_mtime_ns for path in (out / "batches").rglob("*.*")} == before


def test_a_new_way_of_scoring_keeps_the_pictures(suite: Suite, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "batches").rglob("*.png")}
    other = suite.model_copy(update={"scenes": (suite.scenes[0].model_copy(update={"regions": {
        "bear": (64, 0, 128, 128), "robot": (0, 0, 64, 128)
    }}),), "methods": (suite.methods[0],)})  # fmt: skip
    evaluate(other, out)
    plain = next(planned for planned in make_plan(other).batches if planned.arm == "no LoRA")
    assert len(list(batch_folder(out, plain.key).glob("scores-*.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in (out / "batches").rglob("*.png")}.items() >= before.items()


def _evaluate_quietly(suite: Suite, out: Path) -> None:
    torch.set_num_threads(1)
    evaluate(suite, out)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_results_are_the_same_after_kills_at_random_moments(suite: Suite, finished: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(0)
    fork = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import everything
    kills = 0
    for _ in range(60):
        if kills == 3 or all(is_done(out, planned) for planned in make_plan(suite).batches):
            break
        child = fork.Process(target=_evaluate_quietly, args=(suite, out))
        child.start()
        child.join(moments.uniform(0.3, 2.5))
        if child.exitcode is None:
            os.kill(child.pid or 0, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills >= 3
    evaluate(suite, out)
    for left in out.rglob(".*.part"):
        left.unlink()
    assert contents(out) == contents(finished)


def by_accelerate(suite_file: Path, out: Path) -> list[str]:
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launch, *fixed, "--module", "compose", "evaluate", str(suite_file), "--out", str(out)]


def by_option(suite_file: Path, out: Path) -> list[str]:
    return ["-m", "compose", "evaluate", str(suite_file), "--out", str(out), "--processes", "2"]


def called(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(suite_file: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = called(by_accelerate(suite_file, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(finished)
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_say_once_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, "encoder": "./nothing", "device": None}), encoding="utf-8")
    done = called(by_option(path, tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1, done.stderr
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_batch_is_written_down_and_tried_again(
    suite: Suite, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lost,) = [planned for planned in make_plan(suite).batches if (planned.arm, planned.seeds) == ("regional", (2,))]
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(batch_folder(out, lost.key))
    real = runner.make_batch

    def failing(pipe: Any, run: Any, seeds: Any, on_progress: Any = None) -> Any:
        if run.method == "regional" and 2 in seeds:
            raise RuntimeError("no more memory\nfor anybody")
        return real(pipe, run, seeds, on_progress)

    monkeypatch.setattr(runner, "make_batch", failing)
    evaluate(suite, out)
    assert [planned.key for planned in make_plan(suite).batches if not is_done(out, planned)] == [lost.key]
    told = read(batch_folder(out, lost.key) / FAILED, Failed)
    assert told is not None
    assert told.error == "RuntimeError: no more memory\nfor anybody"
    monkeypatch.undo()
    evaluate(suite, out)
    assert all(is_done(out, planned) for planned in make_plan(suite).batches)
    assert not list(out.rglob(FAILED))


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_results(
    suite: Suite, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = runner.write, []

    def filling(path: Path, stored: Any) -> None:
        if len(written) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        real(path, stored)

    monkeypatch.setattr(runner, "write", filling)
    with pytest.raises(OSError, match="No space left"):
        evaluate(suite, tmp_path)
    assert all(path.is_file() for path in written)
    monkeypatch.undo()
    evaluate(suite, tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_a_damaged_result_is_named(suite: Suite, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    planned = make_plan(suite).batches[0]
    (batch_folder(out, planned.key) / planned.scores).unlink()
    (batch_folder(out, planned.key) / MADE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        evaluate(suite, out)


def _with(suite_folder: Path, **changes: Any) -> list[str]:
    path = suite_folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}), encoding="utf-8")
    return ["evaluate", str(path), "--out", str(suite_folder / "out")]


def _unreadable(folder: Path) -> list[dict[str, Any]]:
    (folder / "broken.png").write_bytes(b"not a picture")
    return [{**CONCEPTS[0], "references": ["broken.png"]}, CONCEPTS[1]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: {"concepts": [{**CONCEPTS[0], "references": "./nowhere"}, CONCEPTS[1]]}, "there is no folder"),
        (lambda folder: {"concepts": _unreadable(folder)}, "cannot be read"),
        (lambda folder: {"concepts": [{**CONCEPTS[0], "lora": "./lost.safetensors"}, CONCEPTS[1]]}, "lost.safetensors"),
        (lambda folder: {"concepts": [{**CONCEPTS[0], "lora": "playground:fox"}, CONCEPTS[1]]}, "no LoRA 'fox'"),
        (lambda folder: {"encoder": "./nothing"}, "nothing"),
        (lambda folder: {"model": "./nothing"}, "there is no model"),
        (lambda folder: {"scheduler": "FastScheduler"}, "unknown scheduler 'FastScheduler'"),
        (
            lambda folder: {"scenes": [{**SCENE, "regions": {}}], "detector": {"kind": "windows"}},
            "scene 'both', regional: regional needs to know where the concepts are",
        ),
        (
            lambda folder: {"scenes": [{**SCENE, "regions": {"bear": [0, 0, 64, 300], "robot": [0, 0, 9, 9]}}]},
            "leaves the canvas",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_made(
    tmp_path: Path, change: Callable[[Path], dict[str, Any]], expected: str
) -> None:
    result = CliRunner().invoke(app, _with(tmp_path, **change(tmp_path)))
    assert result.exit_code == 2, result.output
    assert expected in result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(suite_file: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = CliRunner().invoke(app, ["evaluate", str(suite_file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "Permission denied" in result.output


def test_a_file_in_the_place_of_the_folder(suite_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    result = CliRunner().invoke(app, ["evaluate", str(suite_file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "failed" in result.output
    assert "Traceback" not in result.output


def test_the_report_is_written_at_the_end(suite_file: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    result = CliRunner().invoke(app, ["evaluate", str(suite_file), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert {"report.html", "report.md", "pictures.csv", "concepts.csv"} <= {path.name for path in out.iterdir()}
    again = CliRunner().invoke(app, ["evaluate", "report", str(out)])
    assert again.exit_code == 0, again.output


def test_pictures_are_scored_as_they_are_stored(suite: Suite, finished: Path) -> None:
    """A rerun scores what is on disk, so both must be the same picture."""
    planned = make_plan(suite).batches[0]
    with Image.open(picture_path(finished, planned.key, 0)) as image:
        assert image.mode == "RGB"
        assert image.size == (128, 128)
