"""The words of a file: what it declares, and candidates of its captions and folders."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from lora_compose.pipelines.formats.triggers import Candidate, words_of

BOORU = {"mikudress": 40, "1girl": 40, "solo": 40, "twintails": 31}

SUBSETS = [{"subsets": [
    {"image_dir": "hoge", "class_tokens": "hoge girl", "is_reg": False, "img_count": 20},
    {"image_dir": "reg", "class_tokens": "human", "is_reg": True, "img_count": 400},
    {"image_dir": "captions", "class_tokens": None, "is_reg": False},
]}]  # fmt: skip
"""What sd-scripts writes if its settings have class tokens."""


def header(tags: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, str]:
    given = metadata if tags is None else {"ss_tag_frequency": tags, **metadata}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}


DECLARED = {
    "modelspec": (header(None, **{"modelspec.trigger_phrase": "mikudress"}), ("mikudress", None)),
    "a phrase with its noun": (header(None, **{"modelspec.trigger_phrase": "hatsune, 1girl"}), ("hatsune", "1girl")),
    "several tags": (header(None, **{"modelspec.trigger_phrase": "mikudress, twintails, leek"}), ("mikudress", None)),
    "several tags, of which captions have one": (
        header({"10_images": BOORU}, **{"modelspec.trigger_phrase": "leek, mikudress"}), ("mikudress", None)
    ),
    "a folder that is the start of the tag": (
        header({"10_saber": {"saber \\(fate\\)": 20, "1girl": 20, "saber alter": 2}}), ("saber \\(fate\\)", None)
    ),
    "a folder with which one caption begins": (header({"1_TOK": {"TOK riding": 1}}), ("TOK", None)),
    "a trigger that ends with its class word": (header(trigger="alc_woman", class_word="woman"), ("alc", "woman")),
    "ours": (header(trigger="sks", class_word="cat"), ("sks", "cat")),
    "a folder, no captions": (header(ss_dataset_dirs={"10_ohwx man": {"img_count": 20}}), ("ohwx", "man")),
    "a folder, twice": (header(ss_dataset_dirs={"10_ohwx man": {}, "10_ohwx man (2)": {}}), ("ohwx", "man")),
    "a folder as caption": (header({"10_ohwx man": {"ohwx man": 20}}), ("ohwx", "man")),
    "sentences with the folder's words": (
        header({"10_ohwx man": {"a photo of ohwx man": 1, "ohwx man, smiling": 1, "a tree": 1}}), ("ohwx", "man")
    ),
    "a folder with an underscore, captions with a space": (
        header({"10_hatsune_miku": {"hatsune miku": 20, "1girl": 20}}), ("hatsune miku", None)
    ),
    "a folder with a space, captions with an underscore": (
        header({"10_hatsune miku": {"hatsune_miku": 20, "long_hair": 20}}), ("hatsune_miku", None)
    ),
    "a folder with an underscore, captions with the noun": (
        header({"10_ohwx_man": {"ohwx man": 20}}), ("ohwx", "man")
    ),
    "a folder and captions with an underscore before the noun": (
        header({"10_ohwx_man": {"ohwx_man": 20}}), ("ohwx", "man")
    ),
    "a phrase with an underscore before its noun": (
        header(None, **{"modelspec.trigger_phrase": "alc_blue_woman"}), ("alc_blue", "woman")
    ),
    "class tokens": (
        header({"hoge": {"hoge girl": 20}, "reg": {"human": 400}}, ss_datasets=SUBSETS, ss_dataset_dirs={"hoge": {}}),
        ("hoge", "girl"),
    ),
    "class tokens, no captions": (header(ss_datasets=SUBSETS), ("hoge", "girl")),
    "ai-toolkit": (header({"1_TOK": {"TOK": 1}}), ("TOK", None)),
    "a bundled word": (header(), ("<v1> <v2>", None)),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARED)
def test_declared_words_are_taken(case: str) -> None:
    metadata, expected = DECLARED[case]
    words = words_of(metadata, ["<v1>", "<v2>"] if case == "a bundled word" else [])
    assert (words.trigger, words.class_word) == expected
    assert words.where


UNCERTAIN = {
    "captions alone": header({"10_images": BOORU}),
    "a folder that captions do not have": header({"10_ohwx man": BOORU}),
    "several folders": header({"10_ohwx man": {"ohwx man": 9}, "5_alc woman": {"alc woman": 9}}),
    "a class word alone": header({"10_woman": {"woman": 20}}),
    "a folder of one word, no captions": header(ss_dataset_dirs={"10_images": {}}),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_what_is_not_certain_is_a_candidate_only(case: str) -> None:
    words = words_of(UNCERTAIN[case])
    assert words.trigger is None
    assert words.triggers


def test_candidates_have_counts_and_general_tags_come_last() -> None:
    words = words_of(header({"10_images": BOORU}))
    assert words.triggers == (
        Candidate("mikudress", "in 40 captions"),
        Candidate("twintails", "in 31 captions"),
        Candidate("1girl", "in 40 captions"),
        Candidate("solo", "in 40 captions"),
        Candidate("images", "name of a folder of training images"),
    )
    assert words.class_words == (Candidate("1girl", "in 40 captions"),)


def test_a_declared_word_that_captions_have_stays_the_first_candidate() -> None:
    words = words_of(header({"10_images": BOORU}, **{"modelspec.trigger_phrase": "leek, mikudress"}))
    assert [one.words for one in words.triggers[:4]] == ["mikudress", "leek", "leek, mikudress", "twintails"]


def test_of_sentences_words_are_counted() -> None:
    tags = {f"alc woman in a red dress number {i}": 1 for i in range(9)} | {"a wide view of an empty beach": 1}
    words = words_of(header({"img": tags}))
    assert words.triggers[0] == Candidate("alc", "in 9 captions")
    assert [one.words for one in words.class_words] == ["woman", "dress"]


def test_regularisation_images_do_not_count() -> None:
    metadata = header({"10_ohwx man": {"ohwx man": 20}, "1_man": {"man": 400}}, ss_reg_dataset_dirs={"1_man": {}})
    assert words_of(metadata).trigger == "ohwx"
    assert words_of(metadata).class_words == (Candidate("man", "in 20 captions"),)


def test_class_tokens_of_several_folders_are_candidates() -> None:
    subsets = [{"class_tokens": words, "is_reg": False} for words in ("alc woman", "brt woman")]
    words = words_of(header({"women": {"alc woman": 9, "brt woman": 9}}, ss_datasets=[{"subsets": subsets}]))
    assert words.trigger is None
    assert {one.words for one in words.triggers} == {"alc woman", "brt woman"}
    assert words_of(header(ss_datasets=[{"subsets": subsets}])).triggers == (
        Candidate("alc woman", "class_tokens of the training images"),
        Candidate("brt woman", "class_tokens of the training images"),
    )


def test_both_spellings_of_a_tag_are_one_candidate() -> None:
    tags = {"hatsune_miku": 12, "hatsune miku": 28, "aqua_hair": 30, "looking_at_viewer": 40, "ohwx_woman": 5}
    words = words_of(header({"img": tags}))
    assert [(one.words, one.where) for one in words.triggers[:2]] == [
        ("hatsune miku", "in 40 captions"), ("aqua_hair", "in 30 captions")
    ]  # fmt: skip
    assert words.triggers[-1].words == "looking_at_viewer"
    assert words.class_words == (Candidate("woman", "in 5 captions"),)


def test_concepts_of_onetrainer_are_candidates_if_they_were_trained() -> None:
    off: list[dict[str, Any]] = [
        {"enabled": False}, {"validation_concept": True}, {"type": "VALIDATION"}, {"type": "PRIOR_PREDICTION"}
    ]  # fmt: skip
    for other in off:
        trained = {"name": "ohwx", "enabled": True, "validation_concept": False, "type": "STANDARD"}
        words = words_of(header(ot_config={"concepts": [{"name": "other", **other}, trained, {"name": ""}, {}, 3]}))
        assert words.triggers == (Candidate("ohwx", "name of a concept in OneTrainer"),)


@pytest.mark.parametrize(
    "value",
    [
        "[",
        "[]",
        "3",
        "[3]",
        '[{"subsets": 3}]',
        '[{"subsets": [3, {"class_tokens": 3, "image_dir": []}]}]',
        '{"a": 3}',
        '{"a": {"b": "c"}}',
        '{"a": {"": 3}}',
        "[" * 9999,
        '{"concepts": {}}',
        "1" * 9999,
    ],
)
@pytest.mark.parametrize(
    "key", ["ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "ot_config"]
)
def test_metadata_may_be_anything(key: str, value: str) -> None:
    words = words_of({key: value, "trigger": "x" * 500})
    assert len(words.triggers) == 1
    assert len(words.triggers[0].words) <= 204


def test_a_folder_whose_name_is_too_long_is_named_by_its_beginning() -> None:
    cut = "a" * 200 + " ..."
    words = words_of(header({"10_" + "a" * 250: {cut: 20}}))
    assert (words.trigger, words.where) == (cut, f"the folder of its training images, {cut!r}")


@pytest.mark.parametrize("count", [10**400, -(10**400), 0, -3], ids=["huge", "below", "none", "negative"])
def test_counts_that_are_none_do_not_count(count: int) -> None:
    """No float holds the first ones."""
    for own in (count, 20):
        tags = {"10_ohwx man": {"ohwx man": own, "solo": count}}
        words = words_of(header(tags, ss_dataset_dirs={"10_ohwx man": {"img_count": count}}))
        assert words.trigger == "ohwx"
        assert [candidate.words for candidate in words.triggers] == ["ohwx man"]
