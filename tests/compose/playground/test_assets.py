"""The playground's files are found, named safely, and open in plain diffusers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

from lora_compose import ComposePipeline, Concept
from lora_compose.compose.playground import assets
from lora_compose.compose.playground.words import CLASSES, PLACES
from pairs import in_pairs
from small_world import SIZE, concepts, metadata, words

SHARED = {  # and what names them: trigger and class word
    "bear": ("xlo", "bear"),
    "cat": ("sks", "cat"),
    "dog": ("zwx", "dog"),
    "kitten": ("vbn", "cat"),  # a second cat
    "rabbit": ("ohwx", "rabbit"),
    "robot": ("qrt", "robot"),
}
"""Concepts that tests and docs name."""
OUTSIDE = ["../loras/cat", "../../playground/loras/cat", "..", ".", "", "cat/../cat", "cat.safetensors", "/etc/passwd"]


def test_assets_of_the_clone_are_found() -> None:
    assert assets.assets_dir() == Path(__file__).resolve().parents[3] / "assets"


def test_assets_of_an_installed_wheel_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compose/assets/playground").mkdir(parents=True)
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "compose")
    assert assets.assets_dir() == tmp_path / "compose/assets"


def test_another_folder_called_assets_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "compose/assets/playground").mkdir(parents=True)
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "compose")
    assert assets.assets_dir() == tmp_path / "compose/assets"


def test_missing_assets_are_reported_with_the_places_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "compose")
    with pytest.raises(FileNotFoundError, match="assets of lora-compose are missing") as caught:
        assets.playground_model()
    assert str(tmp_path / "assets") in str(caught.value)
    assert str(tmp_path / "compose" / "assets") in str(caught.value)


def test_the_judge_is_found_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "compose")
    (tmp_path / "assets/playground").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="the playground's judge is missing") as caught:
        assets.playground_judge()
    judge = tmp_path / "assets" / "playground" / "judge"
    assert str(judge) in str(caught.value)
    judge.mkdir()
    assert assets.playground_judge() == judge


def test_the_concepts_that_docs_name_are_there() -> None:
    assert {name: words(name) for name in SHARED} == SHARED


def test_every_concept_has_words_of_its_own() -> None:
    assert len({words(name)[0] for name in concepts()}) == len(concepts())


@pytest.mark.parametrize("model", assets.PLAYGROUNDS)
def test_prompts_of_class_images_have_only_words_of_the_model(model: str) -> None:
    tokenizer: Any = CLIPTokenizer.from_pretrained(assets.playground_model(model) / "tokenizer")
    for text in (*CLASSES, *PLACES):
        assert len(tokenizer.tokenize(text)) == len(text.split()), text
    assert {words(name, model)[1] for name in concepts(model)} - {"style"} <= {*CLASSES}


@pytest.mark.parametrize("concept", concepts())
def test_every_concept_has_its_loras(concept: str) -> None:
    for name, method in ((concept, "dreambooth"), (f"{concept}-tara", "tara")):
        path = assets.playground_lora(name)
        assert path.parent == assets.assets_dir() / "playground" / "loras"
        assert metadata(name)["method"] == method
        assert words(name) == words(concept)


@pytest.mark.parametrize("model", assets.PLAYGROUNDS)
def test_every_lora_names_its_playground(model: str) -> None:
    for name in assets.playground_loras(model):
        title = metadata(name, model)["base_model"]
        assert assets.playground_of(title) == model, name


@pytest.mark.parametrize("concept", concepts())
def test_every_concept_has_ten_references_in_order(concept: str) -> None:
    paths = assets.playground_references(concept)
    assert [path.name for path in paths] == [f"{number}.png" for number in range(10)]
    rows = (paths[0].parent / "captions.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == [path.name for path in paths]
    assert all(" ".join(words(concept)) in row for row in rows)
    for path in paths:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")


def test_the_playgrounds_have_the_same_concepts() -> None:
    assert concepts(assets.PLAYGROUND_FLUX) == concepts()
    assert all(words(name, assets.PLAYGROUND_FLUX) == words(name) for name in concepts())


@pytest.mark.parametrize("name", ["mouse", "CAT", *OUTSIDE])
def test_unknown_names_are_refused_and_the_known_ones_listed(name: str) -> None:
    with pytest.raises(ValueError, match=", ".join(assets.playground_loras())):
        assets.playground_lora(name)
    with pytest.raises(ValueError, match=", ".join(concepts())):
        assets.playground_references(name)


def test_model_holds_half_precision_weights_and_no_local_paths() -> None:
    model = assets.playground_model()
    weights = sorted(model.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["text_encoder", "unet", "vae"]
    for path in weights:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118 (not a dict)
    for path in model.rglob("*config.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_plain_diffusers_opens_the_model_and_makes_an_image() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(assets.playground_model())
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.tokenizer.model_max_length == 32
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(assets.playground_lora("cat")))
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 4, "generator": generator, "output_type": "pt"}
    (images,) = pipe("a sks cat on grass", **options, return_dict=False)[:1]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (1, 3, SIZE, SIZE)
    assert images.isfinite().all()
    assert images.std() > 0.01


@pytest.mark.parametrize(("composed", "name"), in_pairs([False, True], assets.PLAYGROUNDS))
def test_outside_of_a_mask_an_image_stays_as_it_is(composed: bool, name: str) -> None:
    pipe: Any = ComposePipeline.from_pretrained(assets.playground_model(name))
    pipe.set_progress_bar_config(disable=True)
    concepts = [Concept(name="cat", lora=str(assets.playground_lora("cat", name)))] if composed else None
    with Image.open(assets.playground_references("dog")[0]) as file:
        image = file.convert("RGB")
    half = image.width // 2
    (found,) = pipe(
        "a sks cat on grass", concepts=concepts, image=image, mask_image=(0, 0, half, image.height),
        num_inference_steps=4, generator=torch.Generator().manual_seed(0), **pipe.guided(4.0, None),
    ).images  # fmt: skip
    changed = np.abs(np.asarray(found, dtype=float) - np.asarray(image, dtype=float)).mean(axis=2)
    assert changed[:, half:].mean() < 8  # of 255
    assert changed[:, :half].mean() > 16


@pytest.mark.parametrize("name", assets.PLAYGROUNDS)
def test_what_the_vae_samples_is_its_mean(name: str) -> None:
    vae: Any = AutoencoderKL.from_pretrained(assets.playground_model(name) / "vae")
    posterior = vae.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).latent_dist
    assert posterior.std.max() < 1e-6
    assert posterior.mean.std() > 0.1


def test_plain_diffusers_opens_the_model_in_half_precision() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(assets.playground_model(), dtype=torch.float16)
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float16}
