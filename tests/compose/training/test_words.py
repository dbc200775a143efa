"""Trigger and class word in captions, and the features there."""

from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from components import tokenizer as new_tokenizer
from lora_compose.compose.training.data import DataError
from lora_compose.compose.training.words import (
    CaptionWords,
    Occurrence,
    check_class_caption,
    class_caption,
    find_concept,
    rows_of,
)
from lora_compose.pipelines.scene.scene import Concept
from trainings import xl_pipeline

SKS = Concept(name="it", trigger="sks", class_word="cat")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return new_tokenizer()


def find(tokenizer: Any, caption: str, concept: Concept = SKS, **options: bool) -> CaptionWords:
    return find_concept([tokenizer], caption, concept, **{"noun": True, "clean": False, **options})


def tokens(tokenizer: Any, caption: str, positions: tuple[int, ...]) -> str:
    ids = tokenizer(caption).input_ids
    return tokenizer.decode([ids[position] for position in positions]).strip()


def test_words_of_one_token(tokenizer: CLIPTokenizer) -> None:
    found = find(tokenizer, "a SKS cat on grass")
    assert found.occurrences == (Occurrence((2,), (3,)),)
    assert find(tokenizer, "a SKS cat on grass", noun=False).occurrences == (Occurrence((2,)),)


def test_every_occurrence_has_its_class_word(tokenizer: CLIPTokenizer) -> None:
    found = find(tokenizer, "a sks cat and a red sks cat")
    assert found.occurrences == (Occurrence((2,), (3,)), Occurrence((7,), (8,)))
    assert found.trigger == (2, 7)


def test_triggers_and_class_words_of_several_tokens(tokenizer: CLIPTokenizer) -> None:
    concept = Concept(name="it", trigger="monadikos", class_word="wooden floor")
    caption = "a monadikos wooden floor"
    found = find(tokenizer, caption, concept).occurrences[0]
    assert len(found.trigger) > 1
    assert tokens(tokenizer, caption, found.trigger).replace(" ", "") == "monadikos"
    assert tokens(tokenizer, caption, found.noun) == "wooden floor"


def test_a_trigger_of_three_words_is_found_whole(tokenizer: CLIPTokenizer) -> None:
    concept = Concept(name="it", trigger="alc blue coat", class_word="woman")
    caption = "an alc blue coat woman and a blue coat"
    for clean, without in ((False, caption), (True, "an woman and a blue coat")):
        found = find(tokenizer, caption, concept, clean=clean)
        assert tokens(tokenizer, caption, found.trigger) == "alc blue coat"
        assert found.class_caption == without
        assert tokens(tokenizer, without, found.occurrences[0].noun) == "woman"
    with pytest.raises(DataError, match="lacks the trigger 'alc blue coat'"):
        find(tokenizer, "an alc coat woman", concept)


def test_the_clean_caption_lacks_the_trigger_and_has_the_same_class_word(tokenizer: CLIPTokenizer) -> None:
    caption = "a cat beside a sks cat and a sks cat"
    found = find(tokenizer, caption, clean=True)
    assert found.class_caption == "a cat beside a cat and a cat"
    nouns = [occurrence.noun for occurrence in found.occurrences]
    assert [tokens(tokenizer, found.class_caption, noun) for noun in nouns] == ["cat", "cat"]
    first, second = (noun[0] for noun in nouns)
    assert find(tokenizer, caption).occurrences[0].noun[0] == first + 1  # one trigger before it
    assert find(tokenizer, caption).occurrences[1].noun[0] == second + 2


