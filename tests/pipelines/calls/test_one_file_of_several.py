"""Several subjects in one file: loaded and installed once, gated by the words and regions of each concept."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components import random_lora, seeded, tiny_pipeline
from lora_compose.attention import Gates
from lora_compose.attention.install import Installation
from lora_compose.pipelines.concepts import library
from lora_compose.pipelines.methods import Draft, Regional
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but

PROMPT = "a sks cat and a zwx cat on grass"
LEFT, RIGHT = (0, 0, 32, 64), (32, 0, 64, 64)


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def duo(pipe: Any, write_lora: Callable[..., Path]) -> Path:
    """One file, and the same content under another name."""
    path = write_lora("duo", unet=random_lora(pipe.unet, 1))
    shutil.copy(path, path.with_name("copy.safetensors"))
    return path


def concept(name: str, path: Path, trigger: str, **fields: Any) -> Concept:
    return Concept(name=name, lora=str(path), trigger=trigger, class_word="cat", **fields)


def latents_of(pipe: Any, *concepts: Concept | str, method: Any = "regional", prompt: str = PROMPT) -> torch.Tensor:
    return pipe(
        prompt, concepts=list(concepts), method=method, num_inference_steps=2, output_type="latent",
        width=64, height=64, generator=seeded(),
    ).images  # fmt: skip


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many LoRAs the bank layers of each pass have."""
    found: list[int] = []
    inputs = Installation.inputs

    def watched(self: Installation, gates: Gates, *args: Any, **options: Any) -> Any:
        found.extend({len(layer.key.ranks) for layer in self.bank.values()})
        return inputs(self, gates, *args, **options)

    monkeypatch.setattr(Installation, "inputs", watched)
    return found


GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "regional": ({"region": LEFT, "weight": 0.8}, {"region": RIGHT, "weight": "1..0.5"}),
    "lora-composer": ({"region": LEFT}, {"region": RIGHT}),
    "clora": ({}, {}),
    "draft": ({}, {"weight": 0.8}),
    "switch": ({"weight": 0.8}, {}),
}


@pytest.mark.parametrize("method", slow_but(("regional", "lora-composer", "draft"), GIVEN))
def test_subjects_of_one_file_are_gated_as_those_of_two(pipe: Any, duo: Path, ranks: list[int], method: str) -> None:
    left, right = GIVEN[method]
    # Each on its own words too: else both change the text, and two files change it twice.
    on_own_words = {"regional": Regional(token_mask="all"), "draft": Draft(token_mask="all")}
    used: Any = on_own_words.get(method, method)
    copy = duo.with_name("copy.safetensors")
    apart = latents_of(pipe, concept("a", duo, "sks", **left), concept("b", copy, "zwx", **right), method=used)
    assert set(ranks) == {2}
    ranks.clear()
    shared = latents_of(pipe, concept("a", duo, "sks", **left), concept("b", duo, "zwx", **right), method=used)
    assert set(ranks) == {1}
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)


def test_where_subjects_of_one_file_overlap_it_acts_once(pipe: Any, write_lora: Callable[..., Path]) -> None:
    duo = write_lora("text", unet=random_lora(pipe.unet, 1), text_encoder=random_lora(pipe.text_encoder, 2))
    alone = latents_of(pipe, concept("a", duo, "sks"), method="merge")
    both = latents_of(pipe, concept("a", duo, "sks"), concept("b", duo, "zwx", weight=0.5), method="merge")
    assert torch.equal(both, alone)
    ramp = concept("b", duo, "zwx", weight="0..1")
    both = latents_of(pipe, concept("a", duo, "sks"), ramp, method="merge")
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


def test_one_file_is_read_once_however_it_is_named(
    pipe: Any, duo: Path, ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        library, "read_lora", lambda path, *, of=library.read_lora, **o: (read.append(path), of(path))[1]
    )
    pipe.load_concept(duo, "a", trigger="sks", class_word="cat", region=LEFT)
    pipe.load_concept(duo, "b", trigger="zwx", class_word="cat", region=RIGHT)
    latents_of(pipe, "a", "b", concept("c", duo, "third"), prompt=f"{PROMPT} with a third cat")
    assert len(read) == 1
    assert set(ranks) == {1}
    pipe.unload_concept("a")
    pipe.unload_concept("b")
    pipe.load_concept(duo, "d")
    assert len(read) == 1, "the file is still in memory, since a call named it"


def test_a_file_that_changed_is_not_shared(pipe: Any, duo: Path, write_lora: Callable[..., Path]) -> None:
    first = pipe.load_concept(duo, "a", trigger="sks", class_word="cat")
    write_lora("duo", unet=random_lora(pipe.unet, 7))
    pipe.load_concept(duo, "b", trigger="zwx", class_word="cat")
    one, other = (pipe.library.loaded[name].factors for name in (first.name, "b"))
    assert one is not other
