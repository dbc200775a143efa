"""Mergers act on changes, not on factors: against dense references, for any factors of the same changes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import merging_reference as reference
from lora_compose.attention import LoraFactors
from lora_compose.pipelines.merging import MERGERS, Moments, make_merger
from lora_compose.pipelines.merging.factors import absent, gram, scaled, spectrum
from lora_compose.pipelines.merging.lego import k_means
from lora_compose.pipelines.merging.soups import best_numbers

PAIRS = [name for name, kind in MERGERS.items() if kind.pair]
SETTINGS: dict[str, dict[str, Any]] = {"ties": {"density": 0.4}, "lego": {"k": 4}}


def dense(change: LoraFactors) -> np.ndarray:
    up, down = (side.flatten(1).double().numpy() for side in (change.up, change.down))
    return change.scale * up @ down


def change(seed: int, outputs: int = 12, inputs: int = 9, rank: int = 3, scale: float = 0.7) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    up = torch.randn(outputs, rank, generator=generator, dtype=torch.float64)
    # Singular values that are well apart, so that small changes of the factors do not change their order.
    return LoraFactors(down, up * torch.arange(1, rank + 1, dtype=torch.float64), scale)


def inputs_of(changes: Sequence[LoraFactors], seed: int = 7, number: int = 40) -> list[Tensor]:
    """What the layer sees while one LoRA alone acts: by LoRA, columns that prefer some directions."""
    generator = torch.Generator().manual_seed(seed)
    width = changes[0].down.flatten(1).shape[1]
    bias = torch.rand(len(changes), width, 1, generator=generator, dtype=torch.float64) * 3
    return list(bias * torch.randn(len(changes), width, number, generator=generator, dtype=torch.float64))


def moments_of(
    changes: Sequence[LoraFactors], inputs: Sequence[Tensor], merged: Sequence[Tensor] | None = None
) -> Moments:
    down = torch.cat([one.down.flatten(1) for one in changes])

    def mean(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
        return torch.stack([(down @ x) @ (down @ y).T / x.shape[1] for x, y in zip(lefts, rights, strict=True)])

    merged = inputs if merged is None else merged
    return Moments(mean(inputs, inputs), mean(merged, merged), mean(inputs, merged))


def merged(name: str, changes: Sequence[LoraFactors], inputs: Sequence[Tensor] | None = None) -> np.ndarray:
    merger = make_merger(name, SETTINGS.get(name))
    moments = moments_of(changes, inputs or inputs_of(changes)) if merger.needs_model else None
    return dense(merger.start([changes])(changes, moments))


def another_gauge(one: LoraFactors, seed: int = 3) -> LoraFactors:
    """Other factors of the same change."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(one.rank, one.rank, generator=generator, dtype=torch.float64)
    mix += 2 * torch.eye(one.rank, dtype=torch.float64)
    return LoraFactors(torch.linalg.inv(mix) @ one.down, one.up @ mix * one.scale, 1.0)


def twice_the_rank(one: LoraFactors) -> LoraFactors:
    """The same change with ranks that add nothing."""
    return LoraFactors(torch.cat([one.down, one.down]), torch.cat([one.up, one.up], 1) / 2, one.scale)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> bool:
    return float(np.abs(found - expected).max()) <= tolerance * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("of", [another_gauge, twice_the_rank], ids=["gauge", "redundant ranks"])
def test_other_factors_of_the_same_changes_give_the_same_change(
    name: str, of: Callable[[LoraFactors], LoraFactors]
) -> None:
    one, other = change(1), change(2, rank=2)
    inputs = inputs_of([one, other])
    expected = merged(name, [one, other], inputs)
    assert close(merged(name, [of(one), other], inputs), expected, 1e-7)
    assert close(merged(name, [one, of(other)], inputs), expected, 1e-7)


@pytest.mark.parametrize("name", MERGERS)
def test_the_order_of_ranks_does_not_matter(name: str) -> None:
    one, other = change(1), change(2)
    turned = LoraFactors(one.down.flip(0), one.up.flip(1), one.scale)
    inputs = inputs_of([one, other])
    assert close(merged(name, [turned, other], inputs), merged(name, [one, other], inputs), 1e-8)


