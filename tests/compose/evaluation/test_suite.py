"""Suites: what they say, what follows from them, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_compose.compose.evaluation import planning
from lora_compose.compose.evaluation.batches import arms, batches, run_of, without_triggers
from lora_compose.compose.evaluation.planning import plan_batches
from lora_compose.compose.evaluation.shipped import suites_dir
from lora_compose.compose.evaluation.suite import read_suite
from lora_compose.compose.files.reading import FileError
from lora_compose.pipelines.scene.scene import Concept
from small_world import STYLE, STYLE_WORDS, words

CAT = {
    "name": "cat",
    "lora": {"ordinary": "playground:cat", "tara": "playground:cat-tara"},
    "trigger": "sks",
    "class_word": "cat",
    "references": "playground:cat",
}
DOG = {
    "name": "dog",
    "lora": {"ordinary": "playground:dog", "tara": "playground:dog-tara"},
    "trigger": "zwx",
    "class_word": "dog",
    "references": "playground:dog",
}
SCENE = {
    "name": "both",
    "prompt": "a sks cat and a zwx dog on grass",
    "concepts": ["cat", "dog"],
    "regions": {"cat": [0, 0, 64, 128], "dog": [64, 0, 128, 128]},
}
BESIDE = {
    "name": "beside",
    "prompt": "a sks cat and a cat on grass",
    "concepts": ["cat"],
    "bystanders": {"other cat": "cat"},
    "regions": {"cat": [0, 0, 64, 128], "other cat": [64, 0, 128, 128]},
}
SUITE: dict[str, Any] = {
    "name": "small",
    "model": "playground",
    "encoder": "playground:judge",
    "concepts": [CAT, DOG],
    "scenes": [SCENE],
    "methods": ["merge", {"method": "tara", "lora": "tara"}, "regional"],
    "seeds": [3, 1, 2],
    "batch_size": 2,
    "steps": 2,
}


A_STYLE = {"name": STYLE, "lora": f"playground:{STYLE}", "trigger": words(STYLE)[0], "class_word": "style",
       "role": "style", "references": f"playground:{STYLE}"}  # fmt: skip


def written(folder: Path, **changes: Any) -> str:
    path = folder / "suite.json"
    path.write_text(json.dumps({**SUITE, **changes}), encoding="utf-8")
    return str(path)


def complaint(folder: Path, **changes: Any) -> str:
    with pytest.raises(FileError) as caught:
        read_suite(written(folder, **changes))
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in suites_dir().glob("*.yaml")))
def test_suites_that_come_along_can_be_read(name: str) -> None:
    suite = read_suite(name)
    assert len(suite.scenes) >= 5  # intervals are taken over scenes
    methods = {method.method for method in suite.compared}
    assert "merge" in methods
    boxed = ("regional", "draft", "lora-composer")
    in_boxes = any(arm.method in boxed and "keep_regions" not in arm.settings for arm in suite.compared)
    assert in_boxes or not any(scene.regions for scene in suite.scenes)
    assert len(suite.compared) > 1


def test_the_full_suite_uses_every_concept() -> None:
    suite = read_suite("playground-full")
    used = [concept for scene in suite.scenes for concept in scene.concepts]
    assert all(used.count(concept.name) >= 2 for concept in suite.concepts)


def test_the_quick_suite_has_every_method_that_is_chosen_automatically() -> None:
    methods = read_suite("playground-quick").methods
    assert {arm.method for arm in methods} == {"merge", "draft", "tara", "regional", "lora-composer"}
    assert any(arm.method == "draft" and not arm.settings for arm in methods), "as a call with boxes chooses it"


def test_every_scene_has_the_sanity_rows_and_all_methods(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path, methods=["regional", {"method": "tara", "lora": "tara"}]))
    rows = [(arm.name, arm.alone, arm.lora) for arm in arms(suite, suite.scenes[0])]
    assert rows == [
        ("no LoRA", None, None),
        ("alone", "cat", "ordinary"),
        ("alone", "dog", "ordinary"),
        ("alone, tara", "cat", "tara"),
        ("alone, tara", "dog", "tara"),
        ("merge", None, None),
        ("regional", None, None),
        ("tara", None, "tara"),
    ]


def test_seeds_are_divided_into_batches_in_their_order(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    seeds = [batch.seeds for batch in batches(suite) if batch.arm.name == "merge"]
    assert seeds == [(3, 1), (2,)]


def test_prompts_name_only_the_acting_concepts(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    prompts = {(batch.arm.name, batch.arm.alone): run_of(suite, batch).scene.prompt for batch in batches(suite)}
    assert prompts["no LoRA", None] == "a cat and a dog on grass"
    assert prompts["alone", "dog"] == "a cat and a zwx dog on grass"
    assert prompts["merge", None] == SCENE["prompt"]


def test_methods_keep_off_bystanders_and_loras_alone_do_not_know_of_them(tmp_path: Path) -> None:
    methods = ["regional", {"name": "file", "method": "regional", "merge": "tsv"}]
    suite = read_suite(written(tmp_path, scenes=[{**BESIDE, "bundle": ["dog"]}], methods=["merge", *methods]))
    runs = {batch.arm.name: run_of(suite, batch).scene for batch in batches(suite)}
    assert {name: len(scene.concepts) for name, scene in runs.items()} == {
        "no LoRA": 0, "alone": 1, "merge": 2, "regional": 2, "file": 2,
    }  # fmt: skip
    other = Concept(name="other cat", role="bystander", class_word="cat", region=(64, 0, 128, 128))
    assert [runs[name].concepts[-1] for name in ("merge", "regional", "file")] == [other] * 3
    assert {runs[name].prompt for name in ("merge", "alone")} == {BESIDE["prompt"]}
    assert runs["no LoRA"].prompt == "a cat and a cat on grass"


def test_scores_of_suites_without_bystanders_stay_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(planning, "digest", lambda *facts: kept.append(facts[0]) or "0")
    plan_batches(read_suite(written(tmp_path)))
    scenes = [facts for facts in kept if isinstance(facts, dict)]
    assert len(scenes) > 5
    assert not any("bystanders" in scene for scene in scenes)
    plan_batches(read_suite(written(tmp_path, scenes=[BESIDE])))
    assert kept[-1]["bystanders"] == {"other cat": "cat"}


def test_methods_get_the_loras_of_their_kind(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    loras = {batch.arm.name: [c.lora for c in run_of(suite, batch).scene.concepts] for batch in batches(suite)}
    assert loras["no LoRA"] == []
    assert loras["merge"] == ["playground:cat", "playground:dog"]
    assert loras["tara"] == ["playground:cat-tara", "playground:dog-tara"]


def test_loras_trained_with_tara_act_alone_by_it(tmp_path: Path) -> None:
    """Without its token masks a LoRA that was trained with them is less than it can be."""
    suite = read_suite(written(tmp_path, methods=["regional", {"name": "merged", "method": "merge", "lora": "tara"}]))
    runs = {batch.arm.name: run_of(suite, batch) for batch in batches(suite)}
    methods = {name: run.method for name, run in runs.items()}
    assert methods == {
        "no LoRA": None, "alone": "merge", "alone, tara": "tara", "merge": "merge", "regional": "regional",
        "merged": "merge",
    }  # fmt: skip
    assert [concept.lora for concept in runs["alone, tara"].scene.concepts] == ["playground:dog-tara"]
    mixed = [{**CAT, "lora": "playground:cat-tara"}, {**DOG, "lora": "playground:dog"}]
    suite = read_suite(written(tmp_path, concepts=mixed, methods=["merge"]))
    assert {b.arm.alone: run_of(suite, b).method for b in batches(suite) if b.arm.alone} == {
        "cat": "tara",
        "dog": "merge",
    }


def test_a_file_that_cannot_be_read_alone_is_left_to_the_check_of_all_runs(tmp_path: Path) -> None:
    (tmp_path / "cat.bin").write_bytes(b"\x80\x02no")
    suite = read_suite(written(tmp_path, concepts=[{**CAT, "lora": str(tmp_path / "cat.bin")}, DOG], methods=["merge"]))
    assert {run_of(suite, batch).method for batch in batches(suite) if batch.arm.alone == "cat"} == {"merge"}


def test_a_concept_acts_as_in_its_suite(tmp_path: Path) -> None:
    cat = {**CAT, "weight": "1..0.4", "blocks": {"down": 0.5}, "negative_prompt": "blurry"}
    suite = read_suite(written(tmp_path, concepts=[cat, {**DOG, "weight": [1, 0]}]))
    one, other = next(
        run for batch in batches(suite) if len((run := run_of(suite, batch)).scene.concepts) == 2
    ).scene.concepts
    assert one == Concept(
        name="cat", lora="playground:cat", trigger="sks", class_word="cat", region=(0, 0, 64, 128), weight="1..0.4",
        blocks={"down": 0.5}, negative_prompt="blurry",
    )  # fmt: skip
    assert (other.weight, other.blocks) == (Concept(name="dog", weight=[1, 0]).weight, None)
    assert "weight" in complaint(tmp_path, concepts=[{**CAT, "weight": "often"}, DOG])
    assert "the weight reaches 30" in complaint(tmp_path, concepts=[{**CAT, "weight": 30}, DOG])
    suite = read_suite(written(tmp_path, concepts=[{**CAT, "weight": 30, "any_weight": True}, DOG]))
    assert 30 in {concept.weight for batch in batches(suite) for concept in run_of(suite, batch).scene.concepts}


def test_a_concept_may_have_one_lora(tmp_path: Path) -> None:
    concepts = [{**CAT, "lora": "playground:cat"}, {**DOG, "lora": "playground:dog"}]
    suite = read_suite(written(tmp_path, concepts=concepts, methods=["merge"]))
    assert [arm.name for arm in arms(suite, suite.scenes[0])] == ["no LoRA", "alone", "alone", "merge"]


def test_triggers_are_taken_out_as_whole_words(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    assert without_triggers("SKS cat, sksy and zwx dog; a sks", suite.concepts) == "cat, sksy and dog; a"


def test_paths_are_relative_to_the_suite(tmp_path: Path) -> None:
    concepts = [
        {**CAT, "lora": "loras/cat.safetensors", "references": ["a.png", "b.png"]},
        {**DOG, "lora": "./dog.safetensors"},
    ]
    suite = read_suite(written(tmp_path, concepts=concepts, methods=["merge"], model="./model"))
    assert suite.concepts[0].lora == str(tmp_path / "loras/cat.safetensors")
    assert suite.concepts[0].references == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert suite.model == str(tmp_path / "model")
    assert suite.encoder == "playground:judge"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scenes": []}, "scenes"),
        ({"methods": []}, "methods"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"methods": ["mrege"]}, "unknown method 'mrege'; there are merge"),
        ({"methods": [{"method": "tara", "settings": {"speed": 1}}]}, "tara has no settings ['speed']"),
        ({"methods": ["merge", "merge"]}, "'merge' stands twice"),
        ({"methods": [{"method": "merge", "name": "alone"}]}, "'alone' is the name of a row"),
        ({"methods": [{"method": "merge", "name": "m", "lora": "other"}]}, "of the kind 'other', which cat, dog lacks"),
        (
            {"concepts": [CAT, {**DOG, "lora": "playground:dog"}], "methods": ["merge"]},
            "cat has a LoRA of the kind 'ordinary', which dog lacks",
        ),
        ({"baseline": "clora"}, "the baseline 'clora' is not among the methods; there are merge, tara, regional"),
        (
            {"scenes": [{**SCENE, "concepts": ["cat", "fox"]}]},
            "scene 'both' names fox, which is not a concept of the suite",
        ),
        ({"scenes": [{**SCENE, "concepts": ["cat", "cat"]}]}, "names a concept twice"),
        ({"scenes": [{**SCENE, "prompt": "a sks cat and a dog"}]}, "does not name 'dog' by its trigger 'zwx'"),
        ({"scenes": [{**SCENE, "regions": {"cat": [0, 0, 9, 9]}}]}, "needs a region for each of cat, dog"),
        ({"scenes": [{**SCENE, "regions": {}}]}, "no regions and the suite has no detector"),
        ({"scenes": [{**SCENE, "bystanders": {"man": "man"}}]}, "'both': the prompt does not name the bystander 'man'"),
        ({"scenes": [{**BESIDE, "prompt": "a sks cat"}]}, "write 'cat' where it follows no trigger"),
        ({"scenes": [{**BESIDE, "bystanders": {"dog": "cat"}}]}, "'dog' has the name of a concept of the suite"),
        ({"scenes": [{**BESIDE, "regions": {"cat": [0, 0, 9, 9]}}]}, "needs a region for each of cat, other cat"),
        ({"scenes": [{**BESIDE, "bystanders": {"other cat": ""}}]}, "scenes[0].bystanders"),
        ({"scenes": [SCENE, SCENE]}, "'both' stands twice"),
        ({"scenes": [{**SCENE, "name": "../../etc"}]}, "scenes[0].name"),
        ({"scenes": [{**SCENE, "sizes": 3}]}, "scenes[0].sizes: unknown field; fields are name, prompt"),
        ({"detector": {"kind": "magic"}}, "detector"),
        ({"save_memory": ["magic"]}, "save_memory"),
        ({"save_memory": ["model-offload", "sequential-offload"]}, "do not go together; choose one"),
        ({"encodr": "clip"}, "encodr: unknown field; fields are name, model, encoder"),
        ({"concepts": [{**CAT, "trigger": ""}, DOG]}, "concepts[0].trigger"),
        ({"guidance_scale": "much"}, "guidance_scale"),
        (
            {"concepts": [{**CAT, "blocks": {"mid": 0}}, DOG], "methods": [{"method": "merge", "merge": "tsv"}]},
            "'merge' merges LoRAs into one file, which takes each with one number as its weight, and 'cat' has",
        ),
        (
            {
                "concepts": [CAT, {**DOG, "weight": "1..0.5"}],
                "methods": ["merge", {"method": "regional", "merge": "tsv"}],
            },
            "and 'dog' has a weight that changes over the steps; give it a number",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    message = complaint(tmp_path, **changes)
    assert expected in message
    assert "suite.json" in message


def test_an_unknown_suite_lists_those_that_come_along() -> None:
    with pytest.raises(FileError, match=r"playground-full, playground-merged-bundles, .*, playground-quick"):
        read_suite("playground-slow")


def test_a_plan_changes_only_where_something_changed(tmp_path: Path) -> None:
    before = plan_batches(read_suite(written(tmp_path)))
    same = plan_batches(read_suite(written(tmp_path)))
    more = plan_batches(read_suite(written(tmp_path, methods=["merge", "regional"], name="other", baseline="regional")))
    slower = plan_batches(read_suite(written(tmp_path, steps=3)))
    judged = plan_batches(read_suite(written(tmp_path, detector={"kind": "windows", "vocabulary": ["fox"]})))
    saving, again = (
        plan_batches(read_suite(written(tmp_path, save_memory=savers)))
        for savers in (["tiling", "model-offload"], ["model-offload", "tiling", "tiling"])
    )
    assert again.batches == saving.batches
    keys = {planned.key for planned in before.batches}
    assert same.batches == before.batches
    assert {planned.key for planned in more.batches} < keys
    assert not {planned.key for planned in slower.batches} & keys
    assert not {planned.key for planned in saving.batches} & keys
    assert {planned.key for planned in judged.batches} == keys
    assert not {planned.scores for planned in judged.batches} & {planned.scores for planned in before.batches}


def test_scores_change_with_the_role_of_a_concept_and_images_of_no_lora_do_not(tmp_path: Path) -> None:
    scene = {key: value for key, value in SCENE.items() if key != "regions"}
    plans = {}
    for role in (None, "subject", "style"):
        changes = {"concepts": [CAT, {**DOG, "role": role}], "scenes": [scene], "detector": {"kind": "windows"}}
        plans[role] = plan_batches(read_suite(written(tmp_path, **changes)))
    assert {planned.scores for planned in plans["subject"].batches} == {plans[None].batches[0].scores}
    assert plans["style"].batches[0].key == plans[None].batches[0].key
    assert plans["style"].batches[0].scores != plans[None].batches[0].scores


def test_scores_change_with_the_boxes_that_cut_own_references(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "0.png")

    def scores(table: str | None) -> str:
        if table is not None:
            (folder / "captions.tsv").write_text(table)
        concepts = [{**CAT, "references": str(folder)}, DOG]
        return plan_batches(read_suite(written(tmp_path, concepts=concepts))).batches[0].scores

    plain = scores(None)
    assert scores("0.png\ta sks cat") == plain
    cut = scores("0.png\ta sks cat\t0 0 8")
    assert len({plain, cut, scores("0.png\ta sks cat\t4 4 8")}) == 3
    assert scores("0.png\ta cat\t0 0 8") == cut


def test_a_missing_reference_image_is_named(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path, concepts=[{**CAT, "references": ["lost.png"]}, DOG]))
    with pytest.raises(ValueError, match=r"concept 'cat': the reference image '.*lost.png' is missing"):
        plan_batches(suite)


def test_methods_that_merge_files_get_the_whole_bundle_as_one_concept_or_in_every_region(tmp_path: Path) -> None:
    scene = {**SCENE, "prompt": f"{SCENE['prompt']} in {STYLE_WORDS}", "concepts": ["cat", "dog", STYLE]}
    alone = {"name": "alone", "prompt": "a sks cat", "concepts": ["cat"], "bundle": ["dog", STYLE],
             "regions": {"cat": [0, 0, 64, 128]}}  # fmt: skip
    concepts = [{**CAT, "lora": "playground:cat"}, {**DOG, "lora": "playground:dog", "weight": 0.5}, A_STYLE]
    methods = [{"method": "merge", "merge": "tsv"}, {"method": "regional", "merge": "ssr"}]
    suite = read_suite(
        written(tmp_path, concepts=concepts, scenes=[scene, alone], methods=methods, baseline="regional")
    )
    assert [method.name for method in suite.compared] == ["merge", "regional"]
    runs = {(b.scene.name, b.arm.name): run_of(suite, b).scene.concepts for b in batches(suite)}
    files = ("playground:cat:1.0", "playground:dog:0.5", f"playground:{STYLE}:1.0")
    for name in ("both", "alone"):
        (one,) = runs[name, "merge"]
        assert (one.lora, one.merge, one.weight, one.name) == (files, "tsv", 1.0, f"cat+dog+{STYLE}")
    cat, dog = runs["both", "regional"]
    assert (cat.lora, cat.merge, cat.region, dog.lora, dog.weight) == (files, "ssr", (0, 0, 64, 128), files, 1.0)
    assert [one.lora for one in runs["alone", "regional"]] == [files]
    style = next(run_of(suite, b).scene.concepts[0] for b in batches(suite) if b.arm.alone == STYLE)
    assert style.is_style


def test_what_cannot_be_bundled_is_said(tmp_path: Path) -> None:
    found = complaint(tmp_path, methods=[{"method": "merge", "merge": "sum"}])
    assert "unknown method 'sum'; there are cat, svd" in found
    assert "names a concept twice" in complaint(tmp_path, scenes=[{**SCENE, "bundle": ["cat"]}])
    assert "names bear, which is not a concept" in complaint(tmp_path, scenes=[{**SCENE, "bundle": ["bear"]}])
    lonely = {"name": "lonely", "prompt": STYLE_WORDS, "concepts": [STYLE]}
    assert "has no subject" in complaint(tmp_path, concepts=[A_STYLE], scenes=[lonely], detector={"kind": "windows"})
