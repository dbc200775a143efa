"""Blind votes beside an evaluation: on its images, those of its judge, and how well its numbers follow them.

`lora-compose blind from` writes sheets of the same scenes and seeds of some methods, shuffled, with the `votes.csv` and
`key.json` of `lora-compose blind score`, and `images.json`, by which `lora-compose blind follow` finds the images.
"""

import json
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from PIL import Image
from rich.table import Table

from lora_compose.compose.evaluation.blind import (
    COLUMNS,
    KEY,
    PAIRS,
    ROWS,
    VERDICTS,
    WAYS,
    BlindImage,
    as_json,
    check_votes,
    generated,
    numbered,
    read_votes,
    vote_sheet,
    write_key,
)
from lora_compose.compose.evaluation.results import ImageScores
from lora_compose.compose.evaluation.scoring import Scorer, open_scorer, reference_files
from lora_compose.compose.evaluation.statistics import Interval
from lora_compose.compose.evaluation.suite import SuiteScene
from lora_compose.compose.evaluation.summary import METRICS, OUTCOME_METRICS
from lora_compose.compose.evaluation.table import Evaluation, load
from lora_compose.compose.files.images import read_pixels
from lora_compose.compose.files.reading import read_whole
from lora_compose.compose.files.stored import write_text
from lora_compose.compose.support.terminal import echo
from lora_compose.compose.support.terminal import out as console
from lora_compose.pipelines.scene.mask_images import on_white, open_image
from lora_compose.pipelines.support.spelling import did_you_mean

FILES = "images.json"
FOLLOWING = "following.csv"
_ORDER = tuple(reversed(VERDICTS))  # from the worst to the best


@dataclass(frozen=True)
class Shown:
    """An image of an evaluation on a sheet: its method's row in the table, its subjects, and its file."""

    method: str
    concepts: tuple[str, ...]
    file: str


def make_from(folder: Path, out: Path, methods: Sequence[str], images: int, subjects: int = 2) -> None:
    """Shuffles images of an evaluation, by some of its methods in scenes of `subjects` subjects; writes the vote files.

    Raises ValueError for unknown methods, too few images that all of them made, and a folder with other votes.
    """
    evaluation = load(folder)
    known = [method.name for method in evaluation.suite.compared]
    for method in methods:
        if method not in known:
            raise ValueError(
                f"the evaluation in {folder} has no method {method!r}; it has {', '.join(known)}"
                f"{did_you_mean(method, known)}"
            )
    shown = dict(enumerate(_chosen(evaluation, methods, images, subjects), start=1))
    key = {number: image.method for number, image in shown.items()}
    files = {number: image.file for number, image in shown.items()}
    check_votes(out, {KEY: key, FILES: files})
    out.mkdir(parents=True, exist_ok=True)
    for page, start in enumerate(range(1, len(shown) + 1, COLUMNS * ROWS)):
        part = {number: shown[number] for number in range(start, min(start + COLUMNS * ROWS, len(shown) + 1))}
        _sheet(evaluation, folder, part).save(out / f"{page}.png")
    (out / FILES).write_text(as_json(files), encoding="utf-8")
    write_key(out, key)


def read_files(out: Path) -> dict[str, str]:
    """The file of each voted image in an evaluation's folder, by number. FileError if the votes are on others."""
    return json.loads(read_whole(out / FILES))


def _chosen(evaluation: Evaluation, methods: Sequence[str], images: int, subjects: int) -> list[Shown]:
    """Equal scenes and seeds of each method, spread over the scenes; neighbours on a sheet have the same scene."""
    table = evaluation.images
    keys = zip(table["scene"], table["arm"], table["seed"], strict=True)
    files: dict[tuple[str, str, int], str] = dict(zip(keys, table["file"], strict=True))
    by_scene = {
        scene.name: _of_all(files, scene.name, methods)
        for scene in evaluation.suite.scenes
        # Voters are asked about subjects with a LoRA only.
        if len(_subjects(evaluation, scene)) == subjects and not scene.bystanders
    }
    # Seed by seed, so that any number of images is spread over the scenes.
    turns = max((len(seeds) for seeds in by_scene.values()), default=0)
    places = [(scene, seeds[turn]) for turn in range(turns) for scene, seeds in by_scene.items() if turn < len(seeds)]
    if len(places) < images:
        made = f"{len(places)} images of {subjects} subjects"
        raise ValueError(f"all of {', '.join(methods)} have made {made}, not {images}")
    chosen: list[Shown] = []
    for scene in evaluation.suite.scenes:
        of_scene = [
            Shown(method, _subjects(evaluation, scene), files[name, method, seed])
            for name, seed in places[:images]
            if name == scene.name
            for method in methods
        ]
        random.Random(scene.name).shuffle(of_scene)
        chosen += of_scene
    return chosen


def _subjects(evaluation: Evaluation, scene: SuiteScene) -> tuple[str, ...]:
    return tuple(name for name in scene.concepts if not evaluation.suite.concept(name).is_style)


