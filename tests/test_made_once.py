"""Copies of small models are what making them again would give."""

from typing import Any

import torch
from torch import nn

from components import TINY, sd_unet
from made_once import made_once


@made_once
def tied(size: int) -> Any:
    """Two layers of one weight, and a random number that is drawn after them."""
    torch.manual_seed(0)
    made: Any = nn.ModuleDict({"first": nn.Linear(size, size), "second": nn.Linear(size, size)}).eval()
    made["second"].weight = made["first"].weight
    made["second"].bias.requires_grad_(False)
    return made


def test_copies_are_the_same_to_the_bit_share_nothing_and_leave_the_same_random_numbers() -> None:
    for make in (lambda: tied(3), lambda: sd_unet(**TINY)):
        one, after = make(), torch.rand(1)
        other, again = make(), torch.rand(1)
        assert after == again
        assert repr(one) == repr(other)
        assert one.training is other.training is False
        mine, theirs = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (one, other))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name])
            assert tensor.requires_grad == theirs[name].requires_grad
            assert tensor.data_ptr() != theirs[name].data_ptr()
    assert tied(3)["first"].weight is not tied(3)["first"].weight
    copied = tied(3)
    assert copied["first"].weight is copied["second"].weight
    assert tied(4)["first"].weight.shape == (4, 4)
