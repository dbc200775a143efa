"""Folders of workers: kept while one lives, removed when all are dead, however they died."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_compose.compose.support.folders import hold, remove

pytest.importorskip("fcntl", reason="Windows has no locks that end with a process")
HOLDS = """
import sys
from lora_compose.compose.support.folders import hold
held = hold(sys.argv[1])
(held.path / "file").write_text("gigabytes")
print(held.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, in which workers have theirs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def worker(name: str) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Another process that holds a folder until it is killed."""
    command = [sys.executable, "-c", HOLDS, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Path(process.stdout.readline().strip()), process
        finally:
            process.kill()


def test_the_next_worker_removes_what_a_killed_one_has_left_and_nothing_of_a_living_one(temporary: Path) -> None:
    with worker("living") as (living, _), worker("killed") as (killed, process):
        other = hold("killed")
        process.kill()
        process.wait()
        hold("next")
        assert (killed / "file").exists(), "another worker of the same node holds it"
        other._lock.close()
        held = hold("next")
        assert not killed.exists()
        assert (living / "file").read_text() == "gigabytes"
        assert held.path.is_dir()
        names = {path.name for path in temporary.iterdir()}
        assert names == {f"lora-compose-{name}{end}" for name in ("living", "next") for end in ("", ".lock")}


def test_a_folder_is_removed_at_the_end_also_if_its_worker_is_only_just_dying(temporary: Path) -> None:
    with worker("dying") as (folder, process):
        process.kill()
        remove(str(folder))
    assert not list(temporary.iterdir())


def test_a_name_in_the_folder_of_all_users_that_leads_elsewhere_is_refused(temporary: Path, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "file").touch()
    (temporary / "lora-compose-a").symlink_to(elsewhere)
    (temporary / "lora-compose-a.lock").touch()
    (temporary / "lora-compose-b.lock").symlink_to(elsewhere / "file")
    with pytest.raises(OSError, match="lora-compose-b"):
        hold("b")
    assert (elsewhere / "file").exists()
    (temporary / "lora-compose-b.lock").unlink()
    with pytest.raises(OSError, match=r"lora-compose-a"):
        hold("a")
    assert (elsewhere / "file").exists()
