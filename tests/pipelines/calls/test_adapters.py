"""Adapters that the user has loaded into the pipeline, as concepts and beside them."""

from typing import Any

import pytest

from components import State, random_lora, seeded
from composing import SD_AND_SLOWLY_XL, StoppedError, assert_close, compose, latents_of, raise_at_step, run, same_bits
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.scene import Concept


@pytest.fixture
def files(pipe, write_lora) -> dict[str, Any]:
    """LoRA files for UNet and text encoder, without metadata: "cat" and "style"."""
    found = {}
    for seed, name in enumerate(("cat", "style")):
        text = random_lora(pipe.text_encoder, 10 + seed, targets=("q_proj", "v_proj"))
        found[name] = write_lora(name, unet=random_lora(pipe.unet, seed), text_encoder=text)
    return found


def with_adapters(pipe: Any, files: dict[str, Any], weights: dict[str, float]) -> Any:
    for name in weights:
        pipe.load_lora_weights(files[name], adapter_name=name)
    pipe.set_adapters(list(weights), list(weights.values()))
    return pipe


CAT = {"prompt": "a sks cat", "concepts": [Concept(name="cat", trigger="sks")]}


@pytest.mark.parametrize(
    ("method", "active"), [("tara", True), pytest.param("composite", False, marks=pytest.mark.slow)]
)
def test_an_adapter_named_as_concept_equals_the_loaded_file(pipe, plain_pipe, files, method, active):
    by_name = ComposePipeline.from_pipe(plain_pipe)
    by_name.set_progress_bar_config(disable=True)
    with_adapters(by_name, files, {"cat": 1.0})
    if not active:
        by_name.disable_lora()
    pipe.load_concept(files["cat"], "cat")
    before = State(by_name)
    assert_close(latents_of(by_name, method=method, **CAT), latents_of(pipe, method=method, **CAT))
    before.assert_unchanged()


def test_weights_of_adapters_and_concepts_multiply(pipe, plain_pipe, files):
    by_name = ComposePipeline.from_pipe(plain_pipe)
    by_name.set_progress_bar_config(disable=True)
    with_adapters(by_name, files, {"cat": 0.5})
    pipe.load_concept(files["cat"], "cat")
    halved, quarter = ([Concept(name="cat", trigger="sks", weight=weight)] for weight in (0.5, 0.25))
    assert_close(latents_of(by_name, **CAT | {"concepts": halved}), latents_of(pipe, **CAT | {"concepts": quarter}))


def test_adapters_that_are_not_named_stay_part_of_the_base(pipe, plain_pipe, files):
    with_adapters(plain_pipe, files, {"style": 0.6, "cat": 1.0})
    with_adapters(pipe, files, {"style": 0.6, "cat": 1.0})
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    expected = plain_pipe("a sks cat", **arguments).images
    before = State(pipe)
    assert_close(latents_of(pipe, method="merge", **CAT), expected)
    before.assert_unchanged()
    alone = latents_of(pipe, method="merge", **CAT | {"concepts": [Concept(name="cat", trigger="sks", weight=0.0)]})
    plain_pipe.set_adapters("style", 0.6)
    assert_close(alone, plain_pipe("a sks cat", **arguments | {"generator": seeded()}).images)


@pytest.mark.parametrize(("loaded", "scale"), [pytest.param("file", 0.0, marks=pytest.mark.slow), ("adapter", 0.5)])
def test_scale_passes_to_the_adapters_of_the_base_and_leaves_concepts_alone(pipe, plain_pipe, files, loaded, scale):
    with_adapters(plain_pipe, files, {"style": 0.6 * scale, "cat": 1.0})
    if loaded == "file":
        with_adapters(pipe, files, {"style": 0.6})
        pipe.load_concept(files["cat"], "cat")
    else:
        with_adapters(pipe, files, {"style": 0.6, "cat": 1.0})
    before = State(pipe)
    scaled = latents_of(pipe, method="merge", cross_attention_kwargs={"scale": scale}, **CAT)
    expected = plain_pipe("a sks cat", num_inference_steps=2, output_type="latent", generator=seeded()).images
    assert_close(scaled, expected)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("method", "error"), [("tara", StoppedError), pytest.param("composite", None, marks=pytest.mark.slow)]
)
def test_adapters_are_what_they_were_after_a_call(pipe, files, method, error):
    with_adapters(pipe, files, {"cat": 0.7, "style": 0.3})
    pipe.set_adapters(["style"], [0.4])
    before = State(pipe)
    if error is None:
        compose(pipe, method=method, **CAT)
    else:
        with pytest.raises(error):
            compose(pipe, method=method, **CAT, **raise_at_step(error))
    before.assert_unchanged()
    assert pipe.get_active_adapters() == ["style"]


def test_a_concept_from_a_file_takes_the_place_of_an_adapter_of_its_name(pipe, files):
    pipe.load_concept(files["cat"], "cat")
    expected = latents_of(pipe, **CAT)
    with_adapters(pipe, files, {"cat": 1.0})
    before = State(pipe)
    assert_close(latents_of(pipe, **CAT), expected)
    before.assert_unchanged()


@SD_AND_SLOWLY_XL
def test_plain_calls_with_adapters_of_the_user_give_the_bits_of_diffusers(composer, plain_pipe, write_lora):
    path = write_lora("style", unet=random_lora(plain_pipe.unet, 7))
    for each in (composer, plain_pipe):
        each.load_lora_weights(path, adapter_name="style")
        each.set_adapters("style", 0.6)
    for scale in (1.0, 0.5):
        arguments = {"cross_attention_kwargs": {"scale": scale}}
        assert same_bits(run(composer, **arguments).images, run(plain_pipe, **arguments).images)
