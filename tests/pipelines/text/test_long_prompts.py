"""Calls with weights in prompts, and with prompts longer than a text encoder reads at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from safetensors.torch import save_file

from components import FAMILIES, seeded
from composing import (
    BOXED,
    EMBEDDINGS,
    POSITIONS,
    assert_close,
    compose,
    composer_of,
    encoded,
    same_bits,
)
from composing import run as two_steps
from flux import flux_pipeline
from flux2 import FLUX2
from krea2 import KREA2
from lora_compose import Clora, Concept, LoraComposer
from lora_compose.pipelines.text.long_prompts import LongTokenizer, chunks_of
from qwen_image import QWEN_IMAGE
from transformer_families import TOKENS, as_file, pipeline_with_concepts, random_lora_of_all
from z_image import Z_IMAGE


def latents_of(pipe, **arguments):
    return compose(pipe, **{"num_inference_steps": 1} | arguments).images


def run(pipe, **arguments):
    return two_steps(pipe, **{"num_inference_steps": 1} | arguments)


EITHER = pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
WEIGHTED, AS_COMPEL = "a (sks cat:1.5) and a (zwx dog:0.6)", "a (sks cat)1.5 and a (zwx dog)0.6"
LONG = "a sks cat, " + "with trees and clouds and a river behind it, " * 9 + "and a zwx dog"


def differ(one, other):
    """By more than rounding."""
    return bool((one - other).abs().max() > 5e-4)


def compels(pipe, text):
    """The embeddings of a prompt in compel's own notation, by its own parser."""
    kind = ReturnedEmbeddingsType
    if "text_encoder_2" not in pipe.components:
        return Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)(text)
    return Compel(
        tokenizer=[pipe.tokenizer, pipe.tokenizer_2], text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
        returned_embeddings_type=kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED, requires_pooled=[False, True],
    )(text)[0]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_compel(family):
    pipe = composer_of(family)
    given = {**encoded(pipe), "prompt_embeds": compels(pipe, AS_COMPEL), "token_positions": POSITIONS}
    found = latents_of(pipe, prompt=WEIGHTED, negative_prompt="dark")
    assert_close(found, latents_of(pipe, **given))
    assert differ(found, latents_of(pipe, negative_prompt="dark"))
    # Pooled text, which SDXL reads too, has no weights.
    given = {**encoded(pipe, negative="dark grey"), "negative_prompt_embeds": compels(pipe, "(dark)1.4 grey")}
    assert_close(
        latents_of(pipe, negative_prompt="(dark:1.4) grey"), latents_of(pipe, **given, token_positions=POSITIONS)
    )


@EITHER
def test_a_weight_of_1_changes_nothing(family):
    pipe = composer_of(family)
    assert_close(latents_of(pipe, prompt="a (sks cat:1) and a zwx dog"), latents_of(pipe), 0)


@EITHER
def test_weights_without_concepts(family):
    pipe = composer_of(family)
    given = {**encoded(pipe), "prompt_embeds": compels(pipe, AS_COMPEL)}
    found = run(pipe, prompt=WEIGHTED, negative_prompt="dark").images
    assert_close(found, run(pipe, **given).images)
    assert same_bits(run(pipe, prompt="a (cat) 16:9").images, run(pipe, prompt="a (cat) 16:9", concepts=[]).images)


@EITHER
def test_weights_of_one_prompt_do_not_reach_others(family):
    pipe = composer_of(family)
    two = latents_of(pipe, prompt=[WEIGHTED, "a sks cat and a zwx dog"], generator=None, latents=_noise(pipe, 2))
    assert_close(two[1:], latents_of(pipe, generator=None, latents=_noise(pipe, 2)[1:]))
    assert_close(two[:1], latents_of(pipe, prompt=WEIGHTED, generator=None, latents=_noise(pipe, 2)[:1]))


def _noise(pipe, images):
    side = pipe.unet.config.sample_size
    return torch.randn(images, 4, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["regional", "clora", pytest.param("lora-composer", marks=pytest.mark.slow)])
def test_methods_that_derive_texts_keep_the_weights(method):
    pipe, how = composer_of("sd"), {"concepts": BOXED, "method": method}
    found = latents_of(pipe, prompt=WEIGHTED, **how)
    assert torch.isfinite(found).all()
    assert differ(found, latents_of(pipe, **how))


@pytest.mark.slow
def test_prompts_of_concepts_may_have_weights():
    pipe = composer_of("sd")

    def of(text):
        cat, dog = BOXED
        concepts = [cat.model_copy(update={"prompt": text}), dog]
        return latents_of(pipe, concepts=concepts, method="lora-composer")

    assert differ(of("a (sks cat:1.8) asleep"), of("a sks cat asleep"))
    assert_close(of("a (sks cat:1) asleep"), of("a sks cat asleep"), 0)


