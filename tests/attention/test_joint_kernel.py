"""Attention to text and image in one sequence: recorded maps are those of what the model attends to."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lora_compose.attention import Recorder
from lora_compose.attention.forward_state import ForwardState, LayerInputs
from lora_compose.attention.joint_kernel import JointKernel
from lora_compose.attention.sites import Site, SitePart

CELLS, WORDS, MULTIPLE = 48, 10, 32
FILLED = {"text": 32, "image": 64}
"""Positions of text and image, filled up to a multiple."""


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask).transpose(1, 2)


@pytest.mark.parametrize("parts", [("image", "text"), ("text", "image")])
def test_maps_count_the_positions_that_fill_up_text_and_image_as_the_model_does(parts: tuple[SitePart, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, sum(FILLED.values()), 3, 8, generator=rng) for _ in range(3))
    word = torch.zeros(1, WORDS, 1)
    word[0, 4] = 1
    recorder = Recorder(["layers.0.attention"], word)
    state = ForwardState(LayerInputs(lengths=(WORDS,), latent_grid=(12, 16)), (recorder,))
    kernel = JointKernel("layers.0.attention", Site(*parts, level=1, multiple=MULTIPLE), state, attend)
    out = kernel(query, key, value)
    scores = torch.einsum("rqhc,rkhc->rhqk", query, key) / 8**0.5
    weights = scores.softmax(-1)  # over all positions
    torch.testing.assert_close(out, torch.einsum("rhqk,rkhc->rqhc", weights, value))
    text, image = (FILLED["image"], 0) if parts == ("image", "text") else (0, FILLED["text"])
    expected = weights[:, :, image : image + CELLS, text + 4].mean(1)
    torch.testing.assert_close(recorder.maps["layers.0.attention"][..., 0], expected)
