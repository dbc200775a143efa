"""Which text a cell reads and which cells it sees, against attention written cell by cell."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_compose.attention import Partition, RegionAttention
from lora_compose.attention.kernels import sdpa
from lora_compose.attention.regions import queries_of

ROWS, HEADS, CHANNELS, TOKENS = 2, 2, 4, 5
LEVEL = 1

Boxes = Sequence[tuple[int, int, int, int]]
"""top, left, bottom, right in cells."""


def inside(grid: tuple[int, int], boxes: Boxes) -> Tensor:
    """Shape: [cells, regions], bool."""
    membership = torch.zeros(*grid, len(boxes), dtype=torch.bool)
    for n, (top, left, bottom, right) in enumerate(boxes):
        membership[top:bottom, left:right, n] = True
    return membership.flatten(0, 1)


APART = inside((4, 6), [(0, 0, 4, 2), (1, 3, 3, 6)])
OVERLAPPING = inside((4, 6), [(0, 0, 3, 3), (1, 2, 4, 5), (2, 1, 4, 6)])


@st.composite
def memberships(draw: st.DrawFn) -> Tensor:
    """Boxes that may overlap, cover everything or be the same."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        boxes.append((top, left, draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))))
    return inside((height, width), boxes)


def regions_of(membership: Tensor) -> list[set[int]]:
    """The regions of every cell."""
    return [{n for n, covered in enumerate(cell) if covered} for cell in membership.tolist()]


def seen_from(membership: Tensor, p: int) -> list[int]:
    """The cells that cell p sees: all from the background, else the background and all that share a region with p."""
    regions = regions_of(membership)
    return [q for q in range(len(regions)) if not regions[p] or not regions[q] or regions[p] & regions[q]]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one cell, in double precision. Shapes: [rows, heads, channels], then twice [rows, heads, n, ...]."""
    scores = (key.double() * query.double()[:, :, None]).sum(dim=-1) / math.sqrt(query.shape[-1])
    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return ((powers / powers.sum(dim=-1, keepdim=True))[..., None] * value.double()).sum(dim=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def query_key_value(cells: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (random(ROWS, HEADS, cells, CHANNELS, seed=seed) for seed in range(3))
    return query, key, value


def texts(regions: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one text for the background and one for each region."""
    keys, values = (random(1 + regions, ROWS, HEADS, TOKENS, CHANNELS, seed=seed) for seed in (3, 4))
    return keys, values


def in_regions(membership: Tensor, *, inject: bool = True, isolate: bool = True) -> RegionAttention:
    return RegionAttention({LEVEL: Partition.of(membership)}, inject, isolate)


@given(memberships())
def test_every_cell_is_in_one_group_and_restore_puts_the_groups_in_order(membership: Tensor) -> None:
    partition = Partition.of(membership)
    cells = torch.cat([group.cells for group in partition.groups])
    assert sorted(cells.tolist()) == list(range(len(membership)))
    assert torch.equal(cells[partition.restore], torch.arange(len(membership)))
    regions = regions_of(membership)
    kinds = [{frozenset(regions[p]) for p in group.cells.tolist()} for group in partition.groups]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set().union(*kinds)) == len(kinds)


@given(memberships())
def test_cells_are_allowed_to_see_the_background_and_their_regions(membership: Tensor) -> None:
    partition = Partition.of(membership)
    expected = [seen_from(membership, p) for p in range(len(membership))]
    assert [row.nonzero()[:, 0].tolist() for row in partition.allowed] == expected
    assert partition.allowed.diagonal().all()
    for group in partition.groups:
        seen = list(range(len(membership))) if group.visible is None else group.visible.tolist()
        assert all(seen == expected[p] for p in group.cells.tolist())


@given(memberships())
def test_isolated_self_attention_equals_masked_attention(membership: Tensor) -> None:
    query, key, value = query_key_value(len(membership))
    found = in_regions(membership).self_attention(sdpa, LEVEL, query, key, value)
    assert found.isfinite().all()
    assert found.shape == query.shape
    for p in range(len(membership)):
        seen = seen_from(membership, p)
        expected = attend(query[:, :, p], key[:, :, seen], value[:, :, seen])
        torch.testing.assert_close(found[:, :, p].double(), expected, atol=1e-5, rtol=1e-5)


