"""A model hub that is out of reach is reported at once, and its cache is read."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lora_compose import ComposePipeline, LoraError
from lora_compose.pipelines.concepts.finding import find_file
from lora_compose.pipelines.support.hub import is_hub_name, reachable

REPOSITORY = "somebody/a-model"


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub at an unused port, and an empty cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return endpoint


@pytest.mark.parametrize(
    ("open_it", "error"),
    [(ComposePipeline.from_pretrained, ConnectionError), (find_file, LoraError)],
    ids=["a model", "a concept"],
)
def test_a_hub_out_of_reach_is_an_error_at_once_that_says_what_to_do(
    unreachable: str, open_it: Any, error: Any
) -> None:
    started = time.perf_counter()
    with pytest.raises(
        error, match=r"is out of reach .*no copy of 'somebody/a-model'.* Give a folder or a file"
    ) as caught:
        open_it(REPOSITORY)
    assert unreachable in str(caught.value)
    assert time.perf_counter() - started < 5, "the hub's client alone retries for half a minute"


def test_a_copy_in_the_cache_is_read_with_a_warning(unreachable: str, tmp_path: Path, caplog: Any) -> None:
    cached = tmp_path / "mine" / "models--somebody--a-model"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "model_index.json").write_text("{}")
    given = {"cache_dir": str(tmp_path / "mine")}
    found = reachable(REPOSITORY, "model_index.json", **given)
    assert found == {**given, "local_files_only": True}
    assert "is read from the cache" in caplog.text


@pytest.mark.parametrize("options", [{"local_files_only": True}, {}])
def test_nothing_is_asked_where_only_the_cache_is_wanted(options: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not options)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert reachable(REPOSITORY, "model_index.json", **options) == options


def test_folders_and_files_are_no_repositories(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    assert not is_hub_name("a/b")
    assert not is_hub_name("/a/b")
    assert not is_hub_name("model")
    assert is_hub_name("a/c")
