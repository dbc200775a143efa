"""Bystanders: subjects of the base model, without a LoRA, which the LoRAs of others keep off."""

import pytest
import torch

from comparisons import assert_close
from composing import PROMPT, SD_AND_SLOWLY_XL, compose, latents_of
from flux import FLUX
from lora_compose import Concept, Regional
from lora_compose.pipelines.methods import choose_method
from lora_compose.pipelines.methods.draft import Draft, draft_only
from lora_compose.pipelines.text.prompts import about
from lora_compose.pipelines.text.tokens import own_nouns
from pairs import slow_but
from transformer_families import CALL, shared_pipeline
from transformer_families import latents_of as latents_on_transformer

PLAIN = "a sks cat and a dog"
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
CAT, DOG = Concept(name="cat", region=LEFT), Concept(name="dog", role="bystander")
IN_ITS_BOX = DOG.model_copy(update={"region": RIGHT})


@SD_AND_SLOWLY_XL
def test_in_boxes_it_is_a_concept_whose_lora_has_no_weight(composer):
    weightless = Concept(name="dog", trigger="", weight=0.0, region=RIGHT)
    expected = latents_of(composer, prompt=PLAIN, concepts=[CAT, weightless], method="regional")
    found = latents_of(composer, prompt=PLAIN, concepts=[CAT, IN_ITS_BOX], method="regional")
    assert_close(found, expected)  # the bank has fewer ranks, so products round in another order


@SD_AND_SLOWLY_XL
def test_a_draft_finds_it_by_its_class_word(composer):
    """Where it finds the dog that a LoRA was trained on: a draft reads no trigger."""
    found, known = (
        draft_only(
            composer, Draft(), prompt=prompt, concepts=["cat", dog], num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        )
        for prompt, dog in ((PLAIN, DOG), (PROMPT, "dog"))
    )  # fmt: skip
    assert torch.equal(found.maps, known.maps)
    assert torch.equal(found.masks, known.masks)
    assert found.masks.flatten(2).any(dim=2).all()
    output = compose(composer, prompt=PLAIN, concepts=["cat", DOG], method=None)
    assert output.method == "draft"
    assert output.images.isfinite().all()


@pytest.mark.parametrize("family", ["sd"])
@pytest.mark.parametrize("method", slow_but(["merge", "composite"], ["merge", "switch", "composite", "tara"]))
def test_methods_that_know_no_places_make_the_image_without_it(composer, method):
    found = latents_of(composer, prompt=PLAIN, concepts=["cat", DOG], method=method)
    assert torch.equal(found, latents_of(composer, prompt=PLAIN, concepts=["cat"], method=method))


@pytest.mark.parametrize("family", ["sd"])
@pytest.mark.parametrize("method", ["lora-composer", "clora", "freefuse"])
def test_methods_that_find_or_draw_subjects_find_it_by_its_class_word(composer, method):
    concepts = [CAT, IN_ITS_BOX] if method == "lora-composer" else ["cat", DOG]
    found = latents_of(composer, prompt=PLAIN, concepts=concepts, method=method)
    assert found.isfinite().all()
    assert not torch.equal(found, latents_of(composer, prompt=PLAIN, concepts=concepts[:1], method=method))


def test_on_a_transformer_its_region_reads_a_text_of_its_own():
    pipe = shared_pipeline(FLUX)
    weightless = Concept(name="dog", trigger="", weight=0.0, region=RIGHT, prompt="a dog")
    found, known = (
        latents_on_transformer(pipe, **{**CALL, "prompt": PLAIN}, **FLUX.unguided, concepts=[CAT, other], method=method)
        for other, method in ((IN_ITS_BOX, Regional(texts="regions")), (weightless, "regional"))
    )
    assert_close(found, known)


def test_on_a_transformer_loras_leave_the_words_of_a_subject_without_one():
    pipe, call = shared_pipeline(FLUX), {**CALL, "prompt": PLAIN, **FLUX.unguided, "concepts": [CAT, IN_ITS_BOX]}
    found, same, changed = (
        latents_on_transformer(pipe, **call, method=Regional(token_mask=words)) for words in ("auto", "others", "none")
    )
    assert torch.equal(found, same)
    assert (found - changed).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd"])
def test_a_lora_without_a_region_is_named_where_a_bystander_has_one(composer, caplog):
    latents_of(composer, prompt=PLAIN, concepts=["cat", IN_ITS_BOX], method="regional")
    assert "without a region, cat acts on the whole image" in caplog.text


