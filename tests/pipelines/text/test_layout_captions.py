"""Boxes of concepts in the JSON prompts of Ideogram 4."""

import json

import pytest

from lora_compose import Concept
from lora_compose.pipelines.text.layout_captions import text_of, with_boxes

CAT = Concept(name="cat", trigger="sks", class_word="cat", region=(0, 100, 300, 400))
DOG = Concept(name="dog", trigger="zwx", class_word="dog", region=(0.5, 0.25, 1.0, 1.0))
CAPTION = {
    "high_level_description": "A sks cat and a sign.",
    "compositional_deconstruction": {
        "background": "Grass, «wet»",
        "elements": [
            {"type": "text", "text": "SKS", "desc": "White letters"},
            {"desc": "A grey sks cat that sits", "bbox": [1, 2, 3, 4], "color_palette": ["#112233"], "type": "obj"},
        ],
    },
}


def test_plain_text_becomes_a_caption_with_an_element_for_each_concept() -> None:
    found = with_boxes('a sks cat says "hi" to a zwx dog', [CAT, DOG], 600, 400)
    assert found.startswith('{"high_level_description":"a sks cat says \\"hi\\" to a zwx dog",'), "compact, in order"
    assert json.loads(found)["compositional_deconstruction"] == {
        "background": "",
        "elements": [
            {"type": "obj", "bbox": [250, 0, 1000, 500], "desc": "sks cat"},
            {"type": "obj", "bbox": [250, 500, 1000, 1000], "desc": "zwx dog"},
        ],
    }


def test_elements_that_name_a_concept_get_its_box_and_others_stay() -> None:
    found = with_boxes(json.dumps(CAPTION), [CAT, DOG.model_copy(update={"prompt": "a zwx dog, asleep"})], 600, 400)
    parts = json.loads(found)["compositional_deconstruction"]
    sign, cat, dog = parts["elements"]
    assert (parts["background"], sign) == ("Grass, «wet»", CAPTION["compositional_deconstruction"]["elements"][0])
    assert "«wet»" in found, "not escaped"
    assert list(cat) == ["type", "bbox", "desc", "color_palette"], "in the order of the format"
    assert cat["bbox"] == [250, 0, 1000, 500]
    assert dog == {"type": "obj", "bbox": [250, 500, 1000, 1000], "desc": "a zwx dog, asleep"}
    assert text_of(CAT, json.dumps(CAPTION), [CAT, DOG]) == "A grey sks cat that sits"
    assert text_of(DOG, json.dumps(CAPTION), [CAT, DOG]) == "zwx dog"


@pytest.mark.parametrize(
    "prompt", ["{a sks cat", "{}", '{"compositional_deconstruction": {"elements": [{"type": "obj"}]}}']
)
def test_what_only_looks_like_a_caption_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="is no caption in JSON; expected"):
        with_boxes(prompt, [CAT], 600, 400)


def test_a_concept_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to write about 'style'; give it a trigger"):
        with_boxes("grass", [Concept(name="style", region=(0, 0, 300, 400))], 600, 400)
