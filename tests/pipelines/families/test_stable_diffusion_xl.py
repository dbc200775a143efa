"""What is particular to SDXL: two text encoders, pooled text and sizes of every row, and a VAE that overflows."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import SDXLCFGCutoffCallback
from torch import Tensor

from components import (
    EVERYTHING,
    State,
    random_lora,
    sd_unet,
    sdxl_unet,
    seeded,
    shallow_sdxl_unet,
    text_loras,
    tiny_xl_pipeline,
    xl_pipeline,
)
from composing import BOXED, EMBEDDINGS, TRIGGERS, assert_close, far_apart, offload_layers, offload_models
from lora_compose.pipelines.families.stable_diffusion_xl import ComposeStableDiffusionXLPipeline
from lora_compose.pipelines.methods import METHODS, Clora, LoraComposer
from lora_compose.pipelines.scene.scene import Concept
from pairs import slow_but

PROMPT = "a sks cat and a zwx dog on grass"
OTHER_PROMPT = "in snow, zwx dog, sks cat"
EVERY_METHOD = tuple(METHODS)
EVERY_KIND = ("tara", "clora", "lora-composer")  # one text, and one for each branch and region


@pytest.fixture
def pipe() -> ComposeStableDiffusionXLPipeline:
    """A tiny SDXL pipeline."""
    return tiny_xl_pipeline()


@pytest.fixture
def plain_pipe() -> StableDiffusionXLPipeline:
    """diffusers' own pipeline with the same weights."""
    return tiny_xl_pipeline(StableDiffusionXLPipeline)


@pytest.fixture
def load(write_lora) -> Callable[..., Any]:
    """Loads the concepts "cat" and "dog", whose LoRAs change the UNet and both text encoders."""

    def load(pipe: Any, *, text: bool = True, **how: Any) -> Any:
        for seed, (name, trigger) in enumerate(TRIGGERS.items()):
            parts = {"unet": random_lora(pipe.unet, seed, **{"size": 0.2, **how})}
            parts |= text_loras(pipe, 5 + seed) if text else {}
            pipe.load_concept(write_lora(name, **parts), name, trigger=trigger, class_word=name)
        return pipe

    return load


@pytest.fixture
def composer(pipe, load) -> Any:
    return load(pipe)


def compose(pipe: Any, method: Any, prompt: Any = PROMPT, **arguments: Any) -> Any:
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(), "concepts": BOXED}
    return pipe(prompt, method=method, **given | arguments)


def latents_of(pipe: Any, method: Any, prompt: Any = PROMPT, **arguments: Any) -> Tensor:
    return compose(pipe, method, prompt, **arguments).images


@contextmanager
def added(pipe: Any) -> Iterator[list[dict[str, Tensor]]]:
    """What the UNet is given besides text and latents, pass by pass."""
    passes: list[dict[str, Tensor]] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(dict(kwargs["added_cond_kwargs"])), with_kwargs=True
    )
    yield passes
    hook.remove()


def pooled(pipe: Any, prompt: str) -> Tensor:
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[2]


# Every method


@pytest.mark.parametrize("method", slow_but(["tara", "lora-composer"], EVERY_KIND))
def test_every_kind_of_method_makes_the_same_finite_latents_again_and_leaves_nothing(load, method):
    pipe = load(tiny_xl_pipeline(), targets=EVERYTHING, size=0.1)
    before = State(pipe)
    first, again = (compose(pipe, method) for _ in range(2))
    before.assert_unchanged()
    assert torch.equal(first.images, again.images)
    assert first.images.isfinite().all()


