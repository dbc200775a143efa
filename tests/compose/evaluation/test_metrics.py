"""Every metric on images whose scores are known, and what may not change them."""

from itertools import permutations
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from evaluations import success
from lora_compose.compose.evaluation.metrics import (
    assign,
    bound_ratio,
    clip_i,
    clip_t,
    leak,
    presence_threshold,
    reached,
    region_similarity,
    similarity_matrix,
    swap_rate,
)

NAN = float("nan")
LOST = [NAN, NAN, NAN]
GOOD = np.array([[0.9, 0.2, 0.1], [0.3, 0.8, 0.4], [0.0, 0.5, 0.7]])
SWAPPED = np.array([[0.2, 0.9, 0.1], [0.8, 0.3, 0.4], [0.0, 0.5, 0.7]])
LOST_ONE = np.array([[0.9, 0.2, 0.1], LOST, [0.0, 0.7, 0.5]])
NONE = np.array([LOST, LOST, LOST])
FREE = np.full(3, NAN)

similarities = arrays(np.float64, st.integers(1, 5).map(lambda n: (n, n)), elements=st.floats(-1, 1, width=32))


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


@st.composite
def detections(draw: st.DrawFn) -> np.ndarray:
    similarity = draw(similarities)
    similarity[draw(arrays(np.bool_, len(similarity)))] = NAN
    return similarity


def shuffled(similarity: np.ndarray, order: list[int]) -> np.ndarray:
    return similarity[order][:, order]


# Embeddings.


def test_clip_t_is_a_hundred_times_the_cosine_and_never_negative() -> None:
    images = unit([1, 0], [1, 1], [0, 1], [1, 0])
    texts = unit([1, 0], [1, 0], [1, 0], [-1, 0])
    scores = clip_t(images, texts)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [100, 100 / 2**0.5, 0, 0], atol=1e-5)


def test_clip_i_is_the_mean_of_all_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    images, references = torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator)
    expected = F.cosine_similarity(images[:, None], references[None], dim=-1).mean(dim=1)
    np.testing.assert_allclose(clip_i(F.normalize(images), F.normalize(references)), expected, atol=1e-6)


def test_without_references_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="no references"):
        clip_i(unit([1, 0]), torch.empty(0, 2))


def test_rows_of_the_similarity_matrix_are_crops_and_columns_concepts() -> None:
    references = [unit([1, 0], [1, 0]), unit([0, 1]), unit([1, 0], [0, 1], [0, -1])]
    matrix = similarity_matrix(unit([1, 0], [0, 1]), references)
    np.testing.assert_allclose(matrix, [[1, 0, 1 / 3], [0, 1, 0]], atol=1e-7)


def test_without_crops_the_similarity_matrix_has_no_rows() -> None:
    assert similarity_matrix(torch.empty(0, 2), [unit([1, 0]), unit([0, 1])]).shape == (0, 2)


# Assignment.


def test_concepts_without_candidates_are_not_detected() -> None:
    similarity = np.array([[0.9, 0.8], [0.9, 0.9]])
    assert assign(similarity, np.array([[True, True], [False, False]])) == [0, None]
    assert assign(similarity, np.zeros((2, 2), dtype=bool)) == [None, None]
    assert assign(np.empty((3, 0)), np.empty((3, 0), dtype=bool)) == [None, None, None]


def test_what_is_not_allowed_may_be_unknown() -> None:
    assert assign(np.array([[NAN, 0.2], [0.3, NAN]]), np.array([[False, True], [True, False]])) == [1, 0]


@given(st.data())
def test_no_assignment_is_better(data: st.DataObject) -> None:
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, max_side=4))
    similarity = data.draw(arrays(np.float64, shape, elements=st.floats(-1, 1, width=16)))
    allowed = data.draw(arrays(np.bool_, shape))
    chosen = assign(similarity, allowed)

    def worth(candidates: tuple[int | None, ...]) -> tuple[int, float]:
        pairs = [pair for pair in enumerate(candidates) if pair[1] is not None and allowed[pair]]
        return len(pairs), float(sum(similarity[pair] for pair in pairs))

    concepts, candidates = shape
    nobody = [None] * concepts
    most, total = max(worth(order) for order in set(permutations([*range(candidates), *nobody], concepts)))
    given_away = [candidate for candidate in chosen if candidate is not None]
    assert len(given_away) == len(set(given_away)) == most
    assert worth(tuple(chosen)) == (most, pytest.approx(total))


# Images.


