"""The simulated accelerator raises and waits where CUDA does, and computes what the CPU computes."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simulated_device import DEVICE, MixedDevicesError, SimTensor, listed, noted_waits, numbers, parameters_that_move


def host() -> Tensor:
    return torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def device(tensor: Tensor | None = None) -> Tensor:
    return (host() if tensor is None else tensor).to(DEVICE, non_blocking=True)


def indices() -> Tensor:
    return torch.tensor([1, 0])


def filled(tensor: Tensor, where: Any, value: Any) -> Tensor:
    tensor[where] = value
    return tensor


def same_bits(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, SimTensor) and torch.equal(numbers(found), expected)
    if isinstance(expected, tuple | list):
        return all(map(same_bits, found, expected))
    return found == expected


# Every value takes the tensor with which it is asked, and another of the same device.
REFUSED: dict[str, Callable[[], Any]] = {
    "operands of both": lambda: device() + host(),
    "in place, from the host": lambda: device().add_(host()),
    "a product": lambda: device() @ host().T,
    "a layer that was left behind": lambda: nn.Linear(3, 3)(device()),
    "a convolution": lambda: F.conv2d(device()[None, None], torch.ones(1, 1, 1, 1)),
    "attention": lambda: F.scaled_dot_product_attention(device()[None], device()[None], host()[None]),
    "joining": lambda: torch.cat([device(), host()]),
    "choosing": lambda: torch.where(device() > 1, device(), host()),
    "an embedding": lambda: F.embedding(indices(), device()),
    "rows by number": lambda: device().index_select(0, indices()),
    "gathering": lambda: device().gather(0, torch.zeros(2, 3, dtype=torch.long)),
    "scattering": lambda: device().scatter(0, device(torch.zeros(2, 3, dtype=torch.long)), host()),
    "a host tensor indexed by the device": lambda: host()[device(indices())],
    "numbers of the host put at places": lambda: filled(device(), device(indices()), host()),
    "numpy": lambda: np.asarray(device()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cuda_refuses_is_refused(case: str) -> None:
    with pytest.raises((MixedDevicesError, RuntimeError, TypeError), match=r"device|numpy"):
        REFUSED[case]()


def test_a_refusal_says_where() -> None:
    with pytest.raises(MixedDevicesError, match=r"aten.add.Tensor gets \[\(2, 3\)\].*test_simulated_device.py:\d+ "):
        device().add(host())


def test_a_refusal_in_backward_is_an_ordinary_error() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad + host()

    x = device().requires_grad_()
    with pytest.raises(MixedDevicesError):
        torch.autograd.grad(Wrong.apply(x).sum(), x)  # pyright: ignore[reportAttributeAccessIssue]


# What CUDA takes, without a wait; every value is given a function that brings tensors to the device, or leaves them.
ALLOWED: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "a number of the host": lambda to: to(host()) * torch.tensor(2.0),
    "a number of Python": lambda to: 3.0 - to(host()),
    "a number of the host, in place": lambda to: to(host()).div_(torch.tensor(2.0)),
    "a number of the host, masked": lambda to: to(host()).masked_fill(to(host()) > 2, torch.tensor(0.0)),
    "a mask that is filled": lambda to: filled(to(host()), to(host()) > 2, 0.0),
    "rows by number": lambda to: to(host())[to(indices())],
    "views written to": lambda to: [whole := to(host()), whole.T[1:].mul_(2)][0],
    "products": lambda to: F.linear(to(host()), to(host()), to(torch.ones(2))),
    "a convolution": lambda to: F.conv2d(to(host())[None, None], to(torch.ones(1, 1, 2, 2)), padding=1),
    "joining": lambda to: torch.cat([to(host()), to(host())]),
    "repeating": lambda to: to(host()).repeat_interleave(2, dim=0),
    "repeating by a tensor": lambda to: to(host()).repeat_interleave(to(indices() + 1), dim=0, output_size=3),
    "another precision": lambda to: to(host()).to(torch.float16),
    "one position": lambda to: to(host())[1, 2],
    "scattering": lambda to: to(host()).scatter_(1, to(torch.tensor([[0], [2]])), 9.0),
    "a copy without a wait": lambda to: to(host()).to("cpu", non_blocking=True).tolist(),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_cuda_allows_gives_the_numbers_of_the_cpu_without_a_wait(case: str) -> None:
    with noted_waits() as waits:
        found = ALLOWED[case](device)
    assert same_bits(found, ALLOWED[case](lambda tensor: tensor))
    assert not waits, listed(waits)


MADE: dict[str, Callable[[torch.device | str], Tensor]] = {
    "zeros": lambda device: torch.zeros(2, 3, device=device),
    "arange": lambda device: torch.arange(1, 9, 2, device=device),
    "ones like those of the host": lambda device: torch.ones_like(host(), device=device),
    "parameters": lambda device: nn.LayerNorm(3, device=device).weight.detach(),
}


@pytest.mark.parametrize("case", MADE)
def test_what_is_made_on_the_device_needs_no_wait(case: str) -> None:
    with noted_waits() as waits:
        found = MADE[case](DEVICE)
    assert found.device == DEVICE
    assert same_bits(found, MADE[case]("cpu"))
    assert not waits, listed(waits)


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 1).all()),
    "a condition": lambda x: 1 if x.sum() > 2 else 0,
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "copied to the host": lambda x: host().copy_(x),
    "to the device": lambda x: host().to(DEVICE),
    "copied to the device": lambda x: x.copy_(host()),
    "part of it set from the host": lambda x: filled(x, 0, torch.ones(3)),
    "a tensor of numbers": lambda x: torch.tensor([1, 2], device=DEVICE),
    "as a tensor of numbers": lambda x: torch.as_tensor([1.0], device=DEVICE),
    "a list of numbers as an index": lambda x: x[:, [0, 2]],
    "an index from the host": lambda x: x[indices()],
    "a number of the device as an index": lambda x: x[device(torch.tensor(1))],
    "nonzero": lambda x: (x > 2).nonzero(),
    "where": lambda x: torch.where(x > 2),
    "unique": lambda x: x.unique(),
    "a mask as an index": lambda x: x[x > 2],
    "a mask that numbers are put at": lambda x: filled(x, x > 4, device(torch.zeros(2))),
    "repeating by a tensor": lambda x: x.repeat_interleave(device(indices() + 1), dim=0),
    "waiting": lambda x: getattr(torch, DEVICE.type).synchronize(),
}


@pytest.mark.parametrize("case", WAITS)
def test_every_wait_for_the_device_is_noted_once_with_its_line(case: str) -> None:
    tensor = device()
    with noted_waits() as waits:
        WAITS[case](tensor)
    assert len(waits) == 1, listed(waits)
    assert "test_simulated_device.py:" in waits[0].line


def test_waits_are_noted_inside_their_block_only() -> None:
    with noted_waits() as outer:
        device().sum().item()
        with noted_waits() as inner:
            device().cpu()
        device().sum().item()
    device().sum().item()
    assert [wait.operation for wait in inner] == ["copy to the host"]
    assert [wait.operation for wait in outer] == ["_local_scalar_dense"] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_cpu(checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 2))

    def gradients(x: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        made = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
        assert isinstance(made, Tensor)
        return [*torch.autograd.grad(made.square().sum(), [x, *model.parameters()])]

    expected = gradients(host())
    model.to(DEVICE)
    with noted_waits() as waits:
        found = gradients(device())
    torch.testing.assert_close(numbers(found), expected)
    assert not waits, listed(waits)


def test_a_module_is_moved_there_and_back_with_its_parameters() -> None:
    module = nn.BatchNorm2d(3)
    parameters = dict(module.named_parameters())
    with parameters_that_move():
        for place in (DEVICE, torch.device("cpu"), DEVICE):
            module.to(place)
            assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
            assert {tensor.device for tensor in [*module.parameters(), *module.buffers()]} == {place}
    module.half()
    assert module.weight.dtype == module.running_mean.dtype == torch.float16  # pyright: ignore[reportOptionalMemberAccess]
    assert copy.deepcopy(module).weight.device == DEVICE


def test_numbers_of_a_parameter_are_replaced_by_those_of_another_device() -> None:
    parameter = nn.Parameter(host(), requires_grad=False)
    with parameters_that_move():
        parameter.data = parameter.data.to(DEVICE)
        assert parameter.device == DEVICE
        parameter.data = parameter.data.to("cpu")
    assert isinstance(parameter, nn.Parameter)
    assert torch.equal(parameter, host())


def test_numbers_of_a_parameter_are_replaced_by_others_of_another_size() -> None:
    parameter = nn.Parameter(device())
    parameter.data = device(torch.ones(4))
    assert torch.equal(numbers(parameter.detach() + 1), torch.full((4,), 2.0))


def test_the_device_is_chosen_by_its_name_alone() -> None:
    assert not getattr(torch, DEVICE.type).is_available()
    assert torch.ones(1).device.type == "cpu"