def _of_all(files: Mapping[tuple[str, str, int], str], scene: str, methods: Sequence[str]) -> list[int]:
    """The seeds of a scene that every method has made."""
    by_method = [{seed for name, arm, seed in files if (name, arm) == (scene, method)} for method in methods]
    return sorted(set.intersection(*by_method))


def _sheet(evaluation: Evaluation, folder: Path, images: Mapping[int, Shown]) -> Image.Image:
    """References of the subjects on the sheet, and numbered images below."""
    names = dict.fromkeys(name for shown in images.values() for name in shown.concepts)
    return vote_sheet(
        [(name, _reference(evaluation, name)) for name in names],
        [(f"{n}: {', '.join(shown.concepts)}", read_pixels(folder / shown.file)) for n, shown in images.items()],
    )


def _reference(evaluation: Evaluation, concept: str) -> Image.Image:
    return on_white(open_image(reference_files(evaluation.suite.concept(concept))[0], "reference image"))


# --- the judge's votes ---


def judge(out: Path, evaluation: Path, first: int | None) -> None:
    """Reproduces the images, lets the judge vote, and lists where it disagrees with the human.

    The thresholds are those of a finished evaluation of the playground; `first` is a number of images, evenly spaced.
    Raises ValueError if the images are generated differently today.
    """
    key, votes = read_votes(out)
    jobs = numbered(len(key) // (len(PAIRS) * len(WAYS)))
    if {str(number): job.way.label for number, job in jobs.items()} != key:
        raise ValueError(
            f"{out / 'key.json'} lists images that are generated differently today, so they cannot be reproduced"
        )
    chosen = list(jobs)[:: max(1, len(jobs) // first)][:first] if first else list(jobs)
    images = generated({number: jobs[number] for number in chosen}, out)
    judge = Judge.of(evaluation)
    judged = {}
    for number, image in images.items():
        pair = jobs[number].pair
        judged[number] = ("none", "some", "all")[judge.present(image, " and ".join(pair), pair)]
    _show_agreement({number: votes[str(number)] for number in judged}, judged, jobs)


def _show_agreement(eye: dict[int, str], judged: dict[int, str], jobs: dict[int, BlindImage]) -> None:
    table = Table("", *VERDICTS, title=f"Human (rows) and judge (columns) on {len(judged)} images")
    counts = Counter((eye[number], verdict) for number, verdict in judged.items())
    for verdict in VERDICTS:
        table.add_row(verdict, *(str(counts[verdict, other]) for other in VERDICTS))
    console.print(table)
    for way in WAYS:
        numbers = [number for number in judged if jobs[number].way == way]
        right = [sum(verdicts[number] == "all" for number in numbers) for verdicts in (eye, judged)]
        console.print(f"all, in {len(numbers)} images of {way.label}: human {right[0]}, judge {right[1]}")
    apart = [number for number in judged if eye[number] != judged[number]]
    console.print(f"they agree on {len(judged) - len(apart)} of {len(judged)}; they disagree on:")
    for number in apart:
        what = f"{jobs[number].way.label}, {' and '.join(jobs[number].pair)}"
        console.print(f"  {number}: {what}: human {eye[number]}, judge {judged[number]}")


@dataclass(frozen=True, eq=False)
class Judge:
    """Says of an image how many of its concepts are present with their own identity, as the evaluation's `success`.

    Encoder, detector and thresholds are those of a finished evaluation.
    """

    scorer: Scorer
    thresholds: Mapping[str, float]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The judge of the evaluation in a folder. Raises ValueError if it has no detector."""
        evaluation = load(folder)
        if evaluation.suite.detector is None:
            raise ValueError(f"the evaluation in {folder} has no detector, so it cannot locate concepts")
        limits = dict(zip(evaluation.thresholds["concept"], evaluation.thresholds["threshold"], strict=True))
        return cls(open_scorer(evaluation.suite), limits)

    def present(self, image: Image.Image, prompt: str, concepts: Sequence[str]) -> int:
        """The number of concepts of the suite that are found in an image and are themselves."""
        scene = SuiteScene(name="image", prompt=prompt, concepts=tuple(concepts))
        scores = self.scorer.score(image.convert("RGB"), scene)
        return sum(self._is_itself(scores, name) for name in concepts)

    def _is_itself(self, scores: ImageScores, name: str) -> bool:
        similarity = scores.concepts[name].similarity
        if not similarity or max(similarity, key=lambda other: similarity[other]) != name:
            return False
        return not similarity[name] < self.thresholds[name]  # without a threshold, being nearest is enough


# --- numbers beside votes ---


def show_following(votes: Path, folder: Path) -> None:
    """Prints how well metrics follow the votes on an evaluation, best first, and writes a table; as `following`."""
    voted = voted_images(votes, folder)
    agreement = following(voted)
    table = Table(
        title=f"How well metrics follow {agreement['images'].to_numpy().max()} votes",
        caption="Of two images that were voted differently, how often the better one has the better number; ties count "
        "half, so 0.5 is chance. In brackets 95 %, over scenes and seeds.",
    )
    for column in ("metric", "follows", "", "images"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for row in agreement.to_dict("records"):
        if np.isnan(row["follows"]):
            table.add_row(row["title"], "-", "", str(row["images"]))
            continue
        interval = f"({row['low']:.2f} … {row['high']:.2f})"
        table.add_row(row["title"], f"{row['follows']:.2f}", interval, str(row["images"]))
    console.print(table)
    by_method = agreeing(voted)
    images, same, milder = (
        sum(getattr(it, name) for it in by_method.values()) for name in ("images", "same", "milder")
    )
    each = "; ".join(f"{method} {it.same} of {it.images}" for method, it in by_method.items())
    echo(
        f"success agrees with you, all subjects right or not, on {same} of {images} images: {each}. "
        f"Of the {images - same} others it calls {milder} right that you do not."
    )
    write_text(to := votes / FOLLOWING, str(agreement.to_csv(index=False, lineterminator="\n")))
    echo("The number to read is the one that follows best. Two whose intervals overlap may be equally good.")
    if unmeasured := agreement.loc[agreement["images"] == 0, "title"].tolist():
        echo(
            f"No voted image has {', '.join(unmeasured)}: evaluate run --metrics measures those of further models on "
            "the same images; the others need styles, bystanders or regions in the scenes."
        )
    echo(f"As a table: {to}")


def voted_images(votes: Path, folder: Path) -> pd.DataFrame:
    """The rows of an evaluation's images that were voted on, with the `vote` on each.

    Raises ValueError if the votes are not on images of this evaluation, and FileError if there is no evaluation, or a
    file is damaged.
    """
    verdicts, files = read_votes(votes)[1], read_files(votes)
    images = load(folder).images.set_index("file")
    if lost := [file for file in files.values() if file not in images.index]:
        raise ValueError(f"{votes} has votes on {lost[0]}, which is no scored image of the evaluation in {folder}")
    return images.loc[[files[number] for number in verdicts]].assign(vote=list(verdicts.values()))


def following(voted: pd.DataFrame) -> pd.DataFrame:
    """A row per metric, the best first: `metric`, `title`, `follows` with `low` and `high`, and `images`.

    Metrics that no image has come last, with 0 images and NaN. `voted` is that of `voted_images`. Raises ValueError if
    all votes are the same.
    """
    eye = [_ORDER.index(vote) for vote in voted["vote"]]
    if len(set(eye)) < 2:
        raise ValueError("all votes are the same, so no number can follow them")
    groups = list(zip(voted["scene"], voted["seed"], strict=True))
    rows = []
    for metric in (*METRICS, *OUTCOME_METRICS):
        values = voted[metric.key].to_numpy(float) * (1 if metric.higher_is_better else -1)
        kept = np.flatnonzero(~np.isnan(values))
        agreement = Interval(np.nan, np.nan, np.nan, 0)
        if len(kept):
            agreement = follows(values[kept], [eye[i] for i in kept], [groups[i] for i in kept])
        ends = {"follows": agreement.mean, "low": agreement.low, "high": agreement.high, "images": len(kept)}
        rows.append({"metric": metric.key, "title": metric.title, **ends})
    return pd.DataFrame(rows).sort_values("follows", ascending=False, kind="stable").reset_index(drop=True)


@dataclass(frozen=True)
class Agreement:
    """On how many `images` success and votes say the `same`, and on how many only success says right (`milder`)."""

    images: int
    same: int
    milder: int


def agreeing(voted: pd.DataFrame) -> dict[str, Agreement]:
    """How often success and the votes agree, by method; `voted` is that of `voted_images`."""
    by_method: dict[str, list[tuple[bool, bool]]] = {}
    for method, success, vote in zip(voted["arm"], voted["success"], voted["vote"], strict=True):
        by_method.setdefault(method, []).append((bool(success), vote == "all"))
    return {
        method: Agreement(len(pairs), sum(a == b for a, b in pairs), sum(a and not b for a, b in pairs))
        for method, pairs in by_method.items()
    }


def follows(
    values: Sequence[float] | np.ndarray, votes: Sequence[int], groups: Sequence[Hashable], draws: int = 2000
) -> Interval:
    """How often the better-voted of two items has the higher value.

    Ties of values count half, so 0.5 is chance, 1 is perfect and 0 is perfectly wrong. NaN if all votes are the same.
    The interval of 95 % draws whole groups with replacement; items of a group are alike. (Somers' D of the values,
    given the votes, is twice this less 1.)
    """
    value, vote = np.asarray(values, dtype=float), np.asarray(votes)
    better = (vote[:, None] > vote[None]).astype(float)
    right = better * (0.5 + 0.5 * np.sign(value[:, None] - value[None]))
    names = list(dict.fromkeys(groups))
    member = np.array([names.index(group) for group in groups])
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weights = np.concatenate([np.ones((1, len(value))), counts[:, member]])
    pairs = np.einsum("di,ij,dj->d", weights, better, weights, optimize=True)
    wins = np.einsum("di,ij,dj->d", weights, right, weights, optimize=True)
    shares = np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    drawn = shares[1:][~np.isnan(shares[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(names) > 1 and len(drawn) else (np.nan, np.nan)
    return Interval(float(shares[0]), float(low), float(high), len(names))
