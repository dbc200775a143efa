"""Prompts without triggers, about one concept, and about nothing but the surroundings."""

import pytest

from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.prompts import about, surroundings, without_triggers

CAT = Concept(name="cat", trigger="sks", class_word="cat")
DOG = Concept(name="dog", trigger="zwx", class_word="dog")
HERO = Concept(name="hero", trigger="max power", class_word="man")
PLAIN = Concept(name="bear", class_word="bear")
STYLE = Concept(name="style", trigger="<ink>")
TOM = Concept(name="tom", trigger="tmb", class_word="cat")
CONCEPTS = (CAT, TOM, DOG, HERO, PLAIN, STYLE)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sks cat and a zwx dog", "a cat and a dog"),
        ("sks cat", "cat"),
        ("sks", ""),
        # punctuation
        ("a cat called sks, on grass", "a cat called, on grass"),
        ("a sks cat; a zwx dog.", "a cat; a dog."),
        # several occurrences
        ("a sks cat beside a sks cat and another sks cat", "a cat beside a cat and another cat"),
        # several words, however they are spaced
        ("a max  power man and max\npower man", "a man and man"),
        # tags of trigger and class word
        ("a sks_cat, a max_power_man and a zwx_dog_", "a cat, a man and a zwx_dog_"),
        # capital letters
        ("A SKS cat and a Zwx Dog, MAX Power man", "A cat and a Dog, man"),
        # no letters
        ("a cat in <ink>, at night", "a cat in, at night"),
        # words that contain a trigger, or a part of one
        ("risks of sksy max speed and power of zwxs", "risks of sksy max speed and power of zwxs"),
        ("a maximum power man", "a maximum power man"),
    ],
)
def test_triggers_are_taken_out_as_whole_words(prompt: str, expected: str) -> None:
    assert without_triggers(prompt, CONCEPTS) == expected


@pytest.mark.parametrize(
    "prompt", ["a sks  cat", "a  sks cat", " a sks cat ", "sks a  cat", "a cat sks", "a cat  sks "]
)
def test_no_spaces_are_left_over(prompt: str) -> None:
    assert without_triggers(prompt, [CAT]) == "a cat"


def test_articles_agree_with_what_follows_them() -> None:
    woman, owl = (
        Concept(name="a", trigger="alc", class_word="woman"),
        Concept(name="b", trigger="zwx", class_word="owl"),
    )
    prompt = "An alc woman and a zwx owl, an old alc woman"
    assert without_triggers(prompt, [woman, owl]) == "A woman and an owl, an old woman"
    assert about(owl, prompt.partition(",")[0], [woman, owl]) == "A zwx owl"
    assert about(woman, "a zwx owl and an alc woman on grass", [woman, owl]) == "an alc woman on grass"
    assert about(woman, prompt.partition(",")[0], [woman, owl]) == "An alc woman"
    assert about(owl, "the alc woman and a zwx owl", [woman, owl]) == "the zwx owl"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a photo of a sks cat and a zwx dog on grass", "a zwx dog"), ("the sks cat and zwx dog", "zwx dog")],
)
def test_a_subject_alone_has_no_scene(prompt: str, expected: str) -> None:
    assert about(DOG, prompt, [CAT, DOG], alone=True) == expected


def test_only_the_triggers_of_the_concepts_given_are_taken_out() -> None:
    prompt = "a sks cat and a zwx dog"
    assert without_triggers(prompt, [CAT]) == "a cat and a zwx dog"
    assert without_triggers(prompt, [DOG]) == "a sks cat and a dog"
    assert without_triggers(prompt, [PLAIN]) == prompt
    assert without_triggers(prompt, []) == prompt


PAIR = "a photo of a sks cat and a zwx dog on grass"