@pytest.mark.parametrize("method", slow_but(["tara", "clora"], EVERY_KIND))
def test_prompts_and_images_in_one_call_equal_single_calls(composer, method):
    prompts, negatives = [PROMPT, OTHER_PROMPT], ["dark", "blurry and grey"]
    together = latents_of(
        composer, method, prompts, negative_prompt=negatives, num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)], negative_original_size=(64, 64), negative_target_size=(32, 96),
    )  # fmt: skip
    for row in (0, 3):  # one of each prompt
        one = latents_of(
            composer, method, prompts[row // 2], negative_prompt=negatives[row // 2], generator=seeded(row),
            negative_original_size=(64, 64), negative_target_size=(32, 96),
        )  # fmt: skip
        assert_close(together[row], one[0])


@pytest.mark.parametrize("method", slow_but(["lora-composer"], EVERY_KIND))
def test_the_structure_of_sdxl_composes_at_any_size(load, method):
    pipe = load(xl_pipeline(unet=shallow_sdxl_unet()), text=False, targets=("attn2.to_k", "attn2.to_v", "attn1.to_q"))
    concepts = [Concept(name="cat", region=(0, 0, 56, 72)), Concept(name="dog", region=(56, 8, 104, 72))]
    output = compose(
        pipe, method, concepts=concepts, width=104, height=72, num_inference_steps=1, record_attention=True,
    )  # fmt: skip
    assert output.images.shape == (1, 4, 9, 13)
    assert output.images.isfinite().all()
    assert output.attention_maps.shape == (1, 1, 2, 3, 4)


# References


def test_branches_of_clora_have_their_own_text_lora_and_pooled_text(composer):
    method = Clora(fuse="branches", step_size=0, mask_from=1.0)  # all branches count the same everywhere
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0}
    fused = latents_of(composer, method, concepts=["cat", "dog"], **arguments)
    alone = [
        composer("a cat and a dog on grass", output_type="latent", generator=seeded(), **arguments).images,
        latents_of(composer, "merge", "a sks cat and a dog on grass", concepts=["cat"], **arguments),
        latents_of(composer, "merge", "a cat and a zwx dog on grass", concepts=["dog"], **arguments),
    ]
    assert_close(fused, torch.stack(alone).mean(dim=0))


def test_a_region_of_the_whole_canvas_reads_its_own_text_and_the_scene_is_the_pooled_text(composer, plain_pipe):
    method = LoraComposer(step_size=0, apart=0, rows="all")
    concepts = [Concept(name="cat", region=(0, 0, 128, 128), prompt="a big sks cat")]
    found = latents_of(composer, method, concepts=concepts)
    plain_pipe.load_lora_weights(composer.concepts["cat"].lora, adapter_name="cat")
    embeds = plain_pipe.encode_prompt("a big sks cat", do_classifier_free_guidance=False)[0]
    expected = plain_pipe(
        prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds),
        pooled_prompt_embeds=pooled(composer, "a cat and a zwx dog on grass"),
        negative_pooled_prompt_embeds=torch.zeros(1, 12), num_inference_steps=2, output_type="latent",
        generator=seeded(),
    ).images  # fmt: skip
    assert_close(found, expected)


def test_a_concept_may_change_the_second_text_encoder_alone(pipe, plain_pipe, write_lora):
    path = write_lora("cat", text_encoder_2=text_loras(pipe, 5)["text_encoder_2"])
    pipe.load_concept(path, "cat", trigger="sks")
    found = latents_of(pipe, "merge", concepts=["cat"])
    plain_pipe.load_lora_weights(path, adapter_name="cat")
    expected = plain_pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=seeded()).images
    assert_close(found, expected)
    assert far_apart(found, pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=seeded()).images)


