"""What a prompt lacks is said with what to type, and proposals come from the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components import random_lora, tiny_pipeline
from lora_compose.pipelines.methods import Draft, choose_method
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.text.prompts import about, without_triggers

TAGS = {"ss_tag_frequency": json.dumps({"10_images": {"1girl": 40, "mikudress": 40}})}
PROMPT = "mikudress and a zwx dog"


@pytest.fixture
def pipe(write_lora: Callable[..., Path]) -> Any:
    pipe = tiny_pipeline()
    dog, man = {"trigger": "zwx", "class_word": "dog"}, {"ss_dataset_dirs": '{"10_ohwx man": {}}'}
    for seed, (name, metadata) in enumerate({"miku": TAGS, "dog": dog, "man": man}.items()):
        write_lora(name, unet=random_lora(pipe.unet, seed), metadata=metadata)
    pipe.folder = write_lora("other", unet=random_lora(pipe.unet, 9)).parent
    return pipe


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_loading_without_a_trigger_names_candidates_and_the_line_to_type(pipe: Any, caplog: Any) -> None:
    path = str(pipe.folder / "miku.safetensors")
    assert pipe.load_concept(path).trigger is None
    assert "concept 'miku' has no trigger" in said(caplog)
    assert "'mikudress' (in 40 captions), '1girl' (in 40 captions)" in said(caplog)
    pipe.unload_concept("miku")
    line = said(caplog).partition("load_concept(")[2]
    typed = eval(f"pipe.load_concept({line}", {"pipe": pipe})
    assert typed.trigger == "mikudress"
    caplog.clear()
    for quiet in ({"trigger": "x"}, {"role": "style"}):
        pipe.unload_concept("miku")
        pipe.load_concept(path, **quiet)
        assert not said(caplog)


def test_a_file_without_any_words_is_loaded_without_a_warning(pipe: Any, caplog: Any) -> None:
    pipe.load_concept(pipe.folder / "other.safetensors")
    assert not said(caplog)


def test_the_folder_of_the_training_images_gives_trigger_and_class_word(pipe: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    loaded = pipe.load_concept(pipe.folder / "man.safetensors")
    assert (loaded.trigger, loaded.class_word) == ("ohwx", "man")
    assert "trigger 'ohwx', from its file (the folder of its training images, '10_ohwx man')" in caplog.text
    pipe.unload_concept("man")
    (added,) = pipe.add_concepts([pipe.folder / "man.safetensors"])
    assert (added.trigger, added.class_word) == ("ohwx", "man")


def test_the_choice_of_a_method_proposes_what_is_in_the_prompt_first(pipe: Any) -> None:
    pipe.add_concepts(pipe.folder)
    found = pipe.resolve_concepts(["miku", "dog"])
    reason = choose_method(found, [PROMPT]).reason
    assert "miku has no trigger: give it one, Concept(name='miku', trigger='mikudress'), and write it" in reason
    named = pipe.resolve_concepts([Concept(name="miku", trigger="mikudress"), "dog"])
    reason = choose_method(named, [PROMPT]).reason
    assert "miku has no class word: give it one, Concept(name='miku', class_word='1girl')" in reason
    assert "write it after 'mikudress'; there is '1girl' (in 40 captions)" in reason
    named = pipe.resolve_concepts([Concept(name="miku", trigger="mikudress", class_word="1girl"), "dog"])
    assert isinstance(choose_method(named, ["mikudress 1girl and a zwx dog"]).method, Draft)


def test_a_blend_says_how_to_get_out_of_it(pipe: Any, caplog: Any) -> None:
    pipe.add_concepts(pipe.folder)
    trigger = Concept(name="other", trigger="alc")
    choose_method(pipe.resolve_concepts([trigger, "dog"]), ["an alc woman and a zwx dog"])
    assert "Concept(name='other', class_word='woman'), and write it after 'alc'; there is 'woman' (in the prompt)" in (
        said(caplog)
    )
    assert "unless that is done, or each has a region, such as Concept(name='other', region=(0, 0, 0.5, 1))" in (
        said(caplog)
    )


def test_a_trigger_that_ends_with_its_class_word_is_enough(pipe: Any) -> None:
    pipe.add_concepts(pipe.folder)
    women = [
        Concept(name="other", trigger="alc woman", class_word="woman"),
        Concept(name="miku", trigger="brt old woman", class_word="woman"),
    ]
    found = pipe.resolve_concepts(women)
    assert [one.concept.phrase for one in found] == ["alc woman", "brt old woman"]
    assert isinstance(choose_method(found, ["an alc woman and a brt old woman in a park"]).method, Draft)


def test_a_trigger_that_ends_with_a_noun_asks_for_the_class_word_alone(pipe: Any) -> None:
    pipe.add_concepts(pipe.folder)
    women = [Concept(name="other", trigger="alc dark woman"), Concept(name="miku", trigger="brt old woman")]
    prompt = "an alc dark woman and a brt old woman in a park"
    reason = choose_method(pipe.resolve_concepts(women), [prompt]).reason
    assert "other has no class word of its own, but a trigger that ends with one: give it one, " in reason
    assert "Concept(name='other', class_word='woman'); the prompt stays as it is" in reason
    assert "write it after" not in reason
    named = [woman.model_copy(update={"class_word": "woman"}) for woman in women]
    assert isinstance(choose_method(pipe.resolve_concepts(named), [prompt]).method, Draft)
    reason = choose_method(pipe.resolve_concepts(women), ["a woman and a brt old woman"]).reason
    assert "class_word='woman'); write 'alc dark woman' in the prompt" in reason


@pytest.mark.parametrize("method", ["draft", "freefuse", "tara"])
def test_methods_that_need_a_trigger_propose_one(pipe: Any, method: str) -> None:
    pipe.add_concepts(pipe.folder)
    with pytest.raises(ValueError, match=r"miku has no trigger: give it one, Concept\(name='miku', trigger="):
        pipe(PROMPT, concepts=["miku", "dog"], method=method, num_inference_steps=1, width=32, height=32)


def test_two_women_of_one_class_word_are_drafted_with_texts_of_their_own(pipe: Any) -> None:
    for file, name, trigger in (
        ("other", "alice", "alc dark hair woman"),
        ("miku", "berta", "brt old lady woman"),
    ):
        pipe.load_concept(pipe.folder / f"{file}.safetensors", name, trigger=trigger, class_word="woman")
    scene = "an alc dark hair woman and a brt old lady woman in a cafe"
    plan = pipe.plan(scene, concepts=["alice", "berta"], width=32, height=32)
    assert plan.method == "draft"
    concepts = list(pipe.concepts.values())
    assert without_triggers(scene, concepts) == "a woman and a woman in a cafe"
    assert about(concepts[1], scene, concepts) == "a brt old lady woman in a cafe"
