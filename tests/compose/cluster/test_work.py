"""Work in pieces, as this process does it: what is kept, what is left to others, and what is reported."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_compose.compose.cluster import work
from lora_compose.compose.cluster.packing import Node, Parcel
from lora_compose.compose.cluster.work import Failure, Progress, ThisProcess
from lora_compose.compose.files.claims import Claims


@dataclass(frozen=True)
class Piece:
    """A number whose double is kept in a file."""

    path: Path
    number: float

    def arguments(self) -> tuple[float] | None:
        return None if self.path.exists() else (self.number,)

    def keep(self, result: Any) -> None:
        self.path.write_text(f"{result}")

    def keep_failure(self, error: str) -> None:
        self.path.write_text(f"{self.path.read_text() if self.path.exists() else ''}, {error}")


def double(opened: list[float], number: float, on_progress: Callable[[float], None]) -> Iterator[float]:
    opened.append(number)
    on_progress(0.5)
    yield 2 * number
    on_progress(1 / number)


def pieces(folder: Path, *numbers: float) -> dict[str, Piece]:
    return {f"{number}": Piece(folder / f"{number}", number) for number in numbers}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_results_are_kept_as_they_come_and_a_failure_stops_no_other_piece(tmp_path: Path) -> None:
    told: list[Any] = []
    opened: list[float] = []
    workers = ThisProcess(lambda node: opened)
    progress = Progress(told.append, 2)
    workers.work(double, Claims(tmp_path / "claims"), pieces(tmp_path, 2, 0, 3), progress)
    assert contents(tmp_path) == {"2": "4", "0": "0, ZeroDivisionError: division by zero", "3": "6"}
    assert told == [2.5, 2.5, 3, 3.5, 4, 4.5, 4 + 1 / 3, 5]
    assert opened == [2, 0, 3]
    assert not list((tmp_path / "claims").iterdir())


def test_nothing_is_opened_for_pieces_that_others_have_done(tmp_path: Path) -> None:
    told: list[Any] = []
    (tmp_path / "1").touch()

    def opening(node: Node) -> Any:
        raise AssertionError("it is needed for nothing")

    ThisProcess(opening).work(double, Claims(tmp_path / "claims"), pieces(tmp_path, 1), Progress(told.append, 0))
    assert told == [1]


def test_what_others_have_claimed_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, others, opened = tmp_path / "claims", ExitStack(), list[float]()
    assert others.enter_context(Claims(folder).claim("1")) is not None
    sleeping = SimpleNamespace(sleep=lambda seconds: others.close())  # then the other process ends
    monkeypatch.setattr(work, "time", sleeping)  # of this module alone: threads of other tests sleep too
    ThisProcess(lambda node: opened).work(double, Claims(folder), pieces(tmp_path, 1, 2, 3), Progress([].append, 0))
    assert opened == [2, 3, 1]


def test_an_error_of_what_is_opened_or_kept_ends_the_work_and_the_claims(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    cannot = {"1": Piece(tmp_path / "none" / "1", 1)}
    for opening, wanted, error in ((dict[str, int]().pop, pieces(tmp_path, 2), KeyError), (list, cannot, OSError)):
        with pytest.raises(error):
            ThisProcess(lambda node, opening=opening: opening("a")).work(
                double, Claims(tmp_path / "claims"), wanted, Progress([].append, 0)
            )
        assert not list((tmp_path / "claims").iterdir())


def test_results_of_a_piece_that_another_process_has_taken_over_are_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claims = tmp_path / "claims"

    def overtaken(opened: Any, number: float) -> Iterator[float]:
        yield number
        (claims / "1.0").rename(claims / "1.1")
        yield 3
        raise AssertionError("a result was read after the claim was lost")

    ThisProcess(lambda node: None).work(overtaken, Claims(claims), pieces(tmp_path, 1))
    assert contents(tmp_path) == {"1": "1"}
    assert "was taken over by another process" in caplog.text


def test_this_machine_has_all_files(tmp_path: Path) -> None:
    def where(node: Node, source: str) -> Iterator[str]:
        yield node.unpack(Parcel())(source)
        raise OSError(node.as_given(source))

    given = str(tmp_path / "model")
    ended = {name: [*results] for name, results in ThisProcess(lambda node: node).map(where, {"a": (given,)})}
    assert ended == {"a": [given, Failure(f"OSError: {given}")]}