def test_a_lora_on_the_projection_of_the_pooled_text_acts_in_its_own_rows(pipe, write_lora):
    targets = ("text_projection", "q_proj")
    path = write_lora("cat", text_encoder_2=random_lora(pipe.text_encoder_2, 5, targets=targets))
    loaded = pipe.load_concept(path, "cat", trigger="sks")
    expected = copy.deepcopy(pipe.text_encoder_2)
    for name, factors in pipe.resolve_concepts([loaded])[0].factors.text_encoders["text_encoder_2"].items():
        expected.get_submodule(name).weight.data += factors.delta()
    words = pipe.tokenizer_2(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with added(pipe) as passes:
        latents_of(pipe, "merge", [PROMPT, PROMPT], concepts=[["cat"], []], guidance_scale=1.0)
    rows = passes[0]["text_embeds"]
    torch.testing.assert_close(rows[:1], expected(words).text_embeds.detach())
    torch.testing.assert_close(rows[1:], pooled(pipe, PROMPT))
    assert far_apart(rows[0], rows[1])


# Pooled text and sizes


def test_every_row_has_the_pooled_text_of_its_branch(load):
    bare = load(tiny_xl_pipeline(), text=False)
    texts = ["a cat and a dog on grass", "a sks cat and a dog on grass", "a cat and a zwx dog on grass"]
    method = Clora(fuse="branches", uncond="each", step_size=0.1)
    with added(bare) as passes:
        latents_of(bare, method, concepts=["cat", "dog"], num_inference_steps=1, negative_prompt="dark")
    of_texts = torch.cat([pooled(bare, text) for text in texts])
    update, whole = passes  # the update sees the prompt's rows alone
    torch.testing.assert_close(update["text_embeds"], of_texts)
    torch.testing.assert_close(whole["text_embeds"], torch.cat([*[pooled(bare, "dark")] * 3, of_texts]))
    assert [len(one["time_ids"]) for one in passes] == [3, 6]


def test_rows_of_a_batch_are_not_mixed_up(composer):
    sizes = {"original_size": (1, 2), "crops_coords_top_left": (3, 4), "target_size": (5, 6)}
    negative = {"negative_original_size": (7, 8), "negative_crops_coords_top_left": (9, 10),
                "negative_target_size": (11, 12)}  # fmt: skip
    with added(composer) as passes:
        compose(composer, "tara", [PROMPT, OTHER_PROMPT], **sizes, **negative, num_images_per_prompt=2)
    rows = passes[0]["time_ids"].tolist()
    assert rows == [[7, 8, 9, 10, 11, 12]] * 4 + [[1, 2, 3, 4, 5, 6]] * 4
    texts = passes[0]["text_embeds"]
    assert torch.equal(texts[:4], torch.zeros(4, 12))  # no negative prompt
    assert torch.equal(texts[4], texts[5])
    assert far_apart(texts[5], texts[6])


def test_a_canvas_of_its_own_has_its_own_size_and_text(load):
    pipe = load(tiny_xl_pipeline(), text=False)
    boxes = {"cat": (0, 0, 32, 128), "dog": (64, 0, 128, 64)}
    concepts = [Concept(name=name, region=box) for name, box in boxes.items()]
    with added(pipe) as passes:
        latents_of(pipe, LoraComposer(step_size=0, apart=0.5), concepts=concepts, guidance_scale=1.0)
    cat, dog, *canvas = passes
    assert cat["time_ids"].tolist() == [[128, 128, 0, 0, 128, 64]]
    assert dog["time_ids"].tolist() == [[128, 128, 0, 0, 64, 64]]
    torch.testing.assert_close(cat["text_embeds"], pooled(pipe, "a sks cat on grass"))
    torch.testing.assert_close(dog["text_embeds"], pooled(pipe, "a zwx dog on grass"))
    for one in canvas:
        assert one["time_ids"].tolist() == [[128, 128, 0, 0, 128, 128]]
        torch.testing.assert_close(one["text_embeds"], pooled(pipe, "a cat and a dog on grass"))


def test_branches_that_run_one_after_the_other_keep_their_pooled_text(composer):
    method = Clora(fuse="branches", uncond="each")
    arguments: dict[str, Any] = {"concepts": ["cat", "dog"], "negative_prompt": "dark", "num_images_per_prompt": 2}
    together = latents_of(composer, method, **arguments)
    assert_close(latents_of(composer, replace(method, branch_batch_size=1), **arguments), together)


def test_diffusers_callback_that_switches_guidance_off_cuts_every_row(composer):
    for method in EVERY_METHOD:
        with added(composer) as passes:
            output = compose(
                composer, method,
                callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.0),
            )  # fmt: skip
        assert output.images.isfinite().all()
        assert {len(one["text_embeds"]) for one in passes[-1:]} == {1}
        assert all(len(one["text_embeds"]) == len(one["time_ids"]) for one in passes)


# Two prompts


def test_another_second_prompt_is_read_if_the_words_stand_at_the_same_place(composer):
    found = latents_of(composer, "tara", prompt_2="o sks cat in a zwx dog in snow")
    assert far_apart(found, latents_of(composer, "tara"))
    embeds = composer.encode_prompt(PROMPT, "o sks cat in a zwx dog in snow")
    positions = {"cat": [2], "dog": [6]}
    arguments = dict(zip(EMBEDDINGS, embeds, strict=True))
    assert torch.equal(latents_of(composer, "tara", None, token_positions=positions, **arguments), found)


@pytest.mark.parametrize("prompt_2", ["a zwx dog and a sks cat on grass", "the nice sks cat and a zwx dog"])
def test_words_at_other_places_in_the_second_prompt_are_refused(composer, prompt_2):
    before = State(composer)
    with pytest.raises(ValueError, match=r"words of 'cat', 'dog' have other token positions for the second tokenizer"):
        compose(composer, "tara", prompt_2=prompt_2)
    before.assert_unchanged()


