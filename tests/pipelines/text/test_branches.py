"""The prompts of CLoRA's branches name every concept, and their words are found in all of them."""

from collections.abc import Sequence

import pytest
import torch
from transformers import CLIPTokenizer

from components import tokenizer as new_tokenizer
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.branches import Branch, branches_of
from lora_compose.pipelines.text.conditioning import Conditioning, TokenMasks, join_branches
from lora_compose.pipelines.text.tokens import Mention, locate_mention, own_nouns

CAT = Concept(name="cat", trigger="sks", class_word="cat")
DOG = Concept(name="dog", trigger="zwx", class_word="dog")
KITTEN = Concept(name="kitten", trigger="vbn", class_word="cat")
STYLE = Concept(name="style", trigger="mjq", class_word="style", role="style")
PROMPT = "a sks cat and a zwx dog on grass"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return new_tokenizer()


def branches(prompt: str, concepts: Sequence[Concept], **options) -> list[Branch]:
    subjects = [i for i, concept in enumerate(concepts) if concept.role != "style"]
    return branches_of([prompt], concepts, subjects, **options)


def named_tokens(tokenizer: CLIPTokenizer, branch: Branch, concepts: Sequence[Concept]) -> list[list[int]]:
    """The tokens that name each concept in a branch."""
    found = TokenMasks.of_prompts(tokenizer, branch.prompts, concepts, branch.names, mentions=branch.mentions)
    return [column.nonzero()[:, 0].tolist() for column in found.phrase[0].T]


def test_every_branch_has_one_trigger_and_all_class_words() -> None:
    texts = [branch.prompts[0] for branch in branches(PROMPT, [CAT, DOG])]
    assert texts == ["a cat and a dog on grass", "a sks cat and a dog on grass", "a cat and a zwx dog on grass"]


def test_words_of_a_style_stay_in_every_branch() -> None:
    found = branches(f"{PROMPT}, mjq style", [CAT, STYLE, DOG])
    assert [branch.subject for branch in found] == [None, 0, 2]
    assert all(branch.prompts[0].endswith("on grass, mjq style") for branch in found)


def test_the_tokens_of_the_published_example_are_found(tokenizer: CLIPTokenizer) -> None:
    """The authors' notebook has 6 and 5 where 5 and 6 are right."""
    # start:0 a:1 cat:2 and:3 a:4 dog:5, and with a trigger a:1 sks:2 dog:3 and:4 a:5 cat:6
    concepts = [
        Concept(name=word, trigger=trigger, class_word=word) for word, trigger in (("dog", "sks"), ("cat", "zwx"))
    ]
    base, dog, cat = branches("a sks dog and a zwx cat", concepts)
    assert base.prompts == ("a dog and a cat",)
    assert named_tokens(tokenizer, base, concepts) == [[2], [5]]
    assert dog.prompts == ("a sks dog and a cat",)
    assert named_tokens(tokenizer, dog, concepts) == [[2, 3], [6]]
    assert cat.prompts == ("a dog and a zwx cat",)
    assert named_tokens(tokenizer, cat, concepts) == [[2], [5, 6]]


def test_all_pieces_of_a_word_are_found(tokenizer: CLIPTokenizer) -> None:
    rare = Concept(name="bear", trigger="mjq", class_word="bear")  # "mjq" has three tokens
    base, bear, cat = branches("a mjq bear and a sks cat", [rare, CAT])
    assert named_tokens(tokenizer, bear, [rare, CAT]) == [[2, 3, 4, 5], [8]]
    assert named_tokens(tokenizer, base, [rare, CAT]) == [[2], [5]]
    assert named_tokens(tokenizer, cat, [rare, CAT]) == [[2], [5, 6]]


def test_two_concepts_of_one_class_keep_their_own_noun(tokenizer: CLIPTokenizer) -> None:
    base, cat, kitten = branches("a sks cat and a vbn cat", [CAT, KITTEN])
    assert base.prompts == ("a cat and a cat",)
    assert named_tokens(tokenizer, base, [CAT, KITTEN]) == [[2], [5]]
    assert named_tokens(tokenizer, cat, [CAT, KITTEN]) == [[2, 3], [6]]
    assert named_tokens(tokenizer, kitten, [CAT, KITTEN]) == [[2], [5, 6]]


def test_class_words_of_no_concept_and_inside_triggers_do_not_count(tokenizer: CLIPTokenizer) -> None:
    cat = CAT.model_copy(update={"trigger": "cat on sand"})
    prompt = "a cat and a cat on sand cat and a zwx dog"
    assert own_nouns(cat, prompt, [cat, DOG]) == (1,)
    base, own, dog = branches(prompt, [cat, DOG])
    assert base.prompts == ("a cat and a cat and a dog",)
    assert named_tokens(tokenizer, base, [cat, DOG])[0] == [5]
    assert named_tokens(tokenizer, own, [cat, DOG])[0] == [5, 6, 7, 8]
    assert named_tokens(tokenizer, dog, [cat, DOG])[0] == [5]


def test_prompts_of_ones_own_take_the_place_of_those_made(tokenizer: CLIPTokenizer) -> None:
    cat = CAT.model_copy(update={"prompt": "a dog and a sks cat"})
    base, own, dog = branches(PROMPT, [cat, DOG], base_prompt="a dog and a cat")
    assert [branch.prompts[0] for branch in (base, own, dog)] == [
        "a dog and a cat", "a dog and a sks cat", "a cat and a zwx dog on grass",
    ]  # fmt: skip
    assert named_tokens(tokenizer, base, [cat, DOG]) == [[5], [2]]
    assert named_tokens(tokenizer, own, [cat, DOG]) == [[5, 6], [2]]


def test_words_of_ones_own_name_a_concept_everywhere(tokenizer: CLIPTokenizer) -> None:
    cat = Concept(name="cat", trigger="sks")
    base, own, dog = branches("a sks and a zwx dog on grass", [cat, DOG], words={"cat": ["a"]})
    assert base.prompts == ("a and a dog on grass",)
    assert named_tokens(tokenizer, base, [cat, DOG]) == [[1, 3], [4]]
    assert named_tokens(tokenizer, own, [cat, DOG]) == [[1, 4], [5]]
    assert named_tokens(tokenizer, dog, [cat, DOG]) == [[1, 3], [4, 5]]


@pytest.mark.parametrize(
    ("prompt", "concepts", "options", "message"),
    [
        ("a sks and a zwx dog", [Concept(name="cat", trigger="sks"), DOG], {}, "give it a class word"),
        ("a sks and a zwx dog", [CAT, DOG], {}, "write 'sks cat' in the prompt"),
        ("a cat, a sks and a zwx dog", [CAT, DOG], {}, "write 'sks cat' in the prompt"),
        (PROMPT, [CAT, DOG], {"base_prompt": "a dog on grass"}, "'cat' occurs 0 times"),
        ("a sks cat and a vbn cat", [CAT, KITTEN], {"base_prompt": "one cat"}, "names cat and kitten"),
    ],
)
def test_concepts_that_cannot_be_named_in_all_branches_are_refused_with_advice(
    prompt: str, concepts: list[Concept], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        branches(prompt, concepts, **options)


def test_words_that_are_missing_or_cut_off_are_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ValueError, match="none of the words"):
        locate_mention(tokenizer, "a dog", CAT, Mention(("lion",)), [CAT])
    with pytest.raises(ValueError, match="the model reads only 30"):
        locate_mention(tokenizer, "a dog " * 15 + "and a lion", CAT, Mention(("lion",)), [CAT])


def text(fill: float, *, guided: bool, images: int = 2) -> Conditioning:
    rows = torch.arange(images * (1 + guided))[:, None, None].float()
    embeds, mask = (fill + rows).expand(-1, 3, 4), torch.zeros(len(rows), 3, 2)
    added = {"text_embeds": fill + rows[:, :, 0]}
    return Conditioning(embeds, mask, mask, Rows.of(images, int(guided)), added)


def first_numbers(joined: Conditioning) -> tuple[list[float], list[float]]:
    added = joined.added or {}
    return joined.prompt_embeds[:, 0, 0].tolist(), added["text_embeds"][:, 0].tolist()


def test_branches_share_the_unconditional_rows_or_have_their_own() -> None:
    texts = [text(10, guided=True), text(20, guided=True)]
    shared, each = join_branches(texts, texts[:1]), join_branches(texts, texts)
    assert first_numbers(shared) == ([10, 11, 12, 13, 22, 23],) * 2
    assert (shared.roles.unconditional, shared.roles.conditional) == (slice(0, 2), slice(2, 6))
    assert first_numbers(each) == ([10, 11, 20, 21, 12, 13, 22, 23],) * 2
    assert (each.roles.unconditional, each.roles.conditional) == (slice(0, 4), slice(4, 8))
    assert first_numbers(each.conditional()) == ([12, 13, 22, 23],) * 2
    assert not each.conditional().guided


def test_branches_without_guidance_have_no_unconditional_rows() -> None:
    texts = [text(10, guided=False), text(20, guided=False)]
    joined = join_branches(texts, texts[:1])
    assert first_numbers(joined) == ([10, 11, 20, 21],) * 2
    assert not joined.guided


def test_the_rows_of_one_image_are_those_of_all_its_branches() -> None:
    texts = [text(10, guided=True), text(20, guided=True)]
    one = join_branches(texts, texts).of_image(1)
    assert first_numbers(one) == ([11, 21, 13, 23],) * 2
    assert (one.images, one.roles.conditional) == (1, slice(2, 4))


def test_bystanders_whose_class_word_is_spelled_in_two_ways_have_one_of_its_places_each() -> None:
    words = ("black cat", "black_cat")
    cats = [Concept(name=word, role="bystander", class_word=word) for word in words]
    assert [own_nouns(cat, "a black cat and a black cat", cats) for cat in cats] == [(0,), (1,)]
