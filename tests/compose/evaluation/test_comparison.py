"""Two runs of an evaluation beside each other."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaluations import Measured, Seen, known, store, suite
from lora_compose.compose.evaluation.batches import Batch
from lora_compose.compose.evaluation.comparison import COMPARED, RELATIVE, RunComparison, compare_runs
from lora_compose.compose.evaluation.suite import Suite

SCENES = {f"scene {i}": ("cat", "dog") for i in range(10)}


def short(scenes: Any = None, **changes: Any) -> Suite:
    """A suite that is quickly stored."""
    return suite(scenes, **({"methods": ["merge", "regional"], "batch_size": 2} | changes))


def improved(batch: Batch, seed: int) -> Seen:
    found = dict(known(batch, seed))
    return found | {"cat": (0.8, 0.1), "dog": (0.7, 0.1)} if batch.arm.name == "regional" else found


def compared(
    tmp_path: Path, a: Suite, b: Suite, measured: tuple[Measured, Measured] = (known, known), **changes: Any
) -> RunComparison:
    return compare_runs(store(tmp_path / "a", a, measured[0]), store(tmp_path / "b", b, measured[1], **changes))


def rows(found: RunComparison) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["arm"], row["metric"]): row for row in found.table.to_dict("records")}


def test_a_run_with_itself(tmp_path: Path) -> None:
    out = store(tmp_path, short(SCENES, seeds=[1]), known)
    found = compare_runs(out, out)
    assert found.notes == ()
    assert set(found.table["metric"]) == set(COMPARED)
    assert set(found.table["difference"]) == {0}
    assert set(found.table["verdict"]) == {"undecided"}


def test_a_better_method_is_seen(tmp_path: Path) -> None:
    both = short(SCENES)
    found = compared(tmp_path, both, both, (known, improved))
    row = rows(found)["regional", "region_min"]
    assert (row["a"], row["b"]) == pytest.approx(((0.45 + 0.49) / 2, 0.7))
    assert row["difference"] == pytest.approx(0.23)
    assert (row["wins"], row["ties"], row["losses"], row["images"], row["verdict"]) == (20, 0, 0, 20, "better")
    leaks = rows(found)["regional", "leak"]
    assert (leaks["verdict"], leaks["wins"]) == ("better", 20)
    assert rows(found)["merge", "region_min"]["verdict"] == "undecided"
    markdown = found.markdown()
    assert "|  | Worst concept | 0.470 | 0.700 | +0.230 (" in markdown
    assert "| 20 / 0 / 0 | B is better |" in markdown
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found)
    assert "20 / 0 / 0  B is better" in console.export_text()


def test_only_common_images_are_compared(tmp_path: Path) -> None:
    found = compared(
        tmp_path, short(seeds=[1, 2]), short(seeds=[2, 3]), (known, lambda b, seed: known(b, min(seed, 2)))
    )
    row = rows(found)["merge", "region"]
    assert (row["images"], row["a"], row["b"]) == (1, pytest.approx(0.25), pytest.approx(0.25))
    none = compared(tmp_path / "none", short(seeds=[1]), short(seeds=[2]))
    assert rows(none)["merge", "region"]["images"] == 0
    assert rows(none)["merge", "region"]["a"] == pytest.approx(0.45)
    assert "no common images" in none.markdown()


def test_loras_alone_are_compared_concept_by_concept(tmp_path: Path) -> None:
    def half(batch: Batch, seed: int) -> Seen | None:
        return None if batch.arm.alone == "cat" else known(batch, seed)

    found = rows(compared(tmp_path, short(), short(), (known, half)))
    assert (found["alone", "region"]["a"], found["alone", "region"]["b"]) == pytest.approx((0.6, 0.6))  # the dog


def test_what_differs_is_reported_first(tmp_path: Path) -> None:
    a, b = short(steps=25), short(methods=["merge", "tara"], steps=50, model="other")
    notes = compared(tmp_path, a, b, versions={"torch": "3", "peft": "1"}).notes
    assert "model: playground in A, other in B" in notes
    assert "steps: 25 in A, 50 in B" in notes
    assert "only in A: method 'regional'" in notes
    assert "only in B: method 'tara'" in notes
    assert "version of torch: 2 in A, 3 in B" in notes
    assert "version of peft: None in A, 1 in B" in notes


@pytest.mark.parametrize("change", [{"encoder": "other/encoder"}, {"detector": {"kind": "windows", "threshold": 0.9}}])
def test_similarities_of_different_encoders_are_not_compared(tmp_path: Path, change: dict[str, Any]) -> None:
    found = compared(tmp_path, short(), short(**change))
    assert set(found.table["metric"]) == set(RELATIVE)
    assert any("similarities are not comparable" in note for note in found.notes)
    assert found.notes[0].startswith(next(iter(change)))


def test_scenes_that_share_only_their_name_are_left_out(tmp_path: Path) -> None:
    found = compared(tmp_path, short({"both": ("cat", "dog")}), short({"both": ("dog", "cat")}))
    assert "not the same scene in spite of the name, and left out: 'both'" in found.notes
    assert set(found.table["images"]) == {0}


def test_clip_t_by_different_models_is_not_compared(tmp_path: Path) -> None:
    found = compared(tmp_path, short(seeds=[1]), short(seeds=[1], metrics=["clip-t=another"]))
    assert set(found.table["metric"]) == set(COMPARED) - {"clip_t"}
    assert "only in B: metric 'clip-t'" in found.notes
