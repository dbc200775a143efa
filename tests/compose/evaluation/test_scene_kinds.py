"""Success by kind of scene, from scores that are known by hand."""

from pathlib import Path

import pytest

from evaluations import known, store, suite
from lora_compose.compose.evaluation.report import write_report
from lora_compose.compose.evaluation.summary import kind_of_scene, success_by_kind
from lora_compose.compose.evaluation.table import load

HOW = ("apart", "entangled")


def stored(folder: Path, how: tuple[str, ...]) -> Path:
    scenes = [
        {"name": f"scene {i}", "prompt": "a sks cat and a zwx dog", "concepts": ["cat", "dog"], "interaction": one}
        for i, one in enumerate(how)
    ]
    return store(folder, suite(scenes), known, draw=True)


def test_success_is_a_mean_over_the_images_of_a_kind(tmp_path: Path) -> None:
    evaluation = load(stored(tmp_path, (*HOW, "apart")))
    table = success_by_kind(evaluation)
    assert list(table.columns) == ["2 subjects, apart", "2 subjects, entangled"]
    images = evaluation.images
    chosen = images[(images["arm"] == "regional") & images["scene"].isin(["scene 0", "scene 2"])]
    assert table.loc["regional", "2 subjects, apart"] == pytest.approx(chosen["success"].astype(float).mean())
    assert 0 < table.loc["regional", "2 subjects, apart"] < 1
    assert success_by_kind(load(stored(tmp_path / "one kind", ("apart", "apart")))).empty


@pytest.mark.parametrize(("word", "kind"), [("old cat", "2 subjects of one class"), ("old dog", "2 subjects")])
def test_class_words_that_end_in_one_noun_are_one_class(word: str, kind: str) -> None:
    small = suite()
    cat, dog = small.concepts
    of_words = small.model_copy(update={"concepts": (cat, dog.model_copy(update={"class_word": word}))})
    assert kind_of_scene(of_words, small.scenes[0]) == kind


def test_the_report_has_a_table_by_kind_and_memory_beside_seconds(tmp_path: Path) -> None:
    report = write_report(stored(tmp_path, HOW))
    page, text = report.html.read_text(), report.markdown.read_text()
    assert "By kind of scene" in page
    assert '<th scope="col">2 subjects, entangled</th>' in page
    assert "| Success | 2 subjects, apart | 2 subjects, entangled |" in text
    assert "| regional | 0.50 | 0.50 |" in text
    assert "| seconds | largest memory |" in text
    assert " MiB |" in text