def read_cells(attention: RegionAttention, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What cells read, without a projection. Shape: as query."""
    read = attention.cross(sdpa, LEVEL, query, keys, values)
    together = attention.mean_over_queries(LEVEL, read.transpose(1, 2).flatten(2))
    return together.unflatten(2, (HEADS, CHANNELS)).transpose(1, 2)


@given(memberships())
def test_cells_read_the_texts_of_their_regions(membership: Tensor) -> None:
    query, (keys, values) = query_key_value(len(membership))[0], texts(membership.shape[1])
    found = read_cells(in_regions(membership), query, keys, values)
    assert found.shape == query.shape
    for p, regions in enumerate(regions_of(membership)):
        numbers = [1 + n for n in regions] if regions else [0]
        read = [attend(query[:, :, p], keys[number], values[number]) for number in numbers]
        expected = sum(read, torch.zeros(())) / len(read)
        torch.testing.assert_close(found[:, :, p].double(), expected, atol=1e-5, rtol=1e-5)


@given(memberships())
def test_what_is_read_is_projected_for_every_text_before_the_mean(membership: Tensor) -> None:
    attention, regions = in_regions(membership), regions_of(membership)
    query, (keys, values) = query_key_value(len(membership))[0], texts(membership.shape[1])
    projections = random(len(keys), CHANNELS, CHANNELS, seed=7)
    text_of_query, cell_of_query = queries_of(membership)
    assert cell_of_query.tolist() == [p for p, mine in enumerate(regions) for _ in mine or [0]]
    assert text_of_query.tolist() == [number for mine in regions for number in ([1 + n for n in mine] or [0])]
    read = attention.cross(sdpa, LEVEL, query, keys, values)[:, 0]
    projected = torch.einsum("rpc,pdc->rpd", read, projections[text_of_query])
    found = attention.mean_over_queries(LEVEL, projected)
    for p, mine in enumerate(regions):
        numbers = [1 + n for n in mine] or [0]
        parts = [
            attend(query[:, :, p], keys[number], values[number])[:, 0] @ projections[number].T.double()
            for number in numbers
        ]
        expected = sum(parts, torch.zeros(())) / len(parts)
        torch.testing.assert_close(found[:, p].double(), expected, atol=1e-4, rtol=1e-4)


def test_without_injection_every_cell_reads_the_first_text() -> None:
    query, (keys, values) = query_key_value(len(OVERLAPPING))[0], texts(3)
    found = in_regions(OVERLAPPING, inject=False).cross(sdpa, LEVEL, query, keys, values)
    assert torch.equal(found, sdpa(query, keys[0], values[0]))
    found = in_regions(OVERLAPPING, inject=False).cross(sdpa, LEVEL, query, keys[:1], values[:1])
    assert torch.equal(found, sdpa(query, keys[0], values[0]))


def test_without_isolation_every_cell_sees_all() -> None:
    query, key, value = query_key_value(len(APART))
    found = in_regions(APART, isolate=False).self_attention(sdpa, LEVEL, query, key, value)
    assert torch.equal(found, sdpa(query, key, value))
    isolated = in_regions(APART).self_attention(sdpa, LEVEL, query, key, value)
    assert torch.equal((isolated - found).abs().amax(dim=(0, 1, 3)) > 1e-4, APART.any(dim=1))


def test_injection_and_isolation_do_not_depend_on_each_other() -> None:
    query, key, value = query_key_value(len(APART))
    keys, values = texts(2)
    both = in_regions(APART)
    injecting, isolating = in_regions(APART, isolate=False), in_regions(APART, inject=False)
    expected = both.cross(sdpa, LEVEL, query, keys, values)
    assert torch.equal(injecting.cross(sdpa, LEVEL, query, keys, values), expected)
    expected = both.self_attention(sdpa, LEVEL, query, key, value)
    assert torch.equal(isolating.self_attention(sdpa, LEVEL, query, key, value), expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_of_others_see_all_cells_and_read_their_own_text(overlap: bool) -> None:
    """Ours have three texts one after the other; those of others have one, in as many tokens."""
    membership, lengths = APART.clone(), (2, 3, 4)
    if overlap:
        membership[:] = True
    others = torch.tensor([1]), torch.tensor([0])
    attention = RegionAttention({LEVEL: Partition.of(membership)}, True, True, lengths, others)
    query, key, value = query_key_value(len(membership))
    found = attention.attend(sdpa, LEVEL, query, key, value, None, False)
    own = in_regions(membership).self_attention(sdpa, LEVEL, query, key, value)
    assert torch.allclose(found[0], own[0], atol=1e-6)
    assert torch.allclose(found[1], sdpa(query, key, value)[1], atol=1e-6)
    keys, values = (random(ROWS, HEADS, sum(lengths) + 2, CHANNELS, seed=seed) for seed in (3, 4))
    found = attention.attend(sdpa, LEVEL, query, keys, values, None, True)
    each_key, each_value = (x[:, :, :9].split([*lengths], dim=2) for x in (keys, values))
    own = in_regions(membership).cross(sdpa, LEVEL, query, each_key, each_value)
    assert found.shape == own.shape
    assert torch.allclose(found[0], own[0], atol=1e-6)
    cells = attention.partitions[LEVEL].queries.cells
    assert torch.allclose(found[1], sdpa(query, keys, values)[1][:, cells], atol=1e-6)


def test_every_level_has_its_own_partition() -> None:
    coarse = inside((2, 3), [(0, 0, 2, 1), (0, 2, 2, 3)])
    attention = RegionAttention({0: Partition.of(APART), 1: Partition.of(coarse)}, inject=True, isolate=True)
    for level, membership in enumerate((APART, coarse)):
        query, key, value = query_key_value(len(membership))
        alone = RegionAttention({level: Partition.of(membership)}, inject=True, isolate=True)
        expected = alone.self_attention(sdpa, level, query, key, value)
        assert torch.equal(attention.self_attention(sdpa, level, query, key, value), expected)
