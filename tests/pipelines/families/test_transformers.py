"""Every transformer family through the same seam: equal to a slow reference, and to diffusers where LoRAs are plain."""

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from all_transformers import FEW, TRANSFORMERS
from anima import ANIMA
from chroma import CHROMA
from components import seeded
from flux import FLUX
from flux3 import FLUX3
from ideogram4 import IDEOGRAM4
from krea2 import KREA2
from lora_compose import Composite, Concept, Switch
from pairs import in_pairs, slow_but
from qwen_image import QWEN_IMAGE
from transformer_families import (
    BOXES,
    CALL,
    CELLS,
    METHODS,
    PROMPT,
    TOKENS,
    Family,
    as_file,
    assert_equals_dense_deltas,
    latents_of,
    lokr_of_all,
    pipeline_with_concepts,
    plain_latents,
    random_lora_of_all,
    shared_pipeline,
)
from z_image import Z_IMAGE


@pytest.fixture(params=TRANSFORMERS, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return TRANSFORMERS[request.param]


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    """Two concepts with LoRAs on every linear layer."""
    return shared_pipeline(family)


@pytest.mark.parametrize("family", slow_but(["flux"], TRANSFORMERS), indirect=True)
def test_the_same_call_is_bit_identical_again_in_a_model_that_no_call_has_touched(family, tmp_path):
    fresh = pipeline_with_concepts(family, tmp_path)
    first, again = (latents_of(fresh, concepts=["cat"], method="merge", **family.unguided) for _ in range(2))
    assert torch.equal(first, again)


def _cases() -> Iterator[Any]:
    """Every family with guidance; without it, and in the words alone, a few."""
    for family, method, guided in product(TRANSFORMERS, METHODS, (True, False)):
        usual = (guided and method != "tara") or (family in FEW and guided != (method == "regional"))
        name = f"{family}-{method}-{'guided' if guided else 'unguided'}"
        yield pytest.param(family, method, guided, id=name, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(("family", "method", "guided"), [*_cases()], indirect=["family"])
def test_a_method_equals_dense_deltas_one_concept_after_the_other(family, pipe, method, guided):
    assert_equals_dense_deltas(family, pipe, method, guided=guided)


@pytest.mark.parametrize(("family", "guided"), in_pairs(TRANSFORMERS, [True, False]), indirect=["family"])
def test_without_concepts_it_does_exactly_what_diffusers_does(family, pipe, guided):
    guidance = family.guided if guided else family.unguided
    assert torch.equal(latents_of(pipe, **guidance), plain_latents(family, pipe, **CALL, **guidance))


def test_negative_embeddings_of_another_shape_are_refused(family, pipe):
    if family in (Z_IMAGE, ANIMA, IDEOGRAM4, FLUX3):  # which take no embeddings
        return
    layers = {name: one for name, one in family.guided.items() if name == "text_encoder_out_layers"}
    tokens, rest = pipe.encode_prompt("a cat", device="cpu", **layers)[0][:, :-1], {}
    if family is FLUX:
        rest = {"negative_pooled_prompt_embeds": torch.zeros(1, 24), "negative_prompt": None}
    if family is CHROMA:
        rest = {"negative_prompt_attention_mask": torch.ones(1, tokens.shape[1]), "negative_prompt": None}
    if family in (KREA2, QWEN_IMAGE):
        rest = {
            "negative_prompt_embeds_mask": torch.ones(1, tokens.shape[1], dtype=torch.bool),
            "negative_prompt": None,
        }
    guided = {**family.guided, **rest, "negative_prompt_embeds": tokens}
    with pytest.raises(ValueError, match="must have the same shape when passed directly"):
        pipe(**CALL, **guided, concepts=["cat"], method="merge")


@pytest.mark.parametrize(
    ("name", "further", "place"),
    [("flux", "pooled_prompt_embeds", 1), ("chroma", "prompt_attention_mask", 2), ("krea2", "prompt_embeds_mask", 1)],
)
def test_a_negative_prompt_of_another_length_than_the_embeddings_is_refused(name, further, place):
    family = TRANSFORMERS[name]
    pipe, given = shared_pipeline(family), {**CALL, **family.guided, "prompt": None}
    encoded = pipe.encode_prompt(CALL["prompt"], device="cpu", max_sequence_length=TOKENS)
    given |= {"prompt_embeds": encoded[0], further: encoded[place], "concepts": ["cat"], "method": "merge"}
    latents_of(pipe, **given)
    with pytest.raises(ValueError, match="give max_sequence_length=48, or negative_prompt_embeds"):
        pipe(**{**given, "max_sequence_length": 32})


def test_other_numbers_of_negative_prompts_than_of_prompts_are_refused(family, pipe):
    if "negative_prompt" not in family.guided:
        return
    given = {**CALL, **family.guided, "negative_prompt": ["a photo", "grass"], "concepts": ["cat"], "method": "merge"}
    with pytest.raises(ValueError, match="there are 2 negative prompts and 1 prompts; give one, or one for each"):
        pipe(**given)


def test_embeddings_of_z_image_may_be_single_tensors_shorter_than_the_padded_text():
    pipe = shared_pipeline(Z_IMAGE)
    given = {**CALL, "prompt": None, "guidance_scale": 2.0, "concepts": ["cat"], "method": "merge"}
    rows, negative = (pipe.read_texts([text], TOKENS)[0][:, :20] for text in (CALL["prompt"], "the photo"))
    found = latents_of(pipe, **given, prompt_embeds=rows, negative_prompt_embeds=negative)
    assert torch.equal(found, latents_of(pipe, **given, prompt_embeds=[*rows], negative_prompt_embeds=[*negative]))
    with pytest.raises(ValueError, match="negative_prompt_embeds are for 2 prompts, and there are 1"):
        latents_of(pipe, **given, prompt_embeds=rows, negative_prompt_embeds=negative.repeat(2, 1, 1))


@pytest.mark.parametrize(("family", "concepts"), in_pairs(TRANSFORMERS, [None, ["cat"]]), indirect=["family"])
def test_without_a_size_images_have_that_of_the_model(family, pipe, concepts):
    given = {**CALL, **family.unguided, "num_inference_steps": 1, "concepts": concepts}
    if family in (KREA2, ANIMA, IDEOGRAM4):  # whose VAE names no size
        assert pipe.own_size == ((2048, 2048) if family is IDEOGRAM4 else (1024, 1024))
        return
    expected = latents_of(pipe, **given | dict(zip(("width", "height"), pipe.own_size, strict=True)))
    assert pipe.own_size == (128, 128)
    assert torch.equal(latents_of(pipe, **given | {"width": None, "height": None}), expected)


@pytest.mark.parametrize("family", slow_but(FEW, TRANSFORMERS), indirect=True)
def test_one_merged_lora_equals_diffusers_with_the_lora_loaded(family, pipe):
    found = latents_of(pipe, concepts=["cat"], method="merge", **family.guided)
    other = copy.deepcopy(pipe)
    other.load_lora_weights(as_file(random_lora_of_all(pipe.transformer, 0)))
    expected = plain_latents(family, other, **CALL, **family.guided)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("name", "methods"), [("flux", ("merge", "tara")), ("z-image", ("regional",))])
def test_a_lokr_of_any_rank_is_applied_exactly(name, methods, tmp_path):
    family = TRANSFORMERS[name]
    pipe = pipeline_with_concepts(family, tmp_path)
    pipe.unload_concept("cat")
    tensors = lokr_of_all(pipe.transformer)
    save_file(tensors, tmp_path / "lokr.safetensors")
    pipe.load_concept(tmp_path / "lokr.safetensors", name="cat", trigger="sks", class_word="cat", max_rank=4)
    changed = pipe.resolve_concepts(["cat"])[0].factors
    for layer, factors in changed.model.items():
        whole = torch.kron(tensors[f"transformer.{layer}.lokr_w1"], tensors[f"transformer.{layer}.lokr_w2"])
        torch.testing.assert_close(factors.delta(), whole)
    assert changed.error == 0
    for method in methods:
        assert_equals_dense_deltas(family, pipe, method)


@pytest.mark.parametrize("family", slow_but(["z-image"], TRANSFORMERS), indirect=True)
def test_switch_and_composite_take_one_lora_at_a_time(family, pipe):
    alone = latents_of(pipe, concepts=["cat"], method="merge", **family.guided)
    for method in (Switch(), Composite()):
        found = latents_of(pipe, concepts=["cat"], method=method, **family.guided)
        torch.testing.assert_close(found, alone, atol=3e-5, rtol=0)
    first = latents_of(pipe, concepts=["cat", "dog"], method=Switch(interval=2), **family.guided)
    torch.testing.assert_close(first, alone, atol=3e-5, rtol=0)


def test_nothing_of_a_call_stays_in_the_transformer(family, pipe):
    before = {name: (module, getattr(module, "processor", None)) for name, module in pipe.transformer.named_modules()}
    latents_of(pipe, concepts=["cat", "dog"], method="tara", record_attention=True, **family.unguided)
    after = {name: (module, getattr(module, "processor", None)) for name, module in pipe.transformer.named_modules()}
    assert after == before


@pytest.mark.slow
def test_a_compiled_transformer_gives_the_same(family, pipe):
    eager = latents_of(pipe, concepts=BOXES, method="regional", **family.guided)
    compiled = copy.copy(pipe)
    compiled.register_modules(transformer=torch.compile(pipe.transformer, backend="eager"))
    found = latents_of(compiled, concepts=BOXES, method="regional", **family.guided)
    torch.testing.assert_close(found, eager, atol=1e-5, rtol=0)


def test_recorded_maps_say_how_much_cells_attend_to_the_words_of_each_concept(family, pipe):
    output = pipe(
        **CALL, **family.guided, concepts=["cat", "dog"], method="merge", record_attention=[0, -1], output_type="latent"
    )
    assert output.recorded_steps == (0, 1)
    assert output.attention_maps.shape == (2, 1, 2, CELLS, CELLS)
    assert (output.attention_maps > 0).all()
    assert output.attention_maps.sum(dim=2).max() < 1


@pytest.mark.parametrize("family", slow_but((*FEW, "anima", "flux3"), TRANSFORMERS), indirect=True)
def test_prompts_of_different_lengths_give_the_images_of_separate_calls(family, pipe):
    prompts, sets = [PROMPT, "a zwx dog"], [["cat", "dog"], ["dog"]]
    noise = torch.randn(2, 4, 16, 16, generator=seeded(1))
    step = {"method": "tara", "num_inference_steps": 1, **family.guided}
    both = latents_of(pipe, prompt=prompts, concepts=sets, latents=noise, **step)
    for i, (prompt, concepts) in enumerate(zip(prompts, sets, strict=True)):
        alone = latents_of(pipe, prompt=prompt, concepts=concepts, latents=noise[i : i + 1], **step)
        torch.testing.assert_close(both[i : i + 1], alone, atol=3e-5, rtol=0)


def test_images_are_decoded_as_in_diffusers(family, pipe):
    nothing, step = [Concept(name="cat", weight=0.0)], {**CALL, "num_inference_steps": 1, "output_type": "np"}
    ours, plain = (
        pipe(**step, **family.unguided, generator=seeded(3), **given).images for given in ({"concepts": nothing}, {})
    )
    assert ours.shape == plain.shape == (1, 128, 128, 3)
    assert abs(ours - plain).max() < 1e-4
