"""Weights in prompts: what is one, and where it is in texts that are derived from a prompt."""

import pytest

from lora_compose.pipelines.text.emphasis import has_weights, plain_text, read_emphasis


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


@pytest.mark.parametrize(("derived", "fragments"), [
    ("a cat and a dog, on grass", {"a": 1, "cat": 1.3, "and a": 1, "dog": 0.5, ", on grass": 1}),
    ("a zwx dog on grass", {"a": 1, "zwx dog": 0.5, "on grass": 1}),
    ("on grass", {"on grass": 1}),
])  # fmt: skip
def test_words_keep_their_weights_in_derived_texts(derived, fragments):
    found = read_emphasis("a (sks cat:1.3) and a (zwx dog:0.5), on grass").carried_to(derived)
    assert dict(zip(*found.fragments(), strict=True)) == fragments


def test_of_two_equal_words_each_keeps_its_own_weight():
    whole = read_emphasis("a (sks cat:1.3) and a zwx cat")
    assert whole.carried_to("a zwx cat").is_even
    assert whole.carried_to("a sks cat").fragments() == (["a", "sks cat"], [1, 1.3])


@pytest.mark.parametrize("text", ["a (sks cat:1.3) and a dog", r"a (b \(c\):2) d", "a cat"])
def test_weights_are_written_as_they_are_read(text):
    assert read_emphasis(text).written() == text
