"""An image of NaN is an error that names the likely cause, and no image."""

import pytest
import torch

from all_transformers import TRANSFORMERS
from components import seeded, tiny_pipeline
from composing import BOXED, compose, composer_of, encoded, run, with_concepts
from lora_compose.compose.generate.making import make
from lora_compose.pipelines.calls.finite import NotFiniteError
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from pairs import slow_but
from transformer_families import CALL, pipeline_with_concepts

HUGE = [Concept(**{**dict(one), "weight": 1e30, "any_weight": True}) for one in BOXED]


@pytest.fixture
def composer():
    return composer_of("sd")


WEIGHT = r"no image.*the weight of concept 'cat' reaches 1e[+]30"
GRADIENT = "the gradient at step 0 is not finite"  # where latents are moved by one


@pytest.mark.parametrize(
    ("method", "message"),
    [
        *((method, WEIGHT) for method in ("merge", "composite", "draft")),
        *(pytest.param(name, WEIGHT, marks=pytest.mark.slow) for name in ("tara", "switch", "regional", "freefuse")),
        ("clora", GRADIENT), ("lora-composer", GRADIENT),
    ],
)  # fmt: skip
def test_every_method_refuses_to_make_an_image_of_nan(composer, method, message):
    with pytest.raises(ValueError, match=message):
        compose(composer, concepts=HUGE, method=method, guidance_scale=3.0)
    assert torch.isfinite(compose(composer, method=method, concepts=BOXED).images).all()


def test_latents_and_embeddings_of_nan_are_named(composer):
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="latents have NaN or infinite values"):
            compose(composer, latents=torch.full((1, 4, 16, 16), value))
    embeds = encoded(composer)
    embeds["prompt_embeds"][0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="prompt_embeds has NaN"):
        compose(composer, **embeds, token_positions={"cat": [2], "dog": [6]})


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # Krea 2's norms are in float32
@pytest.mark.parametrize("family", slow_but(["flux"], TRANSFORMERS))
def test_what_is_too_large_for_float16_is_an_error_on_transformers(family, tmp_path):
    pipe = pipeline_with_concepts(TRANSFORMERS[family], tmp_path).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, **TRANSFORMERS[family].unguided, "output_type": "latent", "method": "merge"}
    assert torch.isfinite(pipe(**call, concepts={"cat": 0.1, "dog": 0.1}, generator=seeded()).images).all()
    strong = [Concept(name=name, weight=1e4, any_weight=True) for name in ("cat", "dog")]
    with pytest.raises(NotFiniteError, match=r"reaches 10000; .*; float16 holds numbers up to 65504 only"):
        pipe(**call, concepts=strong, generator=seeded())


def test_a_model_of_nan_makes_no_image_without_concepts():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    scene = Scene(prompt="a cat", width=64, height=64)
    asked = Run(scene=scene, model="tiny", steps=2)
    assert make(pipe, asked).image.size == (64, 64)
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(NotFiniteError, match="weights of the model that are damaged"):
        make(pipe, asked)


def test_a_decoder_of_nan_makes_no_image():
    pipe = with_concepts(tiny_pipeline())
    pipe.vae.decoder.conv_out.bias.data[0] = torch.nan
    call = {"prompt": "a sks cat", "concepts": ["cat"]}
    assert torch.isfinite(run(pipe, **call).images).all()
    with pytest.raises(NotFiniteError, match=r"the VAE made NaN of finite latents.*It runs in float32"):
        run(pipe, **call, output_type="np")
