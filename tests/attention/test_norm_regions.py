"""Group normalisation by region: against its formula and PyTorch's own, in place of modules and on their `forward`."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from components import random_lora, tiny_unet, unet_inputs
from lora_compose.attention import How, NormRegions, backbone_of, install
from model_snapshot import Snapshot
from norm_reference import region_normalised, shares_by_hand
from reference import constant_gates

FP32: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
EPS = 1e-5


@given(images=st.integers(1, 2), branches=st.integers(1, 2), masks=st.integers(1, 3), seed=st.integers(0, 99))
def test_it_equals_its_formula(images, branches, masks, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = 4, 3
    x = torch.randn(branches * images, 6, *grid, generator=generator) * 3 + 1
    regions = NormRegions.of({grid: torch.rand(images, masks, *grid, generator=generator) / masks})
    torch.testing.assert_close(
        regions.normalised(x, 2, EPS), region_normalised(x, regions.shares[grid], 2, EPS), rtol=1e-4, atol=1e-4
    )


def test_without_borders_each_half_is_normalised_as_if_it_were_alone():
    x = torch.randn(2, 6, 4, 4)
    x[..., 2:] = x[..., 2:] * 7 + 3
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1
    found = NormRegions.of({(4, 4): left}).normalised(x, 2, EPS)
    halves = [nn.functional.group_norm(half, 2, eps=EPS) for half in x.chunk(2, dim=-1)]
    torch.testing.assert_close(found, torch.cat(halves, dim=-1), rtol=1e-4, atol=1e-4)


def test_shares_add_up_to_one_and_change_gradually():
    left = torch.zeros(1, 1, 20, 20)
    left[..., :10] = 1
    (shares,) = NormRegions.of({(20, 20): left}).shares.values()
    torch.testing.assert_close(shares, shares_by_hand(left))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(1, 400))
    line = shares[0, 0, :20]
    assert line[0] == 1
    assert line[-1] == 0
    assert (line[:-1] - line[1:]).max() < 0.3


def test_a_grid_without_regions_is_an_error():
    regions = NormRegions.of({(4, 4): torch.ones(1, 1, 4, 4)})
    with pytest.raises(KeyError):
        regions.normalised(torch.randn(1, 6, 2, 2), 2, EPS)


@pytest.mark.parametrize("how", get_args(How))
@torch.no_grad()
def test_a_unet_has_it_in_either_way_of_installing_and_nothing_is_left(how):
    unet = tiny_unet()
    inputs, before = unet_inputs(unet), Snapshot(unet)
    plain = unet(**inputs)[0]
    gates = constant_gates([0.0])[0]
    lora = random_lora(unet, 1)
    height, width = inputs["sample"].shape[2:]
    left = torch.zeros(1, 1, height, width)
    left[..., : width // 2] = 1
    whole, halves = torch.ones_like(left), left
    outputs = []
    with install(backbone_of(unet), [lora], **FP32, how=how) as installation:
        installation.normalise_by_region()
        installation.normalise_by_region()
        if how == "forward":
            assert list(unet.state_dict()) == list(before.parameters)
        for mask in (None, whole, halves):
            grids = {(-(-height // 2**n), -(-width // 2**n)): mask for n in range(4)} if mask is not None else {}
            by_grid = {grid: nn.functional.adaptive_avg_pool2d(one, grid) for grid, one in grids.items()}
            regions = NormRegions.of(by_grid) if by_grid else None
            installation.use(installation.inputs(gates, inputs["encoder_hidden_states"], norm_regions=regions))
            outputs.append(unet(**inputs)[0])
    none, one, two = outputs
    torch.testing.assert_close(none, plain)
    torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-3)
    assert (two - plain).abs().max() > 10 * (one - plain).abs().max()
    before.assert_unchanged(unet)