@pytest.mark.parametrize(
    ("similarity", "own", "worst", "leaked", "swapped", "succeeds"),
    [
        (GOOD, [0.9, 0.8, 0.7], 0.7, (0.2 + 0.4 + 0.5) / 3, 0, True),
        (SWAPPED, [0.2, 0.3, 0.7], 0.2, (0.9 + 0.8 + 0.5) / 3, 2 / 3, False),
        (LOST_ONE, [0.9, 0, 0.5], 0, (0.2 + 0.7) / 2, 1 / 2, False),
        (NONE, [0, 0, 0], 0, NAN, NAN, False),
        (np.array([[0.6]]), [0.6], 0.6, NAN, NAN, True),
        (np.array([[NAN]]), [0], 0, NAN, NAN, False),
    ],
    ids=["good", "swapped", "lost one", "nothing", "single", "single lost"],
)
def test_images_with_known_scores(
    similarity: np.ndarray, own: list[float], worst: float, leaked: float, swapped: float, succeeds: bool
) -> None:
    np.testing.assert_array_equal(region_similarity(similarity), own)
    assert region_similarity(similarity).min() == worst
    assert leak(similarity) == pytest.approx(leaked, nan_ok=True)
    assert swap_rate(similarity) == pytest.approx(swapped, nan_ok=True)
    assert success(similarity, FREE[: len(similarity)]) is succeeds


def test_success_needs_the_threshold_of_every_concept() -> None:
    assert success(GOOD, np.array([0.9, 0.8, 0.7]))
    assert not success(GOOD, np.array([0.9, 0.8, 0.71]))
    assert success(GOOD, np.array([0.9, 0.8, NAN]))
    assert not success(GOOD, np.array([0.91, NAN, NAN]))


def test_a_concept_as_near_to_another_is_neither_swapped_nor_a_success() -> None:
    similarity = np.array([[0.5, 0.5], [0.1, 0.9]])
    assert swap_rate(similarity) == 0
    assert not success(similarity, FREE[:2])


@given(detections(), st.randoms())
def test_the_order_of_concepts_does_not_matter(similarity: np.ndarray, random: Random) -> None:
    order = list(range(len(similarity)))
    random.shuffle(order)
    other = shuffled(similarity, order)
    np.testing.assert_array_equal(region_similarity(other), region_similarity(similarity)[order])
    assert leak(other) == pytest.approx(leak(similarity), nan_ok=True)
    assert swap_rate(other) == pytest.approx(swap_rate(similarity), nan_ok=True)
    thresholds = np.linspace(-0.5, 0.5, len(order))
    assert success(other, thresholds[order]) == success(similarity, thresholds)


# Against images of one concept.


def test_the_threshold_is_halfway_and_leaves_out_what_was_not_detected() -> None:
    assert presence_threshold(np.array([0.2, 0.4, NAN]), np.array([NAN, 0.7, 0.7])) == pytest.approx(0.5)


def test_a_lora_that_often_fails_alone_does_not_lower_the_threshold() -> None:
    without = np.array([0.3])
    works, fails = np.full(10, 0.9), np.array([0.3] * 6 + [0.9] * 4)
    assert presence_threshold(without, fails) == pytest.approx(presence_threshold(without, works))


def test_what_a_lora_reaches_is_exceeded_by_one_in_ten() -> None:
    assert reached(np.arange(11) / 10) == pytest.approx(0.9)
    assert np.isnan(reached(np.array([NAN])))


@pytest.mark.parametrize(
    ("without", "alone"),
    [([0.5], [0.5]), ([0.6], [0.5]), ([NAN], [0.5]), ([0.5], [NAN, NAN]), ([], [0.5]), ([0.5], [])],
)
def test_without_a_difference_there_is_no_threshold(without: list[float], alone: list[float]) -> None:
    assert np.isnan(presence_threshold(np.array(without), np.array(alone)))


def test_bound_ratio_counts_what_was_not_detected_as_nothing() -> None:
    assert bound_ratio(np.array([0.4, 0.4]), np.array([0.8])) == pytest.approx(0.5)
    assert bound_ratio(np.array([0.4, NAN]), np.array([0.8])) == pytest.approx(0.25)
    assert bound_ratio(np.array([0.4]), np.array([0.8, NAN])) == pytest.approx(1)
    assert bound_ratio(np.array([NAN]), np.array([0.8])) == 0


@pytest.mark.parametrize("alone", [[], [0.0], [NAN], [-0.1]])
def test_bound_ratio_needs_a_concept_that_works_alone(alone: list[float]) -> None:
    assert np.isnan(bound_ratio(np.array([0.4]), np.array(alone)))
