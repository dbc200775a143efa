"""Running an evaluation: interruptions, several processes, failures, and what is kept."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate import cpu_offload
from PIL import Image

from commands import call
from disks import files_of_at_most
from evaluations import contents
from killing import kill_at_work
from lora_compose.compose.cluster.work import keep
from lora_compose.compose.evaluation import planning, report, worker
from lora_compose.compose.evaluation.batches import batches
from lora_compose.compose.evaluation.planning import open_plan, plan_batches
from lora_compose.compose.evaluation.results import (
    CLAIMS,
    FAILED,
    MADE,
    Failed,
    Made,
    Scores,
    batch_folder,
    image_path,
    is_done,
)
from lora_compose.compose.evaluation.runner import evaluate
from lora_compose.compose.evaluation.scoring import Scorer, open_scorer
from lora_compose.compose.evaluation.suite import Suite, read_suite
from lora_compose.compose.evaluation.worker import Images, Worker
from lora_compose.compose.files.claims import Claims
from lora_compose.compose.files.images import read_record
from lora_compose.compose.files.stored import read, write
from lora_compose.compose.generate import processes
from lora_compose.compose.playground.assets import playground_lora
from lora_compose.compose.support.savers import Saver
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.methods import METHODS, Regional

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
    "regions": {"bear": [0, 0, 32, 64], "robot": [32, 0, 64, 64]},
    "width": 64,
    "height": 64,
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
    "steps": 1,
    "guidance_scale": 4,
    "device": "cpu",
}

PATIENCE = 1.0
pytestmark = pytest.mark.usefixtures("tensors_of_others_do_not_count", "playgrounds_opened_once")


class Once(dict[Any, int]):
    """The memory of the first kind of call stands for that of all others."""

    def __contains__(self, kind: object) -> bool:
        return len(self) > 0

    def __getitem__(self, kind: Any) -> int:
        return next(iter(self.values()))


@pytest.fixture(autouse=True, scope="module")
def _costs_are_measured_once() -> Iterator[None]:
    """What a kind of call costs is measured once for all workers, as otherwise for all batches of one.

    Memory is measured once, references are embedded once, and reports have no plots, which no test here reads.
    """
    counted, peaks, opens = {}, Once(), Worker.open
    scorers: dict[str, Scorer] = {}

    def scorer_of(suite: Suite, device: str = "cpu") -> Scorer:
        key = repr((suite.encoder, suite.detector, suite.concepts, suite.metrics, device))
        if key not in scorers:
            scorers[key] = open_scorer(suite, device)
        return replace(scorers[key], suite=suite)

    def opened(suite: Suite, device: str) -> Worker:
        worker = opens(suite, device)
        if not suite.save_memory:
            worker._counted, worker._peaks = counted, peaks
        return worker

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Worker, "open", opened)
        patched.setattr(worker, "open_scorer", scorer_of)
        patched.setattr(report, "against_cost", lambda *_: "")
        yield


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    path.write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def suite(suite_file: Path) -> Suite:
    return read_suite(str(suite_file))


@pytest.fixture(scope="module")
def finished(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("finished")
    evaluate(suite, out)
    return out


def test_every_batch_is_made_and_scored(suite: Suite, finished: Path) -> None:
    plan = plan_batches(suite)
    assert len(plan.batches) == 2 * 5  # seeds 0 and 1, then 2; no LoRA, two alone, merge, regional
    assert all(is_done(finished, planned) for planned in plan.batches)
    assert not list(finished.rglob("*.part"))
    for planned in plan.batches:
        scores = read(batch_folder(finished, planned.key) / planned.scores, Scores)
        assert scores is not None
        assert set(scores.images) == set(planned.seeds)


def test_every_image_carries_its_run(suite: Suite, finished: Path) -> None:
    planned = next(planned for planned in plan_batches(suite).batches if planned.arm == "regional")
    record = read_record(image_path(finished, planned.key, 1))
    assert (record.run.method, record.run.seed, record.run.steps) == ("regional", 1, 1)
    assert record.run.scene.prompt == SCENE["prompt"]
    assert record.batch == (0, 1)


def test_images_of_other_defaults_are_not_taken_for_todays(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    today = {planned.arm: planned.key for planned in plan_batches(suite).batches}
    monkeypatch.setitem(METHODS, "regional", partial(Regional, rows="all"))
    other = {planned.arm: planned.key for planned in plan_batches(suite).batches}
    assert {arm for arm in today if today[arm] != other[arm]} == {"regional"}


def test_cost_is_what_the_methods_take(suite: Suite, finished: Path) -> None:
    costs = {}
    for planned in plan_batches(suite).batches:
        made = read(batch_folder(finished, planned.key) / MADE, Made)
        assert made is not None
        costs[planned.arm] = made.cost
    assert {name: cost.rows_forward for name, cost in costs.items()} == dict.fromkeys(costs, 2.0)  # guided
    assert all(0 < cost.flops < 1e12 and cost.seconds > 0 for cost in costs.values())
    assert all(cost.peak_bytes and cost.peak_bytes > 50e6 for cost in costs.values())  # the weights alone in fp32


def test_scenes_with_a_start_image_cost_the_steps_that_are_run(suite: Suite, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "start.png")
    start = {"name": "from an image", "image": str(tmp_path / "start.png"), "strength": 0.4}
    scenes = (suite.scenes[0].model_copy(update=start), *suite.scenes)
    both = suite.model_copy(update={"scenes": scenes, "methods": suite.methods[:1], "seeds": (0,), "steps": 10})
    opened, rows, flops = Worker.open(both, "cpu"), {}, {}
    for batch in (batch for batch in batches(both) if not batch.arm.alone):
        which = batch.scene.name, batch.arm.name
        if batch.scene.image is None:  # what such a call takes, `test_cost_is_what_the_methods_take` has made
            counted = opened.count(batch)
            rows[which], flops[which] = counted.rows_forward, counted.flops
            continue
        made = next(opened.do(batch))
        assert isinstance(made, Images)
        rows[which], flops[which] = made.cost.rows_forward, made.cost.flops
    for arm in ("no LoRA", "merge"):
        assert (rows["from an image", arm], rows["both", arm]) == (8, 20)  # four of ten steps, guided
        # Texts are read once; for so few steps LoRAs are not added to the weights, which makes a step dearer.
        assert 0.4 <= flops["from an image", arm] / flops["both", arm] < 0.5


def test_an_offloaded_model_is_measured_where_it_runs(suite: Suite) -> None:
    saving = suite.model_copy(update={"save_memory": (Saver.GRADIENT_CHECKPOINTING,)})
    opened = Worker.open(saving, "cpu")
    assert opened.pipe.unet.is_gradient_checkpointing
    for model in (opened.pipe.text_encoder, opened.pipe.unet, opened.pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert opened.pipe.device.type == "meta"
    assert opened.device == torch.device("cpu")
    made = next(opened.do(next(batches(saving))))
    assert isinstance(made, Images)
    assert made.machine.device == "cpu"
    assert made.cost.peak_bytes


def test_a_scene_with_a_bystander_is_made_and_scored(suite: Suite, finished: Path, tmp_path: Path) -> None:
    """Images without it, of no LoRA and of one alone, are those of the scene with two concepts, and scored anew."""
    scene = suite.scenes[0].model_copy(update={
        "prompt": "a xlo bear and a robot on grass", "concepts": ("bear",), "bystanders": {"other": "robot"},
        "regions": {"bear": (0, 0, 32, 64), "other": (32, 0, 64, 64)},
    })  # fmt: skip
    beside = suite.model_copy(update={"scenes": (scene,), "seeds": (0, 1), "methods": suite.methods[:1]})
    out = shutil.copytree(finished, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "batches").rglob("*.png")}
    evaluate(beside, out)
    assert {path: path.stat().st_mtime_ns for path in (out / "batches").rglob("*.png")}.items() >= before.items()
    known = {planned.key for planned in plan_batches(suite).batches}
    for planned in plan_batches(beside).batches:
        scores = read(batch_folder(out, planned.key) / planned.scores, Scores)
        assert scores is not None, planned.arm
        assert [[*image.bystanders["other"]] for image in scores.images.values()] == [["bear"]] * 2
        assert (planned.key in known) == (planned.arm in ("no LoRA", "alone"))
        assert len(list(batch_folder(out, planned.key).glob("scores-*.json"))) == 1 + (planned.key in known)
    record = read_record(image_path(out, plan_batches(beside).batches[-1].key, 1))
    assert [concept.is_bystander for concept in record.run.scene.concepts] == [False, True]


def _evaluate_quietly(suite: Suite, out: Path) -> None:
    torch.set_num_threads(1)
    evaluate(suite, out, patience=PATIENCE)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_results_are_the_same_after_kills_at_random_moments(suite: Suite, finished: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "out", random.Random(0)
    fork = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import everything
    kills = 0
    for _ in range(60):
        if kills == 3 or all(is_done(out, planned) for planned in plan_batches(suite).batches):
            break
        child = fork.Process(target=_evaluate_quietly, args=(suite, out))
        child.start()
        child.join(moments.uniform(0.3, 2.5))
        if child.exitcode is None:
            os.kill(child.pid or 0, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills >= 3
    evaluate(suite, out, patience=PATIENCE)
    assert contents(out) == contents(finished)
    assert not list((out / CLAIMS).iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_processes_join_at_any_time_and_do_the_work_of_one_that_was_killed_twice(
    suite: Suite, finished: Path, tmp_path: Path
) -> None:
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")

    def joins() -> BaseProcess:
        process = fork.Process(target=_evaluate_quietly, args=(suite, out))
        process.start()
        return process

    def made() -> int:
        return len(list(out.rglob(MADE)))

    steady = joins()
    for number in (2, 5):
        while made() < number:
            assert steady.exitcode is None
            time.sleep(0.01)
        kill_at_work(joins, out / CLAIMS, steady)
    steady.join()
    assert steady.exitcode == 0
    assert contents(out) == contents(finished)
    evaluate(suite, out, patience=PATIENCE)  # takes over what the killed one had claimed of what was done already
    assert contents(out) == contents(finished)
    assert not list((out / CLAIMS).iterdir())


@pytest.mark.slow
def test_what_another_process_has_just_tried_in_vain_is_left_alone(
    suite: Suite, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    lost = plan_batches(suite).batches[-1]
    shutil.rmtree(batch_folder(out, lost.key))

    def another_fails(done: float, text: str = "") -> None:
        folder = batch_folder(out, lost.key)
        if done >= 1 and not folder.exists():
            about = {"scene": lost.scene, "arm": lost.arm, "alone": lost.alone, "seeds": lost.seeds}
            write(folder / FAILED, Failed(**about, error="no more memory"))

    evaluate(suite, out, another_fails)
    assert not is_done(out, lost)
    evaluate(suite, out)
    assert is_done(out, lost)


def test_a_process_whose_batch_was_taken_over_keeps_the_results_of_the_other(
    suite: Suite, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    key, late = next(iter(open_plan(suite, out).items()))
    opened = Worker.open(suite, "cpu")
    with Claims(out / CLAIMS).claim(key) as claim:
        assert claim is not None
        (batch_folder(out, key) / MADE).unlink()
        before = set(batch_folder(out, key).iterdir())
        claim.path.rename(out / CLAIMS / f"{key}.1")
        keep(key, late, opened.do(late.batch), claim)
    assert set(batch_folder(out, key).iterdir()) == before
    assert "was taken over by another process" in caplog.text


def by_accelerate(suite_file: Path, out: Path) -> list[str]:
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launch, *fixed, "--module", "lora_compose", "evaluate", str(suite_file), "--out", str(out)]


def by_option(suite_file: Path, out: Path) -> list[str]:
    return ["-m", "lora_compose", "evaluate", str(suite_file), "--out", str(out), "--processes", "2"]


def called(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("started", [by_accelerate, by_option])
def test_two_processes_give_the_results_of_one(
    suite_file: Path, finished: Path, tmp_path: Path, started: Callable[[Path, Path], list[str]]
) -> None:
    out = tmp_path / "out"
    done = called(started(suite_file, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(finished)
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_report_an_error_once(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, "encoder": "./nothing", "device": None}), encoding="utf-8")
    done = called(by_option(path, tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1, done.stderr
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rerun_writes_at_the_end_the_report_that_a_killed_process_began(
    suite_file: Path, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    (out / CLAIMS).mkdir(exist_ok=True)
    (out / CLAIMS / "report.0").write_text("host 1\n")
    told = call("evaluate", "run", suite_file, "--out", out).output
    assert "The report: " in told
    written = {"report.html", "report.md", "images.csv", "concepts.csv"}
    assert written <= {path.name for path in out.iterdir()}
    for name in written:
        (out / name).unlink()
    call("evaluate", "report", out)
    assert written <= {path.name for path in out.iterdir()}


def test_a_failing_batch_is_written_down_and_tried_again(
    suite: Suite, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lost,) = [planned for planned in plan_batches(suite).batches if (planned.arm, planned.seeds) == ("regional", (2,))]
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(batch_folder(out, lost.key))
    real = worker.make_batch

    def failing(pipe: Any, run: Any, seeds: Any, on_progress: Any = None) -> Any:
        if run.method == "regional" and 2 in seeds:
            raise RuntimeError("no more memory\nfor anybody")
        return real(pipe, run, seeds, on_progress)

    monkeypatch.setattr(worker, "make_batch", failing)
    evaluate(suite, out)
    assert [planned.key for planned in plan_batches(suite).batches if not is_done(out, planned)] == [lost.key]
    told = read(batch_folder(out, lost.key) / FAILED, Failed)
    assert told is not None
    assert told.error == "RuntimeError: no more memory\nfor anybody"
    monkeypatch.undo()
    evaluate(suite, out)
    assert all(is_done(out, planned) for planned in plan_batches(suite).batches)
    assert not list(out.rglob(FAILED))


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_results(suite: Suite, finished: Path, tmp_path: Path) -> None:
    def fill(done: float, text: str = "") -> None:
        if done > 3:
            disk.enter_context(files_of_at_most(1000))

    with ExitStack() as disk, pytest.raises(OSError, match=r"/batches/.*\.png"):
        evaluate(suite, tmp_path, fill)
    assert sum(is_done(tmp_path, planned) for planned in plan_batches(suite).batches) == 3
    assert not list(tmp_path.rglob("*.part"))
    evaluate(suite, tmp_path)
    assert contents(tmp_path) == contents(finished)


# --- damaged results ---


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _swap(folder: Path) -> None:
    for name, other in (("0", "spare"), ("1", "0"), ("spare", "1")):
        (folder / f"{name}.png").rename(folder / f"{other}.png")


def _forget_checksums(path: Path) -> None:
    path.write_text(json.dumps({name: told for name, told in json.loads(path.read_text()).items() if name != "sha256"}))


def test_only_what_is_damaged_is_made_again(
    suite: Suite, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    plan = plan_batches(suite)
    both = [planned for planned in plan.batches if planned.seeds == (0, 1)]
    last = [planned for planned in plan.batches if planned.seeds == (2,)]
    folders = [batch_folder(out, planned.key) for planned in (*both, *last)]
    _cut(folders[0] / "0.png")
    (folders[0] / both[0].scores).unlink()
    _swap(folders[1])
    _flip(folders[2] / "1.png")
    (folders[3] / "0.png").unlink()
    (folders[4] / MADE).write_text("{")
    shutil.copy(folders[6] / MADE, folders[5] / MADE)
    (folders[6] / last[1].scores).write_text("{")
    (folders[7] / last[2].scores).write_text('{"images": {}}')
    _forget_checksums(folders[8] / MADE)
    _cut(folders[8] / "2.png")
    untouched = [*folders[6].glob("2.png"), *folders[7].glob("2.png"), *folders[9].iterdir()]
    before = {path: path.stat().st_mtime_ns for path in untouched}

    evaluate(suite, out)
    assert contents(out) == contents(finished)
    assert len(before) == 5
    assert {path: path.stat().st_mtime_ns for path in untouched} == before
    told = [record.getMessage() for record in caplog.records if record.name == planning.__name__]
    assert len(told) == 9
    damaged = ["0.png", "0.png", "1.png", "0.png", MADE, MADE, last[1].scores, last[2].scores, "2.png"]
    for folder, name in zip(folders, damaged, strict=False):
        assert any(str(folder / name) in line and line.endswith("is generated again") for line in told), (folder, name)


def test_a_rerun_makes_nothing_again(suite: Suite, finished: Path, tmp_path: Path) -> None:
    """Nor do checksums that are not there, or a clock that has been set back."""
    out = shutil.copytree(finished, tmp_path / "out")
    for path in out.rglob(MADE):
        _forget_checksums(path)
    for path in [*out.rglob("*")]:
        os.utime(path, (4e9, 4e9))
    evaluate(suite, out)
    assert {path.stat().st_mtime for path in (out / "batches").rglob("*.*")} == {4e9}


# --- several processes ---


def _ends(pid: int) -> bool:
    """Whether a process ends soon; a zombie counts."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "lora_compose").mkdir()
    (tmp_path / "lora_compose" / "__init__.py").touch()
    (tmp_path / "lora_compose" / "__main__.py").write_text(
        "print('at work', flush=True)\nimport time\ntime.sleep(60)\n"
    )
    start = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "assert child.stdout.readline() == b'at work\\n'\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", start, processes.CHILD.read_text("utf-8")]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as one:
        assert one.stdout is not None
        pid = int(one.stdout.readline())
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        one.send_signal(number)
        one.wait(10)
        assert _ends(pid)


def _launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *texts: str, look: Callable[[], None]) -> int:
    """Starts processes that run these texts instead of an evaluation."""
    program = tmp_path / "child.py"
    cases = [f"if os.environ['LOCAL_RANK'] == '{rank}':\n    {text}\n" for rank, text in enumerate(texts)]
    program.write_text("import os, signal, sys, time\n" + "".join(cases))
    monkeypatch.setattr(processes, "CHILD", program)
    try:
        return processes.launch([], len(texts), 1, look)
    finally:
        assert not psutil.Process().children()


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_process_that_was_killed_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[float] = []
    code = _launched(tmp_path, monkeypatch, "time.sleep(2)", KILLED, look=lambda: looks.append(time.monotonic()))
    assert code == 0
    assert len(looks) >= 2
    told = capsys.readouterr().err
    assert told.count("was ended by SIGKILL; where memory runs out") == 1
    assert "The others do its work" in told
    with pytest.raises(OSError, match="no process is left"):
        _launched(tmp_path, monkeypatch, KILLED, KILLED, look=lambda: None)


def test_what_is_wrong_in_a_process_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "sys.stderr.write('no such model'); sys.exit(2)"
    assert _launched(tmp_path, monkeypatch, wrong, wrong, look=lambda: None) == 2
    assert capsys.readouterr().err == "no such model"