def test_several_of_one_class_word_are_its_nouns_in_their_order():
    mine = Concept(name="mine", trigger="sks", class_word="cat")
    others = [Concept(name=name, role="bystander", class_word="cat") for name in ("first", "second", "third")]
    prompt = "a sks cat, a cat and a cat"
    assert [own_nouns(other, prompt, [mine, *others]) for other in others] == [(1,), (2,), ()]
    assert own_nouns(others[0], prompt, [mine, others[0]]) == (1, 2)


@pytest.mark.parametrize("family", ["sd"])
@pytest.mark.parametrize("method", ["lora-composer", "clora"])
def test_each_of_several_of_one_class_word_is_found_in_the_text_of_its_own(composer, method):
    boxes = {"first": (64, 0, 128, 64), "second": (64, 64, 128, 128)}
    others = [Concept(name=name, role="bystander", class_word="dog", region=box) for name, box in boxes.items()]
    found = latents_of(
        composer, prompt="a sks cat, a dog and a dog", concepts=[CAT, *others], method=method, num_inference_steps=1
    )
    assert found.isfinite().all()


def test_the_text_about_it_has_its_own_article():
    mine, other = Concept(name="mine", trigger="alc", class_word="cat"), Concept(name="cat", role="bystander")
    assert about(other, "an alc cat and a cat on grass", [mine, other]) == "a cat on grass"


@pytest.mark.parametrize("family", ["sd"])
def test_an_old_cat_is_of_the_class_of_a_cat(composer):
    old = Concept(name="other", role="bystander", class_word="old cat")
    found, regions = (
        latents_of(composer, prompt="a sks cat and an old cat", concepts=["cat", old], method=Draft(reading=reading))
        for reading in ("auto", "regions")
    )
    assert torch.equal(found, regions)


@pytest.mark.parametrize("family", ["sd"])
def test_an_image_is_repainted_without_it(composer):
    steps = {"num_inference_steps": 2, "guidance_scale": 4.0}
    output = composer(PLAIN, concepts=[CAT, IN_ITS_BOX], method="draft", record_attention=True, **steps)
    assert output.refine().subjects == ("cat",)


@pytest.mark.parametrize("family", ["sd"])
def test_its_bank_is_kept_for_the_next_call(composer):
    call = {"prompt": PLAIN, "concepts": [CAT, IN_ITS_BOX], "method": "regional"}
    first = latents_of(composer, **call)
    kept = composer.banks.bytes
    assert kept > 0
    assert torch.equal(latents_of(composer, **call), first)
    assert composer.banks.bytes == kept


@pytest.mark.parametrize("family", ["sd"])
def test_without_a_method_the_prompt_has_to_name_it(composer):
    loaded = composer.resolve_concepts(["cat", DOG])
    assert isinstance(choose_method(loaded, [PLAIN]).method, Draft)
    choice = choose_method(loaded, ["a sks cat on grass"])
    assert not isinstance(choice.method, Draft)
    assert "the prompt does not name the bystander dog: write 'dog' in it" in choice.reason


@pytest.mark.parametrize("family", ["sd"])
@pytest.mark.parametrize("method", ["draft", "clora", "freefuse"])
def test_methods_that_find_it_say_what_the_prompt_lacks(composer, method):
    with pytest.raises(ValueError, match="the prompt does not name the bystander dog: write 'dog' in it"):
        composer.plan("a sks cat on grass", concepts=["cat", DOG], method=method)


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ("a sks woman and a woman", (1,)),
        ("a woman and a sks woman", (0,)),
        ("a sks woman alone", ()),
        ("a sks woman and a blond woman", (1,)),
    ],
)
def test_it_has_the_nouns_that_belong_to_no_trigger(prompt, nouns):
    mira = Concept(name="mira", trigger="sks", class_word="woman")
    other = Concept(name="other", role="bystander", class_word="woman")
    assert own_nouns(other, prompt, [mira, other]) == nouns
    described = Concept(name="other", role="bystander", class_word="blond woman")
    assert bool(own_nouns(described, prompt, [mira, described])) == ("blond" in prompt)


def test_its_class_word_is_its_name_unless_another_is_given():
    assert DOG.class_word == "dog"
    assert Concept(name="passer-by", role="bystander", class_word="man").class_word == "man"


@pytest.mark.parametrize(
    "field", [{"lora": "dog.safetensors"}, {"trigger": "sks"}, {"weight": 0.5}, {"blocks": {"down": 0.5}}]
)
def test_what_only_a_lora_has_is_refused(field):
    with pytest.raises(ValueError, match=f"is a bystander, which has no LoRA .* leave out {next(iter(field))}"):
        Concept(name="dog", role="bystander", **field)
