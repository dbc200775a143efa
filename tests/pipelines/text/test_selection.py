"""Which of many concepts a prompt names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_compose import Concept
from lora_compose.pipelines.text.selection import choose_concepts

WORDS = {"cat": ("sks", "cat"), "dog": ("zwx", "dog"), "bear": ("xlo", "bear"), "robot": ("qrt blue", "robot")}


def known(**words: tuple[str | None, str | None]) -> dict[str, Concept]:
    return {name: Concept(name=name, trigger=trigger, class_word=noun) for name, (trigger, noun) in words.items()}


def test_concepts_are_taken_by_their_triggers_in_the_order_of_the_prompt() -> None:
    chosen = choose_concepts("a ZWX dog and a sks  cat", known(**WORDS))
    assert chosen.names == ("dog", "cat")
    assert chosen.prompt == "a ZWX dog and a sks  cat"
    assert chosen.reasons == ("dog: by its trigger 'ZWX'", "cat: by its trigger 'sks'")
    assert chosen.notes == ()


def test_a_tag_of_trigger_and_class_word_names_its_concept_and_other_tags_name_none() -> None:
    chosen = choose_concepts("a sks_cat beside a qrt_blue_robot, dog_ears", known(**WORDS))
    assert (chosen.names, chosen.notes) == (("cat", "robot"), ())
    assert chosen.prompt == "a sks_cat beside a qrt_blue_robot, dog_ears"


def test_a_class_word_that_one_concept_has_names_it_and_its_trigger_is_written() -> None:
    chosen = choose_concepts("a robot beside a sks cat, and a dog", known(**WORDS))
    assert chosen.names == ("robot", "cat", "dog")
    assert chosen.prompt == "a qrt blue robot beside a sks cat, and a zwx dog"
    assert chosen.reasons[0] == "robot: by its class word 'robot', before which its trigger 'qrt blue' is written"
    without_trigger = choose_concepts("a robot", known(robot=(None, "robot")))
    assert (without_trigger.names, without_trigger.prompt) == (("robot",), "a robot")


def test_the_class_word_of_another_concepts_trigger_is_not_free() -> None:
    chosen = choose_concepts("a sks cat", known(cat=("sks", "cat"), tabby=("tby", "cat")))
    assert (chosen.names, chosen.notes) == (("cat",), ())


def test_a_class_word_of_several_concepts_takes_none_and_says_so() -> None:
    chosen = choose_concepts("a zwx dog and a cat", known(**WORDS, tabby=("tby", "cat")))
    assert chosen.names == ("dog",)
    assert chosen.notes == (
        "'cat' may be cat ('sks cat'), tabby ('tby cat'): write the trigger of the concept you mean; none was chosen",
    )
    chosen = choose_concepts("a zwx dog, a cat and a cat", known(**WORDS))
    assert chosen.names == ("dog",)
    assert "'cat' stands 2 times, and may be cat ('sks cat')" in chosen.notes[0]


def test_a_trigger_of_several_concepts_is_decided_by_the_class_word_or_refused() -> None:
    both = known(cat=("sks", "cat"), dog=("sks", "dog"))
    assert choose_concepts("a sks dog", both).names == ("dog",)
    for prompt in ("a sks on grass", "a sks cat and a sks dog"):
        with pytest.raises(ValueError, match=r"'sks' in the prompt may be each of 2 concepts: cat \('sks cat'\), dog"):
            choose_concepts(prompt, both)
    with pytest.raises(ValueError, match=r"may be each of 2 concepts: bear .*, grizzly"):
        choose_concepts("a xlo bear", known(bear=("xlo", "bear"), grizzly=("xlo", "bear")))


@pytest.mark.parametrize("prompt", ["a xlo bear in snow", "a bear in snow"])
def test_of_versions_of_one_lora_the_shortest_name_is_meant_or_the_one_with_a_tag(prompt: str) -> None:
    both = known(**{"bear-tara": ("xlo", "bear"), "bear": ("xlo", "bear"), "bear-000004": ("xlo", "bear")})
    chosen = choose_concepts(prompt, both)
    assert (chosen.names, chosen.notes) == (("bear",), ())
    assert "(the words of bear-tara, bear-000004, too)" in chosen.reasons[0]
    tagged = choose_concepts(f"{prompt} <lora:bear-tara:0.8>", both)
    assert (tagged.names, tagged.weights) == (("bear-tara",), {"bear-tara": 0.8})


@pytest.mark.parametrize("prompt", ["a hatsune_miku girl", "a hatsune miku girl"])
def test_both_spellings_of_a_tag_are_one_trigger(prompt: str) -> None:
    both = known(miku=("hatsune_miku", "girl"), other=("hatsune miku", "cat"))
    assert choose_concepts(prompt, both).names == ("miku",)


def test_versions_of_one_lora_may_spell_their_tag_in_two_ways() -> None:
    versions = known(**{"miku": ("hatsune_miku", "girl"), "miku-v2": ("hatsune miku", "girl")})
    for prompt in ("a hatsune_miku girl", "a hatsune miku girl"):
        assert choose_concepts(prompt, versions).names == ("miku",)


def test_a_trigger_inside_a_longer_one_names_nothing() -> None:
    chosen = choose_concepts("a sks tall man", known(short=("sks", "woman"), tall=("sks tall", "man")))
    assert chosen.names == ("tall",)


def test_words_spelled_like_a_trigger_are_noted() -> None:
    chosen = choose_concepts("a zwx dog and a skss animal", known(**WORDS))
    assert chosen.notes == ("'skss' is spelled like 'sks', the trigger of cat, which was not chosen",)
    with pytest.raises(ValueError, match="the prompt names no concept; there are cat") as caught:
        choose_concepts("a skss animal", known(**WORDS, plain=(None, None)))
    assert "known by name alone, without trigger and class word: plain" in str(caught.value)
    assert "'skss' is spelled like 'sks'" in str(caught.value)


def test_nothing_known_and_nothing_named_are_refused() -> None:
    with pytest.raises(ValueError, match="no concept that could be named is known"):
        choose_concepts("a cat", {})
    with pytest.raises(ValueError, match="no concept that could be named is known"):
        choose_concepts("a cat", known(a=(None, None), b=("", "  ")))


def test_accents_may_be_letters_of_their_own() -> None:
    assert choose_concepts("un cafe\u0301 noir", known(cafe=("caf\u00e9", None))).names == ("cafe",)


TRIGGERS = [f"{a}{b}{c}q" for a in "xzv" for b in "kwj" for c in "01"]


@given(
    st.lists(st.sampled_from(range(len(TRIGGERS))), min_size=1, max_size=6, unique=True),
    st.lists(st.sampled_from(["a", "photo", "of", "on", "grass", "house", "quietly"]), max_size=8),
    st.randoms(use_true_random=False),
)
def test_exactly_the_named_ones_are_taken_whatever_stands_between(
    named: list[int], rest: list[str], random: object
) -> None:
    concepts = known(**{f"c{i}": (trigger, f"noun{i}") for i, trigger in enumerate(TRIGGERS)})
    words = [TRIGGERS[i] for i in named] + rest
    getattr(random, "shuffle")(words)  # noqa: B009 (of Hypothesis, which has no type for it)
    prompt = " ".join(words)
    chosen = choose_concepts(prompt, concepts)
    assert chosen.names == tuple(f"c{TRIGGERS.index(word)}" for word in words if word in TRIGGERS)
    assert chosen.prompt == prompt


@given(st.lists(st.sampled_from(list(WORDS)), min_size=1, max_size=4, unique=True), st.data())
def test_choosing_again_from_the_new_prompt_takes_the_same(named: list[str], data: st.DataObject) -> None:
    pieces = [data.draw(st.sampled_from([" ".join(WORDS[name]), WORDS[name][1]])) for name in named]
    first = choose_concepts(" and a ".join(pieces), known(**WORDS))
    again = choose_concepts(first.prompt, known(**WORDS))
    assert first.names == again.names == tuple(named)
    assert again.prompt == first.prompt


@given(st.text(max_size=60), st.text(max_size=6), st.text(max_size=6))
def test_any_text_is_answered(prompt: str, trigger: str, noun: str) -> None:
    try:
        chosen = choose_concepts(prompt, known(it=(trigger, noun)))
    except ValueError as error:
        assert "names no concept" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert chosen.names == ("it",)