def test_a_process_that_cannot_be_ended_politely_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

    def stop() -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _launched(tmp_path, monkeypatch, stubborn, "time.sleep(60)", look=stop)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_no_process_outlives_the_command(suite_file: Path, finished: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore Ctrl-C
    started = subprocess.Popen([sys.executable, *by_option(suite_file, out)], env=environment, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    while not list(out.rglob("*.png")):
        assert started.poll() is None
        time.sleep(0.05)
    children = psutil.Process(started.pid).children(recursive=True)
    assert len(children) == 2
    os.kill(started.pid, number)
    started.wait(30)
    assert all(_ends(child.pid) for child in children)
    done = called(by_option(suite_file, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(finished)
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_work_of_a_killed_process_of_several_is_done_by_the_other(
    suite_file: Path, finished: Path, tmp_path: Path, rank: int
) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *by_option(suite_file, out)]
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(out.rglob("*.png")):
        assert started.poll() is None
        time.sleep(0.05)
    psutil.Process(started.pid).children()[rank].kill()
    _, told = started.communicate(timeout=200)
    assert started.returncode == 0, told
    assert "was ended by SIGKILL" in told
    assert "Traceback" not in told
    assert contents(out) == contents(finished)
    assert (out / "report.html").is_file()


# --- what cannot work ---


def _with(suite_folder: Path, **changes: Any) -> list[str]:
    path = suite_folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}), encoding="utf-8")
    return ["evaluate", str(path), "--out", str(suite_folder / "out")]


def _broken(at: Path) -> str:
    (at / "cut.safetensors").write_bytes(playground_lora("bear").read_bytes()[:500])
    return "./cut.safetensors"


def _unreadable(folder: Path) -> list[dict[str, Any]]:
    (folder / "broken.png").write_bytes(b"not an image")
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
        (lambda at: {"concepts": [{**CONCEPTS[0], "lora": _broken(at)}, CONCEPTS[1]]}, "cut.safetensors is not"),
        (lambda folder: {"scenes": [{**SCENE, "width": 10**6, "height": 10**6}]}, "cannot be made: one pass"),
        (
            lambda folder: {"scenes": [{**SCENE, "regions": {"bear": [0, 0, 64, 300], "robot": [0, 0, 9, 9]}}]},
            "leaves the canvas",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_reported_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], dict[str, Any]], expected: str
) -> None:
    monkeypatch.setattr(ComposePipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was opened"))
    assert expected in call(*_with(tmp_path, **change(tmp_path)), code=2).output
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(suite_file: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in call("evaluate", suite_file, "--out", tmp_path / "out", code=1).output
