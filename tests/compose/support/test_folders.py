"""Folders of processes: kept while one that holds them lives, removed when all are dead, however they died."""

import errno
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_compose.compose.support import folders
from lora_compose.compose.support.folders import hold, remove

fcntl = pytest.importorskip("fcntl", reason="Windows has no locks that end with a process")
HOLDS = """
import sys
from lora_compose.compose.support.folders import hold
held = hold(sys.argv[1])
(held.path / "file").write_text("gigabytes")
print(held.path, flush=True)
sys.stdin.read()
"""
FORKS = """
import os, sys
from lora_compose.compose.support.folders import of_this_process
folder = of_this_process("forked")
if not (child := os.fork()):
    print(of_this_process("forked"), flush=True)
    sys.exit()
os.waitpid(child, 0)
print(folder, folder.is_dir())
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


def test_a_folder_that_another_process_holds_as_well_is_not_removed(temporary: Path) -> None:
    with worker("both") as (folder, process):
        hold("both").remove()
        assert (folder / "file").read_text() == "gigabytes"
        process.kill()
        process.wait()
        hold("both").remove()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("without", ["module", "locks on this file system"])
def test_a_folder_is_removed_where_there_are_no_locks(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if without == "module":
        monkeypatch.setattr(folders, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refused)
    held = hold("a")
    (held.path / "file").touch()
    held.remove()
    assert not list(temporary.iterdir())


def test_the_end_of_a_forked_process_leaves_the_folder_of_its_parent(temporary: Path) -> None:
    said = subprocess.run([sys.executable, "-c", FORKS], check=True, capture_output=True, text=True).stdout.split()
    of_child, of_parent, is_there = said
    assert of_child != of_parent
    assert is_there == "True"
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
