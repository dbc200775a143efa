"""Metrics as pure functions of embeddings and similarities.

Embeddings are torch tensors [n, channels] of length 1 (see `encoders.py`); everything else is numpy, float64.

An image with several concepts is described by one matrix S [concepts, concepts]: row i is the crop that belongs to
concept i, column j its similarity to the references of concept j. A row of NaN is a concept that was not detected.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def clip_t(images: torch.Tensor, texts: torch.Tensor) -> np.ndarray:
    """How well images fit their texts: 100 max(cos, 0), CLIPScore with the factor 100 of torchmetrics.

    0 to 100; higher is better. No detection: the whole image is compared. Shapes: two times [n, channels] to [n].
    Hessel et al. 2021, "CLIPScore", https://arxiv.org/abs/2104.08718, who use the factor 2.5.
    """
    return 100 * (images.double() * texts.double()).sum(dim=1).clamp(min=0).numpy()


def clip_i(images: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    """How alike images and references are: the mean cosine similarity to all references.

    -1 to 1; higher is better. No detection: all of `images` is compared. With embeddings of CLIP this is CLIP-I, with
    those of DINO it is DINO-I, of Ruiz et al. 2022, "DreamBooth", https://arxiv.org/abs/2208.12242. Shapes: [n,
    channels] and [m, channels] to [n]. Raises ValueError if there are no references.
    """
    if not len(references):
        raise ValueError("there are no references to compare with")
    return (images.double() @ references.double().mean(dim=0)).numpy()


def similarity_matrix(crops: torch.Tensor, references: Sequence[torch.Tensor]) -> np.ndarray:
    """`clip_i` of every crop to the references of every concept. Shape: [crops, concepts].

    -1 to 1; higher is more alike. Only what was detected has a crop; there may be none.
    """
    return np.stack([clip_i(crops, of_concept) for of_concept in references], axis=1)


def assign(similarity: np.ndarray, allowed: np.ndarray) -> list[int | None]:
    """Gives each concept at most one candidate and each candidate to at most one concept; None is "not detected".

    As many concepts as possible get one; among the ways to do so, the one with the largest total similarity is taken.
    Shapes: both [concepts, candidates]; `allowed` says which candidates a concept may get, and there may be none.
    """
    most = np.abs(similarity).max(initial=0, where=allowed)
    bonus = 2 * min(similarity.shape) * most + 1  # one more pair outweighs any change of the similarities
    pairs = zip(*linear_sum_assignment(np.where(allowed, similarity + bonus, 0), maximize=True), strict=True)
    chosen = {int(concept): int(candidate) for concept, candidate in pairs if allowed[concept, candidate]}
    return [chosen.get(concept) for concept in range(len(similarity))]


def region_similarity(similarity: np.ndarray) -> np.ndarray:
    """How alike every concept is to its own references: the diagonal of S.

    -1 to 1, in practice above 0; higher is better. A concept that was not detected counts as 0.
    """
    return np.nan_to_num(np.diagonal(similarity), nan=0.0)


def leak(similarity: np.ndarray) -> float:
    """How alike concepts are to others: the highest similarity to another concept's references, averaged over concepts.

    -1 to 1; lower is better, but an image without any identity has a low leak as well: read it together with
    `region_similarity`. Concepts that were not detected are left out; NaN if none was, or with fewer than two.
    """
    _, others = _own_and_others(similarity)
    return _mean(others) if len(similarity) > 1 else np.nan


def swap_rate(similarity: np.ndarray) -> float:
    """The share of concepts whose nearest references are another concept's.

    0 to 1; lower is better. Concepts that were not detected are left out; NaN if none was, or there are fewer than two.
    """
    own, others = _own_and_others(similarity)
    return _mean(others > own) if len(similarity) > 1 else np.nan


def present(detected: np.ndarray, own: np.ndarray, other: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Whether each concept is present with its own identity; an image in which all of them are is a success.

    A concept was detected, is nearer to its own references than to those of any other (NaN: there is no other), and
    reaches its threshold (`presence_threshold`; NaN is none). True is better. Shapes: [concepts] each.
    """
    return detected & ~(own <= other) & ~(own < threshold)


def presence_threshold(without: np.ndarray, alone: np.ndarray) -> float:
    """The similarity to its references from which on a concept counts as present.

    That the own references are the nearest is not enough: a plain cat is the nearest thing to the references of "my
    cat" among cat and dog. So two kinds of images are made: of the plain object, without any LoRA, and with the
    concept's LoRA alone. The threshold is halfway between the mean similarity of the former and what the latter reach
    at their best (`reached`; a LoRA alone often fails, too). Since it is measured with the same encoder, it is
    calibrated for every encoder.

    -1 to 1; neither direction is better. NaN in the similarities (not detected) is left out. The result is NaN if
    images with the LoRA are not more alike to the references than images without: this encoder then cannot recognise
    the identity.
    """
    low, high = _mean(without[~np.isnan(without)]), reached(alone)
    return (low + high) / 2 if high > low else np.nan


def reached(alone: np.ndarray) -> float:
    """The similarity that a LoRA reaches alone in its best images: one image in ten exceeds it. NaN is left out."""
    kept = alone[~np.isnan(alone)]
    return float(np.quantile(kept, 0.9)) if len(kept) else np.nan


def style_share(colours: np.ndarray, without: np.ndarray, alone: np.ndarray) -> float:
    """How much of a style an image has, by its colours: how far they are on the way to those with the style alone.

    0 as without any LoRA, 1 as with the style's LoRA alone, in the same scene; higher is better. It is blind to what
    colours do not show, such as strokes. NaN if colours are the same with and without the style. Shapes: [6] each, mean
    and spread of each channel; those without any LoRA and with the style alone are averages.
    """
    way = alone - without
    length = float(way @ way)
    return float((colours - without) @ way) / length if length > 0 else np.nan


def bound_ratio(method: np.ndarray, alone: np.ndarray) -> float:
    """How much of a concept's identity a method keeps: its mean similarity, over that with its LoRA alone.

    About 0 to 1, above 1 if the method does better than the LoRA alone; higher is better. Concepts that were not
    detected count as 0 in both means. NaN if the mean alone is not above 0.
    """
    kept, whole = _mean(np.nan_to_num(method, nan=0.0)), _mean(np.nan_to_num(alone, nan=0.0))
    return kept / whole if whole > 0 else np.nan


def _own_and_others(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of the detected concepts to their own references, and the highest to another's (-inf if none)."""
    others = np.where(np.eye(len(similarity), dtype=bool), -np.inf, similarity).max(axis=1)
    detected = ~np.isnan(similarity).any(axis=1)
    return np.diagonal(similarity)[detected], others[detected]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan
