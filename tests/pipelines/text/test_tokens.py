"""Triggers and class words are found at the token positions that the model really reads."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from components import tokenizer as new_tokenizer
from flux import t5_tokenizer
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.words import spaced
from lora_compose.pipelines.text.conditioning import TokenMasks, join_rows
from lora_compose.pipelines.text.long_prompts import Span
from lora_compose.pipelines.text.tokens import (
    Positions,
    check_disjoint,
    class_words,
    find_words,
    free_nouns,
    locate,
    own_nouns,
    token_mask,
)


def small_tokenizer() -> Any:
    """CLIP's scheme over bytes with a handful of merges, among them those that make `lo` and `tn` ends of words."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    merges = ["l o</w>", "t n</w>", "s k", "sk s</w>", "a n", "an d</w>", "c a", "ca t</w>", "' s</w>"]
    words = characters + [f"{c}</w>" for c in characters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    pairs: Any = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


TOKENIZERS = {"words": new_tokenizer(), "small": small_tokenizer()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


def concept(trigger: str | None, class_word: str | None = None, name: str = "it") -> Concept:
    return Concept(name=name, trigger=trigger, class_word=class_word)


def words_at(tokenizer: Any, prompt: str, positions: Sequence[int]) -> str:
    """What the model reads at some positions."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    return tokenizer.decode([ids[p] for p in positions])


def read(tokenizer: Any, prompt: str, trigger: str, class_word: str | None = None) -> tuple[str, str]:
    found = locate(tokenizer, prompt, concept(trigger, class_word))
    return words_at(tokenizer, prompt, found.trigger), words_at(tokenizer, prompt, found.class_word)


def test_the_small_tokenizer_splits_words_as_clip_does() -> None:
    tokenizer = TOKENIZERS["small"]
    split = {word: tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids)[1:-1] for word in ("xlo", "ktn", "sks's")}
    assert split == {"xlo": ["x", "lo</w>"], "ktn": ["k", "tn</w>"], "sks's": ["sks</w>", "'s</w>"]}


@pytest.mark.parametrize(
    ("prompt", "trigger", "expected"),
    [
        ("sks", "sks", 1),
        ("a SKS cat", "sks", 1),
        ("a sks cat", "SkS", 1),
        ("a sks cat", "  sks ", 1),
        ("a sks's tail", "sks", 1),
        ("a sks-cat", "sks", 1),
        ("a (sks) cat", "sks", 1),
        ("a sks\ncat", "sks", 1),
        ("a sks. sks! And Sks", "sks", 3),
        ("a sks cat and a   sks  cat", "sks cat", 2),
        ("a \t sks\u00a0cat\u3000and", "sks cat", 1),
    ],
)
def test_triggers_are_found_as_words(tokenizer: Any, prompt: str, trigger: str, expected: int) -> None:
    found = locate(tokenizer, prompt, concept(trigger))
    words = " ".join(trigger.lower().split())
    assert words_at(tokenizer, prompt, found.trigger).split() == words.split() * expected
    assert 0 not in found.trigger
    assert list(found.trigger) == sorted(set(found.trigger))


def test_positions_count_from_the_start_token() -> None:
    for tokenizer in TOKENIZERS.values():
        assert locate(tokenizer, "a sks cat", concept("sks")) == Positions((2,))
        assert locate(tokenizer, "sks", concept("sks")) == Positions((1,))
    small = TOKENIZERS["small"]
    assert locate(small, "a xlo cat", concept("xlo", "cat")) == Positions((2, 3), (4,))
    assert locate(small, "xlo and xlo", concept("xlo")) == Positions((1, 2, 4, 5))


@pytest.mark.parametrize(
    ("prompt", "trigger"),
    [
        ("a ktn dog", "tn"),
        ("a xlo dog", "lo"),
        ("a axlo dog", "xlo"),
        ("a xlos dog", "xlo"),
        ("a sks_cat", "sks"),
        ("a sks, cat", "sks cat"),
        ("a sks-cat", "sks cat"),
        ("a sks cat", "s.s"),
        ("a sks cat", "..."),
        ("a ésks cat", "sks"),
        ("a 猫sks cat", "sks"),
        ("a \u017fks cat", "sks"),  # a long s
    ],
)
def test_parts_of_words_and_other_words_are_not_the_trigger(tokenizer: Any, prompt: str, trigger: str) -> None:
    assert find_words(trigger, prompt) == []
    with pytest.raises(ValueError, match="is not in the prompt") as caught:
        locate(tokenizer, prompt, concept(trigger, "dog", name="rex"))
    assert repr(trigger) in str(caught.value)
    assert repr(f"{trigger} dog") in str(caught.value), "the message is to say what to write"
    assert "'rex'" in str(caught.value)


@pytest.mark.parametrize("trigger", ["saber (fate)", r"saber \(fate\)"])
@pytest.mark.parametrize("written", ["saber (fate)", r"saber \(fate\)", "Saber  (fate)"])
@pytest.mark.parametrize("after", [" stands", ", a cat", "."])
def test_brackets_are_found_escaped_or_not(tokenizer: Any, trigger: str, written: str, after: str) -> None:
    prompt = f"1girl, {written}{after}"
    assert find_words(trigger, prompt) == [(7, 7 + len(written))]
    found = locate(tokenizer, prompt, concept(trigger)).trigger
    assert words_at(tokenizer, prompt, found).replace("\\", "").replace(" ", "").startswith("saber(fate")


@pytest.mark.parametrize("trigger", ["hatsune miku", "hatsune_miku", "Hatsune  Miku"])
@pytest.mark.parametrize("written", ["hatsune miku", "hatsune_miku", "hatsune\nmiku"])
def test_tags_are_found_with_underscores_or_spaces(tokenizer: Any, trigger: str, written: str) -> None:
    prompt = f"1girl, {written}, stage"
    assert find_words(trigger, prompt) == [(7, 7 + len(written))]
    found = locate(tokenizer, prompt, concept(trigger)).trigger
    assert words_at(tokenizer, prompt, found).replace(" ", "").replace("_", "") == "hatsunemiku"


def spelled(data: st.DataObject, words: Sequence[str]) -> str:
    """Words with spaces or underscores between them, as is drawn."""
    gaps = [data.draw(st.sampled_from(" _")) for _ in words[1:]]
    return "".join(word + gap for word, gap in zip(words, [*gaps, ""], strict=True))


@given(st.data(), st.lists(st.text("hjk", min_size=1, max_size=3), min_size=1, max_size=3), st.integers(1, 2))
def test_any_spelling_of_a_tag_is_its_trigger_and_its_class_word(
    data: st.DataObject, own: Sequence[str], nouns: int
) -> None:
    noun = ["old", "man"][-nouns:]
    made = concept(spelled(data, [*own, *noun]), spelled(data, noun))
    assert spaced(made.trigger or "") == " ".join(own)
    tag = spelled(data, [*own, *noun])
    prompt = f"1girl, {tag}, a man"
    ((trigger, found),) = class_words(made, prompt, [made])
    assert trigger[0] == 7
    assert found is not None
    assert (spaced(prompt[slice(*trigger)]), spaced(prompt[slice(*found)])) == (" ".join(own), " ".join(noun))
    assert found[1] == 7 + len(tag)
    assert found in free_nouns(made, prompt, [made])


TAGGED = {**TOKENIZERS, "T5": t5_tokenizer()}


@pytest.mark.parametrize("name", TAGGED)
def test_words_of_a_tag_are_at_their_own_tokens(name: str) -> None:
    tokenizer, man = TAGGED[name], concept("ohwx", "man")
    prompt = "an ohwx_man beside a man"
    found = locate(tokenizer, prompt, man, [man])
    ids = tokenizer(prompt).input_ids
    read = ["".join(tokenizer.convert_ids_to_tokens([ids[p] for p in at])) for at in (found.trigger, found.class_word)]
    assert [text.replace("</w>", "").replace("\u2581", "") for text in read] == ["ohwx", "man"]
    assert found.class_word[0] == found.trigger[-1] + 2, "the underscore is between them"


def test_a_noun_in_a_tag_belongs_to_the_trigger_before_it() -> None:
    man, other = concept("ohwx", "man", "one"), concept("zwx", "man", "two")
    prompt = "a zwx beside an ohwx_man and a man_cave"
    assert [prompt[slice(*noun)] for _, noun in class_words(man, prompt, [man, other]) if noun] == ["man"]
    assert [noun for _, noun in class_words(other, prompt, [man, other])] == [None]
    assert own_nouns(man, prompt, [man, other]) == (0,)


def test_words_as_they_are_written_come_before_other_spellings() -> None:
    prompt = "a red_hat cat with a red hat"
    assert [prompt[a:b] for a, b in find_words("red_hat", prompt)] == ["red_hat"]
    assert [prompt[a:b] for a, b in find_words("red hat", prompt)] == ["red hat"]
    for edge in ("_red", "red_", "__"):
        assert find_words(edge, "a red hat") == []
    assert find_words(r"saber_(fate)", r"a saber \(fate\)") == [(2, 16)]


@pytest.mark.parametrize("trigger", ["", "  ", "\n"])
def test_empty_triggers_are_in_no_prompt(tokenizer: Any, trigger: str) -> None:
    assert find_words(trigger, "a sks cat") == []
    with pytest.raises(ValueError, match="is not in the prompt"):
        locate(tokenizer, "a sks cat", concept(trigger))


@pytest.mark.parametrize(
    ("prompt", "trigger"),
    [
        ("a <v1>, a cat", "<v1>"),  # ">," is one word to the tokenizer
        ("a <v1>.", "<v1>"),
    ],
)
def test_triggers_that_are_glued_to_punctuation_are_refused(tokenizer: Any, prompt: str, trigger: str) -> None:
    with pytest.raises(ValueError, match=r"does not keep its own tokens.*put spaces around it"):
        locate(tokenizer, prompt, concept(trigger))


def test_accents_of_their_own_belong_to_their_letters(tokenizer: Any) -> None:
    """Text may hold a letter and its accent as two characters, which the tokenizer joins."""
    composed, apart = "a \u00e9sk\u00e9 c\u00e2t", "a e\u0301ske\u0301 ca\u0302t"
    assert composed != apart
    found = [
        locate(tokenizer, f"{prompt} on grass", concept(trigger, noun))
        for prompt in (composed, apart)
        for trigger, noun in ((composed.split()[1:]), (apart.split()[1:]))
    ]
    assert found == [found[0]] * 4
    assert len(found[0].class_word) >= 1
    for trigger in ("sk", "ske", "sk\u00e9"):
        with pytest.raises(ValueError, match="is not in the prompt"):
            locate(tokenizer, apart, concept(trigger))
    with pytest.raises(ValueError, match="is not in the prompt"):
        locate(tokenizer, "a sks\u0301 cat", concept("sks"))


def test_an_apostrophe_s_is_not_a_word_of_its_own() -> None:
    with pytest.raises(ValueError, match="does not keep its own tokens"):
        locate(TOKENIZERS["small"], "it's a cat", concept("s"))


@pytest.mark.parametrize(
    ("prompt", "trigger"),
    [
        ("a <v1> cat", "<v1>"),
        ("a (<V1> cat)", "<v1>"),
        ("ein CAFÉ", "café"),
        ("一只 猫 和 狗", "猫"),
        ("👩\u200d🎤 sks", "sks"),
        ("a 🐱 cat", "🐱"),
        ("sks\u200bcat", "sks"),
        ("İstanbul sks", "sks"),
        ("a s.k cat", "s.k"),
    ],
)
def test_any_script_and_sign_can_be_a_trigger(tokenizer: Any, prompt: str, trigger: str) -> None:
    found = locate(tokenizer, prompt, concept(trigger))
    ids = tokenizer(prompt).input_ids
    assert [ids[p] for p in found.trigger] == tokenizer(trigger).input_ids[1:-1]
    before = tokenizer(prompt[: find_words(trigger, prompt)[0][0]]).input_ids[1:-1]
    assert found.trigger[0] == 1 + len(before)


def test_the_class_word_is_the_first_one_after_its_trigger(tokenizer: Any) -> None:
    for prompt, trigger, noun in (
        ("a sks cat and a cat", (2,), (3,)),
        ("a cat and a sks cat", (5,), (6,)),
        ("a cat, a sks and a cat", (5,), (8,)),
        ("a sks Cat and a SKS cat", (2, 6), (3, 7)),
        ("a sks and a sks cat", (2, 5), (6,)),
        ("a sks", (2,), ()),
        ("a cat and a sks", (5,), ()),
        ("a sks scat and a cat", (2,), None),
    ):
        found = locate(tokenizer, prompt, concept("sks", "cat"))
        assert found.trigger == trigger, prompt
        if noun is not None:
            assert found.class_word == noun, prompt
        else:
            assert words_at(tokenizer, prompt, found.class_word) == "cat"
            assert found.class_word[0] > 5, "scat is no cat"
        assert found.phrase == tuple(sorted({*found.trigger, *found.class_word}))


def test_no_other_trigger_stands_between_a_trigger_and_its_class_word(tokenizer: Any) -> None:
    cat, other, kitten = concept("sks", "cat", name="one"), concept("zwx", "cat", name="two"), concept("ktn", "a cat")
    for concepts, prompt, expected in (
        ([cat, other], "sks beside a zwx cat on grass", ["sks", "zwx cat"]),
        ([cat, other], "a zwx and a sks cat", ["sks cat", "zwx"]),
        ([cat, other], "a sks cat and a zwx cat", ["sks cat", "zwx cat"]),
        ([cat, other], "sks and zwx, then a sks cat and a cat", ["sks sks cat", "zwx"]),
        ([cat, other], "sks, sks cat", ["sks sks cat", None]),
        ([cat, concept("my cat", "pet", name="two")], "a sks and my cat", ["sks", "my cat"]),
        ([cat, kitten], "sks and a cat", ["sks cat", None]),
    ):
        for one, words in zip(concepts, expected, strict=True):
            if words is None:
                continue
            found = locate(tokenizer, prompt, one, concepts)
            assert words_at(tokenizer, prompt, found.phrase) == words, prompt
        there = [one for one, words in zip(concepts, expected, strict=True) if words is not None]
        masks = TokenMasks.of_prompts(tokenizer, [prompt], concepts, [one.name for one in there])
        for column, words in enumerate(expected):
            positions = masks.phrase[0, :, column].nonzero()[:, 0].tolist()
            assert words_at(tokenizer, prompt, positions) == (words or "")


def test_a_class_word_that_another_concept_has_taken_is_not_among_a_concepts_own_nouns() -> None:
    cat, other = concept("sks", "cat", name="one"), concept("zwx", "cat", name="two")
    for prompt, first, second in (
        ("a sks cat and a zwx cat", (0,), (1,)),
        ("sks beside a zwx cat", (), (0,)),
        ("a cat, a zwx and a sks cat by a cat", (1,), ()),
        ("a sks, a cat and a zwx", (0,), ()),
    ):
        assert [own_nouns(one, prompt, [cat, other]) for one in (cat, other)] == [first, second], prompt


def test_class_words_of_several_tokens(tokenizer: Any) -> None:
    assert read(tokenizer, "a sks teddy  bear on sand", "sks", "teddy bear") == ("sks", "teddy bear")


def test_words_past_the_limit_of_the_model_are_an_error() -> None:
    tokenizer = TOKENIZERS["words"]
    last = "a " * 29 + "sks"
    assert locate(tokenizer, last, concept("sks")) == Positions((30,))
    assert words_at(tokenizer, last, [30, 31]) == "sks <|endoftext|>"
    with pytest.raises(ValueError, match=r"'sks' of concept 'it' stands at tokens 31 to 31.*reads only 30"):
        locate(tokenizer, "a " * 30 + "sks", concept("sks"))
    with pytest.raises(ValueError, match=r"'ktn' of concept 'it' stands at tokens 29 to 31.*reads only 30"):
        locate(tokenizer, "a " * 28 + "ktn", concept("ktn"))
    with pytest.raises(ValueError, match=r"'sks' .* tokens 40 to 40"):
        locate(tokenizer, "a sks " + "a " * 37 + "sks", concept("sks"))
    with pytest.raises(ValueError, match=r"'cat' .* tokens 31 to 31"):
        locate(tokenizer, "a " * 29 + "sks cat", concept("sks", "cat"))
    assert locate(tokenizer, "a sks " + "a " * 100, concept("sks")) == Positions((2,))
    assert locate(TOKENIZERS["small"], "a " * 74 + "sks", concept("sks")) == Positions((75,))
    with pytest.raises(ValueError, match="reads only 75"):
        locate(TOKENIZERS["small"], "a " * 75 + "sks", concept("sks"))


def test_triggers_that_share_words_are_refused(tokenizer: Any) -> None:
    prompt = "a sks cat and a zwx cat"
    for triggers in (("sks", "sks"), ("sks cat", "sks"), ("cat", "sks cat"), ("zwx", "cat")):
        concepts = [concept(trigger, name=f"c{i}") for i, trigger in enumerate(triggers)]
        found = [locate(tokenizer, prompt, one) for one in concepts]
        if triggers == ("zwx", "cat"):
            check_disjoint(concepts, found, prompt)
            continue
        with pytest.raises(ValueError, match=r"'c0' .* and 'c1' .* share words"):
            check_disjoint(concepts, found, prompt)
        with pytest.raises(ValueError, match="share words"):
            TokenMasks.of_prompts(tokenizer, [prompt], concepts)


WORDS = [
    "sks",
    "zwx",
    "xlo",
    "axlo",
    "xlos",
    "ktn",
    "tn",
    "lo",
    "sk",
    "cat",
    "scat",
    "dog",
    "a",
    "and",
    "on",
    "7",
    "猫",
]
GAPS = [" ", " ", "  ", ", ", " - ", "-", "\n", "! "]


def windows(tokenizer: Any, ids: Sequence[int], words: str) -> list[range]:
    """Where the tokens of words stand among token ids, from the start to the end of a word."""
    needle = tokenizer(words, add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    starts = [
        i
        for i in range(len(ids) - len(needle) + 1)
        if list(ids[i : i + len(needle)]) == needle and (i == 0 or tokens[i - 1].endswith("</w>"))
    ]
    return [range(i + 1, i + 1 + len(needle)) for i in starts]


@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZERS)))
def test_random_prompts_equal_a_search_among_token_ids(data: st.DataObject, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=24))
    gaps = data.draw(st.lists(st.sampled_from(GAPS), min_size=len(words), max_size=len(words)))
    upper = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    prompt = "".join(w.upper() * big + w * (not big) + gap for w, big, gap in zip(words, upper, gaps, strict=True))
    trigger = " ".join(data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=2, unique=True)))
    noun = data.draw(st.sampled_from([w for w in WORDS if w not in trigger.split()]))
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    triggers = windows(tokenizer, ids, trigger)
    after = [[n for n in windows(tokenizer, ids, noun) if n.start >= t.stop] for t in triggers]
    nouns = {found[0] for found in after if found}
    last = max((found.stop - 1 for found in (*triggers, *nouns)), default=0)
    it = concept(trigger, noun)
    if not triggers or last > tokenizer.model_max_length - 2:
        with pytest.raises(ValueError, match="is not in the prompt" if not triggers else "reads only"):
            locate(tokenizer, prompt, it)
        return
    found = locate(tokenizer, prompt, it)
    assert found.trigger == tuple(p for window in triggers for p in window)
    assert set(found.class_word) == {p for window in nouns for p in window}
    assert words_at(tokenizer, prompt, found.trigger).split() == trigger.split() * len(triggers)


@given(st.text(max_size=40), st.text(min_size=1, max_size=3))
def test_no_text_gives_wrong_positions(prompt: str, trigger: str) -> None:
    """Any text is either refused or has the trigger's own tokens at the positions found."""
    tokenizer = TOKENIZERS["small"]
    text = f"{prompt} {trigger} sks"
    try:
        found = locate(tokenizer, text, concept(trigger))
    except ValueError:
        return
    ids = tokenizer(text, verbose=False).input_ids
    own = tokenizer(trigger.strip(), verbose=False).input_ids[1:-1]
    assert [ids[p] for p in found.trigger] == own * (len(found.trigger) // len(own))


@contextmanager
def messages_of_transformers() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def test_long_prompts_are_searched_in_silence() -> None:
    prompt = "a sks cat " + "and a dog " * 30
    with messages_of_transformers() as messages:
        locate(small_tokenizer(), prompt, concept("sks", "cat"))
        assert messages == []
        small_tokenizer()(prompt)
        assert any("longer than" in message for message in messages), "transformers is to warn without our care"


# Masks.


def test_masks_have_ones_at_the_positions_given() -> None:
    mask = token_mask([[(1, 2), ()], [(3,), (0, 4)]], 5)
    assert mask.dtype == torch.float32
    assert mask[:, :, 0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert mask[:, :, 1].tolist() == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]


def test_masks_of_prompts(tokenizer: Any) -> None:
    concepts = [concept("sks", "cat", "cat"), Concept(name="style"), concept("zwx", "dog", "dog")]
    prompts = ["a sks cat and a zwx dog", "a zwx dog"]
    with pytest.raises(ValueError, match="'sks' of concept 'cat' is not in the prompt 'a zwx dog'"):
        TokenMasks.of_prompts(tokenizer, prompts, concepts)
    prompts[1] = "zwx dog, sks cat"
    masks = TokenMasks.of_prompts(tokenizer, prompts, concepts)
    tokens = tokenizer.model_max_length
    assert masks.trigger.shape == masks.phrase.shape == (2, tokens, 3)
    for row, prompt in enumerate(prompts):
        for mask, words in ((masks.trigger, ("sks", "", "zwx")), (masks.phrase, ("sks cat", "", "zwx dog"))):
            for column, expected in enumerate(words):
                positions = mask[row, :, column].nonzero()[:, 0].tolist()
                assert words_at(tokenizer, prompt, positions) == expected
    assert set(masks.phrase.unique().tolist()) == {0.0, 1.0}


def test_masks_of_given_positions() -> None:
    concepts = [concept("sks", name="cat"), concept("zwx", name="dog")]
    masks = TokenMasks.of_positions({"cat": [1, 2], "dog": [[3], [5]]}, 2, 6, concepts)
    assert masks.trigger[:, :, 0].tolist() == [[0, 1, 1, 0, 0, 0]] * 2
    assert masks.trigger[:, :, 1].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert TokenMasks.of_positions({"cat": [1]}, 1, 6, concepts).trigger[0, :, 1].sum() == 0
    for positions, message in (
        ({"bird": [1]}, "bird"),
        ({"cat": [6]}, "between 0 and 5"),
        ({"cat": [-1]}, "between 0 and 5"),
        ({"cat": [[1], [2], [3]]}, "for 3 prompts, there are 2"),
        ({"cat": [1], "dog": [1]}, "share a token"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenMasks.of_positions(positions, 2, 6, concepts)


def test_rows_are_ordered_as_embeddings_are() -> None:
    """All negative rows, then all positive ones; the images of one prompt are neighbours."""
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert join_rows(torch.zeros(2, 1), [first], 2)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert join_rows(None, [first, second], 1)[:, 0].tolist() == [1, 2, 3, 4]
    assert join_rows(None, [first], 3)[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_spans_are_the_words_themselves() -> None:
    prompt = "A Sks  CAT, sks cat; (sks cat)"
    spans = find_words("sks cat", prompt)
    assert [re.sub(r"\s+", " ", prompt[a:b]).lower() for a, b in spans] == ["sks cat"] * 3


_SOME_WORDS = st.sampled_from(["sks", "zwx", "sks zwx", "cat", "cat sks", "dog", "old cat", None])


def one_by_one(it: Concept, prompt: str, concepts: Sequence[Concept]) -> tuple[list[Span], list[Any]]:
    """The free nouns of a concept, and its triggers with class words, by looking at all pairs."""
    of_all = [(other.name, span) for other in concepts for span in find_words(other.trigger or "", prompt)]
    nouns = [
        (start, end) for start, end in find_words(it.class_word or "", prompt)
        if not any(first <= start and end <= last for _, (first, last) in of_all)
    ]  # fmt: skip
    pairs = []
    for span in find_words(it.trigger or "", prompt):
        noun = next((noun for noun in nouns if noun[0] >= span[1]), None)
        between = [start for name, (start, _) in of_all if name != it.name and noun and span[1] <= start < noun[1]]
        pairs.append((span, None if between else noun))
    return nouns, pairs


@given(
    st.lists(st.tuples(_SOME_WORDS, _SOME_WORDS), min_size=1, max_size=5),
    st.lists(st.sampled_from(["sks", "zwx", "cat", "dog", "old", "and"]), max_size=12),
)
def test_class_words_are_those_found_by_looking_at_all_pairs(words: Sequence[Any], text: Sequence[str]) -> None:
    concepts, prompt = [concept(*pair, name=str(i)) for i, pair in enumerate(words)], " ".join(text)
    for it in concepts:
        nouns, pairs = one_by_one(it, prompt, concepts)
        assert free_nouns(it, prompt, concepts) == nouns
        assert class_words(it, prompt, concepts) == pairs
