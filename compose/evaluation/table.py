"""From stored scores to tables: a row per concept, and a row per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_compose.compose.evaluation import metrics, results
from lora_compose.compose.evaluation.batches import alone_name
from lora_compose.compose.evaluation.chosen import COLLAPSED
from lora_compose.compose.evaluation.confused import CELLS, CONFUSION, Confused
from lora_compose.compose.evaluation.confusion import collapse_rate, inside
from lora_compose.compose.evaluation.shots import Shot, stored_shots
from lora_compose.compose.evaluation.suite import SANITY, Suite
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import read

COSTS = ("rows_forward", "rows_stopped", "rows_backward", "flops", "seconds", "preparation_seconds", "peak_bytes")
_CHOSEN = ("dino", "dino_found", "scr", "scr_whole", "arcface")
_KEYS = ("scene", "arm", "alone", "seed")
_EDGES = ("left", "top", "right", "bottom")
_CONCEPT_COLUMNS = (
    *_KEYS, "concept", "found", "own", "other", "nearest", "whole", "placed", "inside", "detection", "threshold",
    "present", "outcome", "took", *_EDGES,
)  # fmt: skip
_IMAGE_COLUMNS = (
    *_KEYS, "file", "clip_t", "clip_i", "region", "region_min", "ratio", "leak", "swap", "success", "found", "placed",
    "inside", "extra", "bystanders", "style", *CONFUSION, *_CHOSEN, *COSTS,
)  # fmt: skip
_CELL_COLUMNS = (*_KEYS, "concept", "reference", *CELLS)
_NUMBERS = (
    "own", "other", "whole", "inside", "detection", "threshold", "clip_t", "clip_i", "region", "region_min", "ratio",
    "leak", "swap", "extra", "bystanders", "style", *CONFUSION, *_CHOSEN, *CELLS, *COSTS,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of an evaluation so far.

    Attributes:
        plan: The planned batches.
        concepts: A row per image and concept; of images with a single LoRA, its concept only.
        images: A row per image.
        thresholds: A row per concept: mean similarity without any LoRA, what its LoRA reaches alone, and the threshold.
        bounds: A row per arm and concept: mean similarity, and its ratio to that with the LoRA alone.
        confusion: A row per cell of the confusion matrix of each image: the crop of which concept, compared with the
            references of which; nothing of images that older versions scored.
        bystander_limits: The similarity from which on a bystander has the identity of a concept, by class word and
            concept; NaN where none could be measured.
        made: How the batches with scores were made.
        failed: Batches that failed.
        missing: Batches that are not made yet.
        unscored: Images that are made, but not scored yet.
    """

    plan: results.BatchPlan
    concepts: pd.DataFrame
    images: pd.DataFrame
    thresholds: pd.DataFrame
    bounds: pd.DataFrame
    confusion: pd.DataFrame
    bystander_limits: Mapping[tuple[str, str], float]
    made: tuple[results.Made, ...]
    failed: tuple[results.Failed, ...]
    missing: int
    unscored: int

    @property
    def suite(self) -> Suite:
        """The suite."""
        return self.plan.suite

    def against(self, baseline: str) -> "Evaluation":
        """The evaluation, compared with another method; raises ValueError if there is no such method."""
        names = [arm.name for arm in self.suite.compared]
        if baseline not in names:
            raise ValueError(f"the baseline {baseline!r} is not among the methods; there are {', '.join(names)}")
        suite = self.suite.model_copy(update={"baseline": baseline})
        return replace(self, plan=self.plan.model_copy(update={"suite": suite}))

    def arm(self, name: str) -> pd.DataFrame:
        """The images of an arm."""
        return pd.DataFrame(self.images[self.images["arm"] == name])

    @property
    def unrecognised(self) -> list[str]:
        """Concepts that the encoder cannot recognise: with their LoRA alone, images are no closer to the references."""
        measured = self.thresholds.dropna(subset=["without", "alone"])
        return measured.loc[measured["threshold"].isna(), "concept"].tolist()

    @property
    def unmeasured(self) -> list[str]:
        """Concepts that were not found in any image without LoRA, or in none with their LoRA alone."""
        return self.thresholds.loc[self.thresholds[["without", "alone"]].isna().any(axis=1), "concept"].tolist()

    @property
    def unlimited(self) -> list[tuple[str, str]]:
        """Class words of bystanders with a concept whose identity on them could not be told from their own look."""
        limits = self.bystander_limits.items()
        return [pair for pair, limit in limits if np.isnan(limit)]


