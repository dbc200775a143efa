"""Making the images of a batch: what is made, resuming, failures, and several processes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commands import call
from killing import kill_at_work
from lora_compose.compose.batch import worker
from lora_compose.compose.batch.entries import Entry, read_entries
from lora_compose.compose.batch.results import STATE
from lora_compose.compose.batch.runner import run_batch
from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.files.images import read_pixels, read_record
from lora_compose.compose.generate.replay import replay_and_compare

SETTINGS = {"model": "playground", "steps": 1, "guidance_scale": 4, "threads": 1, "device": "cpu"}
SCENES: list[dict[str, Any]] = [
    {
        "name": "bear", "prompt": "a xlo bear on grass", "seeds": "0-2", "width": 64, "height": 64,
        "concepts": [{"name": "bear", "lora": "playground:bear", "trigger": "xlo", "class_word": "bear"}],
    },
    {
        "name": "both", "prompt": "a xlo bear and a qrt robot on sand", "width": 64, "height": 64,
        "concepts": [
            {"name": "bear", "lora": "playground:bear", "trigger": "xlo", "class_word": "bear",
             "region": [0, 0, 32, 64]},
            {"name": "robot", "lora": "playground:robot", "trigger": "qrt", "class_word": "robot",
             "region": [32, 0, 64, 64]},
        ],
    },
    {"name": "plain", "prompt": "a bear", "width": 64, "height": 64},
]  # fmt: skip
SEEDS, BATCH_SIZE, PATIENCE = (5, 6), 2, 1.0
pytestmark = pytest.mark.usefixtures("playgrounds_opened_once")
IMAGES = [f"{name}.png" for name in ("bear-0", "bear-1", "bear-2", "both-5", "both-6", "plain-5", "plain-6")]


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "small.yaml"
    fields = {**SETTINGS, "seeds": list(SEEDS), "batch_size": BATCH_SIZE, "scenes": SCENES}
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def entries(batch_file: Path) -> tuple[Entry, ...]:
    return read_entries([batch_file]).entries


@pytest.fixture(scope="module")
def settings(batch_file: Path) -> BatchSettings:
    return BatchSettings(**read_entries([batch_file]).settings)


@pytest.fixture(scope="module")
def finished(entries: tuple[Entry, ...], settings: BatchSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("finished")
    results = run_batch(entries, settings, out)
    assert [(one.path and one.path.name, one.error) for one in results] == [(name, None) for name in IMAGES]
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}


def test_images_are_those_of_a_run_and_can_be_reproduced(entries: tuple[Entry, ...], finished: Path) -> None:
    assert sorted(contents(finished)) == IMAGES
    assert not list((finished / STATE / "claims").iterdir())
    record = read_record(finished / "both-6.png")
    assert record.batch == SEEDS
    assert record.run.scene == entries[1].scene
    assert (record.run.method, record.run.seed) == ("draft", 6)
    assert replay_and_compare(record, read_pixels(finished / "both-6.png"))


def test_a_rerun_makes_only_what_is_missing_or_damaged(
    entries: tuple[Entry, ...], settings: BatchSettings, finished: Path, copied: Path
) -> None:
    (copied / "bear-1.png").unlink()
    data = bytearray((copied / "both-6.png").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "both-6.png").write_bytes(data)
    (copied / STATE / "made" / "plain-5.json").write_text("{")
    (copied / "plain-5.png").unlink()
    (copied / "plain-6.png").unlink()
    before, told = times(copied), []
    run_batch(entries, settings, copied, lambda *done: told.append(done))
    assert contents(copied) == contents(finished)
    assert times(copied)["bear-2.png"] == before["bear-2.png"]
    assert told[0] == (1, f"composing into {copied}"), "scenes are checked once"
    assert told[-1] == (4,)


def test_a_rerun_without_anything_to_do_opens_no_model(
    entries: tuple[Entry, ...], settings: BatchSettings, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(worker, "open_model")
    before = times(copied)
    assert all(one.error is None for one in run_batch(entries, settings, copied))
    assert times(copied) == before


def test_images_of_other_settings_are_kept_unless_they_are_to_be_replaced(
    entries: tuple[Entry, ...], settings: BatchSettings, finished: Path, copied: Path
) -> None:
    other = settings.model_copy(update={"guidance_scale": 3.0})
    with pytest.raises(ValueError, match=r"bear-0\.png is there already.*4 such images.*--replace"):
        run_batch(entries, other, copied)
    assert contents(copied) == contents(finished)
    run_batch(entries[2:], other, copied, replace=True)
    assert read_record(copied / "plain-5.png").run.guidance_scale == 3
    assert contents(copied)["bear-0.png"] == contents(finished)["bear-0.png"]
    stranger = copied.parent / "photos"
    stranger.mkdir()
    (stranger / "plain-6.png").write_bytes(b"a photo")
    with pytest.raises(ValueError, match="was made in another way"):
        run_batch(entries[2:], settings, stranger)


def test_scenes_that_cannot_be_made_are_found_before_the_first_image_and_spoil_no_other(
    entries: tuple[Entry, ...], settings: BatchSettings, finished: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    odd = Entry("odd", entries[2].scene.model_copy(update={"width": 130}), None, "rows.csv, line 7")
    seen: list[set[str]] = []

    def look(done: float, doing: str = "") -> None:
        if doing.startswith("composing"):
            seen.append({path.stem for path in (tmp_path / STATE / "checked").iterdir()})
            assert not contents(tmp_path)

    results = run_batch([odd, entries[2]], settings, tmp_path, look)
    assert seen == [{"odd", "plain"}]
    assert any("rows.csv, line 7" in record.getMessage() for record in caplog.records)
    assert [one.error is None for one in results] == [False, False, True, True]
    assert "130" in str(results[0].error)
    assert contents(tmp_path).items() <= contents(finished).items()


def test_what_fails_is_kept_and_tried_again_in_a_rerun(
    entries: tuple[Entry, ...], settings: BatchSettings, finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = worker.make_batch, []

    def failing(pipe: Any, run: Any, seeds: Any, on_progress: Any = None) -> Any:
        tried.append(seeds)
        if 2 in seeds:
            raise RuntimeError("no more memory")
        return real(pipe, run, seeds, on_progress)

    monkeypatch.setattr(worker, "make_batch", failing)
    for name in ("bear-2.png", "plain-6.png"):
        (copied / name).unlink()
    results = run_batch(entries, settings, copied)
    assert [one.error for one in results if one.error] == ["RuntimeError: no more memory"]
    assert sorted(tried) == [(2,), SEEDS]
    monkeypatch.undo()
    assert all(one.error is None for one in run_batch(entries, settings, copied))
    assert contents(copied) == contents(finished)
    assert not list((copied / STATE / "failed").iterdir())


def test_the_command_makes_the_same_and_lists_it(
    batch_file: Path, finished: Path, copied: Path, tmp_path: Path
) -> None:
    (copied / "plain-5.png").unlink()
    table = tmp_path / "rows.csv"
    said = call("batch", batch_file, "--out", copied).output
    assert "3 scenes, 7 images" in said
    assert "5 of them are there already" in said
    assert "7 images in" in said
    assert contents(copied) == contents(finished)
    listed = [json.loads(line) for line in (copied / "images.jsonl").read_text().splitlines()]
    assert [line["image"] for line in listed] == IMAGES
    assert {line["source"] for line in listed} == {f"{batch_file}, scenes[{i}]" for i in range(3)}
    ways = {line["name"]: (line["method"], line["reason"]) for line in listed}
    assert ways["plain"] == (None, None)
    assert ways["bear"][0] == "merge"
    assert ways["both"] == ("draft", "every concept has a region, and the prompt names each by trigger and class word")
    assert f"2 by draft, because {ways['both'][1]}" in said
    table.write_text("prompt,name,width,height\na bear,plain,64,64\na bear,wide,-1,64\n")
    options = ["--model", "playground", "--steps", 1, "--guidance", 4, "--threads", 1, "--device", "cpu"]
    said = call("batch", table, *options, "--seed", "5-6", "--batch-size", 2, "--out", copied, code=1).output
    assert f"{table}, line 3: width" in said
    assert contents(copied) == contents(finished), "the same scene from a table is the same image"


# --- several processes ---


def _run_quietly(entries: tuple[Entry, ...], settings: BatchSettings, out: Path) -> None:
    torch.set_num_threads(1)
    run_batch(entries, settings, out, patience=PATIENCE)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_images_are_the_same_after_kills_at_random_moments(
    entries: tuple[Entry, ...], settings: BatchSettings, finished: Path, tmp_path: Path
) -> None:
    fork, moments, kills = multiprocessing.get_context("fork"), random.Random(0), 0
    for _ in range(40):
        if kills == 3 or len(contents(tmp_path)) == len(IMAGES):
            break
        child = fork.Process(target=_run_quietly, args=(entries, settings, tmp_path))
        child.start()
        child.join(moments.uniform(0.2, 2.0))
        if child.exitcode is None:
            os.kill(child.pid or 0, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills >= 2
    run_batch(entries, settings, tmp_path, patience=PATIENCE)
    assert contents(tmp_path) == contents(finished)
    assert not list((tmp_path / STATE / "claims").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_two_processes_of_which_one_is_killed_twice_give_the_images_of_one(
    entries: tuple[Entry, ...], settings: BatchSettings, tmp_path: Path
) -> None:
    """Two processes share a folder; one is killed with SIGKILL, started again, and killed again."""
    one_by_one = settings.model_copy(update={"batch_size": 1, "seeds": (0, 1, 2, 3)})
    out, undisturbed, fork = tmp_path / "out", tmp_path / "undisturbed", multiprocessing.get_context("fork")
    run_batch(entries, one_by_one, undisturbed)

    def joins() -> BaseProcess:
        process = fork.Process(target=_run_quietly, args=(entries, one_by_one, out))
        process.start()
        return process

    steady = joins()
    for number in (1, 4):
        while len(contents(out)) < number:
            assert steady.exitcode is None
            time.sleep(0.01)
        kill_at_work(joins, out / STATE / "claims", steady)
    steady.join()
    assert steady.exitcode == 0
    assert len(contents(out)) == 3 + 4 + 4
    assert contents(out) == contents(undisturbed)
    assert not list((out / STATE / "claims").iterdir())


@pytest.mark.slow
def test_two_processes_started_by_one_command_give_the_images_of_one(
    batch_file: Path, finished: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lora_compose", "batch", str(batch_file), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--processes", "2"], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "composing into" in done.stderr, "progress is told without a terminal"
    assert contents(tmp_path / "out") == contents(finished)