def test_words_that_the_second_prompt_lacks_are_refused(composer):
    with pytest.raises(ValueError, match=re.escape("'zwx' of concept 'dog' is not in the prompt 'a sks cat'")):
        compose(composer, "tara", prompt_2="a sks cat")


@pytest.mark.parametrize("method", slow_but(["clora"], ["clora", "lora-composer"]))
def test_methods_that_make_texts_of_their_own_refuse_another_second_prompt(composer, method):
    with pytest.raises(ValueError, match=r"makes texts of its own.*leave prompt_2 out, or use a method with one text"):
        compose(composer, method, prompt_2="o sks cat in a zwx dog in snow")
    same, one = (latents_of(composer, method, num_inference_steps=1, prompt_2=text) for text in (PROMPT, None))
    assert torch.equal(same, one)


def test_as_many_second_prompts_as_prompts_are_needed(composer):
    with pytest.raises(ValueError, match="there are 2 prompts, but 1 in prompt_2"):
        compose(composer, "tara", [PROMPT, OTHER_PROMPT], prompt_2=PROMPT)


# Models of other kinds


def test_a_unet_that_takes_other_numbers_is_refused(load):
    pipe = tiny_xl_pipeline()
    config = pipe.unet.config
    pipe.unet = sdxl_unet(**{**config, "projection_class_embeddings_input_dim": 5 * 8 + 12})
    load(pipe)
    with pytest.raises(ValueError, match="concepts need the base model, and the refiner can refine the images"):
        compose(pipe, "merge")
    pipe.unet = sd_unet()
    with pytest.raises(ValueError, match="concepts need the base model"):
        compose(pipe, "merge")


# Decoding


def test_a_vae_that_overflows_decodes_in_single_precision_and_is_half_again(composer):
    latents = latents_of(composer, "tara")
    composer.vae.half()
    expected = composer.vae.float().decode(latents / composer.vae.config.scaling_factor).sample.detach()
    composer.vae.half()
    before = State(composer)
    images = compose(composer, "tara", output_type="pt").images
    assert torch.equal(images, composer.image_processor.postprocess(expected, output_type="pt"))
    before.assert_unchanged()
    assert composer.vae.dtype == torch.float16


def test_a_vae_is_half_again_when_decoding_fails(composer):
    def fail(module, inputs):
        assert inputs[0].dtype == torch.float32
        raise ZeroDivisionError

    composer.vae.half()
    composer.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        compose(composer, "tara", output_type="pt")
    assert composer.vae.dtype == torch.float16


def test_a_vae_that_does_not_overflow_decodes_in_half_precision(composer):
    seen = []
    composer.vae.register_to_config(force_upcast=False)
    composer.vae.half()
    composer.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    assert torch.from_numpy(compose(composer, "tara", output_type="np").images).isfinite().all()
    assert seen == [torch.float16]


def test_latents_with_a_mean_of_their_own_are_decoded_as_in_diffusers(composer, plain_pipe):
    weightless = [concept.model_copy(update={"weight": 0.0}) for concept in BOXED]
    for pipe in (composer, plain_pipe):
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.9, 1.1, 1.2, 0.8])
    arguments = {"num_inference_steps": 1, "output_type": "pt"}
    expected = plain_pipe(PROMPT, generator=seeded(), **arguments).images
    assert_close(latents_of(composer, "merge", concepts=weightless, **arguments), expected)


# Memory


@pytest.mark.parametrize("offload", slow_but([offload_models], [offload_models, offload_layers]))
def test_a_vae_that_overflows_is_decoded_in_single_precision_also_when_it_is_offloaded(composer, offload):
    composer.vae.half()
    call: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 1}
    expected = compose(composer, "tara", **call).images
    offload(composer)
    for _ in range(2):
        assert_close(compose(composer, "tara", **call).images, expected)
    assert composer.vae.dtype == torch.float16


@pytest.mark.parametrize("encoder", [True, False], ids=["with its encoders", "embeddings alone"])
def test_pooled_text_that_does_not_fit_the_unet_is_refused_in_words(pipe: Any, load: Any, encoder: bool) -> None:
    composer = load(pipe, text=False)
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    composer.text_encoder_2 = pipe.text_encoder_2 if encoder else None
    with pytest.raises(ValueError, match="the pooled text and the six sizes of SDXL's base model"):
        composer(
            prompt_embeds=embeds, pooled_prompt_embeds=pooled[:, :-8], guidance_scale=1.0, num_inference_steps=1,
            concepts=["cat"], method="merge", output_type="latent",
        )  # fmt: skip
