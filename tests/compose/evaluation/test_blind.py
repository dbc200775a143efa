"""Votes that are cast without knowing the method: counted by method, and of images that can be made again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import call, flat
from evaluations import known, store, suite
from lora_compose.compose.evaluation.blind import HALVES, PAIRS, WAYS, BlindImage, generate, numbered, read_votes
from lora_compose.compose.evaluation.votes import Judge
from lora_compose.compose.playground.assets import playground_model, playground_references
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.scene.mask_images import on_white, open_image
from lora_compose.pipelines.scene.scene import Concept


def test_votes_are_counted_by_method(tmp_path) -> None:
    key = {number: job.way.label for number, job in numbered(1).items()}
    votes = {number: "all" if label.startswith("regional") else "none" for number, label in key.items()}
    (tmp_path / "key.json").write_text(json.dumps(key))
    (tmp_path / "votes.csv").write_text("number,verdict\n" + "".join(f"{n},{vote}\n" for n, vote in votes.items()))
    rows = [line.replace("│", "").split() for line in call("blind", "score", tmp_path).output.splitlines()]
    counts = {" ".join(row[:-4]): row[-4:] for row in rows if "LoRAs" in row}
    assert counts == {
        way.label: ["3", "0", "0", "3"] if way.method == "regional" else ["0", "0", "3", "3"] for way in WAYS
    }


def test_images_are_numbered_the_same_every_time() -> None:
    jobs = numbered(2)
    # Numbers of votes that were cast: which of the ways, and which seed.
    first = [(2, 1), (1, 0), (0, 0), (0, 1), (3, 1), (3, 0), (2, 0), (1, 1)]
    assert [(WAYS.index(jobs[number].way), jobs[number].seed) for number in range(1, 9)] == first
    assert [jobs[number].pair for number in range(1, len(jobs) + 1, 8)] == list(PAIRS)
    assert list(jobs) == list(range(1, 1 + len(PAIRS) * len(WAYS) * 2))
    assert len(set(jobs.values())) == len(jobs)


def test_images_of_an_evaluation_are_shuffled_the_same_scenes_and_seeds_for_each_method(tmp_path) -> None:
    scenes = {"one": ("cat", "dog"), "other": ("dog", "cat"), "alone": ("cat",)}
    folder = store(tmp_path / "run", suite(scenes), known, draw=True)
    out = tmp_path / "votes"
    call("blind", "from", folder, "--method", "merge", "--method", "regional", "--images", "3", "--out", out)
    key, _ = read_votes_of(out)
    assert sorted(key.values()) == ["merge"] * 3 + ["regional"] * 3
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "images.json", "key.json", "votes.csv"]
    (out / "votes.csv").write_text("number,verdict\n" + "".join(f"{number},all\n" for number in key))
    counted = call("blind", "score", out).output
    assert all(f"{method} " in counted for method in ("merge", "regional"))


def test_scenes_are_chosen_by_their_number_of_subjects_and_a_style_is_none(tmp_path: Path) -> None:
    scenes = {"two": ("cat", "dog"), "alone": ("dog",)}
    own = suite(scenes, methods=["merge"])
    styled = [it.model_copy(update={"role": "style"}) if it.name == "cat" else it for it in own.concepts]
    for number, (evaluated, chosen) in enumerate(
        [(own, {"alone"}), (own.model_copy(update={"concepts": tuple(styled)}), {"alone", "two"})]
    ):
        folder = store(tmp_path / f"run-{number}", evaluated, known, draw=True)
        out = tmp_path / f"votes-{number}"
        call("blind", "from", folder, "--method", "merge", "--images", 2 * len(chosen), "--subjects", 1, "--out", out)
        files = json.loads((out / "images.json").read_text()).values()
        assert {Path(file).parts[1].split("-")[0] for file in files} == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "clora"), "no method 'clora'; it has merge, regional, tara"),
        (("--method", "merge", "--images", "5"), "all of merge have made 2 images of 2 subjects, not 5"),
    ],
)
def test_images_that_an_evaluation_does_not_have_are_not_shown(tmp_path, arguments, message) -> None:
    folder = store(tmp_path / "run", suite(), known, draw=True)
    result = call("blind", "from", folder, "--out", tmp_path / "votes", *arguments, code=2)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "votes").exists()


def test_votes_are_not_given_to_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(tmp_path / "run", suite(), known, draw=True)
    out = tmp_path / "votes"
    same = ("blind", "from", folder, "--method", "merge", "--images", "2", "--out", out)
    call(*same)
    votes = "number,verdict\n1,all\n2,none\n"
    (out / "votes.csv").write_text(votes)
    call(*same)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    at, refused = out / "images.json", []
    refused.append(call("blind", "from", folder, "--method", "regional", "--images", "2", "--out", out, code=2))
    monkeypatch.setattr("lora_compose.compose.evaluation.blind.generated", None)
    refused.append(call("blind", "make", "--seeds", "1", "--out", out, code=2))
    at.write_text(at.read_text().replace("2.png", "9.png"))
    refused.append(call(*same, code=2))
    assert all("is about other images; give another folder with --out" in flat(it.output) for it in refused)
    at.write_bytes(before[at.name])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert before["votes.csv"].decode() == votes


def test_photographs_are_shown_as_references(tmp_path: Path) -> None:
    own = suite()
    for concept in own.concepts:
        (tmp_path / concept.name).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / concept.name / "it.jpg")
    concepts = tuple(it.model_copy(update={"references": str(tmp_path / it.name)}) for it in own.concepts)
    folder = store(tmp_path / "run", own.model_copy(update={"concepts": concepts}), known, draw=True)
    call("blind", "from", folder, "--method", "merge", "--images", "2", "--out", tmp_path / "votes")
    assert (tmp_path / "votes" / "0.png").is_file()


def test_the_judge_counts_the_subjects_that_are_themselves(tmp_path: Path) -> None:
    judge = Judge.of(store(tmp_path / "run", suite(), known, draw=True))
    cat, dog = (on_white(open_image(playground_references(name)[0], "reference")) for name in ("cat", "dog"))
    both = Image.new("RGB", (cat.width + dog.width, cat.height))
    both.paste(cat, (0, 0))
    both.paste(dog, (cat.width, 0))
    prompt = "a sks cat and a zwx dog"
    assert [judge.present(image, prompt, ("cat", "dog")) for image in (both, cat, dog)] == [2, 1, 1]
    assert [judge.present(image, "a sks cat", ("cat",)) for image in (cat, dog)] == [1, 0]


VOTES = {
    "as UTF-8 with a mark": "\ufeffnumber,verdict\n1,all\n2,some\n",
    "with semicolons": "number;verdict\n1;all\n2;some\n",
    "in the words of earlier versions": "number,verdict\n1,both\n2,one\n",
    "with spaces": "number, verdict\n1, all\n2, some\n",
}


@pytest.mark.parametrize("how", VOTES)
def test_votes_are_read_as_spreadsheets_write_them(tmp_path: Path, how: str) -> None:
    (tmp_path / "key.json").write_text('{"1": "merge", "2": "regional"}')
    (tmp_path / "votes.csv").write_text(VOTES[how], encoding="utf-8")
    assert read_votes(tmp_path)[1] == {"1": "all", "2": "some"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number,verdict\n1,all\n2\n", "votes.csv, line 3: 1 cells, but the header has 2 columns"),
        ("image,verdict\n1,all\n", "votes.csv, line 1: there is no column 'number'; expected number,verdict"),
        ("number,verdict\n1,all\n2,\n", "image 2: expected one of all, some, none, found ''"),
    ],
)
def test_votes_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "key.json").write_text('{"1": "merge", "2": "regional"}')
    (tmp_path / "votes.csv").write_text(text, encoding="utf-8")
    assert message in " ".join(call("blind", "score", tmp_path, code=2).output.split())


def read_votes_of(out: Path) -> tuple[dict[str, str], list[str]]:
    return json.loads((out / "key.json").read_text()), (out / "votes.csv").read_text().splitlines()


@pytest.mark.slow
def test_an_image_is_that_of_the_pipeline() -> None:
    pipe: Any = ComposePipeline.from_pretrained(str(playground_model()))
    pipe.set_progress_bar_config(disable=True)
    (way,) = (way for way in WAYS if way.label == "regional, ordinary LoRAs")
    made = generate(pipe, BlindImage(("cat", "dog"), way, 0))
    (again,) = pipe(
        "a sks cat and a zwx dog on a white background",
        concepts=[Concept(name=name, region=half) for name, half in zip(("cat", "dog"), HALVES, strict=True)],
        method="regional", num_inference_steps=25, guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert np.array_equal(np.asarray(made), np.asarray(again))
