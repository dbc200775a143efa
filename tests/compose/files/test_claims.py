"""Claims: one owner at a time, and none that stays behind."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_compose.compose.files.claims import Claims

PATIENCE = 0.6


def test_what_is_claimed_cannot_be_claimed_until_it_ends(tmp_path: Path) -> None:
    one, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    with one.claim("a.b") as first:
        assert first is not None
        assert first.held
        with other.claim("a.b") as second, other.claim("a") as elsewhere, one.claim("a.b") as again:
            assert second is None
            assert again is None
            assert elsewhere is not None
    with other.claim("a.b") as second:
        assert second is not None
    assert not list((tmp_path / "claims").iterdir())


def test_a_claim_ends_with_an_error(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with pytest.raises(RuntimeError), claims.claim("a"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_owner_that_is_alive_keeps_its_claim(tmp_path: Path) -> None:
    one, other = Claims(tmp_path, PATIENCE), Claims(tmp_path, PATIENCE)
    with one.claim("a") as first:
        for _ in range(10):
            with other.claim("a") as second:
                assert second is None
            time.sleep(PATIENCE / 5)
        assert first is not None
        assert first.held


def waited(claims: Claims, until: Callable[[], bool]) -> float:
    """Seconds until a claim is got, under which a condition must hold."""
    start = time.monotonic()
    while True:
        with claims.claim("a") as taken:
            if taken is not None:
                assert until()
                return time.monotonic() - start
        assert time.monotonic() - start < 20
        time.sleep(0.02)


def _hold(folder: Path) -> None:
    with Claims(folder, PATIENCE).claim("a"):
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="stops and kills a forked process")
def test_the_claim_of_an_owner_without_a_sign_of_life_passes_on(tmp_path: Path) -> None:
    owner = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path,))
    owner.start()
    while not (tmp_path / "a.0").exists():
        time.sleep(0.01)
    os.utime(tmp_path / "a.0", (4e9, 4e9))  # a clock that is years ahead decides nothing
    claims = Claims(tmp_path, PATIENCE)
    with claims.claim("a") as taken:
        assert taken is None
    os.kill(owner.pid or 0, signal.SIGSTOP)
    assert waited(claims, lambda: [path.name for path in tmp_path.iterdir()] == ["a.1"]) >= PATIENCE / 2
    owner.kill()
    owner.join()


def test_a_slow_owner_can_tell_that_its_claim_was_taken_over(tmp_path: Path) -> None:
    slow = Claims(tmp_path)._take("a")  # gives no sign of life
    assert slow is not None
    assert slow.held
    waited(Claims(tmp_path, 0.05), lambda: not slow.held)
    assert not slow.held


def test_of_many_at_once_one_gets_each_piece_of_work(tmp_path: Path) -> None:
    names = [str(i) for i in range(40)]
    done: list[str] = []

    def work() -> None:
        claims = Claims(tmp_path / "claims")
        for name in names:
            with claims.claim(name) as taken:
                if taken is not None and not (tmp_path / name).exists():
                    (tmp_path / name).touch()
                    done.append(name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(names)
    assert not list((tmp_path / "claims").iterdir())
