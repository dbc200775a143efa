"""IP-Adapters beside concepts: as in diffusers, whose processors keep their part."""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor

from components import FAMILIES, State, seeded
from composing import BOXED, PLAIN, assert_close, composer_of, far_apart, lora_file, run
from ip_adapters import with_ip_adapters
from lora_compose.attention.backbones.processors import kernel_of
from lora_compose.attention.backbones.unet import AttentionLayer, ComposeAttnProcessor
from lora_compose.attention.forward_state import ForwardState, LayerInputs
from lora_compose.attention.regions import Partition, RegionAttention
from lora_compose.pipelines.control.image_prompts import PreparedImagePrompts
from lora_compose.pipelines.control.prepared import View
from lora_compose.pipelines.methods import METHODS
from lora_compose.pipelines.scene.rows import Rows
from lora_compose.pipelines.text.conditioning import Conditioning

IMAGES = [Image.fromarray((np.random.default_rng(seed).random((40, 50, 3)) * 255).astype("u1")) for seed in range(3)]
LEFT = Image.new("L", (128, 128))
LEFT.paste(255, (0, 0, 64, 128))
GUIDED = {"guidance_scale": 4.0, "negative_prompt": "dark"}


def masks(*images: Image.Image) -> Tensor:
    """Masks of the images of one adapter, as diffusers prepares them."""
    return IPAdapterMaskProcessor().preprocess(list(images), height=128, width=128).transpose(0, 1)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one": (0.7, {"ip_adapter_image": IMAGES[0]}),
    "unguided": (0.7, {"ip_adapter_image": IMAGES[0], "guidance_scale": 1.0, "negative_prompt": None}),
    "several images": (0.7, {"ip_adapter_image": [IMAGES], "num_images_per_prompt": 2}),
    "masks": (
        [[0.7, 0.4]],
        {
            "ip_adapter_image": [IMAGES[:2]],
            "cross_attention_kwargs": {"ip_adapter_masks": [masks(LEFT, LEFT.rotate(90))]},
        },
    ),
    "by layer": ({"up": {"block_1": [0.0, 1.0]}}, {"ip_adapter_image": IMAGES[0]}),
}


def pipes(family: str, adapters: int = 1) -> tuple[Any, Any]:
    """Ours with the concept "cat", and diffusers' with the LoRA loaded; both have IP-Adapters, of scale 0.7."""
    found = _pipes(family, adapters)
    for pipe in found:
        pipe.set_ip_adapter_scale([0.7] * adapters)  # another test may have set it
    return found


@cache
def _pipes(family: str, adapters: int) -> tuple[Any, Any]:
    ours, theirs = copy.deepcopy(composer_of(family)), FAMILIES[family](PLAIN[family])
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(lora_file(family, "cat"))
    return with_ip_adapters(ours, adapters), with_ip_adapters(theirs, adapters)


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    return run(pipe, **GUIDED | arguments).images


@pytest.mark.parametrize(
    ("family", "case"),
    [("sd", case) for case in CASES]
    + [pytest.param("sdxl", case, marks=pytest.mark.slow) for case in CASES if case != "by layer"],
)
def test_one_merged_concept_is_a_lora_that_diffusers_loads(family, case):
    (ours, theirs), (scale, given) = pipes(family), CASES[case]
    for pipe in (ours, theirs):
        pipe.set_ip_adapter_scale(scale)
    found = latents_of(ours, concepts=["cat"], method="merge", **given)
    assert_close(found, latents_of(theirs, **given))


def test_two_adapters_and_given_embeddings_do_what_they_do_in_diffusers():
    ours, theirs = pipes("sd", 2)
    given = {"ip_adapter_image_embeds": [torch.randn(2, 1, 12, generator=seeded(seed)) for seed in (1, 2)]}
    assert_close(latents_of(ours, concepts=["cat"], method="merge", **given), latents_of(theirs, **given))


@pytest.mark.parametrize(
    "method",
    [method if method in ("tara", "clora") else pytest.param(method, marks=pytest.mark.slow) for method in METHODS],
)
def test_with_scale_0_every_method_does_what_it_does_without_an_adapter(method):
    pipe, _ = pipes("sd")
    given = {"concepts": BOXED, "method": method, "height": 128, "width": 128}
    pipe.set_ip_adapter_scale(0.0)
    assert_close(latents_of(pipe, **given, ip_adapter_image=IMAGES[0]), latents_of(composer_of("sd"), **given))
    pipe.set_ip_adapter_scale(0.7)
    both = masks(LEFT)
    seen = [
        latents_of(pipe, **given, ip_adapter_image=IMAGES[0], cross_attention_kwargs={"ip_adapter_masks": [mask]})
        for mask in (both, torch.ones_like(both))
    ]
    assert far_apart(*seen)


