"""Factors move without the model's layers in which they act, or are copied to where these run."""

import pytest
import torch
from torch import Tensor, nn

from lora_compose.attention import Gates, LoraFactors, Site, installed_bank
from lora_compose.attention.transforms import Rotation
from lora_compose.compose.comfyui.memory import Brought, MovableFactors

CPU, META = torch.device("cpu"), torch.device("meta")


def gates() -> Gates:
    return Gates(text=torch.ones(1, 1, 1), image={0: torch.ones(1, 1, 1)}, row=torch.ones(1, 1), latent_grid=(1, 1))


def lora() -> dict[str, LoraFactors]:
    return {"0": LoraFactors(torch.randn(2, 4), torch.randn(4, 2))}


def drawn(model: nn.Module, factors: MovableFactors, x: Tensor) -> Tensor:
    """The output of a model with the LoRA, whose factors may be on another device."""
    bank = factors.bank_for(model, {"0": Site("image")}, torch.float32)
    with installed_bank(model, bank, device=x.device, dtype=torch.float32, around=Brought) as installed:
        installed.use(installed.inputs(gates(), lengths=[1]))
        return model(x)


def test_factors_that_lie_elsewhere_are_copied_in_each_call() -> None:
    factors, model = MovableFactors([lora()], CPU), nn.Sequential(nn.Linear(4, 4, device=META))
    assert drawn(model, factors, torch.zeros(1, 1, 4, device=META)).shape == (1, 1, 4)
    assert factors.bank is not None
    (layer,) = factors.bank.layers.values()
    assert {tensor.device for tensor in layer.tensors} == {CPU}
    assert factors.bank.bytes == factors.bytes_in(torch.float32) == 64


def test_rotations_that_mix_the_cells_of_a_convolution_are_counted_as_they_are_made() -> None:
    rotation = Rotation(torch.linalg.qr(torch.randn(3, 12, 12)).Q, by_input=True)
    lora = {"0": LoraFactors(torch.zeros(1, 4, 3, 3), torch.zeros(5, 1, 1, 1), transform=rotation)}
    factors, model = MovableFactors([lora], CPU), nn.Sequential(nn.Conv2d(4, 5, 3, bias=False))
    bank = factors.bank_for(model, {"0": Site("image")}, torch.float32)
    assert bank.bytes == factors.bytes_in(torch.float32) == 4 * (5 * 4 * 9 + 5 * 5)


def test_an_error_of_the_layer_itself_is_not_put_down_to_other_nodes() -> None:
    class Failing(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise torch.OutOfMemoryError(f"{len(input)} rows are too many")

    with pytest.raises(torch.OutOfMemoryError, match="3 rows are too many"):
        drawn(nn.Sequential(Failing(4, 4)), MovableFactors([lora()], CPU), torch.zeros(3, 1, 4))


def test_factors_move_without_the_layers_of_the_model_and_are_made_once() -> None:
    factors, model = MovableFactors([lora()], CPU), nn.Sequential(nn.Linear(4, 4))
    drawn(model, factors, torch.zeros(1, 1, 4))
    bank = factors.bank
    assert bank is not None
    (layer,) = bank.layers.values()
    layer.act_on(model[0])
    factors.to(META)
    assert {tensor.device for tensor in layer.tensors} == {META}
    assert layer.layer is model[0]
    assert model[0].weight.device == CPU
    layer.let_go()
    assert factors.bank_for(model, {"0": Site("image")}, torch.float32) is bank
    other = factors.bank_for(model, {"0": Site("image")}, torch.float16)
    assert other is factors.bank is not bank
    assert other.layers["0"].up.device == META
