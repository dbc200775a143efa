"""Outcomes of the subjects of an image, against definitions written out pair by pair."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lora_compose.compose.evaluation.confusion import (
    OUTCOMES,
    Outcome,
    by_place,
    collapse_rate,
    gained,
    inside,
    limits,
    lost,
    outcomes,
    truth_matrix,
)

NAN = float("nan")
TRUTH = np.array([[0.9, 0.1, 0.3], [0.1, 0.8, 0.0], [0.3, 0.0, 0.7]])
THRESHOLDS = np.array([0.5, 0.4, 0.5])
REACHED = np.array([0.7, 0.7, 0.6])
LIMITS = np.array([[0.5, 0.4, 0.45], [0.4, 0.4, 0.3], [0.5, 0.35, 0.5]])  # by hand, from the three above


def features(*counts: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [F.normalize(torch.randn(count, 6, generator=generator) + 0.3, dim=-1) for count in counts]


# The references among themselves.


def test_the_references_own_matrix_leaves_out_each_image_with_itself() -> None:
    sets = features(4, 3, 1)
    by_hand = np.ones((3, 3))
    for i, j in product(range(3), repeat=2):
        rows = [row.tolist() for row in sets[i]]
        pairs = combinations(rows, 2) if i == j else product(rows, [row.tolist() for row in sets[j]])
        cosines = [sum(a * b for a, b in zip(one, other, strict=True)) for one, other in pairs]
        if cosines:
            by_hand[i, j] = sum(cosines) / len(cosines)
    np.testing.assert_allclose(truth_matrix(sets), by_hand, atol=1e-6)
    assert by_hand[2, 2] == 1


def test_limits_are_halfway_to_what_the_other_lora_reaches() -> None:
    np.testing.assert_allclose(limits(TRUTH, THRESHOLDS, REACHED), LIMITS)


def test_without_a_run_limits_come_from_the_references() -> None:
    found = limits(TRUTH, np.full(3, NAN), np.full(3, NAN))
    np.testing.assert_allclose(found, [[0.6, 0.45, 0.5], [0.5, 0.45, 0.35], [0.6, 0.4, 0.5]])


def test_what_cannot_be_told_apart_has_no_limit() -> None:
    twins = np.array([[0.8, 0.75], [0.75, 0.8]])
    found = limits(twins, np.array([0.5, 0.5]), np.array([0.7, 0.9]))
    np.testing.assert_allclose(found, [[0.5, 0.825], [NAN, 0.5]])
    assert np.isnan(limits(np.array([[1.0]]), np.array([NAN]), np.array([0.7])))


# Outcomes.


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.7, 0.1, 0.3], [0.1, 0.7, 0.0], [0.3, 0.0, 0.6]], ["kept", "kept", "kept"]),
        ([[0.45, 0.1, 0.3], [0.1, 0.7, 0.0], [0.3, 0.0, 0.6]], ["drift", "kept", "kept"]),
        ([[0.2, 0.6, 0.3], [0.7, 0.1, 0.0], [0.3, 0.0, 0.6]], ["swap 1", "swap 0", "kept"]),
        ([[0.2, 0.6, 0.3], [0.1, 0.7, 0.0], [0.3, 0.0, 0.6]], ["dominance 1", "kept", "kept"]),
        ([[0.2, 0.6, 0.3], [NAN, NAN, NAN], [0.3, 0.0, 0.6]], ["dominance 1", "missing", "kept"]),
        ([[0.6, 0.5, 0.3], [0.1, 0.7, 0.0], [0.3, 0.0, 0.6]], ["blending 1", "kept", "kept"]),
        ([[0.45, 0.42, 0.3], [0.1, 0.7, 0.0], [0.3, 0.0, 0.6]], ["blending 1", "kept", "kept"]),
        ([[0.1, 0.6, 0.3], [0.1, 0.1, 0.6], [0.7, 0.0, 0.1]], ["swap 1", "swap 2", "swap 0"]),
        ([[0.1, 0.6, 0.3], [0.1, 0.1, 0.6], [0.3, 0.7, 0.1]], ["dominance 1", "swap 2", "swap 1"]),
        ([[0.1, 0.6, 0.3], [0.1, 0.7, 0.0], [0.3, 0.7, 0.1]], ["dominance 1", "kept", "dominance 1"]),
        ([[0.6, 0.42, 0.55], [0.1, 0.7, 0.0], [0.3, 0.0, 0.6]], ["blending 1", "kept", "kept"]),
        ([[NAN] * 3] * 3, ["missing", "missing", "missing"]),
    ],
)  # fmt: skip
def test_outcomes_of_known_matrices(rows: list[list[float]], expected: list[str]) -> None:
    found = outcomes(np.array(rows), TRUTH, LIMITS)
    assert [one.kind if one.other is None else f"{one.kind} {one.other}" for one in found] == expected


@given(st.data())
def test_outcomes_are_those_of_the_definition(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    values = st.floats(-1, 1, width=16)
    similarity, truth = (data.draw(arrays(np.float64, (count, count), elements=values)) for _ in range(2))
    similarity[data.draw(arrays(np.bool_, count))] = NAN
    limit = data.draw(arrays(np.float64, (count, count), elements=values | st.just(NAN)))
    s, t, top = similarity.tolist(), truth.tolist(), limit.tolist()

    def thief(i: int) -> int | None:
        gains = {j: s[i][j] - t[i][j] for j in range(count) if j != i and s[i][j] >= top[i][j]}
        return next((j for j, gain in gains.items() if gain == max(gains.values())), None)

    def owner(i: int) -> int | None:
        j = thief(i)
        return j if j is not None and s[i][j] > s[i][i] else None

    for i, one in enumerate(outcomes(similarity, truth, limit)):
        walk: list[int | None] = [i]
        for _ in range(count):
            walk.append(None if walk[-1] is None else owner(walk[-1]))
        if s[i][i] != s[i][i]:
            expected = Outcome("missing")
        elif thief(i) is None:
            expected = Outcome("drift" if s[i][i] < top[i][i] else "kept")
        elif owner(i) is None:
            expected = Outcome("blending", thief(i))
        else:
            expected = Outcome("swap" if i in walk[1:] else "dominance", thief(i))
        assert one == expected
        assert one.kind in OUTCOMES


def test_what_was_lost_and_gained_is_the_difference_to_the_references() -> None:
    seen = np.array([[0.7, 0.5, 0.2], [NAN, NAN, NAN], [0.3, 0.1, 0.6]])
    assert lost(seen, TRUTH) == pytest.approx(((0.7 - 0.9) + (0.6 - 0.7)) / 2)
    assert gained(seen, TRUTH) == pytest.approx(((0.5 - 0.1) + (0.1 - 0.0)) / 2)
    assert np.isnan([lost(seen[1:2, 1:2], TRUTH[1:2, 1:2]), gained(seen[1:2, 1:2], TRUTH[1:2, 1:2])]).all()
    assert lost(seen[:1, :1], TRUTH[:1, :1]) == pytest.approx(-0.2)
    assert np.isnan(gained(seen[:1, :1], TRUTH[:1, :1]))


# Places and collapse.


@given(*[st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2)] * 2)
def test_the_share_inside_is_that_of_the_pixels(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    canvas = np.zeros((2, 24, 24), dtype=bool)
    for layer, (left, top, width, height) in zip(canvas, (one, other), strict=True):
        layer[top : top + height, left : left + width] = True
    box, region = ((a, b, a + c, b + d) for a, b, c, d in (one, other))
    assert inside(box, region) == pytest.approx((canvas[0] & canvas[1]).sum() / canvas[0].sum())


def test_boxes_belong_to_the_nearest_region() -> None:
    regions = [(0, 0, 64, 128), (64, 0, 128, 128)]
    boxes = [(70, 10, 110, 60), (5, 60, 50, 120), (50, 0, 90, 30)]
    everything = np.ones((2, 3), dtype=bool)
    assert by_place(boxes, regions, everything) == [1, 0]
    assert by_place(boxes[:1], regions, everything[:, :1]) == [None, 0]
    assert by_place([], regions, np.empty((2, 0), dtype=bool)) == [None, None]
    assert by_place(boxes, regions, np.array([[True, False, True], [False, False, True]])) == [0, 2]


def test_a_subject_below_the_threshold_or_missing_has_collapsed() -> None:
    assert collapse_rate(np.array([0.41, 0.4, 0.39, NAN]), 0.4) == 0.5
    assert np.isnan(collapse_rate(np.array([]), 0.4))
