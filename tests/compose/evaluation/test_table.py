"""From stored scores to tables, with numbers computed by hand."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from evaluations import SCORES, TRUTH, Seen, known, sanity, store, success, suite
from lora_compose.compose.evaluation.batches import Batch
from lora_compose.compose.evaluation.report import warnings, write_report
from lora_compose.compose.evaluation.results import MADE, PLAN, ConceptScore, Features, Scores
from lora_compose.compose.evaluation.statistics import bootstrap
from lora_compose.compose.evaluation.summary import MAIN, METRICS, summary
from lora_compose.compose.evaluation.table import Evaluation, arm_names, load
from lora_compose.compose.files.reading import FileError
from small_world import STYLE


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return load(store(tmp_path_factory.mktemp("known"), suite(), known))


def image(evaluation: Evaluation, arm: str, seed: int, alone: str | None = None) -> dict[str, Any]:
    rows = evaluation.arm(arm).to_dict("records")
    (row,) = (row for row in rows if row["seed"] == seed and alone in (None, row["alone"]))
    return row


def concept(evaluation: Evaluation, arm: str, seed: int, name: str) -> dict[str, Any]:
    rows = evaluation.concepts.to_dict("records")
    (row,) = (row for row in rows if (row["arm"], row["seed"], row["concept"]) == (arm, seed, name))
    return row


def arms(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in summary(evaluation).to_dict("records")}


def values(row: dict[str, Any], names: str) -> list[Any]:
    return [row[name] for name in names.split()]


def by_concept(evaluation: Evaluation, *names: str) -> dict[str, tuple[float, ...]]:
    return {row["concept"]: tuple(row[name] for name in names) for row in evaluation.thresholds.to_dict("records")}


# --- images and concepts ---


def test_there_is_a_row_per_image_and_per_concept_that_counts(evaluation: Evaluation) -> None:
    # two seeds of: no LoRA, two kinds of LoRAs of two concepts, three methods
    assert len(evaluation.images) == 2 * (1 + 4 + 3)
    assert len(evaluation.concepts) == 2 * (2 + 4 + 2 * 3)
    assert set(evaluation.concepts.query("arm == 'alone' and alone == 'cat'")["concept"]) == {"cat"}


def test_a_swapped_concept(evaluation: Evaluation) -> None:
    row = image(evaluation, "merge", 1)
    assert values(row, "region region_min leak swap found") == pytest.approx([0.45, 0.3, 0.4, 0.5, 1])
    assert not row["success"]
    dog = concept(evaluation, "merge", 1, "dog")
    assert (dog["own"], dog["other"], dog["nearest"], dog["present"]) == (0.3, 0.5, "cat", False)
    cat = concept(evaluation, "merge", 1, "cat")
    assert (cat["nearest"], cat["threshold"], cat["present"]) == ("cat", pytest.approx(0.5), True)


def test_what_was_not_found_counts_as_0_but_does_not_leak(evaluation: Evaluation) -> None:
    row = image(evaluation, "merge", 2)
    assert values(row, "region region_min leak swap found") == pytest.approx([0.25, 0, 0.2, 0, 0.5])
    assert not row["success"]
    cat = concept(evaluation, "merge", 2, "cat")
    assert (cat["own"], cat["found"], cat["present"]) == (0, False, False)
    assert all(map(pd.isna, values(cat, "other nearest placed detection left")))
    nothing = image(evaluation, "tara", 2)
    assert values(nothing, "region region_min found") == [0, 0, 0]
    assert all(map(pd.isna, values(nothing, "leak swap placed")))


def test_where_a_lora_acts_alone_only_its_concept_counts(evaluation: Evaluation) -> None:
    row = image(evaluation, "alone", 1, "dog")
    assert values(row, "region region_min leak swap found") == pytest.approx([0.6, 0.6, 0.2, 0, 1])
    assert row["success"]


def test_thresholds_are_halfway_between_without_and_alone(evaluation: Evaluation) -> None:
    table = by_concept(evaluation, "without", "alone", "threshold")
    assert table["cat"] == pytest.approx((0.3, 0.7, 0.5))
    assert table["dog"] == pytest.approx((0.2, 0.6, 0.4))
    assert evaluation.unrecognised == evaluation.unmeasured == []


def test_thresholds_leave_out_what_was_not_found(tmp_path: Path) -> None:
    def measured(batch: Batch, seed: int) -> Seen:
        lost = seed == 2 and batch.arm.name in ("no LoRA", "alone")
        return {"cat": None, "dog": None} if lost else known(batch, seed)

    table = by_concept(load(store(tmp_path, suite(), measured)), "threshold")
    assert (*table["cat"], *table["dog"]) == pytest.approx((0.5, 0.4))


def test_ratios_are_over_the_same_kind_of_lora_alone(evaluation: Evaluation) -> None:
    ratio = {(row["arm"], row["concept"]): row["ratio"] for row in evaluation.bounds.to_dict("records")}
    assert ratio["merge", "cat"] == pytest.approx(0.3 / 0.7)  # 0.6 and 0
    assert ratio["merge", "dog"] == pytest.approx(0.4 / 0.6)
    assert ratio["tara", "cat"] == pytest.approx(0.25 / 0.5)  # 0.5 and 0, over TARA LoRAs
    assert ratio["no LoRA", "cat"] == pytest.approx(0.3 / 0.7)
    assert ratio["alone, tara", "dog"] == pytest.approx(1)
    assert np.mean(evaluation.arm("merge")["ratio"].to_numpy()) == pytest.approx((0.3 / 0.7 + 0.4 / 0.6) / 2)


def test_a_concept_that_the_encoder_does_not_recognise(tmp_path: Path) -> None:
    def measured(batch: Batch, seed: int) -> Seen:
        found = dict(known(batch, seed))
        return found | {"dog": (0.65, 0.1)} if batch.arm.name == "no LoRA" else found

    evaluation = load(store(tmp_path, suite(), measured))
    assert evaluation.unrecognised == ["dog"]
    assert concept(evaluation, "regional", 1, "dog")["present"]  # nearest to its own references, no threshold
    assert np.isnan(concept(evaluation, "regional", 1, "dog")["threshold"])


def test_a_style_is_measured_by_its_colours_between_without_and_alone(tmp_path: Path) -> None:
    style = {"name": "old", "lora": "/old.safetensors", "trigger": "wfy", "class_word": "style", "role": "style",
             "references": f"playground:{STYLE}"}  # fmt: skip
    cat = suite().concepts[0].model_dump() | {"lora": "/cat.safetensors"}
    scene = {"name": "one", "prompt": "a sks cat in wfy style", "concepts": ["cat", "old"]}
    small = suite([scene], concepts=[cat, style], methods=["merge", "regional"])
    reds = {"no LoRA": (0.1, 0.3), "alone": (0.5, 0.7), "merge": (0.5, 0.6), "regional": (0.2, 0.4)}

    def measured(batch: Batch, seed: int) -> Seen:
        colours = (reds[batch.arm.name][seed - 1], *[0.5] * 5)
        own = {"no LoRA": 0.3, "alone": 0.7}.get(batch.arm.name, 0.6)
        found = ConceptScore(box=(0, 0, 8, 8), detection=0.9, similarity={"cat": own}, whole=0.5)
        return {"cat": found, "old": ConceptScore(whole=0.5, colours=colours)}

    evaluation = load(store(tmp_path, small, measured))
    assert [image(evaluation, "merge", seed)["style"] for seed in (1, 2)] == pytest.approx([0.75, 1.0])
    assert [image(evaluation, "regional", seed)["style"] for seed in (1, 2)] == pytest.approx([0, 0.5])
    assert by_concept(evaluation, "without", "alone", "threshold")["old"] == pytest.approx((0, 1.2, 0.6))
    assert [image(evaluation, arm, 2)["success"] for arm in ("merge", "regional")] == [True, False]
    alone = image(evaluation, "alone", 2, "old")
    assert (alone["style"], alone["success"]) == (pytest.approx(1.25), True)
    assert all(map(pd.isna, values(alone, "region region_min leak found")))
    assert pd.isna(image(evaluation, "alone", 2, "cat")["style"])
    assert image(evaluation, "merge", 1)["region"] == pytest.approx(0.6)


def test_a_scene_of_one_concept(tmp_path: Path) -> None:
    evaluation = load(store(tmp_path, suite({"one": ("cat",)}), known))
    row = image(evaluation, "regional", 1)
    assert (row["region"], row["region_min"], row["success"]) == (0.7, 0.7, True)
    assert all(map(pd.isna, values(row, "leak swap")))
    assert evaluation.thresholds["concept"].tolist() == ["cat"]


def test_the_order_of_concepts_does_not_matter(tmp_path: Path) -> None:
    straight = load(store(tmp_path / "a", suite({"both": ("cat", "dog")}), known))
    turned = load(store(tmp_path / "b", suite({"both": ("dog", "cat")}), known))
    keys = ["arm", "alone", "seed"]
    first, second = (one.images.sort_values(keys).reset_index(drop=True) for one in (straight, turned))
    assert_frame_equal(first, second)
    assert_frame_equal(straight.thresholds, turned.thresholds)


def test_success_of_an_image_is_that_of_the_metric(tmp_path: Path) -> None:
    steps = [None, *product((0.375, 0.5, 0.75), repeat=2)]  # a concept's similarity to itself and to the other
    cases: dict[int, Any] = dict(enumerate(product(steps, repeat=2)))

    def measured(batch: Batch, seed: int) -> Seen:
        return sanity(batch) or dict(zip(("cat", "dog"), cases[seed], strict=True))

    evaluation = load(store(tmp_path, suite(seeds=list(cases), methods=["merge"], batch_size=64), measured))
    found = dict(zip(evaluation.arm("merge")["seed"], evaluation.arm("merge")["success"], strict=True))
    gap = (np.nan, np.nan)
    for seed, (cat, dog) in cases.items():
        matrix = np.array([cat or gap, (dog or gap)[::-1]])
        assert found[seed] == success(matrix, np.array([0.5, 0.4])), (cat, dog)


# --- outcomes ---


def test_outcomes_come_from_what_lies_beyond_the_references(tmp_path: Path) -> None:
    evaluation = load(store(tmp_path, suite(), known, truth=TRUTH))
    cells = {
        (row["concept"], row["reference"]): row
        for row in evaluation.confusion.query("arm == 'merge' and seed == 1").to_dict("records")
    }
    # limits: cat 0.5 and dog 0.4 (thresholds), else halfway from 0.1 to the 0.6 and 0.7 of the LoRAs alone
    assert {key: cell["limit"] for key, cell in cells.items()} == pytest.approx({
        ("cat", "cat"): 0.5, ("cat", "dog"): 0.35, ("dog", "cat"): 0.4, ("dog", "dog"): 0.4
    })  # fmt: skip
    assert {key: cell["difference"] for key, cell in cells.items()} == pytest.approx({
        ("cat", "cat"): -0.3, ("cat", "dog"): 0.2, ("dog", "cat"): 0.4, ("dog", "dog"): -0.5
    })  # fmt: skip
    found = [
        concept(evaluation, arm, seed, name)
        for arm, seed in (("merge", 1), ("merge", 2), ("regional", 2))
        for name in ("cat", "dog")
    ]
    assert [one["outcome"] for one in found] == ["kept", "dominance", "missing", "kept", "drift", "kept"]
    assert [one["took"] for one in found if pd.notna(one["took"])] == ["cat"]
    row = image(evaluation, "merge", 1)
    assert values(row, "share_kept share_dominance share_drift lost gained") == pytest.approx([0.5, 0.5, 0, -0.4, 0.3])
    merge = arms(evaluation)["merge"]
    assert values(merge, "share_kept share_dominance share_missing share_swap") == pytest.approx([0.5, 0.25, 0.25, 0])


def test_where_a_lora_acts_alone_its_subject_is_kept_or_drifts(tmp_path: Path) -> None:
    evaluation = load(store(tmp_path, suite(), known, truth=TRUTH))
    row = image(evaluation, "alone", 1, "dog")
    assert values(row, "share_kept lost") == pytest.approx([1, -0.2])
    assert pd.isna(row["gained"])
    assert evaluation.confusion.query("arm == 'alone' and alone == 'dog'")["reference"].unique().tolist() == ["dog"]


def test_what_was_found_of_a_lora_alone_counts_in_any_place(tmp_path: Path) -> None:
    """A single finding for two subjects of one class is in the place of one of them, of the one that does not act."""

    def measured(batch: Batch, seed: int) -> Seen:
        elsewhere = ConceptScore(box=(66, 8, 126, 120), similarity={"cat": 0.95, "dog": 0.2}, whole=0.5, slot={})
        return {**known(batch, seed), "cat": elsewhere} if batch.arm.alone == "cat" else known(batch, seed)

    row = image(load(store(tmp_path, suite(), measured, truth=TRUTH)), "alone", 1, "cat")
    assert values(row, "share_kept share_missing lost") == pytest.approx([1, 0, 0.05])


def test_scores_of_older_versions_have_no_outcomes(tmp_path: Path) -> None:
    out = store(tmp_path, suite(), known)
    for path in out.glob(f"batches/*/{SCORES}"):  # as they were written before there were outcomes
        scores = json.loads(path.read_text())
        del scores["truth"]
        for shown in scores["images"].values():
            del shown["chosen"]
            for name in shown["concepts"]:
                del shown["concepts"][name]["slot"]
        path.write_text(json.dumps(scores))
    plan = json.loads((out / PLAN).read_text())
    del plan["suite"]["metrics"]
    (out / PLAN).write_text(json.dumps(plan))
    evaluation = load(out)
    assert image(evaluation, "merge", 1)["region"] == pytest.approx(0.45)
    assert evaluation.confusion.empty
    assert evaluation.images[["share_kept", "lost", "dino", "scr"]].isna().to_numpy().all()
    assert evaluation.concepts["outcome"].isna().to_numpy().all()


def test_the_share_in_its_box_is_that_of_the_found_box(tmp_path: Path) -> None:
    scene = {"name": "both", "prompt": "a sks cat and a zwx dog", "concepts": ["cat", "dog"],
             "regions": {"cat": [0, 0, 32, 128], "dog": [64, 0, 128, 128]}}  # fmt: skip
    row = image(load(store(tmp_path, suite([scene]), known)), "regional", 1)
    assert row["inside"] == pytest.approx((30 / 60 + 1) / 2)  # boxes from 2 to 62 and from 66 to 126


def test_chosen_metrics_are_computed_from_their_own_models(tmp_path: Path) -> None:
    chosen = ["clip-t=a", "clip-i=b", "dino=c", {"name": "scr", "model": "c", "threshold": 0.45}]

    def measured(whole: float, found: dict[str, float]) -> Features:
        return Features(text=31.0, whole={"cat": whole, "dog": 0.5}, found=found)

    of = suite(methods=["merge"], seeds=[1], metrics=chosen)
    out = store(tmp_path, of, lambda batch, seed: sanity(batch) or {"cat": 0.6, "dog": 0.6})
    path = out / "batches/both-merge-None-1" / SCORES
    scores = Scores.model_validate_json(path.read_text())
    by_name = {"clip-t": measured(0.9, {}), "clip-i": measured(0.1, {}), "dino": measured(0.2, {"cat": 0.7}),
               "scr": measured(0.3, {"cat": 0.46, "dog": 0.44})}  # fmt: skip
    images = {1: scores.images[1].model_copy(update={"chosen": by_name})}
    path.write_text(scores.model_copy(update={"images": images}).model_dump_json())
    row = image(load(out), "merge", 1)
    found = values(row, "clip_t clip_i dino dino_found scr scr_whole")
    assert found == pytest.approx([31, (0.1 + 0.5) / 2, (0.2 + 0.5) / 2, 0.7 / 2, 1 / 2, 1 / 2])
    plain = image(load(out), "no LoRA", 1)
    assert values(plain, "clip_t clip_i") == [25, 0.5]
    assert pd.isna(plain["dino"])


def test_arcface_leaves_out_what_has_no_face_in_its_references(tmp_path: Path) -> None:
    of = suite(methods=["merge"], seeds=[1], metrics=["arcface=a.onnx"])
    out = store(tmp_path, of, lambda batch, seed: sanity(batch) or {"cat": 0.6, "dog": 0.6})
    path = out / "batches/both-merge-None-1" / SCORES
    scores = Scores.model_validate_json(path.read_text())
    both = {"cat": 0.1, "dog": 0.2}
    for whole, found, expected in (
        (both, {"cat": 0.7, "dog": 0.5}, 0.6),
        (both, {"cat": 0.7}, 0.35),  # the dog was not found
        ({"cat": 0.1}, {"cat": 0.7}, 0.7),  # no face in the references of the dog
        ({"dog": 0.1}, {}, 0.0),
    ):
        features = {"arcface": Features(whole=whole, found=found)}
        images = {1: scores.images[1].model_copy(update={"chosen": features})}
        path.write_text(scores.model_copy(update={"images": images}).model_dump_json())
        assert image(load(out), "merge", 1)["arcface"] == pytest.approx(expected)


def test_only_an_encoder_that_reads_texts_gives_clip_i(tmp_path: Path) -> None:
    of = suite(methods=["merge"], seeds=[1])
    out = store(tmp_path, of, lambda batch, seed: sanity(batch) or {"cat": 0.6, "dog": 0.6})
    path = out / "batches/both-merge-None-1" / SCORES
    scores = Scores.model_validate_json(path.read_text())
    images = {1: scores.images[1].model_copy(update={"clip_t": None})}
    path.write_text(scores.model_copy(update={"images": images}).model_dump_json())
    table = load(out)
    assert pd.isna(image(table, "merge", 1)["clip_i"])
    assert image(table, "no LoRA", 1)["clip_i"] == 0.5


# --- what is not there ---


def test_failures_and_gaps_are_counted(tmp_path: Path) -> None:
    def measured(batch: Batch, seed: int) -> Seen | str | None:
        gaps = {("merge", 1): "out of memory", ("merge", 2): None, ("regional", 1): "unscored"}
        return gaps.get((batch.arm.name, seed), known(batch, seed))

    evaluation = load(store(tmp_path, suite(), measured))
    assert [(one.arm, one.error) for one in evaluation.failed] == [("merge", "out of memory")]
    assert (evaluation.missing, evaluation.unscored) == (1, 1)
    assert evaluation.arm("merge").empty
    assert evaluation.arm("regional")["seed"].tolist() == [2]
    table = arms(evaluation)
    assert table["merge"]["images"] == 0
    assert np.isnan(table["merge"]["success"])
    assert table["regional"]["success_verdict"] == "undecided"


def test_a_batch_is_there_when_it_is_complete(tmp_path: Path) -> None:
    store(tmp_path, suite(), known)
    for path in tmp_path.glob(f"batches/both-merge-*/{MADE}"):
        path.unlink()
    assert load(tmp_path).missing == 2


def test_an_evaluation_that_has_not_begun(tmp_path: Path) -> None:
    evaluation = load(store(tmp_path, suite(), lambda batch, seed: None))
    assert evaluation.images.empty
    assert evaluation.missing == len(evaluation.plan.batches)
    assert evaluation.unmeasured == ["cat", "dog"]
    assert summary(evaluation)["images"].tolist() == [0] * 6


def test_types_do_not_depend_on_what_is_there(tmp_path: Path, evaluation: Evaluation) -> None:
    empty = load(store(tmp_path / "empty", suite(), lambda batch, seed: None))
    numbers = ["seed", "own", "other", "threshold", "left", "region", "leak", "success", "extra", "seconds"]
    for full, none in ((evaluation.images, empty.images), (evaluation.concepts, empty.concepts)):
        assert full.columns.tolist() == none.columns.tolist()
        shared = [name for name in numbers if name in full]
        assert full.dtypes[shared].tolist() == none.dtypes[shared].tolist()


def test_no_evaluation_and_a_damaged_plan(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no evaluation"):
        load(tmp_path)
    (tmp_path / PLAN).write_text("[]")
    with pytest.raises(FileError, match="damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (SCORES, lambda text: text.replace('"cat"', '"cow"'), "is damaged: seed 1 lacks cat"),
        (SCORES, lambda text: text.replace('"1"', '"7"'), "is damaged: seed 1 lacks cat, dog"),
        (SCORES, lambda text: "{", "is damaged"),
        (MADE, lambda text: text[:100], "is damaged"),
        (MADE, lambda text: text.replace('"merge"', '"tara"'), "is of another batch"),
    ],
)  # fmt: skip
def test_a_damaged_batch_is_reported_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[str], str], told: str
) -> None:
    store(tmp_path, suite(), known)
    path = tmp_path / "batches/both-merge-None-1" / name
    path.write_text(damage(path.read_text()))
    evaluation = load(tmp_path)
    assert evaluation.arm("merge")["seed"].tolist() == [2]
    assert evaluation.missing + evaluation.unscored == 1
    assert len(evaluation.images) == 15
    assert f"{path} {told}" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"key": "../elsewhere"}, {"scores": "../scores-1.json"}, {"arm": "=cmd()"}, {"scene": "<b>"}]
)
def test_a_plan_that_leads_elsewhere_is_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    plan = json.loads((store(tmp_path, suite(), known) / PLAN).read_text())
    plan["batches"][0] |= changes
    (tmp_path / PLAN).write_text(json.dumps(plan))
    with pytest.raises(FileError, match="damaged"):
        load(tmp_path)


# --- the summary ---


def many_scenes(better: bool) -> tuple[dict[str, tuple[str, ...]], "dict[str, Seen]"]:
    scenes = {f"scene {i}": ("cat", "dog") for i in range(12)}
    good: Seen = {"cat": (0.7, 0.1), "dog": (0.6, 0.1)}
    bad: Seen = {"cat": (0.45, 0.3), "dog": (0.3, 0.3)}
    return scenes, {"regional": good if better else bad, "merge": bad if better else good, "tara": bad}


@pytest.mark.parametrize("better", [True, False])
def test_verdicts_of_clear_cases(tmp_path: Path, better: bool) -> None:
    scenes, seen = many_scenes(better)
    of = suite(scenes, methods=["merge", "regional"], batch_size=2)
    out = store(tmp_path, of, lambda batch, seed: sanity(batch) or seen[batch.arm.name])
    row = arms(load(out))["regional"]
    assert {row[f"{key}_verdict"] for key in MAIN} == {"better" if better else "worse"}
    assert row["region_min_difference"] == pytest.approx(0.3 if better else -0.3)
    assert row["leak_difference"] == pytest.approx(-0.2 if better else 0.2)
    assert (row["leak_wins"], row["leak_losses"]) == ((24, 0) if better else (0, 24))


@pytest.mark.slow
def test_another_baseline_turns_the_verdict_around(tmp_path: Path) -> None:
    scenes, seen = many_scenes(True)
    out = store(tmp_path, suite(scenes, batch_size=2), lambda batch, seed: sanity(batch) or seen[batch.arm.name])
    against = load(out).against("regional")
    rows = arms(against)
    assert (rows["regional"]["role"], rows["merge"]["role"]) == ("baseline", "method")
    assert rows["merge"]["success_verdict"] == "worse"
    write_report(out, "regional")
    assert "regional (baseline)" in (out / "report.md").read_text()
    with pytest.raises(ValueError, match="'clora' is not among the methods; there are merge, regional, tara"):
        load(out).against("clora")


def test_the_summary_is_in_the_order_of_the_suite(evaluation: Evaluation) -> None:
    table = summary(evaluation)
    expected = ["no LoRA", "alone", "alone, tara", "merge", "regional", "tara"]
    assert table["arm"].tolist() == arm_names(evaluation.suite) == expected
    assert table["role"].tolist() == ["sanity"] * 3 + ["baseline"] + ["method"] * 2
    assert [isinstance(said, str) for said in table["success_verdict"]] == [False] * 4 + [True] * 2
    first = suite(methods=["regional", "merge"], baseline="regional")
    assert arm_names(first) == ["no LoRA", "alone", "regional", "merge"]


def test_intervals_are_over_scenes(tmp_path: Path) -> None:
    scenes = {f"scene {i}": ("cat", "dog") for i in range(4)}

    def measured(batch: Batch, seed: int) -> Seen:
        own = 0.2 + 0.1 * int(batch.scene.name[-1]) + 0.01 * seed
        return sanity(batch) or {"cat": (own, 0.1), "dog": (own, 0.1)}

    evaluation = load(store(tmp_path, suite(scenes), measured))
    row = arms(evaluation)["merge"]
    images = evaluation.arm("merge")
    for metric in METRICS:
        interval = bootstrap(images[metric.key].astype(float).tolist(), images["scene"].tolist())
        expected = [interval.mean, interval.low, interval.high]
        found = [row[metric.key], row[f"{metric.key}_low"], row[f"{metric.key}_high"]]
        assert found == pytest.approx(expected, nan_ok=True)
    assert row["region"] == pytest.approx(0.365)


def test_costs_are_relative_to_no_lora(evaluation: Evaluation) -> None:
    table = arms(evaluation)
    assert values(table["tara"], "rows rows_ratio flops_ratio seconds seconds_ratio") == [100, 2, 2, 4, 2]
    assert values(table["no LoRA"], "rows_ratio flops_ratio seconds_ratio") == [1, 1, 1]


# --- bystanders ---


def beside(folder: Path, right: dict[int, Any], draw: bool = False, plain: Any = None) -> Path:
    """A cat, and another one without a LoRA, which is 0.4 like the cat without LoRAs.

    `right` is of merge, by seed, and `plain` of images without LoRAs. The LoRA of the cat reaches 0.8 alone, so the
    limit of the other one is 0.6.
    """
    scene = {"name": "beside", "prompt": "a sks cat and a cat", "concepts": ["cat"], "bystanders": {"other": "cat"}}

    def measured(batch: Batch, seed: int) -> Seen:
        if batch.arm.name == "no LoRA":
            return {"cat": 0.4, "other": {"cat": 0.3 + 0.2 * (seed % 2)} if plain is None else plain}
        return {"cat": 0.8, "other": right[seed] if batch.arm.name == "merge" else {"cat": 0.8}}

    of = suite([scene], methods=["merge", "regional"], seeds=[*right])
    return store(folder, of, measured, draw=draw)


RIGHT = {1: {"cat": 0.59}, 2: {"cat": 0.61}, 3: {}, 4: {"cat": 0.0}}


def test_an_image_is_right_if_its_bystander_is_there_without_the_identity_of_a_concept(tmp_path: Path) -> None:
    images = load(beside(tmp_path, RIGHT)).images.set_index(["arm", "seed"])
    assert images.loc["merge", "bystanders"].tolist() == [1, 0, 0, 1]
    assert images.loc["merge", "success"].tolist() == [True, False, False, True]
    assert images.loc["regional", "success"].tolist() == [False] * 4
    assert images.loc["no LoRA", "bystanders"].tolist() == [1] * 4
    assert [np.isnan(share) for share in images.loc["alone", "bystanders"]] == [True] * 4, "nothing keeps it off"
    assert images.loc["alone", "success"].tolist() == [True] * 4


@pytest.mark.parametrize("plain", [{}, {"cat": 0.85}])
def test_a_bystander_without_a_limit_is_named(tmp_path: Path, plain: dict[str, float]) -> None:
    """Without LoRAs it was never found, or it is as much like the cat as the cat's LoRA."""
    told = " ".join(warnings(load(beside(tmp_path, RIGHT, plain=plain))))
    assert "No limit for bystanders: cat beside cat." in told


def test_without_bystanders_there_is_no_number_of_them(evaluation: Evaluation) -> None:
    assert evaluation.images[["bystanders"]].isna().to_numpy().all()
    assert all(np.isnan(row["bystanders"]) for row in arms(evaluation).values())


def test_a_report_says_what_is_wrong_with_bystanders(tmp_path: Path) -> None:
    report = write_report(beside(tmp_path, RIGHT, draw=True))
    assert "| Bystanders ↑ |" in report.markdown.read_text()
    page = report.html.read_text()
    assert page.count("a bystander is missing, or has a concept") >= 2 + 4
    assert "No limit for bystanders" not in page
