"""What downloads say that fail, and the table of it in the docs."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from commands import free_port
from local_hub import LocalHub, Repository, connect, serving
from lora_compose.compose.evaluation.published import Download, Published, wanted
from lora_compose.compose.evaluation.suite import Suite
from lora_compose.pipelines.concepts.finding import find_file

LORA, FILE = "somebody/cat-lora", "cat.safetensors"
PAGE = Path(__file__).parents[3] / "docs/models.md"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with a file of another repository's size, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with serving(LocalHub({LORA: Repository({FILE: b"weights" * 1000})})) as hub:
        connect(hub, tmp_path / "cache", monkeypatch)
        yield hub


def breaks(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    hub.breaks[FILE] = [0] * 6
    find_file(LORA)


def other_bytes(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    hub.changed.add(FILE)
    find_file(LORA)


def another_file(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    cat = {"name": "cat", "lora": "cat", "trigger": "sks", "class_word": "cat", "references": "playground:cat"}
    scene = {"name": "one", "prompt": "a sks cat", "concepts": ["cat"], "regions": {"cat": [0, 0, 64, 64]}}
    suite = Suite.model_validate({
        "name": "small", "model": "playground", "encoder": "playground:judge", "detector": {"kind": "windows"},
        "concepts": [cat], "scenes": [scene], "methods": ["merge"], "seeds": [1],
    })  # fmt: skip
    downloads = {"cat": Download(repository=LORA, file=FILE, sha256="0" * 64)}
    list(wanted(Published(downloads=downloads, suite=suite)))


def gated(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    hub.repositories[LORA].gated = True
    find_file(LORA)


def no_repository(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    find_file("somebody/dog-lora")


def no_revision(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    find_file(LORA, revision="v9")


def no_file(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    find_file(LORA, "dog.safetensors")


def out_of_reach(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    find_file(LORA)


def offline(hub: LocalHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    find_file(LORA)


FAILURES: dict[str, Callable[[LocalHub, pytest.MonkeyPatch], None]] = {
    "it breaks five times without new bytes": breaks,
    "other bytes than the hub has, e.g. from a proxy": other_bytes,
    "another file than a [published suite](evaluation.md#public-models-and-loras) names": another_file,
    "gated repository": gated,
    "no such repository, or a private one": no_repository,
    "no such revision": no_revision,
    "no such file": no_file,
    "hub out of reach, nothing in the cache": out_of_reach,
    "`HF_HUB_OFFLINE=1`, not in the cache": offline,
}
TOLD_BY_WARNING = "hub out of reach, a copy in the cache"


def table() -> dict[str, tuple[str, str]]:
    """Message and what is downloaded again, by failure, as the docs have them."""
    text = PAGE.read_text(encoding="utf-8").partition("**What does a download say that fails?**")[2]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n\n")[1].splitlines()[2:]]
    return {name: (message.partition("`")[2].strip("`"), again) for name, message, again in rows}


def told_in_the_docs(name: str) -> str:
    """A pattern for the message."""
    return re.escape(table()[name][0]).replace("…", ".+")


@pytest.mark.parametrize("name", FAILURES)
def test_the_docs_have_the_message_and_what_is_downloaded_again(
    name: str, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises((OSError, ValueError)) as caught:
        FAILURES[name](hub, patch)
    assert re.search(told_in_the_docs(name), str(caught.value), re.DOTALL)
    before = hub.bytes_of(FILE)
    assert bool(before) == (FAILURES[name] is other_bytes), "nothing arrived, but for that"
    hub.breaks.clear()
    hub.changed.clear()
    hub.repositories[LORA].gated = False
    find_file(LORA)
    find_file(LORA)
    assert hub.bytes_of(FILE) - before == len(hub.repositories[LORA].files[FILE]), "once, whole"


def test_the_docs_have_the_warning_of_a_copy_in_the_cache(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_file(LORA)
    served = len(hub.served)
    out_of_reach(hub, monkeypatch)
    assert re.search(told_in_the_docs(TOLD_BY_WARNING), caplog.text)
    assert len(hub.served) == served


def test_the_docs_have_these_failures_and_one_that_says_nothing() -> None:
    assert {name for name, (message, _) in table().items() if message} == {*FAILURES, TOLD_BY_WARNING}