@pytest.mark.parametrize("name", [name for name in MERGERS if name not in (*PAIRS, "dare")])
def test_the_order_of_loras_does_not_matter(name: str) -> None:
    changes = [change(1), change(2), change(3, rank=2)]
    inputs = inputs_of(changes)
    assert close(merged(name, changes[::-1], inputs[::-1]), merged(name, changes, inputs), 1e-8)


@pytest.mark.parametrize("name", MERGERS)
def test_alpha_acts_as_if_it_were_in_the_factors(name: str) -> None:
    one, other = change(1, scale=1 / 32), change(2, scale=4.0)
    folded = [LoraFactors(c.down, c.up * c.scale, 1.0) for c in (one, other)]
    inputs = inputs_of([one, other])
    assert close(merged(name, [one, other], inputs), merged(name, folded, inputs), 1e-8)


@pytest.mark.parametrize("name", MERGERS)
def test_a_layer_that_one_lora_changes_keeps_its_change(name: str) -> None:
    one = change(1)
    kept = {"ties": {"density": 1.0}, "dare": {"density": 1.0}}.get(name, {})
    merge = make_merger(name, kept).start([[one, absent(one)]])
    inputs = inputs_of([one, one])
    moments = moments_of([one, absent(one)], inputs)
    assert close(dense(merge([one, absent(one)], moments)), dense(one), 1e-9)
    if name not in PAIRS:
        assert close(
            dense(make_merger(name, kept).start([[one]])([one], moments_of([one], inputs[:1]))), dense(one), 1e-9
        )


@pytest.mark.parametrize("name", [name for name in MERGERS if not MERGERS[name].needs_model and name != "k-lora"])
def test_a_lora_of_weight_0_is_absent(name: str) -> None:
    one, other = change(1), change(2)
    expected = merged(name, [one, absent(one)])
    assert close(merged(name, [one, scaled(other, 0.0)]), expected)


@pytest.mark.parametrize("name", MERGERS)
def test_layers_without_any_change_stay_so(name: str) -> None:
    nothing = scaled(change(1), 0.0)
    assert not merged(name, [nothing, nothing]).any()


sizes = st.integers(1, 14)


@settings(max_examples=25, deadline=None)
@given(outputs=sizes, inputs=sizes, ranks=st.tuples(*[st.integers(1, 5)] * 2), seed=st.integers(0, 99))
def test_of_any_shape_the_result_is_that_of_the_dense_references(
    outputs: int, inputs: int, ranks: tuple[int, int], seed: int
) -> None:
    changes = [change(seed + i, outputs, inputs, rank, 0.5 + i) for i, rank in enumerate(ranks)]
    whole = [dense(one) for one in changes]
    assert close(merged("cat", changes), whole[0] + whole[1])
    assert close(merged("svd", changes), whole[0] + whole[1])
    assert close(merged("tsv", changes), reference.tsv(whole), 1e-6)
    assert close(merged("np", changes), reference.np_lora(whole[0], whole[1], 0.5, 0.9), 1e-7)
    assert close(dense(spectrum(changes[0]).factors(2)), reference.cut(whole[0], 2), 1e-7)
    expected = [[float((a * b).sum()) for b in whole] for a in whole]
    assert np.allclose(gram(changes).numpy(), expected, rtol=1e-4, atol=1e-4 * np.trace(expected))


@settings(max_examples=15, deadline=None)
@given(outputs=st.integers(2, 14), inputs=st.integers(2, 14), ranks=st.tuples(*[st.integers(1, 5)] * 2),
       seed=st.integers(0, 99))  # fmt: skip