def arm_names(suite: Suite) -> list[str]:
    """The rows of the tables, in their order: no LoRA, LoRAs alone, the methods."""
    return [SANITY[0], *(alone_name(suite, kind) for kind in suite.kinds), *(method.name for method in suite.compared)]


def bound_name(suite: Suite, arm: str) -> str:
    """The row in which the LoRAs of an arm act alone; for images without LoRA, the first kind of LoRAs."""
    kinds = {method.name: method.lora for method in suite.compared}
    if arm not in kinds:
        return SANITY[1] if arm == SANITY[0] else arm
    kind = kinds[arm]
    return alone_name(suite, suite.kinds[0] if kind is None else kind)


def load(out: Path) -> Evaluation:
    """Computes the tables of what is stored so far; damaged batches count as missing. FileError without a plan."""
    plan = read(out / results.PLAN, results.BatchPlan)
    if plan is None:
        raise FileError(f"there is no evaluation in {out}: {results.PLAN} is missing")
    shots, failed, missing, unscored = stored_shots(out, plan)
    shots = _with_styles(plan.suite, shots)
    concepts = _typed(
        pd.DataFrame([row for shot in shots for row in _concept_rows(plan.suite, shot)], columns=_CONCEPT_COLUMNS)
    )
    thresholds = _thresholds(plan.suite, concepts)
    limits = dict(zip(thresholds["concept"], thresholds["threshold"], strict=True))
    concepts["threshold"] = [limits[name] for name in concepts["concept"]]
    concepts = _typed(concepts)
    columns = (concepts[key].to_numpy(dtype=float) for key in ("own", "other", "threshold"))
    concepts["present"] = metrics.present(concepts["found"].to_numpy(dtype=bool), *columns)
    confused = [Confused.of(shot, thresholds) for shot in shots]
    concepts = _with_outcomes(concepts, shots, confused)
    of_bystanders = _bystander_limits(plan.suite, shots, thresholds)
    return Evaluation(
        plan=plan,
        concepts=concepts,
        images=_images(plan.suite, shots, confused, concepts, of_bystanders),
        thresholds=thresholds,
        bounds=_bounds(plan.suite, concepts),
        confusion=_typed(
            pd.DataFrame(
                [cell for confusion in confused if confusion for cell in confusion.cells()], columns=_CELL_COLUMNS
            )
        ),
        bystander_limits=of_bystanders,
        made=tuple({id(shot.made): shot.made for shot in shots}.values()),
        failed=tuple(failed),
        missing=missing,
        unscored=unscored,
    )


def _with_styles(suite: Suite, shots: Sequence[Shot]) -> list[Shot]:
    """The images with how much of each style they have."""
    colours: dict[tuple[str, str, str | None], dict[str, list[Any]]] = {}
    for shot in shots:
        by_style = colours.setdefault((shot.planned.scene, shot.planned.arm, shot.planned.alone), {})
        for name, score in shot.scores.concepts.items():
            if score.colours is not None:
                by_style.setdefault(name, []).append(score.colours)

    def mean(scene: str, arm: str, alone: str | None, style: str) -> np.ndarray:
        seen = colours.get((scene, arm, alone), {}).get(style)
        return np.mean(seen, axis=0) if seen else np.full(6, np.nan)

    def share(shot: Shot, style: str) -> float:
        scene, bound = shot.planned.scene, bound_name(suite, shot.planned.arm)
        ends = mean(scene, SANITY[0], None, style), mean(scene, bound, style, style)
        return metrics.style_share(np.array(shot.scores.concepts[style].colours), *ends)

    return [
        replace(shot, styles={
            name: share(shot, name)
            for name in suite.scene(shot.planned.scene).concepts
            if suite.concept(name).is_style and shot.planned.alone in (None, name)
        })
        for shot in shots
    ]  # fmt: skip


def _with_outcomes(concepts: pd.DataFrame, shots: Sequence[Shot], confused: Sequence[Confused | None]) -> pd.DataFrame:
    """The table with the outcome of each concept; nothing of styles and of images of older versions."""
    outcomes: list[Mapping[str, str | None]] = []
    for shot, confusion in zip(shots, confused, strict=True):
        outcomes += [{}] * len(shot.names) if confusion is None else confusion.subjects()
        outcomes += [{}] * len(shot.styles)
    return concepts.assign(**{key: [row.get(key) for row in outcomes] for key in ("outcome", "took")})