@pytest.mark.slow
def test_equal_texts_of_two_subjects_have_their_own_weights():
    pipe, dog = composer_of("sd"), BOXED[1]
    boxes = {"left": (0, 0, 64, 64), "right": (0, 64, 64, 128)}
    others = [Concept(name=name, role="bystander", class_word="bird", region=box) for name, box in boxes.items()]

    def of(text):
        return latents_of(pipe, prompt=f"a sks cat, a zwx dog, {text}", concepts=[dog, *others], method="lora-composer")

    assert differ(of("a (bird:2) and a bird"), of("a (bird:2) and a (bird:2)"))
    assert differ(of("a (bird:2) and a bird"), of("a bird and a (bird:2)"))


@EITHER
def test_a_long_prompt_is_read_in_chunks(family):
    pipe = composer_of(family)
    spans = chunks_of(pipe.tokenizer, LONG)
    texts = [LONG[slice(*span)] for span in spans]
    assert len(texts) > 1
    assert all(text.endswith(",") for text in texts[:-1])
    parts = [encoded(pipe, text, "dark" if i == 0 else "") for i, text in enumerate(texts)]
    given = {name: torch.cat([part[name] for part in parts], dim=1) for name in EMBEDDINGS[:2]}
    length = pipe.tokenizer.model_max_length
    first, last = (pipe.tokenizer(text).input_ids for text in (texts[0], texts[-1]))
    sks, zwx = (pipe.tokenizer(word).input_ids[1] for word in ("sks", "zwx"))
    positions = {"cat": [first.index(sks)], "dog": [(len(texts) - 1) * length + last.index(zwx)]}
    expected = latents_of(pipe, **{**parts[0], **given}, token_positions=positions)
    assert_close(latents_of(pipe, prompt=LONG, negative_prompt="dark"), expected)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("sd", Clora(fuse="branches")), ("sdxl", "tara"),
        pytest.param("sd", LoraComposer(least_updates=0.0), marks=pytest.mark.slow),
        pytest.param("sd", "freefuse", marks=pytest.mark.slow),
        pytest.param("sdxl", Clora(fuse="branches"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_short_prompt_beside_a_long_one_gives_the_image_that_it_gives_alone(family, method):
    pipe, short = composer_of(family, whole=True), "a sks cat and a zwx dog on grass"
    noise = torch.randn(2, 4, 16, 16, generator=seeded())
    how = {"method": method, "concepts": BOXED, "negative_prompt": ["dark", "blurry"], "record_attention": True}
    both = compose(pipe, prompt=[short, LONG], latents=noise, **how)
    for i, (prompt, negative) in enumerate(zip([short, LONG], ["dark", "blurry"], strict=True)):
        own = {**how, "negative_prompt": negative}
        alone = compose(pipe, prompt=prompt, latents=noise[i : i + 1], **own)
        assert_close(both.images[i], alone.images[0])
        assert_close(both.attention_maps[:, i], alone.attention_maps[:, 0])


def test_a_weighted_prompt_beside_a_long_one_gives_the_image_that_it_gives_alone_without_concepts():
    pipe, noise = composer_of("sd"), torch.randn(2, 4, 16, 16, generator=seeded())
    both = run(pipe, prompt=[WEIGHTED, LONG], latents=noise).images
    assert_close(both[0], run(pipe, prompt=WEIGHTED, latents=noise[:1]).images[0])


def test_a_phrase_may_stand_in_two_chunks():
    pipe = composer_of("sd")
    tokenizer = LongTokenizer(pipe.tokenizer, 2)
    text = "a " * (pipe.tokenizer.model_max_length - 3) + "sks cat"
    start = text.index("sks")
    (first, _, before), (second, _, after) = tokenizer.parts(text, start, len(text))
    assert (first[-3:], second) == ("sks", "cat")
    assert (before, after) == (0, pipe.tokenizer.model_max_length)


REFUSED = [
    ({"prompt": "a (sks cat:-1) and a zwx dog"}, "is -1; expected 0 to 10"),
    ({"prompt": "a (sks cat:1.3)like and a zwx dog"}, "a weight ends inside a word"),
    ({"prompt": WEIGHTED, "clip_skip": 1}, "do not go with clip_skip"),
    ({"prompt": WEIGHTED, "negative_prompt_embeds": torch.zeros(1, 32, 24)}, "negative_prompt_embeds do not go with"),
    ({"prompt": LONG, "negative_prompt_embeds": torch.zeros(1, 32, 24)}, "nor with prompts that are longer"),
    ({"negative_prompt": "<lora:cat:1>"}, "tags such as <lora:cat:0.8> are read in prompt alone"),
    ({"prompt": "a sks cat <lora:cat:1>"}, "'cat' is in concepts and has a tag in the prompt"),
    ({"prompt": "a sks cat <lora:cart:1>"}, "there is no concept 'cart'; there are cat, dog.*did you mean 'cat'"),
    ({"prompt": "a sks cat <lora:cat:high>"}, "expected a name and one number"),
    ({"prompt": "a sks cat <lora:cat"}, "without '>'"),
    ({"prompt": ["a sks cat <lora:cat:1>"] * 2, "concepts": [["dog"]]}, "concepts for 1 prompts, but 2 prompts"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compose(composer_of("sd"), **arguments)


def flux_with_cat(folder: Path) -> Any:
    pipe = flux_pipeline()
    save_file(dict(as_file(random_lora_of_all(pipe.transformer, 0))), folder / "cat.safetensors")
    pipe.load_concept(folder / "cat.safetensors", trigger="sks", class_word="cat")
    return pipe


FLUX_CALL: dict[str, Any] = {"num_inference_steps": 1, "width": 128, "height": 128, "max_sequence_length": TOKENS}


@pytest.mark.parametrize("concepts", [[], ["cat"]], ids=["plain", "concepts"])
def test_weights_of_flux_are_those_of_compel(tmp_path, concepts):
    pipe = flux_with_cat(tmp_path)
    compel = Compel(tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2)
    given = {**FLUX_CALL, "concepts": concepts, "method": "merge" if concepts else None}
    expected = {
        "prompt_embeds": compel.build_conditioning_tensor("a sks cat on (grass)1.5"),
        "negative_prompt_embeds": compel.build_conditioning_tensor("(the)0.5 photo"),
    }
    pooled = [pipe.encode_prompt(text, None)[1] for text in ("a sks cat on grass", "the photo")]
    pools = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    words = {"prompt": "a sks cat on (grass:1.5)", "negative_prompt": "(the:0.5) photo", "true_cfg_scale": 2.0}
    found = run(pipe, **given, **words, num_images_per_prompt=2, generator=[seeded(1), seeded(2)]).images
    for i in range(2):
        alone = run(pipe, **given, prompt=None, **expected, **pools, true_cfg_scale=2.0, generator=seeded(i + 1))
        assert_close(found[i : i + 1], alone.images)
    plain = run(pipe, **given, prompt="a sks cat on grass", negative_prompt="the photo", true_cfg_scale=2.0)
    assert (plain.images - found[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("concepts", [[], ["cat"]], ids=["plain", "concepts"])
@pytest.mark.parametrize("family", [FLUX2, KREA2, QWEN_IMAGE, Z_IMAGE])
def test_transformers_with_a_chat_template_refuse_weights_and_tags(family, concepts, tmp_path):
    pipe = pipeline_with_concepts(family, tmp_path)
    texts = [("a sks cat (on:1.2) grass", None), ("a sks cat", "a (dark:1.2) cat")]
    for prompt, negative in texts[: 1 if family is FLUX2 else 2]:
        given = {} if negative is None else {"negative_prompt": negative}
        with pytest.raises(ValueError, match=r"weights as in .* work with SD 1.x, 2.x, XL and FLUX.1"):
            pipe(prompt=prompt, concepts=concepts, num_inference_steps=1, **given)
    with pytest.raises(ValueError, match="there is no concept 'bear'"):
        pipe(prompt="a sks cat <lora:bear:1>", concepts=concepts, num_inference_steps=1)


def test_tags_of_a_prompt_are_concepts_with_weights():
    pipe = composer_of("sd")
    expected = latents_of(pipe, concepts={"cat": 0.5, "dog": 1.2}, method=None)
    assert same_bits(run(pipe, prompt="a sks cat and a zwx dog <lora:cat:0.5>, <lora:dog:1.2>").images, expected)
    mixed = run(pipe, prompt="a sks cat and a zwx dog <lora:dog:1.2>", concepts=[Concept(name="cat", weight=0.5)])
    assert same_bits(mixed.images, expected)


def test_each_prompt_has_its_own_tags():
    pipe = composer_of("sd")
    prompts = ["a sks cat <lora:cat:0.5>", "a zwx dog <lora:dog>"]
    found = run(pipe, prompt=prompts, generator=None, latents=_noise(pipe, 2)).images
    sets = [{"cat": 0.5}, {"dog": 1.0}]
    plain = ["a sks cat", "a zwx dog"]
    assert same_bits(found, run(pipe, prompt=plain, concepts=sets, generator=None, latents=_noise(pipe, 2)).images)