@pytest.mark.parametrize(
    ("caption", "concept", "complaint"),
    [
        ("a cat", SKS, "the caption 'a cat' lacks the trigger 'sks'; write 'sks cat'"),
        ("a sksy cat", SKS, "lacks the trigger"),
        ("a sks dog", SKS, "lacks the class word 'cat' after the trigger"),
        ("a cat called sks", SKS, "lacks the class word 'cat' after the trigger"),
        ("very " * 40 + "sks cat", SKS, "the model reads only 30"),
        ("sks " + "very " * 40 + "cat", SKS, "the model reads only 30"),
        ("a <|endoftext|> cat", Concept(name="it", trigger="<|endoftext|>", class_word="cat"), "is no token"),
    ],
)
def test_words_that_cannot_be_used_are_refused(
    tokenizer: CLIPTokenizer, caption: str, concept: Concept, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        find(tokenizer, caption, concept)


def test_an_ordinary_lora_does_not_need_the_class_word(tokenizer: CLIPTokenizer) -> None:
    assert find(tokenizer, "a sks dog", noun=False).trigger == (2,)


def test_both_tokenizers_of_sdxl_agree(tokenizer: CLIPTokenizer) -> None:
    pipe = xl_pipeline()
    two = [pipe.tokenizer, pipe.tokenizer_2]
    assert two[0].pad_token_id != two[1].pad_token_id
    caption = "a sks cat and a monadikos"
    assert find_concept(two, caption, SKS, noun=True, clean=False) == find(tokenizer, caption)


def test_tokenizers_that_disagree_are_refused(tokenizer: CLIPTokenizer) -> None:
    other = new_tokenizer()
    other.add_tokens(["sks cat"])  # one token instead of two
    with pytest.raises(DataError, match=r"two tokenizers read|does not keep its own tokens"):
        find_concept([tokenizer, other], "a sks cat", SKS, noun=True, clean=False)


@pytest.mark.parametrize(
    ("caption", "about_the_class"),
    [
        ("a sks cat on grass", "a cat on grass"),
        ("SKS cat", "cat"),
        ("a sks sitting cat and a Sks cat", "a sitting cat and a cat"),
        ("a cat, then sks.", "a cat, then cat."),
        ("sks", "cat"),
    ],
)
def test_a_caption_about_the_class_has_the_class_word_in_place_of_the_concept(
    caption: str, about_the_class: str
) -> None:
    assert class_caption(caption, SKS) == about_the_class


@pytest.mark.parametrize("clean", [False, True])
def test_a_tag_of_trigger_and_class_word_is_both(tokenizer: CLIPTokenizer, clean: bool) -> None:
    caption = "1girl, sks_cat, a cat"
    found = find(tokenizer, caption, clean=clean)
    assert tokens(tokenizer, caption, found.trigger) == "sks"
    assert [tokens(tokenizer, found.class_caption, it.noun) for it in found.occurrences] == ["cat"]
    assert found.class_caption == ("1girl, cat, a cat" if clean else caption)
    assert class_caption(caption, SKS) == "1girl, cat, a cat"
    if not clean:
        assert found.occurrences[0].noun[0] == found.trigger[-1] + 2, "the underscore is between them"


def test_class_captions_must_not_name_the_concept() -> None:
    check_class_caption("a cat", SKS)
    with pytest.raises(DataError, match="has the trigger 'sks'"):
        check_class_caption("a Sks cat", SKS)


def words(*found: Occurrence) -> CaptionWords:
    return CaptionWords("", "", found)


def test_rows_pair_tokens_or_take_the_mean_of_the_class_word() -> None:
    text = torch.arange(12.0)[:, None].expand(2, 12, 3)
    text = torch.stack([text[0], text[1] + 100])
    rows = rows_of(
        [words(Occurrence((1, 2), (3, 4))), words(Occurrence((1,), (5, 6)), Occurrence((8, 9), (3,)))], text, text
    )
    assert rows.trigger[:, 0].tolist() == [1, 2, 101, 108, 109]
    assert rows.noun[:, 0].tolist() == [3, 4, 105.5, 103, 103]
    assert rows.of_caption == ((0, 1), (2, 3, 4))


def test_captions_count_alike_however_often_they_name_the_concept() -> None:
    text = torch.zeros(2, 12, 3)
    rows = rows_of([words(Occurrence((1,), (2,))), words(Occurrence((1, 2), (3,)))], text, text)
    assert rows.weights([0, 1, 1, 1]).tolist() == pytest.approx([0.25, 0.375, 0.375])
    assert rows.weights([0]).tolist() == [1, 0, 0]
