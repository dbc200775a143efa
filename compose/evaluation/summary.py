"""The metrics, a summary with a row per arm and intervals, and success by kind of scene."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lora_compose.compose.evaluation.confusion import OUTCOMES
from lora_compose.compose.evaluation.statistics import bootstrap, compare
from lora_compose.compose.evaluation.suite import SANITY, Suite, SuiteScene
from lora_compose.compose.evaluation.table import COSTS, Evaluation, arm_names
from lora_compose.pipelines.scene.scene import head_noun_of


@dataclass(frozen=True)
class Metric:
    """A metric of images: its column and its title in tables, direction, digits after the point, range and meaning."""

    key: str
    title: str
    higher_is_better: bool
    digits: int
    span: str
    meaning: str


METRICS = (
    Metric(
        "success", "Success", True, 2, "0 to 1",
        "Share of images in which every concept was found, is nearer to its own "
        "references than to those of any other, and reaches its threshold; of a style, half of it. Bystanders have to "
        "be there, too, without the identity of a concept.",
    ),
    Metric(
        "region_min", "Worst concept", True, 3, "-1 to 1, in practice above 0",
        "Similarity of the worst concept of an image to its own references, so that a good concept cannot make up for "
        "a lost one. A concept that was not found counts as 0.",
    ),
    Metric(
        "region", "Likeness", True, 3, "-1 to 1, in practice above 0",
        "Similarity of what was found to its own references, averaged over the concepts of an image. A concept that "
        "was not found counts as 0.",
    ),
    Metric(
        "ratio", "Of alone", True, 2, "about 0 to 1",
        "Likeness over what the same kind of LoRA reaches when it acts alone: how much of the identity the method "
        "keeps. The row without LoRA shows how much of that is due to the object as such.",
    ),
    Metric(
        "leak", "Leak", False, 3, "-1 to 1, in practice above 0",
        "Similarity of what was found to the most alike of the other concepts' references. An image without any "
        "identity leaks little as well: read it beside the likeness. The rows of LoRAs that act alone show how much "
        "there is without any other LoRA.",
    ),
    Metric(
        "swap", "Nearer to another", False, 2, "0 to 1",
        "Share of the concepts that were found, but look more like another concept than like themselves.",
    ),
    Metric("found", "Found", True, 2, "0 to 1", "Share of the concepts that the detector found."),
    Metric(
        "placed", "In place", True, 2, "0 to 1",
        "Share of the found concepts whose middle lies in their region, in scenes with a layout. Methods that take no "
        "layout are not meant to follow it.",
    ),
    Metric(
        "inside", "Inside its box", True, 2, "0 to 1",
        "Which share of what was found of a concept lies in its region, in scenes with a layout.",
    ),
    Metric(
        "extra", "Extra objects", False, 2, "0 and more",
        "Objects of the subjects' classes beyond one for each subject, such as a second cat.",
    ),
    Metric(
        "bystanders", "Bystanders", True, 2, "0 to 1",
        "Share of the subjects without a LoRA that were found and have no concept's identity: less similarity to its "
        "references than halfway between the model's own objects of that class and what the concept's LoRA reaches "
        "alone.",
    ),
    Metric(
        "style", "Style", True, 2, "about 0 to 1",
        "How much of a style an image has, by its colours: 0 as without any LoRA, 1 as with the style's LoRA alone, in "
        "the same scene. Blind to what colours do not show.",
    ),
    Metric(
        "clip_t", "CLIP-T", True, 1, "0 to 100",
        "100 x similarity of the image to its prompt, without the triggers. It is blind to identity.",
    ),
    Metric(
        "clip_i", "CLIP-I", True, 3, "-1 to 1",
        "Similarity of the whole image to the references, averaged over the concepts, by an encoder that also reads "
        "texts. It cannot say which object is alike; it is here because papers report it.",
    ),
    Metric(
        "dino", "DINO", True, 3, "-1 to 1",
        "As CLIP-I, by DINOv2, which compares appearance where CLIP compares classes. Of the whole image.",
    ),
    Metric(
        "dino_found", "DINO, found", True, 3, "-1 to 1, in practice above 0",
        "Similarity of the crop of each concept to its references, by DINOv2. One that was not found counts as 0.",
    ),
    Metric(
        "scr", "SCR", False, 2, "0 to 1",
        "Subject collapse rate: share of the concepts that were not found, or are less similar to their references "
        "than a threshold.",
    ),
    Metric(
        "scr_whole", "SCR, whole image", False, 2, "0 to 1",
        "Subject collapse rate of the whole image instead of crops, as in the paper.",
    ),
    Metric(
        "arcface", "ArcFace", True, 3, "-1 to 1, in practice above 0",
        "Similarity of the face of each subject that was found to the faces of its references, by a network that "
        "recognises faces. A subject that was not found, or without a face, counts as 0; one whose references show no "
        "face is left out.",
    ),
)  # fmt: skip
"""All metrics, the main ones among them; tables show them in this order."""

OUTCOME_METRICS = (
    Metric("share_kept", "Kept", True, 2, "0 to 1", f"The subject {OUTCOMES['kept']}."),
    *(
        Metric(f"share_{kind}", kind.capitalize(), False, 2, "0 to 1", f"The subject {text}.")
        for kind, text in OUTCOMES.items()
        if kind != "kept"
    ),
    Metric(
        "lost", "Lost", True, 3, "-1 to 1, in practice below 0",
        "Similarity of what stands in a concept's place to its own references, less that of the references among "
        "themselves.",
    ),
    Metric(
        "gained", "Gained", False, 3, "-1 to 1",
        "Similarity to the references of the other concept that gave most, less that of the two concepts' references.",
    ),
)  # fmt: skip
"""Outcomes of the subjects: shares that sum to 1, and the similarity lost and gained."""

MAIN = ("success", "region_min", "leak")
"""The metrics in which methods are compared with the baseline."""


def summary(evaluation: Evaluation) -> pd.DataFrame:
    """A row per arm: metrics with intervals over scenes, comparisons with the baseline, and cost.

    The rows stand in the order of the suite; there is no ranking. For a metric `m`, `m_low` and `m_high` are the ends
    of its interval; for the main ones `m_difference` is the difference to the baseline on the same scenes and seeds,
    with `m_difference_low` and `m_difference_high`, `m_wins`, `m_ties`, `m_losses` in images, and `m_verdict`.

    Costs are medians over images (`peak_bytes` is the largest), and `*_ratio` those over the row without LoRA.
    `rows` are latent rows, forward and backward.
    """
    suite = evaluation.suite
    baseline, plain = evaluation.arm(suite.baseline), _cost(evaluation.arm(SANITY[0]))
    rows = []
    for arm in arm_names(suite):
        chosen = evaluation.arm(arm)
        row: dict[str, Any] = {"arm": arm, "role": role(suite, arm), "images": len(chosen)}
        row |= {"scenes": len(set(chosen["scene"]))}
        for metric in (*METRICS, *OUTCOME_METRICS):
            row |= _interval(metric.key, chosen)
            if metric.key in MAIN:
                row |= _compared(metric, chosen, baseline) if row["role"] == "method" else {}
        cost = _cost(chosen)
        rows.append(
            row | cost | {f"{key}_ratio": _ratio(cost[key], plain[key]) for key in ("rows", "flops", "seconds")}
        )
    return pd.DataFrame(rows, columns=_summary_columns())


def role(suite: Suite, arm: str) -> str:
    """The role of a row: "sanity", "baseline" or "method"."""
    if arm in {method.name for method in suite.compared}:
        return "baseline" if arm == suite.baseline else "method"
    return "sanity"


def _interval(key: str, images: pd.DataFrame) -> dict[str, float]:
    interval = bootstrap(images[key].astype(float).tolist(), images["scene"].tolist())
    return {key: interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}


def _compared(metric: Metric, method: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, Any]:
    result = compare(
        by_scene_and_seed(method, metric.key), by_scene_and_seed(baseline, metric.key), metric.higher_is_better
    )
    values = (
        result.difference.mean, result.difference.low, result.difference.high,
        result.wins, result.ties, result.losses, result.verdict,
    )  # fmt: skip
    return dict(zip(_comparison_columns(metric.key), values, strict=True))


def by_scene_and_seed(images: pd.DataFrame, key: str) -> pd.Series:
    """A column of an arm as `statistics.compare` takes it; where LoRAs act alone, the mean over them."""
    values = pd.Series(images[key].to_numpy(dtype=float), [images["scene"], images["seed"]], name=key)
    return pd.Series(values.groupby(level=[0, 1], sort=False).mean())


def _comparison_columns(key: str) -> list[str]:
    parts = ("difference", "difference_low", "difference_high", "wins", "ties", "losses", "verdict")
    return [f"{key}_{part}" for part in parts]


def _cost(images: pd.DataFrame) -> dict[str, float]:
    costs = {key: images[key].to_numpy(dtype=float) for key in COSTS}
    costs = {"rows": costs["rows_forward"] + costs["rows_stopped"] + costs["rows_backward"], **costs}
    if images.empty:
        return dict.fromkeys(costs, np.nan)
    return {key: float(values.max() if key == "peak_bytes" else np.median(values)) for key, values in costs.items()}


def _ratio(cost: float, plain: float) -> float:
    return cost / plain if plain else np.nan


def _summary_columns() -> list[str]:
    columns = ["arm", "role", "images", "scenes"]
    for metric in (*METRICS, *OUTCOME_METRICS):
        columns += [metric.key, f"{metric.key}_low", f"{metric.key}_high"]
        columns += _comparison_columns(metric.key) if metric.key in MAIN else []
    return [*columns, "rows", *COSTS, "rows_ratio", "flops_ratio", "seconds_ratio"]


def kind_of_scene(suite: Suite, scene: SuiteScene) -> str:
    """How many subjects a scene has, whether two of them are of one class, and how they interact, if it says so.

    "cat" and "old cat" are of one class.
    """
    words = [*(suite.concept(name).class_word for name in scene.concepts), *scene.bystanders.values()]
    alike = " of one class" if len(set(map(head_noun_of, words))) < len(words) else ""
    how = "" if scene.interaction is None else f", {scene.interaction}"
    without = f", {len(scene.bystanders)} without a LoRA" if scene.bystanders else ""
    return f"{len(words)} subject{'s' if len(words) > 1 else ''}{alike}{without}{how}"


def success_by_kind(evaluation: Evaluation) -> pd.DataFrame:
    """Mean success by row of the tables and kind of scene; a column for each kind, in the order of the suite.

    Empty if all scenes are of one kind.
    """
    suite = evaluation.suite
    kinds = {str(scene.name): kind_of_scene(suite, scene) for scene in suite.scenes}
    if len(columns := list(dict.fromkeys(kinds.values()))) < 2:
        return pd.DataFrame()
    images = evaluation.images.assign(kind=[kinds[str(scene)] for scene in evaluation.images["scene"]])
    by_kind = {
        kind: [images["success"][(images["arm"] == arm) & (images["kind"] == kind)].mean() for arm in arm_names(suite)]
        for kind in columns
    }
    return pd.DataFrame(by_kind, index=arm_names(suite))  # pyright: ignore[reportArgumentType]  # its stubs want an Index
