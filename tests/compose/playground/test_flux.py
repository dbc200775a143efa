"""The playground's transformer as it is shipped: plain diffusers opens it, and its LoRAs are composed by name."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from components import seeded
from lora_compose import Concept
from lora_compose.compose.files.paths import model_source
from lora_compose.compose.generate.making import make
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND_FLUX, playground_lora, playground_model, playground_of
from lora_compose.pipelines.concepts.loading import match, read_lora
from lora_compose.pipelines.formats.files import trained_with
from lora_compose.pipelines.scene.scene import Run, Scene
from pairs import slow_but
from small_world import SIZE, concepts, words

PROMPT = "a xlo bear and a qrt robot on sand"
LEFT, RIGHT = (0, 0, SIZE // 2, SIZE), (SIZE // 2, 0, SIZE, SIZE)
BOXES = {"bear": LEFT, "robot": RIGHT}


def run(method: str | None, boxed: bool = False) -> Run:
    concepts = [
        Concept(name=name, lora=f"{PLAYGROUND_FLUX}:{name}", region=BOXES[name] if boxed else None) for name in BOXES
    ]
    scene = Scene(prompt=PROMPT, concepts=tuple(concepts) if method else ())
    return Run(scene=scene, model=PLAYGROUND_FLUX, method=method, steps=2, guidance_scale=4, seed=1, device="cpu")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_model(run(None))


@pytest.fixture(scope="module")
def plain_image(pipe: Any) -> np.ndarray:
    """The image without concepts."""
    return np.asarray(make(pipe, run(None)).image, dtype=int)


def test_it_is_small_and_plain_diffusers_makes_the_same_image_where_steps_draw_no_noise() -> None:
    folder = playground_model(PLAYGROUND_FLUX)
    assert model_source(PLAYGROUND_FLUX) == folder
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 64 * 10**6
    plain: Any = FluxPipeline.from_pretrained(folder)
    ours = open_model(run(None))
    steady = FlowMatchEulerDiscreteScheduler.from_config(plain.scheduler.config, stochastic_sampling=False)
    plain.scheduler = ours.scheduler = steady
    plain.set_progress_bar_config(disable=True)
    image = plain(
        PROMPT, guidance_scale=4, height=SIZE, width=SIZE, num_inference_steps=2,
        max_sequence_length=plain.tokenizer_2.model_max_length, generator=seeded(1),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(image), np.asarray(make(ours, run(None)).image))


def test_a_seed_makes_the_same_image_again_without_concepts_too(pipe: Any, plain_image: np.ndarray) -> None:
    assert pipe.scheduler.config.stochastic_sampling
    torch.manual_seed(7)
    assert np.array_equal(np.asarray(make(pipe, run(None)).image), plain_image)


def test_its_images_have_its_own_size(pipe: Any) -> None:
    given = {"num_inference_steps": 1, "generator": seeded(1)}
    (made,) = pipe(PROMPT, **given).images
    (again,) = pipe(PROMPT, **given, image=made, strength=1).images
    assert made.size == again.size == pipe.own_size == (SIZE, SIZE)


@pytest.mark.parametrize("method", slow_but(["draft"], ["regional", "draft"]))
def test_its_loras_compose_by_name(pipe: Any, plain_image: np.ndarray, method: str) -> None:
    image = np.asarray(make(pipe, run(method, boxed=method == "regional")).image, dtype=int)
    assert image.shape == (SIZE, SIZE, 3)
    assert abs(image - plain_image).max() > 20


def test_its_loras_say_what_they_are(pipe: Any) -> None:
    for name in concepts(PLAYGROUND_FLUX):
        path = playground_lora(name, PLAYGROUND_FLUX)
        assert all(words(name, PLAYGROUND_FLUX))
        assert match(read_lora(path), pipe).complete
        assert trained_with(path) == "dreambooth"
    assert playground_of("lora-compose playground-flux") == PLAYGROUND_FLUX
