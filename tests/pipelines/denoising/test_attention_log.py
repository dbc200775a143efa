"""Recorded attention maps against those of diffusers' own attention, and the masks that follow from them."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from comparisons import assert_close
from components import seeded
from composing import ALL_LEVELS
from lora_compose.pipelines.denoising.attention_log import masks_of
from reference import add_reference
from three_concepts import PHRASES, PROMPT, WEIGHTS, denoise, full_gates, load, loras_of, token_rows


class Capture(AttnProcessor):
    """diffusers' plain attention that keeps its probabilities. Shape: [rows, heads, cells, tokens]."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        self.kept.append(attn.get_attention_scores(query, key).unflatten(0, (len(hidden_states), -1)))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@ALL_LEVELS
@pytest.mark.parametrize(("guidance_scale", "width", "height"), [
    (5.0, 96, 64), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(5.0, 128, 128), (1.0, 64, 96)]),
])  # fmt: skip
def test_recorded_attention_is_that_of_diffusers(pipe, plain_pipe, write_lora, guidance_scale, width, height):
    names = ["cat", "dog", "bear"]
    loras = loras_of(pipe, names)
    load(pipe, write_lora, names, loras)
    tokens = token_rows([PROMPT], names, 2, "cond_only" if guidance_scale > 1 else None)
    gates = full_gates(tokens, torch.tensor(WEIGHTS), image_size=(height, width))
    add_reference(plain_pipe.unet, loras, gates)
    grid = (-(-height // 32), -(-width // 32))
    captures = []
    for name, module in plain_pipe.unet.named_modules():
        if name.startswith(("down_blocks.2.", "up_blocks.1.")) and name.endswith("attn2"):
            captures.append(Capture())
            module.set_processor(captures[-1])
    assert len(captures) == 5
    arguments = {"num_images_per_prompt": 2, "guidance_scale": guidance_scale, "width": width, "height": height}
    expected = denoise(plain_pipe, **arguments).images
    output = denoise(pipe, concepts=names, method="tara", record_attention=True, **arguments)
    assert_close(output.images, expected)
    assert output.recorded_steps == (0, 1)
    assert output.attention_maps.shape == (2, 2, 3, *grid)
    assert output.attention_maps.dtype == torch.float32
    for step in range(2):
        mean = torch.stack([capture.kept[step][-2:].mean(dim=1) for capture in captures]).mean(dim=0)
        for column, name in enumerate(names):
            words = mean[:, :, list(PHRASES[name])].mean(dim=2).unflatten(1, grid)
            assert_close(output.attention_maps[step, :, column], words)


def test_masks_follow_from_the_maps_and_no_cell_has_two_concepts():
    maps = torch.rand(2, 2, 3, 4, 4, generator=seeded()) * torch.tensor([1.0, 0.01, 5.0])[:, None, None]
    maps[1, 1, 2] = 0  # a concept that is nowhere
    masks = masks_of(maps)
    assert masks.shape == maps.shape
    assert masks.dtype == torch.bool
    for step in range(2):
        for image in range(2):
            share = torch.stack([each / each.max().clamp(min=1e-30) for each in maps[step, image]])
            for row in range(4):
                for column in range(4):
                    best = int(share[:, row, column].argmax())
                    expected = [k == best and bool(share[k, row, column] >= 0.5) for k in range(3)]
                    assert masks[step, image, :, row, column].tolist() == expected
    shares = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    assert ((shares.amax(dim=2) > 0.4) & ~masks.any(dim=2)).any()


def test_masks_are_returned_with_the_maps(pipe, write_lora):
    names = ["cat", "dog", "bear"]
    load(pipe, write_lora, names, loras_of(pipe, names))
    output = denoise(pipe, concepts=names, method="tara", num_images_per_prompt=2, record_attention=True)
    assert torch.equal(output.masks, masks_of(output.attention_maps))
    assert output.masks.any()
    assert output.masks.sum(dim=2).max() == 1


def test_all_steps_some_or_none_can_be_recorded_and_the_image_is_the_same(pipe, write_lora):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    everything = denoise(pipe, concepts=["cat"], method="tara", record_attention=True)
    for wanted, steps in (([-1], (1,)), ([1, 0, -2], (0, 1))):
        output = denoise(pipe, concepts=["cat"], method="tara", record_attention=wanted)
        assert output.recorded_steps == steps
        assert torch.equal(output.attention_maps, everything.attention_maps[list(steps)])
        assert torch.equal(output.images, everything.images)
    nothing = denoise(pipe, concepts=["cat"], method="tara", record_attention=[])
    assert nothing.attention_maps is nothing.masks is nothing.recorded_steps is None
    assert torch.equal(nothing.images, everything.images)


def test_maps_of_a_concept_without_a_trigger_are_empty(pipe, write_lora):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    pipe.load_concept(pipe.concepts["cat"].lora, "style")
    output = denoise(pipe, concepts=["cat", "style"], method="merge", record_attention=True)
    assert (output.attention_maps[:, :, 1] == 0).all()
    assert (output.attention_maps[:, :, 0] > 0).all()
    assert not output.masks[:, :, 1].any()
