"""Frozen weights get no gradient, and what asked for one before asks again afterwards."""

from contextlib import nullcontext

import pytest

from components import tiny_unet, unet_inputs
from lora_compose.attention import frozen


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_weights_get_no_gradient_and_ask_again_afterwards(fails: bool) -> None:
    unet = tiny_unet()
    asked = {name: i % 3 > 0 for i, (name, _) in enumerate(unet.named_parameters())}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(asked[name])
    inputs = unet_inputs(unet, grid=(8, 12))
    sample = inputs["sample"].requires_grad_()
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), frozen(unet):
        assert not any(parameter.requires_grad for parameter in unet.parameters())
        unet(**inputs)[0].square().sum().backward()
        if fails:
            raise KeyboardInterrupt
    assert sample.grad is not None
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == asked
    assert set(asked.values()) == {True, False}


def test_weights_that_are_not_frozen_would_get_a_gradient() -> None:
    unet = tiny_unet()
    unet(**unet_inputs(unet, grid=(8, 12)))[0].square().sum().backward()
    assert any(parameter.grad is not None for parameter in unet.parameters())
