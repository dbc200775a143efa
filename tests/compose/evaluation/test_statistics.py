"""Intervals by scene, against scipy and by simulation; verdicts need enough scenes."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lora_compose.compose.evaluation.statistics import MINIMUM_SCENES, Interval, bootstrap, compare

NAN = float("nan")
numbers = st.floats(-10, 10, width=32)
tables = st.lists(st.tuples(st.sampled_from("abcdefg"), numbers), min_size=1, max_size=20)


def same(found: Interval, expected: Interval) -> bool:
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return all(a == pytest.approx(b, abs=1e-9, nan_ok=True) for a, b in pairs)


def series(values: dict[tuple[str, int], float]) -> pd.Series:
    return pd.Series(values.values(), index=pd.MultiIndex.from_tuples(values, names=["scene", "seed"]), dtype=float)


def measured(scenes: int, seeds: int = 3, mean: float = 0.0, noise: float = 1.0, seed: int = 0) -> pd.Series:
    rng = np.random.default_rng(seed)
    return series({(f"scene {i}", j): rng.normal(mean, noise) for i in range(scenes) for j in range(seeds)})


# Intervals.


def test_every_scene_counts_the_same() -> None:
    interval = bootstrap([1, 1, 1, 1, 0], ["a", "a", "a", "a", "b"])
    assert (interval.mean, interval.scenes) == (0.5, 2)
    assert (interval.low, interval.high) == (0, 1)


def test_one_scene_has_no_interval() -> None:
    assert same(bootstrap([1, 2, 3], ["a"] * 3), Interval(2, NAN, NAN, 1))


@pytest.mark.parametrize("values", [[], [NAN], [NAN, NAN]])
def test_without_values_nothing_is_known(values: list[float]) -> None:
    assert same(bootstrap(values, ["a", "b"][: len(values)]), Interval(NAN, NAN, NAN, 0))


def test_nan_is_left_out() -> None:
    values, scenes = [1, 2, 4, NAN, NAN], ["a", "b", "c", "c", "d"]
    assert same(bootstrap(values, scenes), bootstrap(values[:3], scenes[:3]))


def test_every_value_needs_its_scene() -> None:
    with pytest.raises(ValueError, match="does not match"):
        bootstrap([1, 2], ["a"])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_scipy_gives_the_same_interval_for_one_value_per_scene(level: float) -> None:
    values = np.random.default_rng(5).gamma(2, size=15)
    interval = bootstrap(values.tolist(), [f"{i:02}" for i in range(15)], draws=20_000, level=level)
    reference = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=1, vectorized=True
    ).confidence_interval
    width = reference.high - reference.low
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(reference.low, abs=0.02 * width)
    assert interval.high == pytest.approx(reference.high, abs=0.02 * width)


def test_the_interval_covers_the_truth_about_as_often_as_documented() -> None:
    rng = np.random.default_rng(0)
    scenes = [f"{i:02}" for i in range(20) for _ in range(3)]
    hits = 0
    for run in range(300):
        values = np.repeat(rng.normal(2.0, 1.0, size=20), 3) + rng.normal(0.0, 0.5, size=60)
        interval = bootstrap(values.tolist(), scenes, draws=500, seed=run)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 300 <= 0.99


def test_more_seeds_of_the_same_scenes_do_not_narrow_the_interval() -> None:
    few, many = measured(12, seeds=1, seed=3), measured(12, seeds=1, seed=3)
    many = pd.concat([many] * 50)
    scenes = few.index.get_level_values(0).tolist()
    assert same(bootstrap(few.tolist(), scenes), bootstrap(many.tolist(), scenes * 50))


def test_the_seed_fixes_the_draws() -> None:
    values, scenes = list(range(12)), [f"{i:02}" for i in range(12)]
    assert bootstrap(values, scenes) == bootstrap(values, scenes)
    assert bootstrap(values, scenes).low != bootstrap(values, scenes, seed=1).low


@given(tables, numbers)
def test_a_shift_shifts_everything(table: list[tuple[str, float]], shift: float) -> None:
    scenes, values = zip(*table, strict=True)
    plain, moved = bootstrap(values, scenes), bootstrap([value + shift for value in values], scenes)
    assert same(moved, Interval(plain.mean + shift, plain.low + shift, plain.high + shift, plain.scenes))


@given(tables, st.data())
def test_the_order_of_rows_does_not_matter(table: list[tuple[str, float]], data: st.DataObject) -> None:
    scenes, values = zip(*table, strict=True)
    other_scenes, other_values = zip(*data.draw(st.permutations(table)), strict=True)
    assert same(bootstrap(values, scenes), bootstrap(other_values, other_scenes))


# Comparisons.


def test_a_clear_difference_is_reported_in_the_direction_of_the_metric() -> None:
    baseline = measured(MINIMUM_SCENES)
    method = baseline + measured(MINIMUM_SCENES, mean=3, noise=0.3, seed=1)
    up, down = compare(method, baseline, True), compare(method, baseline, False)
    assert (up.verdict, up.wins, up.ties, up.losses) == ("better", 30, 0, 0)
    assert (down.verdict, down.wins, down.ties, down.losses) == ("worse", 0, 0, 30)
    assert up.difference == down.difference
    assert up.difference.mean == pytest.approx(3, abs=0.3)
    assert compare(baseline, method, True).verdict == "worse"
    assert compare(baseline, method, False).verdict == "better"


def test_with_few_scenes_nothing_is_decided() -> None:
    baseline = measured(MINIMUM_SCENES - 1, seeds=100)
    compared = compare(baseline + 3, baseline, True)
    assert (compared.verdict, compared.wins) == ("undecided", 900)


def test_pairs_are_found_by_scene_and_seed() -> None:
    baseline = measured(12)
    method = (baseline + 1).sample(frac=1, random_state=0)
    compared = compare(method, baseline, True)
    assert same(compared.difference, Interval(1, 1, 1, 12))
    assert compared.verdict == "better"


def test_only_what_both_have_is_compared() -> None:
    method = series({("a", 0): 1.0, ("a", 1): 5.0, ("b", 0): 2.0, ("c", 0): NAN, ("d", 0): 9.0})
    baseline = series({("a", 0): 0.0, ("b", 0): 3.0, ("c", 0): 1.0, ("e", 0): 9.0})
    compared = compare(method, baseline, True)
    assert (compared.difference.scenes, compared.wins, compared.ties, compared.losses) == (2, 1, 0, 1)
    assert compared.difference.mean == 0


def test_without_common_images_nothing_is_known() -> None:
    compared = compare(series({("a", 0): 1.0}), series({("b", 0): 1.0}), True)
    assert same(compared.difference, Interval(NAN, NAN, NAN, 0))
    assert (compared.wins, compared.ties, compared.losses, compared.verdict) == (0, 0, 0, "undecided")


def test_small_differences_are_ties() -> None:
    baseline = series({("a", i): 0.0 for i in range(4)})
    method = series(dict(zip(baseline.index, [0.25, -0.25, 0.5, -0.75], strict=True)))
    compared = compare(method, baseline, True, tie=0.25)
    assert (compared.wins, compared.ties, compared.losses) == (1, 2, 1)
    assert compare(method, baseline, True).ties == 0


def test_rounding_is_a_tie() -> None:
    baseline = measured(3)
    assert compare(baseline + 1e-8, baseline, True).ties == 9


def test_an_image_that_is_there_twice_is_refused() -> None:
    twice = pd.concat([measured(2), measured(2)])
    for pair in ((twice, measured(2)), (measured(2), twice)):
        with pytest.raises(ValueError, match=r"there twice: \('scene 0'"):
            compare(*pair, True)