def _concept_rows(suite: Suite, shot: Shot) -> list[dict[str, Any]]:
    similarity = shot.similarity
    own = metrics.region_similarity(similarity)
    rows = []
    for i in shot.acting:
        score = shot.scores.concepts[shot.concepts[i]]
        detected = not np.isnan(similarity[i]).any()
        others = np.delete(similarity[i], i)
        rows.append(
            {
                **shot.keys,
                "concept": shot.concepts[i],
                "found": detected,
                "own": own[i],
                "other": others.max() if len(others) else np.nan,
                "nearest": shot.concepts[int(similarity[i].argmax())] if detected else None,
                "whole": score.whole,
                "placed": score.placed,
                "inside": _inside(suite, shot, shot.concepts[i]),
                "detection": score.detection,
                **dict(zip(_EDGES, score.box or [None] * 4, strict=True)),
            }
        )
    styles = [
        {**shot.keys, "concept": name, "found": not np.isnan(share), "own": share, "nearest": name,
         "whole": shot.scores.concepts[name].whole}
        for name, share in shot.styles.items()
    ]  # fmt: skip
    return rows + styles


def _inside(suite: Suite, shot: Shot, concept: str) -> float:
    """The share of a concept's detection that lies in its region; NaN without a region or a detector."""
    region = suite.scene(shot.planned.scene).regions.get(concept)
    box = shot.scores.concepts[concept].box
    return np.nan if region is None or box is None or suite.detector is None else inside(box, region)


