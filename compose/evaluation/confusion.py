"""Outcomes of the subjects of an image, from the confusion matrix of crops and references.

Row i of a matrix is the crop that belongs to subject i, column j the references of subject j; NaN is a subject that was
not found. Subjects resemble each other to begin with, so the similarities of the references among themselves are
subtracted: what is left of the diagonal is what a subject lost, what is left beside it is what others gave it. After
Tian et al. 2026, "MultiBind", https://arxiv.org/abs/2603.21937; the limits and the exact definitions are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lora_compose.compose.evaluation.metrics import assign, clip_i
from lora_compose.pipelines.scene.mask_images import Box

OUTCOMES = {
    "kept": "has its own identity alone",
    "drift": "lost its identity without the identity of another",
    "swap": "two subjects have each other's identity",
    "dominance": "has the identity of another subject, but not the other way round",
    "blending": "a mix of its own identity and another's",
    "missing": "was not found",
}
"""Outcomes of a subject and what they mean; each subject has exactly one."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a subject, one of `OUTCOMES`, and the subject whose identity it took, if it took one."""

    kind: str
    other: int | None = None


def truth_matrix(references: Sequence[torch.Tensor]) -> np.ndarray:
    """How alike the references of subjects are among themselves.

    Each entry is the mean cosine over pairs of an image of the row's and one of the column's subject; on the diagonal
    over pairs of different images, 1 if there is only one. Shapes: [images, channels] of length 1 each, to [subjects,
    subjects]. Raises ValueError if a subject has no references.
    """
    truth = np.array([[clip_i(images, other).mean() for other in references] for images in references])
    for i, images in enumerate(references):
        count = len(images)
        truth[i, i] = (count * truth[i, i] - 1) / (count - 1) if count > 1 else 1.0  # without each image with itself
    return truth


def limits(truth: np.ndarray, thresholds: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """The lowest similarity at which a crop has an identity. Shape: [subjects, subjects].

    On the diagonal the threshold of the subject (`metrics.presence_threshold`); where there is none, halfway between
    its references among themselves and those of the subject most like it. Beside the diagonal, halfway between how
    alike the two subjects' references are, and what the other's LoRA reaches alone (`metrics.reached`; where that is
    not known, its references among themselves). NaN is no limit: a single subject without a threshold, or a pair that
    the encoder cannot tell apart. Shapes: [subjects, subjects] and two times [subjects].
    """
    count = len(truth)
    own = np.eye(count, dtype=bool)
    top = np.where(np.isnan(reached), np.diagonal(truth), reached)
    beside = np.where(top > truth, (truth + top) / 2, np.nan)
    nearest = np.where(own, -np.inf, truth).max(axis=1)
    apart = np.where(nearest > -np.inf, (np.diagonal(truth) + nearest) / 2, np.nan)
    return np.where(own, np.where(np.isnan(thresholds), apart, thresholds)[:, None], beside)


def outcomes(similarity: np.ndarray, truth: np.ndarray, limit: np.ndarray) -> list[Outcome]:
    """The outcome of each subject. Shapes: three times [subjects, subjects].

    A subject takes the identity of another from the limit of that cell on; of several, of the one that gained most
    over the references (`similarity - truth`). If the crop is more like that one than like itself, it is taken over: by
    a swap if following such takeovers leads back to it, otherwise by dominance. If not, it is blended.
    """
    other = [_intruder(i, similarity, truth, limit) for i in range(len(similarity))]
    taken = [j if j is not None and similarity[i, j] > similarity[i, i] else None for i, j in enumerate(other)]
    outcomes = []
    for i, j in enumerate(other):
        if np.isnan(similarity[i]).any():
            outcomes.append(Outcome("missing"))
        elif j is None:
            outcomes.append(Outcome("drift" if similarity[i, i] < limit[i, i] else "kept"))
        elif taken[i] is None:
            outcomes.append(Outcome("blending", j))
        else:
            outcomes.append(Outcome("swap" if _returns(i, taken) else "dominance", j))
    return outcomes


def _intruder(i: int, similarity: np.ndarray, truth: np.ndarray, limit: np.ndarray) -> int | None:
    beyond = [j for j in range(len(similarity)) if j != i and similarity[i, j] >= limit[i, j]]
    return max(beyond, key=lambda j: similarity[i, j] - truth[i, j], default=None)


def _returns(start: int, taken: Sequence[int | None]) -> bool:
    at, steps = taken[start], 0
    while at is not None and at != start and steps < len(taken):
        at, steps = taken[at], steps + 1
    return at == start


def lost(similarity: np.ndarray, truth: np.ndarray) -> float:
    """What subjects lost: the diagonal of `similarity - truth`, averaged over those that were found.

    0 is as alike as their references are among themselves, below 0 is less; higher is better. NaN if none was found.
    """
    difference = np.diagonal(similarity - truth)
    return float(np.nanmean(difference)) if not np.isnan(difference).all() else np.nan


def gained(similarity: np.ndarray, truth: np.ndarray) -> float:
    """What subjects took of others: the highest of `similarity - truth` beside the diagonal, averaged over subjects.

    0 is as alike as the references of the two are; lower is better. Subjects that were not found are left out; NaN if
    none was, or with fewer than two.
    """
    if len(similarity) < 2:
        return np.nan
    beside = np.where(np.eye(len(similarity), dtype=bool), -np.inf, similarity - truth)
    kept = beside[~np.isnan(similarity).any(axis=1)].max(axis=1)
    return float(kept.mean()) if len(kept) else np.nan


def inside(box: Box, region: Box) -> float:
    """The share of a box that lies in a region, 0 to 1; higher is better."""
    width = max(0, min(box[2], region[2]) - max(box[0], region[0]))
    height = max(0, min(box[3], region[3]) - max(box[1], region[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def by_place(boxes: Sequence[Box], regions: Sequence[Box], allowed: np.ndarray) -> list[int | None]:
    """Gives each subject the box nearest to its region, as `assign` does. `allowed`: shape [subjects, boxes]."""
    centres = [np.array([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in of]).reshape(-1, 2) for of in (regions, boxes)]
    return assign(-np.linalg.norm(centres[0][:, None] - centres[1][None], axis=-1), allowed)


def collapse_rate(similarity: np.ndarray, threshold: float) -> float:
    """The share of subjects whose similarity to their references is below a threshold (SCR).

    0 to 1; lower is better. A subject that was not found (NaN) has collapsed. NaN without subjects. After "When
    Identities Collapse", https://arxiv.org/abs/2603.26078, which compares the whole image, by DINOv2.
    """
    return float(np.mean(~(similarity >= threshold))) if len(similarity) else np.nan
