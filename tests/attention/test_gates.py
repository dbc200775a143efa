"""Gates of the layers of one kind: the factor of every concept, repeated over its ranks, on the layer's own grid."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_compose.attention import Gates, Site, SitePart
from lora_compose.attention.gates import GateKey

ROWS, TOKENS, GRID, RANKS = 2, 3, (3, 4), (2, 0, 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, len(RANKS), generator=torch.Generator().manual_seed(seed))


def gates(rows: int = ROWS) -> Gates:
    image = {0: drawn(rows, 12, seed=1), 1: drawn(rows, 4, seed=2)}
    read = {0: drawn(rows, 12, seed=3)}
    further: dict[SitePart, Tensor] = {"reference": drawn(rows, 5, seed=6), "other": drawn(rows, 2, seed=7)}
    return Gates(drawn(rows, TOKENS), image, drawn(rows, seed=4), GRID, read, drawn(rows, seed=5), further)


def expanded(found: Gates, site: Site, *, convolution: bool = False) -> Tensor:
    return found.expand(GateKey(site, convolution, RANKS), [TOKENS] * ROWS)


def by_rank(gate: Tensor) -> Tensor:
    """The first concept has two ranks, the second none, the third one."""
    return torch.stack([gate[..., 0], gate[..., 0], gate[..., 2]], dim=-1)


GIVEN = gates()
EXPECTED = {
    "text": (Site("text"), GIVEN.text),
    "image": (Site("image", level=1), GIVEN.image[1]),
    "what is read from the text": (Site("image", reads_text=True), (GIVEN.read or {})[0]),
    "one vector per row": (Site("row"), GIVEN.row),
    "modulation": (Site("modulation"), GIVEN.modulation),
    "text before image": (Site("text", "image", level=1), torch.cat([GIVEN.text, GIVEN.image[1]], dim=1)),
    "image before text": (Site("image", "text", level=1), torch.cat([GIVEN.image[1], GIVEN.text], dim=1)),
    "references alone": (Site("reference"), GIVEN.further["reference"]),
    "all kinds of positions": (
        Site("other", "text", "image", "reference", level=1),
        torch.cat([GIVEN.further["other"], GIVEN.text, GIVEN.image[1], GIVEN.further["reference"]], dim=1),
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_layers_get_the_gates_of_their_parts_for_every_rank(case: str) -> None:
    site, gate = EXPECTED[case]
    assert gate is not None
    assert torch.equal(expanded(GIVEN, site), by_rank(gate))


def test_convolutions_get_gates_in_the_shape_of_the_grid() -> None:
    found = expanded(GIVEN, Site("image"), convolution=True)
    assert torch.equal(found, by_rank(GIVEN.image[0]).transpose(1, 2).unflatten(2, GRID))


def test_a_joint_sequence_takes_gates_that_are_broadcast() -> None:
    short = Gates(drawn(1, 1), {1: drawn(ROWS, 1, seed=2)}, drawn(1), GRID)
    found = expanded(short, Site("text", "image", level=1))
    parts = short.text.expand(ROWS, TOKENS, -1), short.image[1].expand(ROWS, 4, -1)
    assert torch.equal(found, by_rank(torch.cat(parts, dim=1)))


def test_without_gates_of_their_own_modulation_and_reading_layers_follow_row_and_image() -> None:
    plain = Gates(GIVEN.text, GIVEN.image, GIVEN.row, GRID)
    assert torch.equal(expanded(plain, Site("modulation")), by_rank(GIVEN.row))
    assert torch.equal(expanded(plain, Site("image", reads_text=True)), by_rank(GIVEN.image[0]))


def test_a_reference_without_gates_of_its_own_has_those_of_the_image_and_other_positions_need_some() -> None:
    plain = Gates(GIVEN.text, GIVEN.image, GIVEN.row, GRID)
    found = expanded(plain, Site("image", "reference", level=1))
    assert torch.equal(found, by_rank(torch.cat([GIVEN.image[1]] * 2, dim=1)))
    with pytest.raises(KeyError, match="other"):
        expanded(plain, Site("text", "other"))


@pytest.mark.parametrize("case", EXPECTED)
def test_gates_of_a_larger_set_a_factor_and_some_rows_are_those_of_every_part(case: str) -> None:
    site, gate = EXPECTED[case]
    assert gate is not None
    wide = GIVEN.scatter_concepts([3, 0, 1], 4).expand(GateKey(site, False, (1, 1, 1, 1)), [TOKENS] * ROWS)
    assert torch.equal(wide, torch.stack([gate[..., 1], gate[..., 2], torch.zeros(gate.shape[:-1]), gate[..., 0]], -1))
    assert torch.equal(
        expanded(GIVEN.times(torch.tensor([0.5, 1.0, -2.0])), site), by_rank(gate * torch.tensor([0.5, 1.0, -2.0]))
    )
    assert torch.equal(expanded(GIVEN.select(slice(1, None)), site), by_rank(gate[1:]))
    one = gates(rows=1)
    assert torch.equal(expanded(one.select(slice(1, None)), site), expanded(one, site)), "rows that are broadcast stay"


def test_a_text_is_filled_up_where_the_layer_fills_it_up_and_a_lora_acts_there_if_it_acts_on_every_token() -> None:
    """As a transformer does it whose program tells no padding; the concepts act on one token, and on all."""
    text = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    gates = Gates(text, {0: torch.full((1, 2, 2), 0.5)}, torch.ones(1, 2), (1, 2))
    key = GateKey(Site("text", "image", multiple=4), False, (1, 1))
    expanded = gates.expand(key, [3])
    assert expanded[0, :4].tolist() == [[1, 1], [0, 1], [0, 1], [0, 1]]
    assert expanded.shape == (1, 8, 2)
    assert gates.expand(GateKey(Site("text"), False, (1, 1)), [3]).shape == (1, 3, 2)


def test_the_ranks_that_do_not_act_have_the_gate_zero() -> None:
    found = replace(GIVEN, ranks=(2, None, 9))
    key = GateKey(Site("text"), False, (4, 3, 5))
    whole = GIVEN.expand(key, [TOKENS] * ROWS)
    acting = torch.tensor([1, 1, 0, 0, *[1] * 8])
    assert torch.equal(found.expand(key, [TOKENS] * ROWS), whole * acting)
    scattered = found.scatter_concepts([3, 0, 1], 4)
    assert scattered.ranks == (None, 9, None, 2)
    assert found.select([0]).up_to(2).times(torch.ones(3)).ranks == (2, None, 9)
    shared = replace(found, ranks=(2, 2, None)).strongest([0, 0, 1])
    assert shared.ranks == (2, None)
