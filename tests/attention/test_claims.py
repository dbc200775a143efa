"""Calls claim models: many may read one, and one alone may change it; what was interrupted is finished first."""

import sys
import threading
from collections.abc import Callable

import pytest
from torch import nn

from lora_compose.attention.claims import Claim, ClaimKind, Journal, claimed, undoing


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ("read", "read", True), ("read", "compose", False), ("read", "install", False), ("compose", "read", True),
        ("compose", "compose", False), ("compose", "install", True), ("install", "read", False),
        ("install", "compose", False), ("install", "install", False),
    ],
)  # fmt: skip
def test_which_claims_go_together_in_one_thread(first: ClaimKind, second: ClaimKind, allowed: bool) -> None:
    model = nn.Linear(1, 1)
    with claimed([model], first):
        if allowed:
            with claimed([model], second):
                pass
        else:
            with pytest.raises(RuntimeError, match="another image"), claimed([model], second):
                pass
        with claimed([nn.Linear(1, 1)], second):
            pass
    with claimed([model], second):
        pass


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)


def test_a_call_alone_puts_loras_into_its_models() -> None:
    model, refused = nn.Linear(1, 1), []

    def install() -> None:
        try:
            with claimed([model], "install"):
                pass
        except RuntimeError as error:
            refused.append(error)

    with claimed([model], "compose"):
        in_a_thread(install)
    assert len(refused) == 1


def test_a_call_reads_its_models_until_it_changes_one() -> None:
    model = nn.Linear(1, 1)
    with claimed([model], "compose"), undoing(model) as journal:
        with claimed([model], "read"):
            pass
        journal.callback(list)
        with pytest.raises(RuntimeError, match="another image"), claimed([model], "read"):
            pass


def test_a_claim_that_is_refused_claims_nothing_and_undoes_nothing() -> None:
    free, taken, undone = nn.Linear(1, 1), nn.Linear(1, 1), []
    with claimed([taken], "compose"), undoing(taken) as undo:
        undo.callback(undone.append, 1)
        with pytest.raises(RuntimeError), claimed([free, taken], "compose"):
            pass
        with claimed([free], "compose"):
            pass
        assert not undone
    assert undone == [1]


class Interrupted:
    """A change whose undoing is interrupted so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.undone = times, False

    def undo(self) -> None:
        self.times -= 1
        if self.times >= 0:
            raise KeyboardInterrupt
        self.undone = True


def note(journal: Journal, *changes: Interrupted) -> None:
    for change in changes:
        journal.callback(change.undo)


def test_what_is_undone_is_finished_at_once_though_it_is_interrupted() -> None:
    model, last, first = nn.Linear(1, 1), Interrupted(1), Interrupted(0)
    with pytest.raises(KeyboardInterrupt), undoing(model) as undo:
        note(undo, first, last)
    assert last.undone
    assert first.undone


@pytest.mark.parametrize("times", range(2, 6))
def test_what_is_undone_is_finished_by_the_next_claim_at_the_latest(times: int) -> None:
    models, last, first = (nn.Linear(1, 1), nn.Linear(1, 1)), Interrupted(times), Interrupted(0)
    with pytest.raises(KeyboardInterrupt), claimed(models, "compose"), undoing(models[0]) as undo:
        note(undo, first, last)
    while not last.undone:  # each attempt ends where it is interrupted
        try:
            with claimed([models[1]], "read"):
                assert last.undone
        except KeyboardInterrupt:
            pass
    assert first.undone
    in_a_thread(lambda: Claim(models, "compose").take())


def test_no_other_thread_interferes_while_changes_are_being_undone() -> None:
    model, refused = nn.Linear(1, 1), []

    def other() -> None:
        try:
            Claim([model], "read").take()
        except RuntimeError as error:
            refused.append(error)

    with claimed([model], "compose"), undoing(model) as undo:
        undo.callback(in_a_thread, other)
    assert len(refused) == 1


def test_the_changes_of_a_thread_that_is_gone_are_undone_by_whoever_comes_next() -> None:
    model, change = nn.Linear(1, 1), Interrupted(4)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt), claimed([model], "compose"), undoing(model) as undo:
            note(undo, change)

    in_a_thread(interrupted)
    assert not change.undone
    with claimed([model], "read"):
        assert change.undone


def test_an_interrupted_note_is_kept_until_its_change_is_undone() -> None:
    journal, change = Journal(), Interrupted(3)
    note(journal, change)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            journal.undo_to(0)
        assert len(journal) == 1
    journal.undo_to(0)
    assert len(journal) == 0


def test_a_journal_holds_no_model_that_is_not_being_changed() -> None:
    model = nn.Linear(1, 1)
    with claimed([model], "compose"), undoing(model) as undo:
        undo.callback(setattr, model, "training", model.training)
    assert sys.getrefcount(model) == 2