def test_of_any_shape_mergers_that_compare_loras_are_their_dense_references(
    outputs: int, inputs: int, ranks: tuple[int, int], seed: int
) -> None:
    ranks = min(ranks[0], outputs, inputs), min(ranks[1], outputs, inputs)
    changes = [change(seed + i, outputs, inputs, rank, 0.5 + i) for i, rank in enumerate(ranks)]
    whole, seen = [dense(one) for one in changes], inputs_of(changes, seed)
    columns = [x.numpy() for x in seen]
    assert close(merged("ties", changes), reference.ties(whole, 0.4), 1e-6)
    assert close(merged("k-lora", changes), reference.k_lora([(whole[0], whole[1])], ranks)[0], 1e-3)
    numbers = reference.soups(whole, columns, 1e-3).clip(0, 1.5)
    assert close(merged("soups", changes, seen), np.einsum("i,ioj->oj", numbers, np.stack(whole)), 1e-6)
    assert close(merged("ssr", changes, seen), reference.ssr(whole, columns, 1e-2), 1e-5)
    assert close(merged("iteris", changes, seen), reference.iteris(whole, columns, columns, 1e-2), 1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.3, 0.7, 1.0])
def test_ties_is_ties_on_the_coefficients_in_the_common_basis(seed: int, density: float) -> None:
    changes = [change(seed), change(seed + 50, rank=2), change(seed + 70, rank=4)]
    found = make_merger("ties", {"density": density}).start([])(changes, None)
    assert found.rank <= 9
    assert close(dense(found), reference.ties([dense(one) for one in changes], density), 1e-8)


def test_ties_of_changes_that_do_not_meet_is_their_sum() -> None:
    one, other = change(1), change(2)
    one = LoraFactors(one.down, torch.cat([one.up[:6], torch.zeros(6, 3, dtype=torch.float64)]))
    other = LoraFactors(other.down, torch.cat([torch.zeros(6, 3, dtype=torch.float64), other.up[:6]]))
    found = make_merger("ties", {"density": 1.0}).start([])([one, other], None)
    assert close(dense(found), dense(one) + dense(other), 1e-8)


def test_dare_is_expected_to_be_the_sum_and_repeats_with_its_seed() -> None:
    changes = [change(1), change(2)]
    whole = dense(changes[0]) + dense(changes[1])
    found = [dense(make_merger("dare", {"seed": seed}).start([])(changes, None)) for seed in range(400)]
    error = np.linalg.norm(np.mean(found, 0) - whole) / np.linalg.norm(np.mean([abs(f - whole) for f in found], 0))
    assert error < 4 / 400**0.5
    assert not close(found[0], found[1], 1e-3)
    again = dense(make_merger("dare", {"seed": 1}).start([])(changes, None))
    assert np.array_equal(again, found[1])


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_dare_drops_entries_in_the_common_basis(density: float) -> None:
    changes = [change(1), change(2, rank=2)]
    generator = torch.Generator().manual_seed(5)
    kept = [torch.rand(5, 9, generator=generator, dtype=torch.float64).numpy() < density for _ in changes]
    found = make_merger("dare", {"density": density, "seed": 5}).start([])(changes, None)
    assert close(dense(found), reference.dare([dense(one) for one in changes], kept, density), 1e-8)


