"""What a check says of the words of a run: that which the call reads."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from lora_compose.compose.check.report import Report, check
from lora_compose.compose.generate.models import open_model
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.pipelines.scene.scene import Concept, Run, Scene
from qwen_image_edit import NAVY, ORANGE, QWEN_IMAGE_EDIT, qwen_image_edit_pipeline
from transformer_families import PROMPT, as_file, random_lora_of_all

pytestmark = pytest.mark.usefixtures("costs_do_not_matter")
BEAR = Concept(name="bear", lora="playground:bear", trigger="xlo", class_word="bear", region=(0, 0, 64, 128))
ROBOT = Concept(name="robot", lora="playground:robot", trigger="qrt", class_word="robot", region=(64, 0, 128, 128))


def facts_of(report: Report) -> dict[str, str]:
    assert report.problems == ()
    return dict(report.facts)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_model(playground_run("-"))


def playground_run(prompt: str, *concepts: Concept, **fields: Any) -> Run:
    return Run(
        scene=Scene(prompt=prompt, concepts=concepts),
        model=PLAYGROUND,
        method="regional",
        steps=1,
        device="cpu",
        **fields,
    )


def test_words_are_counted_behind_the_images_that_an_edit_model_reads(tmp_path: Path) -> None:
    pipe, concepts, paths = qwen_image_edit_pipeline(), [], []
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        path = tmp_path / f"{name}.safetensors"
        save_file(dict(as_file(random_lora_of_all(pipe.transformer, seed))), path)
        concepts.append(Concept(name=name, lora=str(path), trigger=trigger, class_word=name))
    for name, image in (("navy", NAVY), ("orange", ORANGE)):
        image.save(path := tmp_path / f"{name}.png")
        paths.append(str(path))
    scene = Scene(prompt=PROMPT, concepts=tuple(concepts), references=tuple(paths), width=128, height=128)
    facts = facts_of(check(Run(scene=scene, model="-", method="merge", steps=1), pipe))
    for concept, trigger in zip(concepts, QWEN_IMAGE_EDIT.words, strict=True):
        at = f"trigger {concept.trigger!r} at token {', '.join(map(str, trigger))}; "
        assert facts[f"{concept.name}: words"] == f"{at}class word {concept.class_word!r} at token {trigger[-1] + 1}"
    assert f" {QWEN_IMAGE_EDIT.words[0][0]}:s " in facts["tokens"]


def test_a_class_word_belongs_to_the_trigger_before_it(pipe: Any) -> None:
    facts = facts_of(check(playground_run("a xlo beside a qrt bear", BEAR, ROBOT), pipe))
    assert facts["bear: words"].endswith("the class word 'bear' does not follow it")


def test_a_concept_with_a_prompt_of_its_own_need_not_be_in_the_prompt(pipe: Any) -> None:
    bear = BEAR.model_copy(update={"prompt": "a xlo bear in snow"})
    facts = facts_of(check(playground_run("a qrt robot in snow", bear, ROBOT), pipe))
    assert facts["bear: words"] == "the trigger 'xlo' is not in the prompt; the concept has one of its own"
    assert facts["robot: words"].startswith("trigger 'qrt' at token 2")


def test_all_that_is_wrong_with_the_words_is_said_at_once(pipe: Any) -> None:
    report = check(playground_run("a bear in snow", BEAR, ROBOT), pipe)
    assert [word for word in ("'xlo'", "'qrt'") if not any(word in problem for problem in report.problems)] == []
    assert len(report.problems) == 2, "each once"
    assert dict(report.facts)["bear: words"] == "the trigger 'xlo' was not found"
