"""LoRA-Composer with regions that are denoised on canvases of their own in the first steps."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components import EVERYTHING, random_lora, tiny_pipeline
from lora_compose.attention import grid_at
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.regions import Regions
from lora_compose.pipelines.scene import Concept

CANVAS, LEFT, RIGHT = (0, 0, 128, 128), (0, 0, 64, 128), (64, 0, 128, 128)


@pytest.fixture
def composer(write_lora) -> ComposeStableDiffusionPipeline:
    """A small pipeline with the concepts "cat" and "dog"; its UNet halves latents once."""
    pipe = tiny_pipeline()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        path = write_lora(f"{name}-file", unet=random_lora(pipe.unet, seed))
        pipe.load_concept(path, name, trigger=trigger, class_word=name)
    return pipe


def at(cat: Any, dog: Any, **of_dog: Any) -> list[Concept]:
    return [Concept(name="cat", region=cat), Concept(name="dog", region=dog, **of_dog)]


def compose(pipe: Any, method: LoraComposer, **arguments: Any) -> Any:
    given: dict[str, Any] = {
        "prompt": "a sks cat and a zwx dog on grass", "concepts": at(LEFT, RIGHT), "num_inference_steps": 2,
        "guidance_scale": 4.0, "output_type": "latent", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(method=method, **given | arguments)


def latents_of(pipe: Any, method: LoraComposer, **arguments: Any) -> Tensor:
    return compose(pipe, method, **arguments).images


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def far_apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


def test_regions_apart_never_know_of_each_other(composer):
    method = LoraComposer(apart=1.0, step_size=0)
    one, other = (
        latents_of(composer, method, concepts=at(LEFT, RIGHT, prompt=prompt), num_inference_steps=4)
        for prompt in ("a zwx dog on grass", "one big zwx dog in the water")
    )
    assert torch.equal(one[..., :8], other[..., :8])
    assert far_apart(one[..., 8:], other[..., 8:])


def test_regions_apart_never_know_of_each_others_loras_in_any_layer(write_lora):
    pipe = tiny_pipeline()
    for seed, (name, trigger) in enumerate((("cat", "sks"), ("dog", "zwx"))):
        path = write_lora(name, unet=random_lora(pipe.unet, seed, targets=EVERYTHING, size=0.1))
        pipe.load_concept(path, name, trigger=trigger, class_word=name)
    method = LoraComposer(apart=1.0, step_size=0)
    one, other = (latents_of(pipe, method, concepts=at(LEFT, RIGHT, weight=weight)) for weight in (1.0, 0.0))
    assert torch.equal(one[..., :8], other[..., :8])
    assert far_apart(one[..., 8:], other[..., 8:])


def test_regions_that_are_not_apart_do_know_of_each_other(composer):
    method = LoraComposer(apart=0.0, step_size=0)
    one, other = (
        latents_of(composer, method, concepts=at(LEFT, RIGHT, prompt=prompt), num_inference_steps=4)
        for prompt in ("a zwx dog on grass", "one big zwx dog in the water")
    )
    assert far_apart(one[..., :8], other[..., :8])


def test_a_region_of_the_whole_canvas_is_apart_from_nothing(composer):
    concepts = [Concept(name="cat", region=CANVAS)]
    apart, together = (latents_of(composer, LoraComposer(apart=apart), concepts=concepts) for apart in (1.0, 0.0))
    assert_close(apart, together)


def test_regions_and_their_surroundings_come_from_their_canvases_and_the_rest_from_the_whole_one(composer):
    concepts = at((0, 0, 64, 64), (96, 96, 128, 128))
    apart, together = (
        latents_of(composer, LoraComposer(apart=apart, step_size=0), concepts=concepts, num_inference_steps=1)
        for apart in (1.0, 0.0)
    )
    shown = torch.zeros(16, 16, dtype=torch.bool)
    shown[:8, :8] = shown[8:, 8:] = True  # the second region's canvas is larger than the region
    assert torch.equal(apart[..., ~shown], together[..., ~shown])
    assert torch.equal((apart != together).any(dim=1)[0], shown)


def test_no_canvas_shows_the_region_of_another_concept(composer):
    method = LoraComposer(apart=1.0, step_size=0)
    one, other = (
        latents_of(composer, method, concepts=at((0, 0, 64, 64), (32, 64, 64, 96), prompt=prompt))
        for prompt in ("a zwx dog on grass", "one big zwx dog in the water")
    )
    changed = (one != other).any(dim=1)[0]
    assert changed[8:12, 4:8].all()
    assert not changed[:8, :8].any(), "the second concept's canvas reaches into the first one's region"


def test_where_regions_overlap_the_mean_of_their_canvases_counts(composer):
    scenes = {
        "both": at((0, 0, 64, 64), (32, 32, 96, 96)),
        "cat": at((0, 0, 64, 64), (64, 64, 128, 128)),
        "dog": at((112, 112, 128, 128), (32, 32, 96, 96)),
    }
    method = LoraComposer(apart=1.0, step_size=0)
    both, cat, dog = (
        latents_of(composer, method, concepts=concepts, num_inference_steps=1)[..., 4:8, 4:8]
        for concepts in scenes.values()
    )
    assert far_apart(cat, dog)
    assert_close(both, (cat + dog) / 2)


@pytest.mark.parametrize(("apart", "boxes", "rows"), [
    (0.0, (LEFT, RIGHT), 8), (0.5, (LEFT, RIGHT), 8), (1.0, (LEFT, RIGHT), 8),
    (0.5, ((0, 0, 64, 64), (64, 64, 128, 128)), 8 + 2 * 2 * 2 / 4),
    (1.0, (CANVAS, CANVAS), 16),
], ids=str)  # fmt: skip
def test_canvases_of_regions_cost_their_share_and_the_rest_only_where_there_is_any(composer, apart, boxes, rows):
    method = LoraComposer(apart=apart, step_size=0)
    cost = compose(composer, method, concepts=at(*boxes), num_inference_steps=4).cost
    assert cost.rows_forward == pytest.approx(rows)


def test_the_first_part_of_the_steps_is_apart(composer):
    def images(apart: float) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(pipe, step, timestep, tensors):
            found.append(tensors["latents"])
            return tensors

        compose(
            composer, LoraComposer(apart=apart, step_size=0), num_inference_steps=4, callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        )  # fmt: skip
        return found

    never, half, always = (images(apart) for apart in (0.0, 0.5, 1.0))
    assert [torch.equal(one, other) for one, other in zip(half, always, strict=True)] == [True, True, False, False]
    assert far_apart(never[0], half[0])


@pytest.mark.parametrize("apart_side", [0.0, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("width", "height"), [(256, 128), (256, 256)])
def test_the_canvas_of_a_region_has_a_share_of_the_size_that_the_model_was_made_for(
    composer, apart_side, width, height
):
    method = LoraComposer(apart=1.0, apart_side=apart_side, step_size=0)
    concepts = [Concept(name="cat", region=(64, 64, 80, 80))]
    sizes = {"width": width, "height": height, "num_inference_steps": 1, "guidance_scale": 1.0}
    rows = compose(composer, method, concepts=concepts, **sizes).cost.rows_forward
    cells = (rows - 1) * width * height / 64  # without the pass for the rest
    least = max(2, 16 * apart_side)
    assert least**2 <= cells <= (least + 2 * 2) ** 2, "more only to be halved by the UNet"


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(0, 3), st.floats(0, 20))
def test_windows_hold_their_region_and_lie_on_the_canvas(data: st.DataObject, levels: int, side: float) -> None:
    canvas = tuple(data.draw(st.integers(1, 40)) for _ in range(2))
    starts = [data.draw(st.integers(0, length - 1)) for length in canvas]
    box = [
        slice(start, data.draw(st.integers(start + 1, length))) for start, length in zip(starts, canvas, strict=True)
    ]
    region = torch.zeros(*canvas, 1, dtype=torch.bool)
    region[box[0], box[1]] = True
    regions = Regions((0,), {0: region, levels: region[:: 2**levels, :: 2**levels]})  # the coarsest grid says how often
    for window, inside, length in zip(regions.window(0, side), box, canvas, strict=True):
        assert 0 <= window.start <= inside.start
        assert inside.stop <= window.stop <= length
        assert window.stop - window.start >= min(side, length)
        assert window.start % 2**levels == 0
        assert window.stop % 2**levels == 0 or window.stop == length


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(0, 3), st.floats(0, 20), st.sampled_from([0.0, 0.5, 1.0]))
def test_windows_hold_their_region_on_every_grid(
    data: st.DataObject, levels: int, side: float, threshold: float
) -> None:
    height, width = (data.draw(st.integers(1, 40)) for _ in range(2))
    left, top = data.draw(st.integers(0, width * 8 - 1)), data.draw(st.integers(0, height * 8 - 1))
    box = left, top, data.draw(st.integers(left + 1, width * 8)), data.draw(st.integers(top + 1, height * 8))
    size = height * 8, width * 8
    regions = Regions.of([None, box], size, (height, width), range(levels + 1), threshold)
    window = regions.window(0, side)
    part = regions.part(window, 0)
    for level, cells in part.cells.items():
        assert cells.sum() == regions.cells[level].sum() > 0
        assert cells.shape[:2] == grid_at(part.grid, level)


@pytest.mark.parametrize("boxes", [(LEFT, RIGHT), ((0, 0, 64, 64), (72, 80, 128, 128))], ids=["covered", "gaps"])
def test_attention_of_regions_apart_is_recorded_on_the_whole_canvas(composer, boxes):
    output = compose(composer, LoraComposer(apart=0.5), concepts=at(*boxes), record_attention=True)
    assert output.attention_maps.shape == (2, 1, 2, 16, 16)
    assert output.attention_maps.isfinite().all()
    assert (output.attention_maps.amax(dim=(-2, -1)) > 0).all()
