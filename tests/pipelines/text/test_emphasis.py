"""Weights in prompts: what is one, and where it is in texts that are derived from a prompt."""

import pytest

from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.emphasis import has_weights, plain_text, read_emphasis, written
from lora_compose.pipelines.text.prompts import about, surroundings, without_triggers


@pytest.mark.parametrize(("text", "plain", "fragments"), [
    ("a (sks cat:1.3) and a dog", "a sks cat and a dog", {"a": 1, "sks cat": 1.3, "and a dog": 1}),
    ("(a:0.5)", "a", {"a": 0.5}),
    ("((a:2) b:1.5) c", "a b c", {"a": 3, "b": 1.5, "c": 1}),
    (r"\(a:1.3\) (b:.5)", "(a:1.3) b", {"(a:1.3)": 1, "b": 0.5}),
    ("(a (b) c:2)", "a (b) c", {"a (b) c": 2}),
    ("(ratio 16:9) (a: 2 )", "(ratio 16:9) a", {"(ratio 16:9)": 1, "a": 2}),
])  # fmt: skip
def test_weights_are_read(text, plain, fragments):
    found = read_emphasis(text)
    assert found.text == plain_text(text) == plain
    assert dict(zip(*found.fragments(), strict=True)) == pytest.approx(fragments)


@pytest.mark.parametrize("text", ["a (cat)", "a (cat", "a cat)", "(16:9)", r"a \(cat\)", "(cat:)", "a: 1.3", ""])
def test_other_texts_stay_what_they_are(text):
    assert read_emphasis(text).text == text
    assert read_emphasis(text).is_even
    assert not has_weights(text)


@pytest.mark.parametrize("weight", ["-1", "11", "1000"])
def test_a_weight_has_a_range(weight):
    with pytest.raises(ValueError, match=rf"is {weight}; expected 0 to 10, such as \(word:1.3\)"):
        read_emphasis(f"a (cat:{weight})")


CAT, DOG = Concept(name="cat", trigger="sks", class_word="cat"), Concept(name="dog", trigger="zwx", class_word="dog")
TWIN, BYSTANDER = (
    Concept(name="twin", trigger="zwx", class_word="cat"),
    Concept(name="other", class_word="cat", role="bystander"),
)


def about_each(prompt: str, *concepts: Concept) -> list[str]:
    """The texts about some concepts, with the signs of weights."""
    return [written(about(concept, plain_text(prompt), concepts)) for concept in concepts]


def test_words_keep_their_weights_in_derived_texts():
    prompt = "a (sks cat:1.3) and a (zwx dog:0.5), on grass"
    assert about_each(prompt, CAT, DOG) == ["a (sks cat:1.3) , on grass", "a (zwx dog:0.5) , on grass"]
    plain = plain_text(prompt)
    assert written(without_triggers(plain, [CAT, DOG])) == "a (cat:1.3) and a (dog:0.5) , on grass"
    assert written(surroundings(plain, [CAT, DOG])) == "on grass"
    assert written(surroundings(plain_text("a sks cat, (on grass:1.2) ; "), [CAT])) == "(on grass:1.2)"


@pytest.mark.parametrize(("prompt", "texts"), [
    ("a (sks cat:1.3) and a zwx cat on green grass", ["a (sks cat:1.3) on green grass", "a zwx cat on green grass"]),
    ("a sks cat and a (zwx cat:1.3) on green grass", ["a sks cat on green grass", "a (zwx cat:1.3) on green grass"]),
    ("a sks cat and a zwx (cat:1.3) on green grass", ["a sks cat on green grass", "a zwx (cat:1.3) on green grass"]),
    ("(a sks cat:2) and an zwx cat", ["(a sks cat:2)", "(an:2) zwx cat"]),
])  # fmt: skip
def test_of_two_subjects_of_one_class_each_keeps_its_own_weights(prompt, texts):
    assert about_each(prompt, CAT, TWIN) == texts


@pytest.mark.parametrize(("prompt", "texts"), [
    ("a (cat:1.3) and a sks cat on green grass", ["a sks cat on green grass", "a (cat:1.3) on green grass"]),
    ("a sks cat and a (cat:1.3) on green grass", ["a sks cat on green grass", "a (cat:1.3) on green grass"]),
])  # fmt: skip
def test_a_bystander_of_the_class_of_a_subject_keeps_its_own_weights(prompt, texts):
    assert about_each(prompt, CAT, BYSTANDER) == texts


def test_of_three_equal_nouns_each_keeps_its_own_weight():
    prompt = plain_text("a sks cat and a zwx cat and a (cat:1.3)")
    assert written(without_triggers(prompt, [CAT, TWIN])) == "a cat and a cat and a (cat:1.3)"


def test_brackets_of_the_text_stay_what_they_are_in_derived_texts():
    prompt = r"a (sks cat:1.3) and a zwx dog \(grass:1.2\)"
    assert about_each(prompt, CAT, DOG) == [r"a (sks cat:1.3) \(grass:1.2\)", r"a zwx dog \(grass:1.2\)"]


def test_a_prompt_of_a_concept_has_its_own_weights_alone():
    seated = CAT.model_copy(update={"prompt": "a sks cat (seated:1.2)"})
    assert about_each("a (sks cat:1.3) and a zwx dog", seated, DOG) == ["a sks cat (seated:1.2)", "a zwx dog"]


@pytest.mark.parametrize("text", ["a (sks cat:1.3) and a dog", r"a (b \(c\):2) d", "a cat"])
def test_weights_are_written_as_they_are_read(text):
    assert read_emphasis(text).written() == text
