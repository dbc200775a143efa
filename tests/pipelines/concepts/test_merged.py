"""Several files as one concept: the same as a merged file, or as concepts side by side where that is the sum."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components import EVERYTHING, State, random_lora, seeded, text_loras, tiny_pipeline
from lora_compose.compose.lora.matching import match_files
from lora_compose.compose.lora.merging import Given, merge_files
from lora_compose.pipelines.concepts import library
from lora_compose.pipelines.concepts.loading import read_lora
from lora_compose.pipelines.merging import make_merger
from lora_compose.pipelines.merging.calibration import calibrate, prompt_of
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def files(pipe: Any, write_lora: Callable[..., Path]) -> list[str]:
    """Two files for UNet, convolutions and text encoder, of different ranks and scales."""
    return [
        str(
            write_lora(
                name, unet=random_lora(pipe.unet, seed, rank=rank, scale=scale, targets=EVERYTHING, size=0.2),
                **text_loras(pipe, seed), metadata={"trigger": trigger, "class_word": "cat"},
            )
        )
        for seed, (name, trigger, rank, scale) in enumerate([("cat", "sks", 3, 0.5), ("style", "wfy", 2, 1.5)])
    ]  # fmt: skip


def latents_of(pipe: Any, *concepts: str | Concept) -> torch.Tensor:
    return pipe(
        "a sks cat in wfy style", concepts=list(concepts), method="merge", num_inference_steps=2, output_type="latent",
        width=32, height=32, generator=seeded(),
    ).images  # fmt: skip


def test_their_sum_gives_the_image_of_all_of_them(pipe: Any, files: list[str]) -> None:
    cat, style = files
    apart = latents_of(pipe, Concept(name="cat", lora=cat), Concept(name="style", lora=style, weight=0.7))
    together = latents_of(pipe, Concept(name="both", lora=[cat, f"{style}:0.7"]))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    half = latents_of(pipe, Concept(name="both", lora=[cat, f"{style}:0.7"], weight=0.5))
    assert float((half - apart).abs().max()) > 1e-2


@pytest.mark.parametrize("method", slow_but(["ties"], ["ties", "ssr"]))
def test_the_image_is_that_of_the_merged_file(method: str, pipe: Any, files: list[str], tmp_path: Path) -> None:
    before = State(pipe)
    together = latents_of(pipe, Concept(name="both", lora=files, merge=method))
    before.assert_unchanged()
    given = [Given(path, read_lora(Path(path))) for path in files]
    matched = match_files(given, pipe)
    merger = make_merger(method)
    texts = [prompt_of(one.file) for one in given]
    moments = calibrate(pipe, matched.changes, texts, merger) if merger.needs_model else None
    merge_files(matched, merger, tmp_path / "out.safetensors", moments=moments)
    merged = latents_of(pipe, Concept(name="one", lora=str(tmp_path / "out.safetensors")))
    torch.testing.assert_close(together, merged, atol=1e-3, rtol=1e-3)


def test_a_dora_is_merged_as_its_change_of_this_models_weights(
    pipe: Any, files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Exactly here: no layer has more outputs than the rank to which it is cut."""
    cat, style = files
    tensors = load_file(cat)
    for key in [key for key in tensors if key.startswith("unet.") and ".lora_A" in key]:
        stem = key.partition(".lora_A")[0]
        norms = pipe.unet.get_submodule(stem.removeprefix("unet.")).weight.detach().flatten(1).norm(dim=1)
        tensors[f"{stem}.lora_magnitude_vector"] = norms * torch.linspace(0.7, 1.4, len(norms))
    save_file(tensors, tmp_path / "dora.safetensors", {"trigger": "sks", "class_word": "cat"})
    dora = str(tmp_path / "dora.safetensors")
    apart = latents_of(pipe, Concept(name="cat", lora=dora), Concept(name="style", lora=style, weight=0.7))
    together = latents_of(pipe, Concept(name="both", lora=[dora, f"{style}:0.7"]))
    assert "their change is taken from this model, as the best of rank 128: relative error 0.00%" in caplog.text
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-3)
    assert float((latents_of(pipe, Concept(name="cat", lora=cat)) - apart).abs().max()) > 1e-1


def test_words_are_those_of_the_first_file_and_every_file_is_kept_in_mind(pipe: Any, files: list[str]) -> None:
    concept = pipe.load_concept([files[0], f"{files[1]}:0.5"], merge="np")
    assert (concept.name, concept.trigger, concept.class_word) == ("cat+style", "sks", "cat")
    (loaded,) = pipe.resolve_concepts(["cat+style"])
    assert [file.path.name for file in loaded.files] == ["cat.safetensors", "style.safetensors"]
    assert loaded.concept.merge == "np"
    assert torch.equal(latents_of(pipe, "cat+style"), latents_of(pipe, "cat+style"))


def test_files_are_merged_again_only_if_something_has_changed(
    pipe: Any, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, merge = [], library.merge_matched
    monkeypatch.setattr(library, "merge_matched", lambda *given: done.append(1) or merge(*given))
    both = Concept(name="both", lora=files, merge="tsv")
    pipe.add_concepts([both])
    assert pipe.concepts["both"].trigger == "sks"
    assert done == []
    for concept in ("both", both, Concept(name="again", lora=files, merge="tsv")):
        latents_of(pipe, concept)
    assert len(done) == 1
    latents_of(pipe, both.model_copy(update={"merge": "ties"}))
    latents_of(pipe, Concept(name="both", lora=[files[0], f"{files[1]}:0.9"], merge="tsv"))
    Path(files[1]).touch()
    latents_of(pipe, both)
    assert len(done) == 4


def test_words_bundled_with_a_file_are_said_to_be_left_out(
    pipe: Any, files: list[str], write_lora: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    vectors = {"bundle_emb.<tom>.string_to_param.*": torch.ones(1, pipe.text_encoder.config.hidden_size)}
    save_file(load_file(files[0]) | vectors, files[0])
    pipe.load_concept(files, "both")
    assert "cat.safetensors: its words are left out (<tom>)" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": ["a.safetensors"]}, "expected one file, or a list of 2 to 32 that are merged"),
        ({"lora": ["a.safetensors", 3]}, "expected one file, or a list of 2 to 32"),
        ({"lora": ["a.safetensors"] * 33}, "expected one file, or a list of 2 to 32"),
        ({"lora": ["a.safetensors:nan", "b.safetensors"]}, "the weight is nan; expected a number such as 0.8"),
        ({"lora": ["a.safetensors:0", "b.safetensors:0"]}, "every weight is 0; there is nothing to merge"),
        ({"lora": "a.safetensors", "merge": "ties"}, "merges one file; give lora a list of several"),
    ],
)
def test_what_cannot_be_merged_is_refused_when_it_is_written_down(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Concept(name="both", **fields)


@pytest.mark.parametrize(
    ("number", "method", "message"),
    [
        (3, "np", "np takes two files, a subject and then a style; 3 were given"),
        (2, "sum", "unknown method 'sum'; there are cat, svd"),
        (2, "soups", "other.safetensors does not say its trigger"),
        (2, "tsv", "nothing is left of other.safetensors, other.safetensors"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(
    number: int, method: str, message: str, pipe: Any, write_lora: Callable[..., Path]
) -> None:
    untrained = random_lora(pipe.unet, 3, scale=0.0)
    other = str(write_lora("other", unet=untrained))
    before = State(pipe)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_concept([other] * number, "both", merge=method)
    assert not pipe.concepts
    before.assert_unchanged()
