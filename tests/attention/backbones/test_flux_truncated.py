"""A FLUX transformer that stops early gives the same maps and gradients, and is whole again afterwards."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from components import seeded
from flux import flux_transformer
from lora_compose.attention import Recorder, backbone_of, frozen
from lora_compose.attention.claims import undoing
from lora_compose.attention.device import modules_of
from lora_compose.attention.forward_state import ForwardState, LayerInputs
from transformer_families import TOKENS

ROWS, GRID = 2, (8, 12)
DOUBLE = ["transformer_blocks.0.attn", "transformer_blocks.1.attn", "transformer_blocks.2.attn"]


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    return flux_transformer(num_layers=3, num_single_layers=2)


def maps_and_gradient(transformer: Any, layers: list[str], *, stop: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Recorded maps of one pass and the gradient of a loss on them, which is taken after the pass is over."""
    generator, backbone, state = seeded(1), backbone_of(transformer), ForwardState()
    latents = torch.randn(ROWS, 4, *GRID, generator=generator).requires_grad_()
    text = torch.randn(ROWS, TOKENS, 24, generator=generator)
    added = {"pooled_projections": torch.randn(ROWS, 24, generator=generator)}
    recorder = Recorder(layers, torch.eye(TOKENS).expand(ROWS, -1, -1))
    state.recorders = [recorder]
    state.inputs = LayerInputs(lengths=(TOKENS,) * ROWS, latent_grid=GRID)
    with undoing(transformer) as undo, frozen(transformer):
        backbone.steer(modules_of(transformer), state, undo)
        with backbone.truncated_after(layers) if stop else nullcontext():
            backbone.forward(latents, torch.tensor(500.0), text, added, guidance=torch.full((ROWS,), 3.5))
        loss = torch.stack([found.square().sum() for found in recorder.maps.values()]).sum()
        (gradient,) = torch.autograd.grad(loss, latents)
    return {name: found.detach() for name, found in recorder.maps.items()}, gradient


@pytest.mark.parametrize("last", DOUBLE)
def test_maps_and_gradients_are_those_of_a_whole_pass(transformer: Any, last: str) -> None:
    layers = DOUBLE[: DOUBLE.index(last) + 1]
    whole, gradient = maps_and_gradient(transformer, layers, stop=False)
    stopped, same = maps_and_gradient(transformer, layers, stop=True)
    assert whole.keys() == stopped.keys() == set(layers)
    assert all(torch.equal(stopped[name], whole[name]) for name in layers)
    assert gradient.abs().max() > 0
    assert torch.equal(same, gradient)


def test_no_block_runs_after_the_last_layer_and_the_model_is_whole_again(transformer: Any) -> None:
    ran: list[str] = []
    for name, module in transformer.named_modules():
        if name.rpartition(".")[0] in ("transformer_blocks", "single_transformer_blocks"):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    modules = dict(transformer.named_modules())
    maps_and_gradient(transformer, DOUBLE[:2], stop=True)
    assert ran == ["transformer_blocks.0", "transformer_blocks.1"]
    assert dict(transformer.named_modules()) == modules
    ran.clear()
    maps_and_gradient(transformer, DOUBLE[:2], stop=False)
    assert len(ran) == 5
