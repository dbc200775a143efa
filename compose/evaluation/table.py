"""From stored scores to tables: a row per concept, and a row per image."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from lora_compose.compose.evaluation import metrics, results
from lora_compose.compose.evaluation.batches import alone_name
from lora_compose.compose.evaluation.suite import SANITY, Suite
from lora_compose.compose.files.reading import FileError
from lora_compose.compose.files.stored import read

logger = logging.getLogger(__name__)

_Read = TypeVar("_Read")


COSTS = ("rows_forward", "rows_stopped", "rows_backward", "flops", "seconds", "preparation_seconds", "peak_bytes")
_KEYS = ("scene", "arm", "alone", "seed")
_EDGES = ("left", "top", "right", "bottom")
_CONCEPT_COLUMNS = (
    *_KEYS, "concept", "found", "own", "other", "nearest", "whole", "placed", "detection", "threshold", "present",
    *_EDGES,
)  # fmt: skip
_IMAGE_COLUMNS = (
    *_KEYS, "file", "clip_t", "clip_i", "region", "region_min", "ratio", "leak", "swap", "success", "found", "placed",
    "extra", "style", *COSTS,
)  # fmt: skip
_NUMBERS = (
    "own", "other", "whole", "detection", "threshold", "clip_t", "clip_i", "region", "region_min", "ratio", "leak",
    "swap", "extra", "style", *COSTS,
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
        made: How the batches with scores were made.
        failed: Batches that failed.
        missing: Batches that are not made yet.
        unscored: Images that are made, but not scored yet.
    """

    plan: results.Plan
    concepts: pd.DataFrame
    images: pd.DataFrame
    thresholds: pd.DataFrame
    bounds: pd.DataFrame
    made: tuple[results.Made, ...]
    failed: tuple[results.Failed, ...]
    missing: int
    unscored: int

    @property
    def suite(self) -> Suite:
        """The suite."""
        return self.plan.suite

    def against(self, baseline: str) -> "Evaluation":
        """The evaluation, compared with another method.

        Raises:
            ValueError: If there is no such method.
        """
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


@dataclass(frozen=True, eq=False)
class _Image:
    """An image with scores.

    `concepts` are the subjects of its scene, `acting` the places of those that count, `styles` the styles that count
    and how much of each the image has.
    """

    planned: results.Planned
    seed: int
    file: str
    made: results.Made
    scores: results.ImageScores
    concepts: tuple[str, ...]
    styles: Mapping[str, float] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, Any]:
        return {"scene": self.planned.scene, "arm": self.planned.arm, "alone": self.planned.alone, "seed": self.seed}

    @property
    def acting(self) -> list[int]:
        return [i for i, name in enumerate(self.concepts) if self.planned.alone in (None, name)]

    @property
    def similarity(self) -> np.ndarray:
        """S [concepts, concepts] of the metrics, with rows of NaN for those that do not count."""
        rows = [self.scores.concepts[name].similarity for name in self.concepts]
        values = np.array([[row.get(name, np.nan) for name in self.concepts] for row in rows], dtype=np.float64)
        values[[i for i in range(len(values)) if i not in self.acting]] = np.nan
        return values


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
    """Reads all that an evaluation has stored so far, and computes its tables.

    Raises:
        FileError: If there is no evaluation, or its plan is damaged. A damaged batch counts as not made.
    """
    plan = read(out / results.PLAN, results.Plan)
    if plan is None:
        raise FileError(f"there is no evaluation in {out}: {results.PLAN} is missing")
    shots, failed, missing, unscored = _stored(out, plan)
    shots = _with_styles(plan.suite, shots)
    concepts = _typed(pd.DataFrame([row for shot in shots for row in _concept_rows(shot)], columns=_CONCEPT_COLUMNS))
    thresholds = _thresholds(plan.suite, concepts)
    limits = dict(zip(thresholds["concept"], thresholds["threshold"], strict=True))
    concepts["threshold"] = [limits[name] for name in concepts["concept"]]
    concepts = _typed(concepts)
    concepts["present"] = _present(concepts)
    return Evaluation(
        plan=plan,
        concepts=concepts,
        images=_images(plan.suite, shots, concepts),
        thresholds=thresholds,
        bounds=_bounds(plan.suite, concepts),
        made=tuple({id(shot.made): shot.made for shot in shots}.values()),
        failed=tuple(failed),
        missing=missing,
        unscored=unscored,
    )


def _stored(out: Path, plan: results.Plan) -> tuple[list[_Image], list[results.Failed], int, int]:
    """Images with scores, failures, how many batches are not made, and how many images are not scored."""
    shots: list[_Image] = []
    failed: list[results.Failed] = []
    missing = unscored = 0
    for planned in plan.batches:
        concepts = plan.suite.scene(planned.scene).concepts
        made = _sound(results.read_made, out, planned)
        scores = _sound(results.read_scores, out, planned, concepts)
        failure = _sound(read, results.batch_folder(out, planned.key) / results.FAILED, results.Failed)
        if made is not None and scores is not None:
            subjects = tuple(name for name in concepts if not plan.suite.concept(name).is_style)
            for seed in planned.seeds:
                file = results.image_path(out, planned.key, seed).relative_to(out).as_posix()
                shots.append(_Image(planned, seed, file, made, scores.images[seed], subjects))
        elif failure is not None:
            failed.append(failure)
        elif made is None:
            missing += 1
        else:
            unscored += len(planned.seeds)
    return shots, failed, missing, unscored


def _sound(reader: Callable[..., _Read | None], *args: Any) -> _Read | None:
    """Reads results; a damaged batch is logged and left out, so that the others are still shown."""
    try:
        return reader(*args)
    except FileError as error:
        logger.error("%s, and is left out; run the evaluation again to repair it", error)
        return None


def _with_styles(suite: Suite, shots: Sequence[_Image]) -> list[_Image]:
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

    def share(shot: _Image, style: str) -> float:
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


def _concept_rows(shot: _Image) -> list[dict[str, Any]]:
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


def _images(suite: Suite, shots: Sequence[_Image], concepts: pd.DataFrame) -> pd.DataFrame:
    own = _own_by(concepts)
    rows = []
    for shot in shots:
        bound = bound_name(suite, shot.planned.arm)
        rows.append(_image_row(shot, {name: own.get((bound, name), np.array([])) for name in shot.concepts}))
    images = _typed(pd.DataFrame(rows, columns=_IMAGE_COLUMNS))
    present = concepts.groupby(list(_KEYS), dropna=False, sort=False)["present"].all()
    return images.assign(success=present.to_numpy(dtype=bool))


def _present(concepts: pd.DataFrame) -> np.ndarray:
    """Whether each concept is present with its own identity, as in `metrics.success`."""
    own, other, threshold = (concepts[key].to_numpy(dtype=float) for key in ("own", "other", "threshold"))
    return concepts["found"].to_numpy(dtype=bool) & ~(own <= other) & ~(own < threshold)


def _image_row(shot: _Image, bounds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    similarity, acting = shot.similarity, shot.acting
    names = [shot.concepts[i] for i in acting]
    scores = [shot.scores.concepts[name] for name in (*names, *shot.styles)]
    own = metrics.region_similarity(similarity)[acting]
    return {
        **shot.keys,
        "file": shot.file,
        "clip_t": shot.scores.clip_t,
        "clip_i": _mean([score.whole for score in scores]),
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
    """Without the gaps; NaN if nothing is left."""
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if len(kept) else np.nan
