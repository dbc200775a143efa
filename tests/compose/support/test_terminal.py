"""Progress, in a terminal and without one."""

import io
import time

import pytest
from rich.console import Console

from lora_compose.compose.support import terminal
from lora_compose.compose.support.terminal import bar, progress_line, starting


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The output on stderr without a terminal, with hardly any time between two lines."""
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=stream, width=200))
    monkeypatch.setattr(terminal, "EVERY", 0.01)
    return stream


def wait_for(text: str, stream: io.StringIO) -> None:
    until = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.01)


def test_progress_is_reported_in_lines_without_a_terminal(told: io.StringIO) -> None:
    with bar("composing", 4) as on_progress:
        wait_for("composing: 0%, 0:00 so far\n", told)
        on_progress(1)
        wait_for("composing: 25%, 0:00 so far\n", told)
        on_progress(3, "composing, \x1b[31mthe last")
        wait_for("composing, \\x1b[31mthe last: 75%, 0:00 so far, about 0:0", told)
    ended = told.getvalue()
    time.sleep(0.05)
    assert told.getvalue() == ended, "nothing is told afterwards"


def test_work_of_unknown_length_has_progress_too(told: io.StringIO) -> None:
    with starting():
        wait_for("starting: 0:00 so far\n", told)


def test_quick_work_has_no_progress(told: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "EVERY", 60.0)
    with bar("composing", 1) as on_progress:
        on_progress(1)
    assert told.getvalue() == ""


def test_the_lines_end_with_an_exception(told: io.StringIO) -> None:
    with pytest.raises(KeyboardInterrupt), bar("composing", 1):
        raise KeyboardInterrupt
    ended = told.getvalue()
    time.sleep(0.05)
    assert told.getvalue() == ended


def test_a_bar_is_drawn_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=stream, width=100, force_terminal=True))
    with bar("composing", 2) as on_progress:
        on_progress(1, "composing the second")
        wait_for("composing the second", stream)
    assert "left" in stream.getvalue()
    assert "so far" not in stream.getvalue()


def test_the_time_left_in_a_terminal_is_by_all_of_the_work_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of methods that are timed in turns: a quick call, and one of a minute."""
    stream, now = io.StringIO(), 0.0
    console = Console(file=stream, width=100, force_terminal=True, get_time=lambda: now)
    monkeypatch.setattr(terminal, "err", console)
    with bar("timing", 20) as on_progress:
        for done in range(1, 20):
            now += 2 if done % 2 else 60
            on_progress(done, f"timing {done}")
        wait_for("timing 19", stream)
    assert "0:00:31" in stream.getvalue()  # the mean of a call, since the first one


@pytest.mark.parametrize(
    ("done", "total", "seconds", "line"),
    [
        (0, 10, 5.0, "training: 0%, 0:05 so far"),
        (2.5, 10, 20.0, "training: 25%, 0:20 so far, about 1:00 left"),
        (5, 10, 4000.0, "training: 50%, 1:06:40 so far, about 1:06:40 left"),
        (12, 10, 4.0, "training: 100%, 0:04 so far, about 0:00 left"),
        (3, None, 7.4, "training: 0:07 so far"),
        (0, 0, 7.4, "training: 0:07 so far"),
    ],
)
def test_a_line_says_how_much_is_done_and_left(done: float, total: float | None, seconds: float, line: str) -> None:
    assert progress_line("training", done, total, seconds) == line


def test_the_time_left_of_resumed_work_goes_by_what_was_done_since() -> None:
    assert progress_line("training", 60, 100, 30.0, first=(50, 10.0)) == "training: 60%, 0:30 so far, about 1:20 left"
    assert progress_line("training", 50, 100, 30.0, first=(50, 10.0)) == "training: 50%, 0:30 so far"
