"""Folders of many LoRA files: known by their headers, read when a call names them, kept while there is room."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components import State, random_lora, seeded, tiny_pipeline
from lora_compose.pipelines.concepts import library
from lora_compose.pipelines.concepts.loading import Factors
from lora_compose.pipelines.concepts.lru import Read, Recent
from lora_compose.pipelines.formats.files import LoraError, LoraFile
from lora_compose.pipelines.scene.scene import Concept

WORDS = {"cat": "sks", "dog": "zwx", "bear": "ohwx", "robot": "vtn"}
PROMPT = "a sks cat and a zwx dog"


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def folder(pipe: Any, write_lora: Callable[..., Path]) -> Path:
    """Four files, each with trigger and class word in its header."""
    for seed, (name, trigger) in enumerate(WORDS.items()):
        write_lora(name, unet=random_lora(pipe.unet, seed), metadata={"trigger": trigger, "class_word": name})
    return write_lora("unused", unet=random_lora(pipe.unet, 9)).parent


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with files from now on: "read cat.safetensors", "match cat.safetensors"."""
    done: list[str] = []

    def watched(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(file: Any, *args: Any, **options: Any) -> Any:
            done.append(f"{verb} {getattr(file, 'path', file).stem}")
            return function(file, *args, **options)

        return run

    monkeypatch.setattr(library, "read_lora", watched("read", library.read_lora))
    monkeypatch.setattr(library, "match", watched("match", library.match))
    return done


def latents_of(pipe: Any, *concepts: str | Concept, prompt: str = PROMPT) -> torch.Tensor:
    return pipe(
        prompt, concepts=list(concepts), method="merge", num_inference_steps=1, output_type="latent",
        width=32, height=32, generator=seeded(),
    ).images  # fmt: skip


def size_of(pipe: Any, name: str) -> int:
    """Bytes that a file takes in memory, the first that is read."""
    pipe.resolve_concepts([name])
    return pipe.library.recent.bytes


def test_a_folder_is_known_by_its_headers_alone(pipe: Any, folder: Path, work: list[str]) -> None:
    added = pipe.add_concepts(folder)
    assert [concept.name for concept in added] == ["bear", "cat", "dog", "robot", "unused"]
    assert pipe.concepts == {concept.name: concept for concept in added}
    assert pipe.concepts["cat"] == Concept(
        name="cat", lora=str(folder / "cat.safetensors"), trigger="sks", class_word="cat", weight=1.0
    )
    assert (pipe.concepts["unused"].trigger, pipe.concepts["unused"].class_word) == (None, None)
    assert work == []


def test_swapping_concepts_in_memory_reads_and_matches_nothing(pipe: Any, folder: Path, work: list[str]) -> None:
    pipe.add_concepts(folder)
    first = latents_of(pipe, "cat"), latents_of(pipe, "dog")
    assert work == ["read cat", "match cat", "read dog", "match dog"]
    work.clear()
    for name, expected in zip(("cat", "dog", "cat"), (*first, first[0]), strict=True):
        assert torch.equal(latents_of(pipe, name), expected)
    latents_of(pipe, Concept(name="tom", lora=str(folder / "cat.safetensors"), weight=0.5))
    assert work == []


def test_what_was_not_used_for_longest_leaves_the_memory(
    pipe: Any, folder: Path, work: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipe.add_concepts(folder)
    pipe.concept_memory = 2 * size_of(pipe, "cat")  # all are of one size
    with caplog.at_level(logging.DEBUG, "lora_compose.pipelines.concepts.lru"):
        for name in ("dog", "cat", "bear"):
            pipe.resolve_concepts([name])
    assert [record.args[0] for record in caplog.records] == [str(folder / "dog.safetensors")]  # pyright: ignore
    work.clear()
    pipe.resolve_concepts(["cat"])
    pipe.resolve_concepts(["bear"])
    assert work == []
    pipe.resolve_concepts(["dog"])
    assert work == ["read dog", "match dog"]


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five files; what is in them does not matter."""
    folder = tmp_path_factory.mktemp("recent")
    found = {name: folder / f"{name}.safetensors" for name in "abcde"}
    for path in found.values():
        path.touch()
    return found


@given(st.integers(0, 6), st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True)))
def test_memory_holds_the_files_used_last(paths: dict[str, Path], room: int, calls: list[list[str]]) -> None:
    recent, used, read = Recent(), [], []
    for names in calls:
        expected = [name for name in names if name not in used]
        for name in names:
            file = LoraFile(paths[name], "", {}, {"x": torch.ones(4), "same": torch.ones(0)})
            recent.get([paths[name]], None, lambda file=file: read.append(file.path.stem) or Read((file,), Factors({})))
        recent.trim(room * 16, keep=len(names))
        assert read == expected
        used = [*(name for name in used if name not in names), *names][-max(room, len(names)) :]
        assert recent.bytes == 16 * len(used)
        read.clear()


def test_concepts_of_one_call_stay_even_if_they_are_too_large(pipe: Any, folder: Path, work: list[str]) -> None:
    pipe.add_concepts(folder)
    pipe.concept_memory = 0
    for _ in range(2):
        latents_of(pipe, "cat", "dog")
    assert work == ["read cat", "match cat", "read dog", "match dog"]


def test_a_loaded_concept_is_not_dropped(pipe: Any, folder: Path, work: list[str]) -> None:
    pipe.concept_memory = 0
    pipe.load_concept(folder / "cat.safetensors")
    pipe.add_concepts([folder / "dog.safetensors"])
    for name in ("cat", "dog", "cat"):
        pipe.resolve_concepts([name])
    assert work == ["read cat", "match cat", "read dog", "match dog"]


def test_a_damaged_file_is_named_when_it_is_added_and_an_error_of_the_call_that_names_it(
    pipe: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (folder / "dog.safetensors").read_bytes()
    (folder / "dog.safetensors").write_bytes(whole[: len(whole) // 2])
    pipe.add_concepts(folder)
    assert "dog.safetensors is not a readable safetensors file" in caplog.text
    assert "'dog' is known by its name alone" in caplog.text
    expected, before, in_memory = latents_of(pipe, "cat"), State(pipe), pipe.library.recent.bytes
    with pytest.raises(LoraError, match=r"dog\.safetensors is not a readable safetensors file"):
        latents_of(pipe, "cat", "dog")
    before.assert_unchanged()
    assert pipe.library.recent.bytes == in_memory
    assert torch.equal(latents_of(pipe, "cat"), expected)
    (folder / "dog.safetensors").write_bytes(whole)  # the copy is complete now
    assert pipe.resolve_concepts(["dog"])[0].concept.trigger == "zwx"


def test_a_file_that_has_changed_is_read_again(pipe: Any, folder: Path, write_lora: Any, work: list[str]) -> None:
    pipe.add_concepts(folder)
    before = latents_of(pipe, "cat")
    write_lora("cat", unet=random_lora(pipe.unet, 5), metadata={"trigger": "zwx", "class_word": "dog"})
    assert not torch.equal(latents_of(pipe, "cat"), before)
    assert pipe.resolve_concepts(["cat"])[0].concept.trigger == "zwx"
    assert work.count("read cat") == 2


def test_what_is_in_memory_does_not_change_with_the_file(pipe: Any, folder: Path) -> None:
    path = folder / "cat.safetensors"
    pipe.load_concept(path)
    expected = latents_of(pipe, "cat")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size // 2))
    assert torch.equal(latents_of(pipe, "cat"), expected)


def test_fields_given_when_adding_override_the_header(pipe: Any, folder: Path) -> None:
    pipe.add_concepts([Concept(name="tom", lora=str(folder / "cat.safetensors"), trigger="xlo", weight=0.5)])
    (found,) = pipe.resolve_concepts([Concept(name="tom", region=(0, 0, 8, 8))])
    assert found.concept == Concept(
        name="tom", lora=str(folder / "cat.safetensors"), trigger="xlo", class_word="cat", weight=0.5,
        region=(0, 0, 8, 8),
    )  # fmt: skip


def test_fields_may_be_plain_json(pipe: Any, folder: Path) -> None:
    tom = {"lora": str(folder / "cat.safetensors"), "trigger": "xlo"}
    pipe.add_concepts({"tom": tom})
    pipe.add_concepts([{"name": "rex", "lora": str(folder / "dog.safetensors")}])
    assert (pipe.concepts["tom"].trigger, pipe.concepts["rex"].trigger) == ("xlo", "zwx")
    with pytest.raises(LoraError, match="concept 'bear' needs a file, and there is none at None"):
        pipe.add_concepts({"bear": {"trigger": "xlo"}})


def test_a_folder_can_be_added_again_for_its_new_files(pipe: Any, folder: Path, write_lora: Any) -> None:
    pipe.add_concepts(folder)
    pipe.unload_concept("unused")
    assert "unused" not in pipe.concepts
    write_lora("new", unet=random_lora(pipe.unet, 7))
    pipe.add_concepts(folder)
    assert {"unused", "new"} <= pipe.concepts.keys()


def test_names_are_given_once_or_nothing_is_added(pipe: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = (folder / "cat.safetensors").rename(tmp_path / "other" / "dog.safetensors")
    with pytest.raises(ValueError, match=r"would both be called 'dog'; name them: Concept\(name="):
        pipe.add_concepts([folder / "bear.safetensors", folder / "dog.safetensors", other])
    pipe.load_concept(other, "bear")
    with pytest.raises(ValueError, match="a concept or adapter 'bear' already"):
        pipe.add_concepts(folder)
    assert list(pipe.concepts) == ["bear"]


def test_files_that_are_not_there_are_refused_when_adding(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="has no safetensors files"):
        pipe.add_concepts(tmp_path)
    with pytest.raises(LoraError, match="concept 'cat' needs a file, and there is none at"):
        pipe.add_concepts([tmp_path / "cat.safetensors"])
    assert pipe.concepts == {}