def _bystander_limits(suite: Suite, shots: Sequence[Shot], thresholds: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The similarity from which on a bystander has the identity of a concept, by its class word and the concept.

    Halfway between the model's own objects of that class, without any LoRA, and what the concept's LoRA reaches alone.
    NaN where one of the two is not known, or the LoRA is no more alike.
    """
    reached = dict(zip(thresholds["concept"], thresholds["alone"], strict=True))
    without: dict[tuple[str, str], list[float]] = {
        (word, name): []
        for scene in suite.scenes
        for word in scene.bystanders.values()
        for name in scene.concepts
        if not suite.concept(name).is_style
    }
    for shot in (shot for shot in shots if shot.planned.arm == SANITY[0]):
        words = suite.scene(shot.planned.scene).bystanders
        for name, similarity in shot.scores.bystanders.items():
            for concept, alike in similarity.items():
                without[words[name], concept].append(alike)
    return {
        (word, concept): metrics.presence_threshold(np.array(alike), np.array([reached.get(concept, np.nan)]))
        for (word, concept), alike in without.items()
    }


def _bystanders(suite: Suite, shot: Shot, limits: Mapping[tuple[str, str], float]) -> float:
    """The share of bystanders found without a concept's identity; NaN if there are none, or one LoRA acts alone."""
    words = suite.scene(shot.planned.scene).bystanders if shot.planned.alone is None else {}
    right = []
    for name, word in words.items():
        similarity = shot.scores.bystanders.get(name, {})
        taken = any(alike >= limits[word, concept] for concept, alike in similarity.items())
        right.append(bool(similarity) and not taken)
    return _mean(right)


def _images(
    suite: Suite,
    shots: Sequence[Shot],
    confused: Sequence[Confused | None],
    concepts: pd.DataFrame,
    limits: Mapping[tuple[str, str], float],
) -> pd.DataFrame:
    own = _own_by(concepts)
    rows = []
    for shot, confusion in zip(shots, confused, strict=True):
        bound = bound_name(suite, shot.planned.arm)
        row = _image_row(shot, {name: own.get((bound, name), np.array([])) for name in shot.concepts})
        places = {"inside": _mean([_inside(suite, shot, name) for name in shot.names])}
        places["bystanders"] = _bystanders(suite, shot, limits)
        rows.append({**row, **places, **(confusion.image() if confusion else {}), **_chosen(suite, shot)})
    images = _typed(pd.DataFrame(rows, columns=_IMAGE_COLUMNS))
    present = concepts.groupby(list(_KEYS), dropna=False, sort=False)["present"].all()
    return images.assign(success=present.to_numpy(dtype=bool) & ~(images["bystanders"] < 1).to_numpy())


def _chosen(suite: Suite, shot: Shot) -> dict[str, float | None]:
    """The metrics that the user chose, as far as the image was scored by them."""
    row: dict[str, float | None] = {}
    for metric in suite.metrics:
        if metric.name not in shot.scores.chosen:
            continue
        whole, detected = shot.whole_by(metric.name), shot.found_by(metric.name)
        if metric.name == "clip-t":
            row["clip_t"] = shot.scores.chosen[metric.name].text
        elif metric.name == "clip-i":
            seen = shot.scores.chosen[metric.name].whole
            row["clip_i"] = _mean([*whole, *(seen[style] for style in shot.styles)])
        elif metric.name == "dino":
            row |= {"dino": _mean(whole), "dino_found": _mean(np.nan_to_num(detected, nan=0.0))}
        elif metric.name == "arcface":
            row["arcface"] = _mean(np.nan_to_num(detected[~np.isnan(whole)], nan=0.0))
        else:
            threshold = COLLAPSED if metric.threshold is None else metric.threshold
            row |= {"scr": collapse_rate(detected, threshold), "scr_whole": collapse_rate(whole, threshold)}
    return row


def _image_row(shot: Shot, bounds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    similarity, acting = shot.similarity, shot.acting
    names = [shot.concepts[i] for i in acting]
    scores = [shot.scores.concepts[name] for name in (*names, *shot.styles)]
    own = metrics.region_similarity(similarity)[acting]
    return {
        **shot.keys,
        "file": shot.file,
        "clip_t": shot.scores.clip_t,
        "clip_i": np.nan if shot.scores.clip_t is None else _mean([score.whole for score in scores]),
        "region": _mean(own),
        "region_min": min(own, default=np.nan),
        "ratio": _mean([metrics.bound_ratio(own[[i]], bounds[name]) for i, name in enumerate(names)]),
        "leak": metrics.leak(similarity),
        "swap": metrics.swap_rate(similarity),
        "found": _mean(np.asarray(~np.isnan(similarity[acting]).any(axis=1))),
        "placed": _mean([np.nan if score.placed is None else score.placed for score in scores]),
        "extra": shot.scores.extra,
        "style": _mean([*shot.styles.values()]),
        **shot.made.cost.model_dump(),
    }


def _thresholds(suite: Suite, concepts: pd.DataFrame) -> pd.DataFrame:
    """The presence thresholds of the concepts that scenes use."""
    used = {name for scene in suite.scenes for name in scene.concepts}
    rows = []
    for name in (concept.name for concept in suite.concepts if concept.name in used):
        detected = concepts[concepts["found"] & (concepts["concept"] == name)]
        without, alone = (detected.loc[detected["arm"] == arm, "own"].to_numpy() for arm in SANITY[:2])
        threshold = metrics.presence_threshold(without, alone)
        rows.append(
            {"concept": name, "without": _mean(without), "alone": metrics.reached(alone), "threshold": threshold}
        )
    return pd.DataFrame(rows, columns=["concept", "without", "alone", "threshold"])


def _bounds(suite: Suite, concepts: pd.DataFrame) -> pd.DataFrame:
    """How alike each concept is under each arm, and its ratio to that with the LoRA alone."""
    own = _own_by(concepts)
    rows = [
        {
            "arm": arm,
            "concept": concept.name,
            "region": _mean(own[arm, concept.name]),
            "ratio": metrics.bound_ratio(
                own[arm, concept.name], own.get((bound_name(suite, arm), concept.name), np.array([]))
            ),
        }
        for arm in arm_names(suite)
        for concept in suite.concepts
        if (arm, concept.name) in own
    ]
    return pd.DataFrame(rows, columns=["arm", "concept", "region", "ratio"])


def _own_by(concepts: pd.DataFrame) -> dict[Any, np.ndarray]:
    """Similarities to the own references by arm and concept."""
    return {key: rows.to_numpy() for key, rows in concepts.groupby(["arm", "concept"])["own"]}


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Gives columns their types, so that they are the same with and without rows and gaps."""
    kinds = dict.fromkeys(_NUMBERS, "float64") | dict.fromkeys(_EDGES, "Int64")
    kinds |= {"seed": "int64", "placed": "boolean"} if "concept" in table else {"seed": "int64", "placed": "float64"}
    return table.astype({name: kind for name, kind in kinds.items() if name in table})


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if len(kept) else np.nan
