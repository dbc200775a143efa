"""Which positions attend to which does not depend on the order of the rows."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from lora_compose.attention import JointRegions, Site

LENGTHS, CELLS = (3, 2, 2), 6
UNCONDITIONAL = (True, False, False, True)
MEMBERSHIP = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0], [0, 0]], dtype=torch.bool)
SITES = {"one length": Site("text", "image", level=1), "padded": Site("text", "image", level=1, multiple=4)}
JOINT = ("text", "image")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def case(site: Site, order: tuple[int, ...], *, padding: bool) -> tuple[Tensor, Tensor]:
    """Attention and what may be seen of four rows in an order, put back into the first order."""
    generator = torch.Generator().manual_seed(0)
    tokens = site.padded(sum(LENGTHS))
    positions = tokens + site.padded(CELLS)
    q, k, v = torch.randn(3, 4, positions, 2, 4, generator=generator)[:, order]
    hidden = (torch.rand(4, sum(LENGTHS), generator=generator) < 0.3)[list(order)] if padding else None
    mask = (torch.rand(4, 1, 1, positions, generator=generator) < 0.8)[list(order)] if padding else None
    regions = JointRegions.of(
        site, MEMBERSHIP, LENGTHS, [UNCONDITIONAL[row] for row in order], isolate=True, hidden=hidden
    )
    back = torch.tensor(order).argsort()
    return regions.attend(attend, JOINT, q, k, v, mask)[back], regions.allowed(JOINT, positions)[back]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_rows_in_any_order_give_the_same(site: str, padding: bool) -> None:
    found, seen = case(SITES[site], (0, 3, 1, 2), padding=padding)
    assert found.isfinite().all()
    assert not torch.equal(seen[0], seen[1])
    for order in permutations(range(4)):
        other, allowed = case(SITES[site], order, padding=padding)
        torch.testing.assert_close(other, found, atol=1e-6, rtol=0)
        assert torch.equal(allowed, seen)


@pytest.mark.parametrize("site", SITES)
def test_attention_is_that_of_a_mask_of_positions(site: str) -> None:
    generator = torch.Generator().manual_seed(1)
    positions = SITES[site].padded(sum(LENGTHS)) + SITES[site].padded(CELLS)
    q, k, v = torch.randn(3, 4, positions, 2, 4, generator=generator)
    regions = JointRegions.of(SITES[site], MEMBERSHIP, LENGTHS, UNCONDITIONAL, isolate=True)
    everything = attend(q, k, v, regions.allowed(JOINT, positions)[:, None])
    found = regions.attend(attend, JOINT, q, k, v, None)
    # What unconditional rows do not attend to is not computed either: the texts of regions, which nothing reads.
    own = slice(None) if regions.base is None else regions.base[JOINT].queries
    for row, unconditional in enumerate(UNCONDITIONAL):
        at = own if unconditional else slice(None)
        torch.testing.assert_close(found[row, at], everything[row, at], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["seen or not", "added"])
def test_a_mask_of_positions_of_either_kind_goes_with_regions(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    positions = sum(LENGTHS) + CELLS
    q, k, v = torch.randn(3, 4, positions, 2, 4, generator=generator)
    hidden = torch.rand(4, sum(LENGTHS), generator=generator) < 0.3
    regions = JointRegions.of(SITES["one length"], MEMBERSHIP, LENGTHS, UNCONDITIONAL, isolate=True, hidden=hidden)
    everything = JointRegions.of(SITES["one length"], MEMBERSHIP, LENGTHS, UNCONDITIONAL, isolate=True)
    conditional = torch.tensor(UNCONDITIONAL)[:, None, None, None].logical_not()
    padding = conditional & torch.nn.functional.pad(hidden, (0, CELLS))[:, None, None]
    allowed = everything.allowed(JOINT, positions)[:, None] & ~padding
    assert torch.equal(regions.allowed(JOINT, positions)[:, None], allowed), "maps are recorded without padding"
    for rows in (4, 1):
        seen = (torch.rand(rows, 1, positions, positions, generator=generator) < 0.7) | torch.eye(positions).bool()
        added = torch.randn(rows, 1, positions, positions, generator=generator)
        mask = seen if kind == "seen or not" else added
        both = (
            seen & allowed if kind == "seen or not" else added.expand(4, -1, -1, -1).masked_fill(~allowed, -torch.inf)
        )
        found, expected = regions.attend(attend, JOINT, q, k, v, mask), attend(q, k, v, both)
        for row, unconditional in enumerate(UNCONDITIONAL):
            at = (
                regions.base[JOINT].queries
                if unconditional and regions.base
                else ~expected[row].isnan().any(-1).any(-1)
            )
            torch.testing.assert_close(found[row, at], expected[row, at], atol=1e-6, rtol=0)


def test_cells_of_references_of_another_size_are_in_the_regions_that_are_given() -> None:
    site, several = Site("text", "image", "reference", level=1), torch.zeros(5, 2, dtype=torch.bool)
    several[4, 1] = True
    regions = JointRegions.of(site, MEMBERSHIP, LENGTHS, [False], isolate=True, references=several)
    (seen,) = regions.allowed(site.parts, sum(LENGTHS) + CELLS + 5)
    cells = slice(7, 7 + CELLS)
    for at in range(13, 17):  # no region: text 0, and every cell
        assert seen[at, :3].all()
        assert not seen[at, 3:7].any()
        assert seen[at, 7:].all()
    of_second = torch.tensor([False, False, True, True, True, True])
    assert torch.equal(seen[17, cells], of_second)
    assert torch.equal(seen[17, :7], torch.tensor([1, 1, 1, 0, 0, 1, 1]).bool())
    same = JointRegions.of(site, MEMBERSHIP, LENGTHS, [False], isolate=True).allowed(site.parts, 7 + 2 * CELLS)[0]
    assert torch.equal(same[7:13], same[13:]), "otherwise it has the size and the regions of the image"


@pytest.mark.parametrize(
    ("unconditional", "rows"),
    [
        ([True, True, False, False], (slice(0, 2), slice(2, 4))),
        ([False, False, True], (slice(2, 3), slice(0, 2))),
        ([False, False], (None, slice(0, 2))),
        ([True], (slice(0, 1), None)),
        ([False, True, False], (slice(1, 2), [0, 2])),
    ],
)
def test_rows_that_are_contiguous_are_not_copied(
    unconditional: list[bool], rows: tuple[slice | list[int] | None, ...]
) -> None:
    regions = JointRegions.of(SITES["one length"], MEMBERSHIP, LENGTHS, unconditional, isolate=False)
    found = [one.tolist() if isinstance(one, Tensor) else one for one in regions.rows]
    assert tuple(found) == rows


def test_a_slice_of_the_rows_has_rows_of_its_own() -> None:
    regions = JointRegions.of(SITES["one length"], MEMBERSHIP, LENGTHS, [False, True, False], isolate=False)
    assert regions.rows[0] == slice(1, 2)
    assert regions.select(slice(1, 3)).rows == (slice(0, 1), slice(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("unconditional", [[True, False, False], [False, True, False]])
def test_attention_compiles_into_one_graph(unconditional: list[bool]) -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 3, sum(LENGTHS) + CELLS, 2, 4, generator=torch.Generator().manual_seed(1))
    regions = JointRegions.of(SITES["one length"], MEMBERSHIP, LENGTHS, unconditional, isolate=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regions.attend(attend, JOINT, q, k, v, None)

    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(q, k, v), run(q, k, v))
    torch._dynamo.reset()