def test_dare_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    for name in MERGERS:
        merged(name, [change(1), change(2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_tsv_of_the_same_lora_twice_is_that_lora() -> None:
    one = change(1)
    assert close(merged("tsv", [one, another_gauge(one)]), dense(one), 1e-8)


def test_np_takes_from_the_subject_what_lies_in_the_styles_main_directions_alone() -> None:
    style = change(2)
    reads = spectrum(style).v
    inside = LoraFactors(reads.T, change(1, rank=3).up)
    found = make_merger("np", {"strength": 3.0, "energy": 1.0}).start([])([inside, style], None)
    assert close(dense(found), dense(inside) / 4 + dense(style), 1e-9)
    outside = LoraFactors(torch.linalg.qr(reads, mode="complete").Q[:, 3:6].T, inside.up)
    assert close(merged("np", [outside, style]), dense(outside) + dense(style), 1e-9)


def test_k_lora_is_the_mean_over_the_steps_of_what_the_paper_chooses() -> None:
    # Widely different sizes, so that some layers take one alone, some change over, and one is an outlier.
    factors = [0.02, 0.4, 0.8, 1.0, 1.3, 6.0]
    layers = [[scaled(change(i), f), change(i + 30, rank=2)] for i, f in enumerate(factors)]
    expected = reference.k_lora([(dense(a), dense(b)) for a, b in layers], (3, 2))
    merge = make_merger("k-lora").start(layers)
    found = [dense(merge(layer, None)) for layer in layers]
    for one, other in zip(found, expected, strict=True):
        assert close(one, other, 1e-3)  # the reference takes 2000 steps, not infinitely many
    assert close(found[0], dense(layers[0][1]), 1e-9)
    assert close(found[-1], dense(layers[-1][0]), 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_soups_and_ssr_solve_their_least_squares(seed: int) -> None:
    changes = [change(seed), change(seed + 10, rank=2), change(seed + 20)]
    inputs = inputs_of(changes, seed)
    moments, columns = moments_of(changes, inputs), [x.numpy() for x in inputs]
    whole = [dense(one) for one in changes]
    expected = reference.soups(whole, columns, 1e-3)
    assert np.allclose(best_numbers(changes, moments, 1e-3).numpy(), expected, atol=1e-9)
    numbers = expected.clip(0, 1.5)
    assert close(merged("soups", changes, inputs), np.einsum("i,ioj->oj", numbers, np.stack(whole)))
    for ridge in (1e-4, 0.3):
        found = make_merger("ssr", {"ridge": ridge}).start([])(changes, moments)
        assert close(dense(found), reference.ssr(whole, columns, ridge), 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_round_of_iteris_solves_its_least_squares_on_the_inputs_of_the_merged_model(seed: int) -> None:
    changes = [change(seed), change(seed + 10, rank=2, scale=3.0), change(seed + 20)]
    alone, again = inputs_of(changes, seed), inputs_of(changes, seed + 50)
    again = [0.7 * x + 0.5 * y for x, y in zip(alone, again, strict=True)]
    whole = [dense(one) for one in changes]
    for ridge in (1e-4, 0.3):
        found = make_merger("iteris", {"ridge": ridge}).start([])(changes, moments_of(changes, alone, again))
        expected = reference.iteris(whole, [x.numpy() for x in alone], [y.numpy() for y in again], ridge)
        assert close(dense(found), expected, 1e-6)


def test_soups_ssr_and_iteris_come_nearer_to_each_lora_on_its_own_inputs_than_the_sum() -> None:
    changes = [change(1), change(2), change(3)]
    inputs = inputs_of(changes)

    def error(name: str) -> float:
        found = torch.tensor(merged(name, changes, inputs))
        return sum(
            float(((found - torch.tensor(dense(c))) @ x).norm() ** 2) for c, x in zip(changes, inputs, strict=True)
        )

    assert error("ssr") < error("soups") < 0.9 * error("cat")
    assert error("iteris") < error("soups")


def test_without_any_inputs_soups_ssr_and_iteris_are_the_sum() -> None:
    changes = [change(1), change(2)]
    nothing = Moments.zeros(2, 6)
    for name in ("soups", "ssr", "iteris"):
        for moments in (None, nothing):
            found = make_merger(name).start([])(changes, moments)
            assert close(dense(found), dense(changes[0]) + dense(changes[1]))


def orthogonal_units(values: Sequence[float], first: int) -> LoraFactors:
    """A change whose singular triples are unit vectors, from one on."""
    eye = torch.eye(12, dtype=torch.float64)[first : first + len(values)]
    return LoraFactors(eye[:, :9].clone(), eye.T * torch.tensor(values, dtype=torch.float64))


def test_lego_joins_units_that_are_alike_and_keeps_their_mean_length() -> None:
    one, other = orthogonal_units([4.0, 2.0], 0), orthogonal_units([3.0, 1.0], 1)  # share the second unit of one
    merge = make_merger("lego", {"k": 3, "output": False}).start([])
    assert np.allclose(np.diag(dense(merge([one, other], None)))[:3], [4.0, 2.5, 1.0])
    auto = make_merger("lego", {"k": "auto"}).start([])
    assert np.allclose(np.diag(dense(auto([one, other], None)))[:3], [4.0, 2.5, 1.0])
    scaled_output = make_merger("lego", {"k": 3}).start([])([one, other], None)
    assert np.allclose(np.diag(dense(scaled_output))[:3], np.sqrt(2 / 3) * np.array([4.0, 2.5, 1.0]))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_lego_finds_the_best_clusters_of_the_units(seed: int, k: int) -> None:
    one, other = change(seed), change(seed + 40, rank=2)
    other = LoraFactors(torch.cat([other.down[:1], one.down[:1] + other.down[1:] / 9]), other.up, other.scale)
    found = make_merger("lego", {"k": k}).start([])([one, other], None)
    assert close(dense(found), reference.lego([dense(one), dense(other)], k), 1e-7)


def test_lego_with_room_for_all_units_is_the_sum_times_the_output_factor() -> None:
    changes = [change(1), change(2, rank=2)]
    whole = dense(changes[0]) + dense(changes[1])
    found = make_merger("lego", {"k": 9}).start([])(changes, None)
    assert close(dense(found), np.sqrt(2.5 / 5) * whole)
    assert close(dense(make_merger("lego", {"k": "auto", "alike": 1.0}).start([])(changes, None)), whole)


def test_lego_of_the_same_lora_twice_is_that_lora() -> None:
    one = change(1)
    assert close(dense(make_merger("lego").start([])([one, another_gauge(one)], None)), dense(one), 1e-7)
    assert close(dense(make_merger("lego", {"k": "auto"}).start([])([one, another_gauge(one)], None)), dense(one), 1e-7)


def test_k_means_finds_groups_that_are_plain_to_see() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(5, 8, generator=generator)
    points = (centres[:, None] + torch.randn(5, 6, 8, generator=generator)).flatten(0, 1)
    labels = k_means(points @ points.T, 5).view(5, 6)
    assert len(labels.unique()) == 5
    assert (labels == labels[:, :1]).all()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sum", {}, "unknown method 'sum'; there are cat, svd, ties"),
        ("ties", {"k": 3}, r"ties has no settings \['k'\]; it has density"),
        ("cat", {"k": 3}, "it has none"),
        ("ties", {"density": 0}, "density must be above 0 and at most 1"),
        ("ties", {"density": "much"}, "density must be above 0 and at most 1"),
        ("dare", {"density": 1.5}, "density must be above 0 and at most 1"),
        ("dare", {"seed": -1}, "seed must be a whole number"),
        ("np", {"strength": -1}, "strength must be a positive number"),
        ("np", {"energy": True}, "energy must be above"),
        ("lego", {"k": 0}, "k must be a positive whole number"),
        ("lego", {"k": 2.5}, "k must be a positive whole number"),
        ("lego", {"output": 1}, "output must be true or false"),
        ("k-lora", {"balance": float("inf")}, "balance must be a positive number"),
        ("soups", {"ridge": 0}, "ridge must be a positive number"),
        ("ssr", {"ridge": None}, "ridge must be a positive number"),
        ("iteris", {"rounds": 0}, "rounds must be a positive whole number"),
    ],
)  # fmt: skip
def test_unusable_settings_are_errors_that_say_what_is_expected(name: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_merger(name, given)


def test_k_lora_looks_at_large_layers_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result for any number of rows, and a refusal of two thin factors with a huge product."""
    small = [change(1), change(2)]
    expected = make_merger("k-lora").start([small])(small, None)
    monkeypatch.setattr("lora_compose.pipelines.merging.k_lora._AT_ONCE", 1)
    found = make_merger("k-lora").start([small])(small, None)
    torch.testing.assert_close(found.delta(), expected.delta())
    thin = [LoraFactors(torch.ones(1, 100_000), torch.ones(100_000, 1), 1.0)] * 2
    with pytest.raises(ValueError, match="one is 100000 x 100000; expected at most"):
        make_merger("k-lora").start([thin])
