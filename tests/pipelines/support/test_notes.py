"""Warnings: in every call, in the first call of a process, and as values of a plan."""

import logging

import pytest

from lora_compose.pipelines.support import notes


def test_what_was_warned_of_once_is_not_made_again(caplog: pytest.LogCaptureFixture) -> None:
    made = []

    def message() -> str:
        made.append(1)
        return "too much"

    for about in ("cat", "cat", "dog"):
        notes.warn_first(about, message)
    assert len(made) == 2
    assert caplog.messages == ["too much", "too much"]
    notes.warn_once("ignored")
    notes.warn_once("ignored")
    assert caplog.messages[2:] == ["ignored"]


def test_a_plan_keeps_each_warning_once_and_logs_none(caplog: pytest.LogCaptureFixture) -> None:
    with notes.kept() as found:
        for _ in range(2):
            notes.warn_once("ignored")
            notes.warn("again")
    assert found == ["ignored", "again"]
    assert not caplog.messages
    notes.warn_once("ignored")  # was not logged by the plan
    assert caplog.messages == ["ignored"]


def test_memory_of_warnings_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger=notes.logger.name)
    for number in range(3 * notes.MOST_LOGGED):
        notes.warn_once(str(number))
        assert len(notes.logged) <= notes.MOST_LOGGED


def test_warnings_that_are_held_come_at_the_end_and_not_at_all_after_a_refusal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with notes.held():
        notes.warn("again")
        notes.warn_once("ignored")
        assert not caplog.messages
    assert caplog.messages == ["again", "ignored"]

    @notes.held()
    def refuse() -> None:
        notes.warn_once("too much")
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refuse()
    assert caplog.messages[2:] == []
    with notes.kept() as found, notes.held():
        notes.warn_once("too much")  # was not logged
    assert found == ["too much"]
