"""How well numbers follow votes, against Somers' D and votes of a known rule."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import somersd

from commands import call
from doc_tables import table
from evaluations import TRUTH, Seen, sanity, store, suite
from lora_compose.compose.evaluation.batches import Batch
from lora_compose.compose.evaluation.blind import VERDICTS, read_votes
from lora_compose.compose.evaluation.summary import METRICS, OUTCOME_METRICS
from lora_compose.compose.evaluation.table import load
from lora_compose.compose.evaluation.votes import following, follows, read_files, voted_images
from snippets import ROOT


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=2, max_size=30))
def test_it_is_somers_d_of_the_values_given_the_votes(items: list[tuple[int, int]]) -> None:
    values, votes = (list(column) for column in zip(*items, strict=True))
    found = follows(values, votes, range(len(items)), draws=1).mean
    if len(set(votes)) == 1:
        assert np.isnan(found)
    elif len(set(values)) == 1:
        assert found == 0.5  # ties only, of which SciPy gives NaN
    else:
        assert found == pytest.approx((somersd(votes, values).statistic + 1) / 2)


def test_the_interval_draws_whole_groups() -> None:
    rng = np.random.default_rng(3)
    votes = rng.integers(0, 3, 60)
    values = votes + rng.normal(0, 1.5, 60)
    groups = np.repeat(np.arange(20), 3)
    by_hand = []
    for _ in range(1500):
        drawn = np.concatenate([np.flatnonzero(groups == one) for one in rng.integers(0, 20, 20)])
        by_hand.append((somersd(votes[drawn], values[drawn]).statistic + 1) / 2)
    found = follows(values, votes.tolist(), groups.tolist())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])), abs=0.02)
    assert found.low < found.mean < found.high
    assert np.isnan(follows(values, votes.tolist(), [0] * 60).low)


def test_scenes_with_a_bystander_are_not_voted_on(tmp_path: Path) -> None:
    """Voters are asked about two subjects."""
    scenes = [
        {"name": name, "prompt": "a sks cat, a zwx dog and a fox", "concepts": ["cat", "dog"], "bystanders": beside}
        for name, beside in (("two", {}), ("three", {"fox": "fox"}))
    ]

    def measured(batch: Batch, seed: int) -> Seen:
        foxes = {name: {"cat": 0.1, "dog": 0.1} for name in batch.scene.bystanders}
        return {"cat": 0.5, "dog": 0.5, **foxes}

    folder = store(tmp_path / "run", suite(scenes, methods=["merge"]), measured, draw=True)
    out = tmp_path / "votes"
    call("blind", "from", folder, "--method", "merge", "--images", "2", "--out", out)
    assert {Path(file).parts[1].split("-")[0] for file in json.loads((out / "images.json").read_text()).values()} == {
        "two"
    }
    few = call("blind", "from", folder, "--method", "merge", "--images", "3", "--out", tmp_path / "more", code=2)
    assert "have made 2 images of 2 subjects, not 3" in " ".join(few.output.split())


def test_a_metric_that_the_votes_were_made_by_follows_them(tmp_path: Path) -> None:
    seeds = list(range(1, 7))

    def measured(batch: Batch, seed: int) -> Seen:
        return sanity(batch) or {"cat": (0.3 + 0.05 * seed, 0.0), "dog": (0.3 + 0.05 * seed, 0.0)}

    folder = store(tmp_path / "run", suite(methods=["merge"], seeds=seeds), measured, draw=True, truth=TRUTH)
    out = tmp_path / "votes"
    call("blind", "from", folder, "--method", "merge", "--images", "6", "--out", out)
    files = json.loads((out / "images.json").read_text())
    verdicts = {n: ("none", "some", "all")[(int(Path(file).stem) - 1) // 2] for n, file in files.items()}
    (out / "votes.csv").write_text("number,verdict\n" + "".join(f"{n},{verdict}\n" for n, verdict in verdicts.items()))
    agreement = following(voted_images(out, folder))
    assert agreement["metric"].tolist()[-1] == "arcface", "what no image has comes last"
    assert sorted(agreement["metric"]) == sorted(metric.key for metric in (*METRICS, *OUTCOME_METRICS)), (
        "none is left out"
    )
    found = agreement.set_index("metric")["follows"].to_dict()
    assert found["region_min"] == found["region"] == found["lost"] == 1
    assert found["clip_t"] == found["found"] == 0.5  # the same in all images
    assert np.isnan(found["dino"])
    assert dict(zip(agreement["metric"], agreement["images"], strict=True))["dino"] == 0
    printed = call("blind", "follow", out, "--evaluation", folder).output
    assert "Worst concept" in printed
    assert "1.00 (1.00 … 1.00)" in " ".join(printed.replace("│", " ").split())
    assert re.search(r"No voted image has .*Style, .*ArcFace: evaluate run --metrics", " ".join(printed.split()))
    right = dict(zip(*(load(folder).images.query("arm == 'merge'")[it] for it in ("seed", "success")), strict=True))
    as_voted = sum(success == (seed >= 5) for seed, success in right.items())
    assert 0 < as_voted < 6, "otherwise the next line would say little"
    milder = sum(bool(success) and seed < 5 for seed, success in right.items())
    told = f"on {as_voted} of 6 images: merge {as_voted} of 6. Of the {6 - as_voted} others it calls {milder} right"
    assert told in " ".join(printed.split())
    written = pd.read_csv(out / "following.csv")
    assert written.set_index("metric")["follows"].to_dict() == pytest.approx(found, nan_ok=True)
    (out / "votes.csv").write_text("number,verdict\n" + "".join(f"{n},all\n" for n in files))
    refused = call("blind", "follow", out, "--evaluation", folder, code=2).output
    assert "are the same, so no number can follow them" in " ".join(refused.split())


@pytest.mark.parametrize(
    "folder",
    [
        "votes-unet", "votes-unet-ancestral", "votes-unet-three", "votes-boxes", "votes-transformer",
        "votes-transformer-three",
    ],
)  # fmt: skip
def test_the_votes_in_the_docs_are_those_of_their_files(folder: str) -> None:
    key, votes = read_votes(ROOT / "docs" / folder)
    counts = pd.crosstab(pd.Series(key)[list(votes)], pd.Series(votes)).reindex(columns=list(VERDICTS), fill_value=0)
    rows = {line for line in (ROOT / "docs" / "evaluation.md").read_text("utf-8").splitlines() if line[:1] == "|"}
    for method, row in counts.to_dict("index").items():
        shown = f"| {row['all']} | {row['some']} | {row['none']} | {sum(row.values())} |"
        assert any(line.endswith(shown) and str(method).split(",")[0] in line for line in rows), (method, shown)


def test_the_readme_counts_votes_as_the_files_do() -> None:
    said = re.search(
        r"right in (\d+) of 52 images.* and in (none) where .* FLUX.1 in (\d+), and in (none|\d+) ",
        " ".join((ROOT / "README.md").read_text("utf-8").split()),
    )
    assert said is not None
    counted = []
    for folder in ("votes-unet", "votes-transformer"):
        key, votes = read_votes(ROOT / "docs" / folder)
        for method in ("draft", "merge"):
            counted.append(sum(votes[number] == "all" for number, its in key.items() if its == method))
    assert [0 if number == "none" else int(number) for number in said.groups()] == counted


def test_the_page_about_training_counts_votes_as_their_file_does() -> None:
    said = re.search(
        r"both right in (\d+) of (\d+) held-back images and `clora` in (\d+) ",
        " ".join((ROOT / "docs" / "training.md").read_text("utf-8").split()),
    )
    assert said is not None
    key, votes = read_votes(ROOT / "docs" / "votes-unet-empty")
    drafts = [votes[number] for number, method in key.items() if method == "draft"]
    others = [votes[number] for number, method in key.items() if method == "clora"]
    assert [int(number) for number in said.groups()] == [drafts.count("all"), len(drafts), others.count("all")]


def test_the_table_in_the_docs_is_what_the_command_wrote() -> None:
    folder = ROOT / "docs" / "votes"
    written = pd.read_csv(folder / "following.csv")
    rows = table("docs/evaluation.md", "Which one follows an eye here?")[2:]
    shown = pd.DataFrame(written[written["images"] > 0]).to_dict("records")
    assert [(name.lower(), follows, int(images)) for name, follows, images in rows] == [
        (row["title"].lower(), f"{row['follows']:.2f} ({row['low']:.2f} … {row['high']:.2f})", row["images"])
        for row in shown
    ]
    key, votes = read_votes(folder)
    assert len(votes) == len(key) == written["images"].max()
    assert read_files(folder).keys() == key.keys()