def test_prompts_with_their_own_concepts_have_their_own_images():
    pipe, _ = pipes("sd")
    embeds, noise = torch.randn(4, 1, 12, generator=seeded(4)), torch.randn(2, 4, 16, 16, generator=seeded(5))
    prompts, sets = ["a sks cat", "a zwx dog"], [["cat"], ["dog"]]
    size = {"height": 128, "width": 128, "method": "tara", "negative_prompt": None}
    both = latents_of(pipe, prompt=prompts, concepts=sets, latents=noise, ip_adapter_image_embeds=[embeds], **size)
    for i in range(2):
        own = embeds[[i, i + 2]]
        alone = latents_of(
            pipe, prompt=prompts[i], concepts=sets[i], latents=noise[i : i + 1], ip_adapter_image_embeds=[own], **size
        )
        assert_close(both[i : i + 1], alone)


@torch.no_grad()
def test_cells_in_several_regions_read_the_images_once():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8, cross_attention_dim=12).eval()
    attn.set_processor(IPAdapterAttnProcessor2_0(16, 12, scale=0.8))  # pyright: ignore[reportArgumentType]
    cells, text, images = torch.randn(2, 16, 16), torch.randn(2, 5, 12), [torch.randn(2, 1, 4, 12)]
    expected = attn(cells, (text, images))
    membership = torch.zeros(16, 2, dtype=torch.bool)
    membership[:10, 0] = membership[6:14, 1] = True
    regions = RegionAttention({0: Partition.of(membership)}, inject=True, isolate=False)
    state = ForwardState(LayerInputs(regions=regions, texts=text.expand(3, -1, -1, -1)))
    layer, processor = AttentionLayer("attn", True, "mid", 0), attn.processor
    ours: Any = ComposeAttnProcessor(layer, kernel_of("attn", attn), state, processor)
    attn.set_processor(ours)
    assert_close(attn(cells, (text, images)), expected, 1e-6)


def test_a_part_of_the_canvas_sees_its_part_of_the_masks():
    text = Conditioning(torch.zeros(4, 5, 12), torch.zeros(4, 5, 0), torch.zeros(4, 5, 0), Rows.of(2, 1))
    ready = PreparedImagePrompts([torch.ones(2, 1, 3)], [torch.zeros(1, 1, 3)], [masks(LEFT)], (16, 16))
    inputs = ready.inputs(text, View((slice(0, 16), slice(4, 12))))
    assert torch.equal(inputs["image_embeds"][0][:, 0, 0], torch.tensor([0.0, 0, 1, 1]))
    (mask,) = inputs["ip_adapter_masks"]
    assert mask.shape == (1, 1, 16, 8)
    assert torch.equal(mask[0, 0, 0], torch.tensor([1.0] * 4 + [0.0] * 4))


def test_nothing_of_a_call_stays_in_the_model():
    pipe, _ = pipes("sd")
    before = State(pipe)
    latents_of(pipe, concepts=["cat", "dog"], method="tara", ip_adapter_image=IMAGES[0])
    before.assert_unchanged()


def test_subjects_are_repainted_with_the_same_image():
    pipe, _ = pipes("sd")
    given = {"concepts": BOXED[:1], "method": "merge", "output_type": "pil", "ip_adapter_image": IMAGES[0]}
    assert run(pipe, prompt="a sks cat", **given).refine().subjects == ("cat",)
    masked = run(pipe, prompt="a sks cat", **given, cross_attention_kwargs={"ip_adapter_masks": [masks(LEFT)]})
    with pytest.raises(ValueError, match="nor with ip_adapter_masks"):
        masked.refine()


def test_what_does_not_fit_is_refused_with_words():
    pipe, plain = pipes("sd")[0], composer_of("sd")
    cat = {"concepts": ["cat"], "method": "merge"}
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (plain, {"ip_adapter_image": IMAGES[0]}, "needs an IP-Adapter in the model: call pipe.load_ip_adapter"),
        (pipe, {}, "the model has an IP-Adapter, which needs an image"),
        (pipe, {"ip_adapter_image": IMAGES[:2]}, "ip_adapter_image has 2 entries; the model has 1 IP-Adapters"),
        (pipe, {"ip_adapter_image": IMAGES[0], "ip_adapter_image_embeds": [torch.zeros(2, 1, 12)]}, "one of the two"),
        (pipe, {"ip_adapter_image_embeds": [torch.zeros(6, 1, 12)]}, "are for 3 images, and the call makes 1"),
        (
            pipe, {"ip_adapter_image": IMAGES[0], "cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(8, 8)]}},
            r"a tensor \[1, 1, height, width\] .*, not \[8, 8\]",
        ),
    ]  # fmt: skip
    for one, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            latents_of(one, **cat, **given)