@pytest.mark.parametrize(
    ("concept", "prompt", "expected"),
    [
        (CAT, PAIR, "a photo of a sks cat on grass"),
        (DOG, PAIR, "a photo of a zwx dog on grass"),
        (CAT, "a sks cat, by night", "a sks cat, by night"),
        # punctuation between and after the concepts
        (DOG, "a sks cat, a zwx dog, a bear: at dusk.", "a zwx dog: at dusk."),
        # one of them stands there twice
        (CAT, "a sks cat, a zwx dog and the sks cat again", "a sks cat again"),
        # several words, any spacing
        (HERO, "a zwx dog and a max  power man in snow", "a max  power man in snow"),
        # capital letters: the words stay as they are written
        (CAT, "Photo of a SKS Cat and a ZWX dog", "Photo of a SKS Cat"),
        # the trigger without its class word
        (CAT, "a photo of sks and a zwx dog, outside", "a photo of sks, outside"),
        # no trigger: the class word names it
        (PLAIN, "a sks cat and a bear, at night", "a bear, at night"),
        # the class word of another concept of the same class
        (CAT, "a photo of sks beside a tmb cat on grass", "a photo of sks on grass"),
        (TOM, "a photo of sks beside a tmb cat on grass", "a photo of tmb cat on grass"),
        (CAT, "a photo of sks, a zwx dog and a cat", "a photo of sks and a cat"),
        # no class word
        (STYLE, "a drawing in <ink> on paper", "a drawing in <ink> on paper"),
    ],
)
def test_one_phrase_stands_for_all_concepts(concept: Concept, prompt: str, expected: str) -> None:
    assert about(concept, prompt, CONCEPTS) == expected


def test_concepts_that_the_prompt_does_not_name_leave_it_alone() -> None:
    assert about(CAT, "a sks cat on grass", CONCEPTS) == "a sks cat on grass"
    assert about(CAT, "a sks cat among bears, dogs and risks", CONCEPTS) == "a sks cat among bears, dogs and risks"


def test_a_class_word_alone_does_not_name_a_concept_with_a_trigger() -> None:
    assert about(CAT, "a dog and a sks cat on grass", CONCEPTS) == "a dog and a sks cat on grass"
    with pytest.raises(ValueError, match="does not name the concept 'dog'"):
        about(DOG, "a dog and a sks cat on grass", CONCEPTS)


@pytest.mark.parametrize("prompt", [PAIR, "nothing of it"])
def test_a_prompt_of_its_own_wins(prompt: str) -> None:
    own = DOG.model_copy(update={"prompt": "one zwx dog  asleep"})
    assert about(own, prompt, [CAT, own]) == "one zwx dog  asleep"


@pytest.mark.parametrize(
    ("concept", "advice"),
    [
        (DOG, "does not name the concept 'dog': write 'zwx dog' in it, or .* Concept(name='dog', prompt=...)"),
        (PLAIN, "does not name the concept 'bear': write 'bear' in it, or .* Concept(name='bear', prompt=...)"),
    ],
)
def test_concepts_that_are_not_named_are_refused_with_advice(concept: Concept, advice: str) -> None:
    pattern = advice.replace("(", r"\(").replace(")", r"\)").replace("...", r"\.\.\.")
    with pytest.raises(ValueError, match=f"the prompt 'a risks cat' {pattern}"):
        about(concept, "a risks cat", CONCEPTS)


def test_a_concept_without_any_words_needs_a_prompt() -> None:
    nameless = Concept(name="mood")
    with pytest.raises(ValueError, match="'mood': give it a trigger and write that in it, or give"):
        about(nameless, PAIR, [CAT, nameless])
    assert about(CAT, PAIR, [CAT, nameless]) == PAIR


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a sks cat and a zwx dog on grass", "on grass"),
        (PAIR, "a photo on grass"),
        ("a meadow with a sks cat and a zwx dog", "a meadow"),
        ("a meadow with sks cat and zwx dog at night", "a meadow at night"),
        ("a photo showing the max power man in snow", "a photo in snow"),
        ("a sks cat, a zwx dog, by night", "by night"),
        ("sks cat", ""),
        ("an image of my sks cat on grass", "an image on grass"),
        ("Your sks cat, their zwx dog at night", "at night"),
        ("a tour with sks cat", "a tour"),
        ("risks on grass", "risks on grass"),
        ("an empty room", "an empty room"),
    ],
)
def test_surroundings_are_the_prompt_without_the_concepts(prompt: str, expected: str) -> None:
    assert surroundings(prompt, CONCEPTS) == expected


def test_surroundings_keep_the_concepts_that_are_not_given() -> None:
    assert surroundings("a zwx dog with a sks cat on grass", [CAT]) == "a zwx dog on grass"
    assert surroundings(PAIR, []) == PAIR
