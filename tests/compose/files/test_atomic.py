"""Atomic writes: what other processes see of a file that is being written, and what a killed writer leaves."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from disks import files_of_at_most
from lora_compose.compose.files import atomic
from lora_compose.compose.files.atomic import write_new, write_whole
from lora_compose.compose.files.paths import free_path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


@contextmanager
def writer(path: Path) -> Iterator[int]:
    """A process that has written half a file and goes no further."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def write() -> None:
        with atomic._part(path, b"half"):
            ready.set()
            signal.pause()

    process = fork.Process(target=write)
    process.start()
    assert ready.wait(10)
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def later_process(path: Path, data: bytes) -> None:
    """Writes as a process does that has not written yet."""
    atomic._remove_leftovers.cache_clear()
    write_whole(path, data)


def test_what_a_killed_writer_leaves_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".other.part").write_bytes(b"somebody else's")
    with writer(tmp_path / "plan.json") as pid:
        os.kill(pid, signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    later_process(tmp_path / "plan.json", b"whole")
    assert names(tmp_path) == [".other.part", "plan.json"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    with writer(tmp_path / "plan.json"):
        (part,) = names(tmp_path)
        later_process(tmp_path / "plan.json", b"whole")
        assert names(tmp_path) == sorted([part, "plan.json"])


def test_a_writer_goes_on_whose_file_was_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = atomic.fcntl.flock, []

    def sooner(file: Any, how: int) -> None:
        if not taken:
            (left,) = tmp_path.iterdir()
            left.unlink()
            taken.append(left)
        real(file, how)

    monkeypatch.setattr(atomic.fcntl, "flock", sooner)
    write_whole(tmp_path / "plan.json", b"whole")
    assert taken
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_bytes() == b"whole"


@pytest.mark.parametrize("write", [write_whole, lambda path, data: write_new(path, data, free_path)])
def test_what_cannot_be_written_is_named_and_leaves_everything_as_it_was(tmp_path: Path, write: object) -> None:
    assert callable(write)
    (path := tmp_path / "plan.json").write_bytes(b"before")
    with files_of_at_most(10), pytest.raises(OSError, match=r"plan\.json") as raised:
        write(path, bytes(100))
    assert raised.value.errno == errno.EFBIG
    assert names(tmp_path) == ["plan.json"]
    assert path.read_bytes() == b"before"


def test_names_as_long_as_they_may_be_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), b"whole")
    assert names(tmp_path) == ["n" * 255]


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_whole(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("taken", ["file", "link"])
def test_a_name_that_is_given_again_although_it_is_taken_ends_the_write(tmp_path: Path, taken: str) -> None:
    path = tmp_path / "it"
    path.symlink_to("nowhere") if taken == "link" else path.write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        write_new(path, b"mine", lambda path: path)
    assert [one.name for one in tmp_path.iterdir()] == ["it"]
