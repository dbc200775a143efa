"""Prompts, batches, generators and embeddings of a call with concepts."""

from typing import Any

import pytest
import torch

from components import FAMILIES, seeded
from composing import (
    BOTH,
    BOXED,
    POSITIONS,
    PROMPT,
    QUIET,
    UPDATES,
    assert_close,
    composer_of,
    encoded,
    far_apart,
    latents_of,
    one_step,
    run,
    with_concepts,
)
from pairs import in_pairs


@pytest.mark.parametrize("method", ["tara", pytest.param("composite", marks=pytest.mark.slow), UPDATES])
def test_prompts_images_and_generators_in_one_call_equal_single_calls(composer, method):
    prompts = [PROMPT, "zwx dog, sks cat, sks"]
    negatives, given = ["dark", "blurry"], {"method": method, "concepts": BOXED}
    together = latents_of(
        composer, prompt=prompts, negative_prompt=negatives, num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)], **given,
    )  # fmt: skip
    assert together.shape == (4, 4, 16, 16)
    for row in range(4):
        own = {"prompt": prompts[row // 2], "negative_prompt": negatives[row // 2], "generator": seeded(row)}
        one = latents_of(composer, **own, **given)
        assert_close(together[row], one[0])


def test_a_list_of_one_prompt_gives_the_bits_of_the_prompt(composer):
    assert torch.equal(latents_of(composer, prompt=[PROMPT]), latents_of(composer))


@BOTH
@pytest.mark.parametrize(("prompts", "images"), [(PROMPT, 2), ([PROMPT, PROMPT], None)])
def test_there_are_as_many_images_as_asked_for(family: str, prompts: Any, images: int | None) -> None:
    count = (1 if isinstance(prompts, str) else len(prompts)) * (images or 1)
    found = one_step(composer_of(family, whole=True), prompt=prompts, num_images_per_prompt=images)
    assert found.images.shape == (count, 4, 16, 16)
    assert found.cost.rows_forward == 2 * count


@pytest.mark.parametrize(
    ("method", "trigger", "written"),
    in_pairs(["draft", "clora", UPDATES, "regional", None], [("caf\xe9", "cafe\u0301"), ("cafe\u0301", "caf\xe9")]),
)
def test_a_letter_and_its_accent_may_be_one_character_or_two(composer, method, trigger, written):
    concepts = [BOXED[0].model_copy(update={"trigger": trigger, "region": None}), BOXED[1]]
    plan = composer.plan(f"a {written} cat and a zwx dog", concepts=concepts, method=method)
    same = composer.plan("a caf\xe9 cat and a zwx dog", concepts=[concepts[0].model_copy(update={"trigger": "caf\xe9"}),
                                                                 BOXED[1]], method=method)  # fmt: skip
    assert plan.method == same.method
    assert plan.concepts == same.concepts
    assert plan.concepts[0].phrase


def test_one_generator_serves_all_images_in_turn(composer):
    start = torch.randn(2, 4, 16, 16, generator=seeded(3))
    drawn = latents_of(composer, num_images_per_prompt=2, generator=seeded(3))
    assert torch.equal(drawn, latents_of(composer, num_images_per_prompt=2, latents=start))


@pytest.mark.parametrize(("method", "guidance_scale"), [("merge", 5.0), ("composite", 5.0), ("tara", 1.0)])
def test_embeddings_with_positions_give_the_bits_of_the_prompt(composer, method, guidance_scale):
    arguments: dict[str, Any] = {"method": method, "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    arguments["generator"] = [seeded(1), seeded(2)]
    expected = latents_of(composer, negative_prompt="dark", **arguments)
    arguments |= {"generator": [seeded(1), seeded(2)], **encoded(composer)}
    assert torch.equal(latents_of(composer, token_positions=POSITIONS, **arguments), expected)


def test_positions_can_be_given_for_each_prompt(composer):
    prompts = [PROMPT, "zwx dog, sks cat, sks"]
    expected = latents_of(composer, prompt=prompts)
    positive, negative = composer.encode_prompt(prompts, torch.device("cpu"), 1, True)
    positions = {"cat": [[2], [4, 7]], "dog": [[6], [1]]}
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(latents_of(composer, token_positions=positions, **embeds), expected)
    swapped = {"cat": [[6], [1]], "dog": [[2], [4, 7]]}
    assert far_apart(latents_of(composer, token_positions=swapped, **embeds), expected)


def test_words_after_a_textual_inversion_of_several_tokens_are_found(composer):
    composer.load_textual_inversion({"<thing>": torch.randn(3, 24, generator=seeded())})
    prompt = "a <thing> and a sks cat"  # tokens: a, three of the thing, and, a, sks, cat
    expected = latents_of(composer, prompt=prompt, concepts=["cat"])
    embeds = {**encoded(composer, prompt, ""), "concepts": ["cat"]}
    assert torch.equal(latents_of(composer, token_positions={"cat": [7]}, **embeds), expected)
    assert far_apart(latents_of(composer, token_positions={"cat": [5]}, **embeds), expected)


@pytest.mark.parametrize(("method", "family"), in_pairs(["tara", None, "composite", "regional"], FAMILIES))
def test_text_encoded_by_itself_gives_the_image_of_the_prompt(family: str, method: Any) -> None:
    """Of a pipeline with text encoders alone, in one without them; without concepts too."""
    composer = composer_of(family)
    texts = {name for name in composer.components if name.startswith(("text_encoder", "tokenizer"))}
    parts, nothing = composer.components, dict.fromkeys(composer.components)
    only_text = type(composer)(**nothing | {name: parts[name] for name in texts}, **QUIET[family])
    no_text = with_concepts(type(composer)(**parts | dict.fromkeys(texts), **QUIET[family]))
    given = {"concepts": BOXED, "method": method} if method else {}
    positions = {"token_positions": POSITIONS} if method else {}
    found = run(no_text, **given, **positions, **encoded(only_text)).images
    assert torch.equal(found, run(composer, negative_prompt="dark", **given).images)


def test_the_text_encoder_runs_as_often_as_in_diffusers(composer, plain_pipe):
    counts = []
    for pipe, concepts in ((plain_pipe, {}), (composer, {"concepts": ["cat", "dog"], "method": "merge"})):
        calls = []
        pipe.text_encoder.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        pipe(PROMPT, num_inference_steps=1, output_type="latent", **concepts)
        counts.append(len(calls))
    assert counts == [2, 2]
