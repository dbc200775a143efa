"""ControlNets and T2I-Adapters beside concepts, compared with diffusers' own pipelines for them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components import (
    FAMILIES,
    TINY_XL,
    State,
    activated,
    random_lora,
    sd_unet,
    sdxl_unet,
    seeded,
    small_pipeline,
    xl_pipeline,
)
from composing import BOXED, assert_close, composer_of, far_apart
from lora_compose import METHODS, Concept, Control
from lora_compose.attention import backbone_of
from lora_compose.compose.benchmark.architectures import ARCHITECTURES
from lora_compose.pipelines.control.prepare import prepare_control
from lora_compose.pipelines.control.prepared import PreparedAdapter, PreparedControlNet, View
from lora_compose.pipelines.denoising.passes import AttentionMaps, MapLoss, MapRequest, Pass
from lora_compose.pipelines.denoising.process import Settings, constant_gates, one_text
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods.clora import Clora
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.text.conditioning import Conditioning
from pairs import slow_but

PROMPT = "a sks cat and a zwx dog on grass"
LEFT, RIGHT = (0, 0, 64, 128), (64, 0, 128, 128)
WEIGHT_0 = [Concept(name="cat", weight=0.0)]


@pytest.fixture
def composer(family: str) -> Any:
    """The same for all tests, which leave it as it is."""
    return composer_of(family)


@cache
def image_of(seed: int = 0, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Coloured squares."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def net_of(pipe: Any, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8), **changes)
    activated(net, size=0.2, seed=seed)
    with torch.no_grad():  # so that it looks at the image
        for parameter in net.controlnet_cond_embedding.parameters():
            parameter *= 3
    return net


def adapter_of(pipe: Any, kind: str | None = None, channels: Sequence[int] | None = None, **changes: Any) -> T2IAdapter:
    torch.manual_seed(1)
    xl = hasattr(pipe, "text_encoder_2")
    config: dict[str, Any] = {
        "channels": list(channels or pipe.unet.config.block_out_channels),
        "adapter_type": kind or ("full_adapter_xl" if xl else "full_adapter"),
        "downscale_factor": 16 if xl else 8,
        "num_res_blocks": 1,
    }
    return T2IAdapter(**config | changes).eval()


def latents_of(pipe: Any, **arguments: Any) -> Tensor:
    given: dict[str, Any] = {
        "prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent",
        "generator": seeded(), "height": 128, "width": 128,
    }  # fmt: skip
    return pipe(**given | arguments).images


def diffusers_pipeline(pipe: Any, **parts: Any) -> Any:
    """diffusers' own pipeline for a `controlnet` or an `adapter`, of the same components."""
    xl = hasattr(pipe, "text_encoder_2")
    if "controlnet" in parts:
        cls: Any = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    else:
        cls = StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline
    quiet = (
        {"requires_safety_checker": False} if not xl else {"add_watermarker": False} if "controlnet" in parts else {}
    )
    components = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    found = cls(**components, **parts, **quiet)
    found.set_progress_bar_config(disable=True)
    return found


# As in diffusers


@pytest.mark.parametrize(("family", "case"), [
    pytest.param("sd", {"end": 0.25}, marks=pytest.mark.slow), ("sdxl", {"start": 0.2, "end": 0.7, "scale": 0.6}),
])  # fmt: skip
def test_with_concepts_of_weight_0_a_controlnet_does_what_it_does_in_diffusers(composer, case):
    net, images = net_of(composer), [image_of(1), image_of(2)]
    given = {"prompt": [PROMPT, "a sks cat"], "num_images_per_prompt": 2, "num_inference_steps": 4}
    expected = latents_of(
        diffusers_pipeline(composer, controlnet=net),
        image=images,
        controlnet_conditioning_scale=case.get("scale", 1.0),
        control_guidance_start=case.get("start", 0.0),
        control_guidance_end=case.get("end", 1.0),
        **given,
    )
    control = Control(model=net, image=images, **case)
    assert_close(latents_of(composer, concepts=WEIGHT_0, method="merge", control=control, **given), expected)


@pytest.mark.parametrize(("family", "guidance_scale"), [("sd", 1.0), ("sdxl", 4.0)])
def test_several_controlnets_are_added_up_as_in_diffusers(composer, guidance_scale):
    nets, images, scales = [net_of(composer, seed) for seed in (0, 1)], [image_of(1), image_of(2)], [0.5, 1.2]
    expected = latents_of(
        diffusers_pipeline(composer, controlnet=nets),
        image=images,
        controlnet_conditioning_scale=scales,
        control_guidance_end=[1.0, 0.5],
        guidance_scale=guidance_scale,
    )
    parts = zip(nets, images, scales, (1.0, 0.5), strict=True)
    control = [Control(model=net, image=one, scale=scale, end=end) for net, one, scale, end in parts]
    given = {"concepts": WEIGHT_0, "method": "merge", "guidance_scale": guidance_scale}
    assert_close(latents_of(composer, control=control, **given), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_controlnet_that_pools_acts_on_the_rows_of_the_prompt_as_in_diffusers(composer):
    net = net_of(composer)
    net.register_to_config(global_pool_conditions=True)
    expected = latents_of(diffusers_pipeline(composer, controlnet=net), image=image_of())
    found = latents_of(composer, concepts=WEIGHT_0, method="merge", control=Control(model=net, image=image_of()))
    assert_close(found, expected)


def test_with_a_lora_a_controlnet_does_what_it_does_in_diffusers_with_the_lora_loaded(composer, write_lora):
    net = net_of(composer)
    found = latents_of(composer, concepts=["cat"], method="merge", control=Control(model=net, image=image_of()))
    plain = diffusers_pipeline(FAMILIES["sd"](), controlnet=net)
    plain.load_lora_weights(write_lora("again", unet=random_lora(composer.unet, 0)))
    assert_close(found, latents_of(plain, image=image_of()))
    assert far_apart(found, latents_of(composer, concepts=["cat"], method="merge"))


ADAPTER_CASES = {
    "sd, light": (lambda: small_pipeline(unet=sd_unet()), {"kind": "light_adapter", "channels": (8, 16, 16)}),
    "sd, grey": (FAMILIES["sd"], {"in_channels": 1}),
    "sdxl": (FAMILIES["sdxl"], {}),
    # As the adapters of SDXL: a fourth feature, which goes to the middle of the UNet.
    "sdxl, whole": (
        lambda: xl_pipeline(unet=sdxl_unet(transformer_layers_per_block=(1, 1, 1))), {"channels": (8, 16, 16, 16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_with_concepts_of_weight_0_an_adapter_does_what_it_does_in_diffusers(write_lora, case):
    make, changes = ADAPTER_CASES[case]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_concept(write_lora("cat", unet=random_lora(pipe.unet, 0)), trigger="sks", class_word="cat")
    adapter, xl = adapter_of(pipe, **changes), case.startswith("sdxl")
    image = image_of().convert("L" if "grey" in case else "RGB")
    given = {"num_images_per_prompt": 2}
    expected = latents_of(
        diffusers_pipeline(pipe, adapter=adapter),
        image=image,
        adapter_conditioning_scale=0.6,
        **given | ({"adapter_conditioning_factor": 0.5} if xl else {}),
    )
    control = Control(model=adapter, image=image, scale=0.6, end=0.5 if xl else 1.0)
    found = latents_of(pipe, concepts=WEIGHT_0, method="merge", control=control, **given)
    assert_close(found, expected)


# With every method


USUAL = ("composite", "lora-composer", "clora")
"""One for each kind of pass: by regions, of one LoRA each, on parts of the canvas, with gradients, and of a draft."""


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(pytest.param("sd", method, marks=() if method in USUAL else pytest.mark.slow) for method in METHODS),
        ("sdxl", "tara"),
    ],
)
def test_every_method_follows_controls_and_leaves_everything_as_it_was(composer, method):
    net, adapter = net_of(composer), adapter_of(composer)
    state, bits = State(composer), [parameter.clone() for parameter in net.parameters()]
    given = {"concepts": BOXED, "method": method, "num_inference_steps": 1}
    without = latents_of(composer, **given)
    by_net = latents_of(composer, control=Control(model=net, image=image_of()), **given)
    by_adapter = latents_of(composer, control=Control(model=adapter, image=image_of(), scale=5.0), **given)
    assert by_net.isfinite().all()
    assert by_adapter.isfinite().all()
    assert far_apart(by_net, without)
    assert far_apart(by_adapter, without)
    state.assert_unchanged()
    assert all(torch.equal(parameter, before) for parameter, before in zip(net.parameters(), bits, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("method", ["merge", "lora-composer"])
def test_scale_0_is_none(composer, method):
    off = [Control(model=model, image=image_of(), scale=0.0) for model in (net_of(composer), adapter_of(composer))]
    given = {"concepts": BOXED, "method": method, "num_inference_steps": 1}
    assert torch.equal(latents_of(composer, control=off, **given), latents_of(composer, **given))


@pytest.mark.parametrize(("method", "pooled"), [
    ("merge", False), pytest.param("clora", False, marks=pytest.mark.slow),
    (Clora(fuse="branches", uncond="each", branch_batch_size=2), True),
    pytest.param(Clora(fuse="branches", branch_batch_size=1), True, marks=pytest.mark.slow),
])  # fmt: skip
def test_prompts_in_one_call_follow_their_own_images(composer, method, pooled):
    net, adapter, images = net_of(composer), adapter_of(composer), [image_of(1), image_of(2)]
    net.register_to_config(global_pool_conditions=pooled)
    prompts = [PROMPT, "a zwx dog near a sks cat"]
    noise = torch.randn(2, 4, 16, 16, generator=seeded())

    def compose(which: slice) -> Tensor:
        control = [Control(model=model, image=images[which]) for model in (net, adapter)]
        given = {"prompt": prompts[which], "latents": noise[which], "concepts": ["cat", "dog"], "method": method}
        return latents_of(composer, control=control, num_inference_steps=1, **given)

    assert_close(compose(slice(0, 2)), torch.cat([compose(slice(0, 1)), compose(slice(1, 2))]))


@pytest.mark.parametrize("method", slow_but(["regional"], ["regional", "lora-composer"]))
def test_prompts_with_different_concept_sets_follow_their_own_images(composer, method):
    images, prompts = [image_of(1), image_of(2)], [PROMPT, "a zwx dog"]
    concept_sets = [BOXED, [Concept(name="dog", region=LEFT)]]
    noise = torch.randn(2, 4, 16, 16, generator=seeded())

    def compose(which: slice) -> Tensor:
        control = [
            Control(model=net_of(composer), image=images[which], regions={"dog": 0.3}),
            Control(model=adapter_of(composer), image=images[which]),
        ]
        given = {"prompt": prompts[which], "latents": noise[which], "concepts": concept_sets[which], "method": method}
        return latents_of(composer, control=control, num_inference_steps=1, **given)

    assert_close(compose(slice(0, 2)), torch.cat([compose(slice(0, 1)), compose(slice(1, 2))]))


@pytest.mark.parametrize("model_of", [net_of, adapter_of])
def test_regions_apart_see_their_own_part_of_the_image(composer, model_of):
    model, both = model_of(composer), np.array(image_of(1))
    both[:, 64:] = np.array(image_of(2))[:, 64:]
    one, other = (
        latents_of(
            composer, concepts=BOXED, method=LoraComposer(apart=1.0, step_size=0),
            control=Control(model=model, image=image),
        )
        for image in (image_of(1), Image.fromarray(both))
    )  # fmt: skip
    assert torch.equal(one[..., :8], other[..., :8])
    assert far_apart(one[..., 8:], other[..., 8:])


def test_regions_read_their_texts_and_a_controlnet_the_scene_in_plain_words(composer):
    net, seen = net_of(composer), []
    net.register_forward_pre_hook(lambda _, __, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True)
    method = LoraComposer(apart=0.0, step_size=0, reinit="off")
    latents_of(composer, concepts=BOXED, method=method, control=Control(model=net, image=image_of()))
    cond, uncond = composer.encode_prompt("a cat and a dog on grass", torch.device("cpu"), 1, True, "")
    assert len(seen) == 2
    assert all(torch.equal(text, torch.cat([uncond, cond])) for text in seen)


def test_a_callback_that_switches_guidance_off_is_followed(composer):
    net = net_of(composer)

    def switch_off(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe._guidance_scale = 1.0
        return given

    def switch_off_all(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe._guidance_scale = 1.0
            given |= {"prompt_embeds": given["prompt_embeds"][-1:], "image": pixels}
        return given

    plain = diffusers_pipeline(composer, controlnet=net)
    pixels = plain.control_image_processor.preprocess(image_of())
    expected = latents_of(
        plain, image=image_of(), callback_on_step_end=switch_off_all,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    found = composer(
        PROMPT, 128, 128, 2, guidance_scale=4.0, output_type="latent", generator=seeded(), concepts=WEIGHT_0,
        method="merge", control=Control(model=net, image=image_of()), callback_on_step_end=switch_off,
    )  # fmt: skip
    assert_close(found.images, expected)
    assert found.cost.control_rows == 2 + 1


# Gradients


@dataclass(frozen=True)
class Probe(Settings):
    """A method that compares the gradient of a loss on maps with its finite differences, in every step."""

    branch_batch_size: int | None = None

    def start(self, session: Session) -> "Probing":
        gates = constant_gates(session, session.concepts.with_styles(session.concepts.subjects))
        return Probing(session, Pass(one_text(session), gates, branch_batch_size=self.branch_batch_size))


@dataclass(frozen=True)
class Probing:
    session: Session
    spec: Pass

    @property
    def text(self) -> Conditioning:
        return self.spec.text

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        denoiser = self.session.denoiser
        prepared, request = denoiser.prepare(self.spec), MapRequest(self.text.conditional().phrase_mask)

        def loss(maps: AttentionMaps) -> Tensor:
            return maps.text.double().square().sum(dim=(1, 2))

        def at(where: Tensor) -> Tensor:
            return loss(denoiser.maps(where, step, prepared, request)).sum()

        found = denoiser.gradient(latents, step, prepared, MapLoss(request, loss))
        way = torch.randn(latents.shape, generator=seeded(3), dtype=latents.dtype)
        slope = (at(latents + 1e-2 * way) - at(latents - 1e-2 * way)) / 2e-2
        torch.testing.assert_close((found.direction.double() * way).sum(), slope, rtol=2e-3, atol=1e-7)
        return latents, torch.zeros_like(latents)


@pytest.mark.parametrize(
    ("family", "model_of", "branch_batch_size"),
    [
        ("sd", net_of, None),
        ("sd", adapter_of, 1),
        *(pytest.param("sdxl", *case, marks=pytest.mark.slow) for case in ((net_of, 1), (adapter_of, None))),
    ],
)
def test_gradients_go_through_controls(composer, model_of, branch_batch_size):
    control = Control(model=model_of(composer), image=image_of())
    latents_of(
        composer, concepts=["cat", "dog"], control=control, num_inference_steps=1, method=Probe(branch_batch_size),
        prompt=[PROMPT] * 2,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "rows"), [
    pytest.param("merge", 2 * 2, marks=pytest.mark.slow),
    ("composite", 2 * 2 * 2),
    (LoraComposer(apart=0.0, reinit="off", most_updates=0.1), 2 * 2 + 1),
    (LoraComposer(apart=1.0, step_size=0), 2 * 2),  # two halves of the canvas
])  # fmt: skip
def test_rows_through_controlnets_are_counted(composer, method, rows):
    found = composer(
        PROMPT, 128, 128, 2, guidance_scale=4.0, output_type="latent", generator=seeded(), concepts=BOXED,
        method=method, control=[
            Control(model=net_of(composer), image=image_of()),
            Control(model=net_of(composer), image=image_of(), end=0.01),
            Control(model=adapter_of(composer), image=image_of()),
        ],
    )  # fmt: skip
    assert found.cost.control_rows == rows
    assert found.cost.rows_forward + found.cost.rows_stopped == rows


# Scales by region


def prepared(
    pipe: Any, model: Any, *regions: dict[str, Any], width: int = 128, height: int = 128, images: int = 1, **how: Any
) -> Any:
    """A control made ready for one prompt with each of some regions."""
    backbone, device = backbone_of(pipe.unet), torch.device("cpu")
    canvas = Canvas((height, width), (height // 8, width // 8), len(regions), images, device, backbone)
    return prepare_control(Control(model=model, image=image_of(0, (width, height)), **how), pipe.unet, canvas, regions)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_region_has_scale_0_an_adapter_adds_nothing(composer):
    adapter = adapter_of(composer)
    whole = prepared(composer, adapter, {"cat": LEFT, "dog": RIGHT}, scale=0.7)
    half = prepared(composer, adapter, {"cat": LEFT, "dog": RIGHT}, scale=0.7, regions={"cat": 0.0})
    for one, other in zip(whole.features(), half.features(), strict=True):
        middle = one.shape[-1] // 2
        assert not other[..., :middle].any()
        assert torch.equal(other[..., middle:], one[..., middle:])
        assert one[..., :middle].any()


@pytest.mark.parametrize("model_of", slow_but([net_of], [net_of, adapter_of]))
def test_the_same_scale_in_all_regions_is_that_of_the_whole_image(composer, model_of):
    model = model_of(composer)
    given = {"concepts": BOXED, "method": "lora-composer", "num_inference_steps": 1}
    whole = latents_of(composer, control=Control(model=model, image=image_of(), scale=5.0), **given)
    # The scale of the rest does not matter where regions cover everything.
    control = Control(model=model, image=image_of(), scale=0.0, regions={"cat": 5.0, "dog": 5.0})
    assert_close(latents_of(composer, control=control, **given), whole)
    other = Control(model=model, image=image_of(), scale=5.0, regions={"dog": 0.1})
    assert far_apart(latents_of(composer, control=other, **given), whole)


def test_a_scale_by_region_follows_the_prompt_that_has_the_concept(composer):
    boxes = [{"cat": LEFT}, {"cat": RIGHT}, {"dog": LEFT}]
    weights = prepared(composer, net_of(composer), *boxes, images=2, regions={"cat": 0.0}).weights[0]
    assert weights.shape == (6, 1, 16, 16)
    assert [bool(half.any()) for one in weights[::2, 0] for half in one.split(8, dim=1)] == [
        False, True, True, False, True, True,
    ]  # fmt: skip
    assert torch.equal(weights[::2], weights[1::2])


CELL = st.integers(0, 11)


@given(
    corners=st.lists(st.tuples(CELL, CELL, CELL, CELL), min_size=1, max_size=3),
    scales=st.lists(st.floats(-1, 2), min_size=4, max_size=4),
)
def test_scales_by_region_are_means_over_regions_and_cells(corners, scales):
    boxes = [
        (min(x, u) * 8, min(y, v) * 8, (max(x, u) + 1) * 8, (max(y, v) + 1) * 8) for x, y, u, v in corners
    ]  # multiples of a latent cell: what a cell has is then the same in all of its pixels
    names = ["a", "b", "c"][: len(boxes)]
    regions, by_name = dict(zip(names, boxes, strict=True)), dict(zip(names, scales, strict=False))
    control = prepared(composer_of("sd"), _net(), regions, width=96, height=96, scale=scales[3], regions=by_name)
    total, times = np.zeros((96, 96)), np.zeros((96, 96))
    for (left, top, right, bottom), scale in zip(boxes, scales, strict=False):
        total[top:bottom, left:right] += scale
        times[top:bottom, left:right] += 1
    pixels = torch.from_numpy(np.where(times > 0, total / np.maximum(times, 1), scales[3]))[None, None]
    for level in (0, 1):
        expected = F.avg_pool2d(pixels, 8 * 2**level)
        torch.testing.assert_close(control.weights[level].double(), expected, atol=1e-6, rtol=1e-5)


@cache
def _net() -> ControlNetModel:
    return net_of(composer_of("sd"))


def test_a_part_of_an_odd_canvas_has_its_own_scales_and_features(composer):
    net, adapter = (
        prepared(composer, model_of(composer), {"cat": (0, 0, 40, 120)}, width=88, height=120, regions={"cat": 0.0})
        for model_of in (net_of, adapter_of)
    )
    assert isinstance(net, PreparedControlNet)
    assert net.weights is not None
    assert isinstance(adapter, PreparedAdapter)
    view = View((slice(2, 15), slice(4, 11)))
    assert view.of_cells(net.weights[1], 1).shape == (1, 1, 7, 4)
    assert [tuple(one.shape) for one in adapter.features(view.window)] == [(1, 8, 13, 7), (1, 16, 7, 4)]
    assert not adapter.features(view.window)[0][..., :1].any()
    assert torch.equal(view.of_pixels(net.hint, 8), net.hint[..., 16:120, 32:88])


# What does not fit


WIDER = {"projection_class_embeddings_input_dim": 6 * 8 + 20}

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "size": (lambda p: Control(model=net_of(p), image=image_of(0, (96, 128))), "96 x 128 pixels, the canvas 128 x 128"),
    "number": (
        lambda p: Control(model=net_of(p), image=[image_of()] * 3), "there are 3 images and 1 prompts",
    ),
    "channels": (
        lambda p: Control(model=net_of(p), image=torch.zeros(1, 128, 128)), "of 3 channels, and this one has 1",
    ),
    "colour for grey": (
        lambda p: Control(model=adapter_of(p, in_channels=1), image=image_of()), r"convert\('L'\)",
    ),
    "sixteen bits": (
        lambda p: Control(model=net_of(p), image=Image.new("I", (128, 128))), "mode 'I' has no fixed range",
    ),
    "another pooled text": (
        lambda p: Control(model=net_of(xl_pipeline(unet=sdxl_unet(**TINY_XL | WIDER))), image=image_of()),
        "ControlNet is for another model: its (addition_embed_type|projection_class_embeddings_input_dim) is",
    ),
    "another width of text": (
        lambda p: Control(
            model=ControlNetModel.from_config(dict(net_of(p).config) | {"cross_attention_dim": 12}), image=image_of()
        ),
        "cross_attention_dim is 12, the UNet's 24",
    ),
    "another adapter": (
        lambda p: Control(model=adapter_of(p, channels=(8, 12)), image=image_of()), "T2I-Adapter is for another model",
    ),
    "pixels": (
        lambda p: Control(
            model=ControlNetModel.from_unet(p.unet, conditioning_embedding_out_channels=(4, 8)), image=image_of()
        ),
        "downsamples its image by 2; the VAE of this model by 8",
    ),
    "another device": (
        lambda p: Control(model=net_of(p).to("meta"), image=image_of()), "is on meta, the pipeline runs on cpu",
    ),
    "unknown region": (
        lambda p: Control(model=net_of(p), image=image_of(), regions={"bear": 1.0}),
        "name 'bear'; concepts of this call that have a region: 'cat', 'dog'",
    ),
}  # fmt: skip


def test_what_does_not_fit_is_refused_before_anything_is_changed(composer):
    controls = {case: make(composer) for case, (make, _) in WRONG.items()}
    state, timesteps = State(composer), composer.scheduler.timesteps
    for case, control in controls.items():
        with pytest.raises(ValueError, match=WRONG[case][1]):
            latents_of(composer, concepts=BOXED, method="lora-composer", control=control)
    state.assert_unchanged()
    assert composer.scheduler.timesteps is timesteps


def test_sizes_that_an_adapter_cannot_join_are_refused(composer):
    control = Control(model=adapter_of(composer, downscale_factor=16), image=image_of(0, (120, 128)))
    with pytest.raises(ValueError, match="multiples of 16, not 120 x 128"):
        latents_of(composer, concepts=WEIGHT_0, method="merge", control=control, width=120)


def test_a_pooling_controlnet_has_no_scale_per_region(composer):
    net = net_of(composer)
    net.register_to_config(global_pool_conditions=True)
    control = Control(model=net, image=image_of(), regions={"cat": 0.5})
    with pytest.raises(ValueError, match="cannot have a scale per region"):
        latents_of(composer, concepts=BOXED, method="merge", control=control)


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ({"start": 0.5, "end": 0.5}, ValueError, "0 <= start < end <= 1, not from 0.5 to 0.5"),
    ({"end": 1.5}, ValueError, "start < end <= 1"),
    ({"scale": float("nan")}, ValueError, "finite number, not nan"),
    ({"regions": {"cat": float("inf")}}, ValueError, "finite number, not inf"),
    ({"model": nn.Linear(1, 1)}, TypeError, "ControlNetModel or a T2IAdapter of diffusers, not a Linear"),
])  # fmt: skip
def test_controls_that_cannot_be_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        Control(**{"model": _net(), "image": image_of(), **wrong})


@pytest.mark.parametrize("image", ["pose.png", torch.zeros(3, 128, 128, dtype=torch.uint8), np.zeros((128, 128, 3))])
def test_what_is_no_image_is_refused(composer, image):
    with pytest.raises(TypeError, match="PIL image or a floating-point tensor"):
        latents_of(composer, concepts=WEIGHT_0, control=Control(model=net_of(composer), image=image))


@pytest.mark.parametrize("control", [0.5, ["pose.png"]])
def test_what_is_no_control_is_refused(composer, control):
    with pytest.raises(TypeError, match=r"takes a Control\(model=..., image=...\) or a list"):
        latents_of(composer, concepts=WEIGHT_0, control=control)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_concepts_controls_are_refused_and_none_are_fine(composer, family):
    with pytest.raises(ValueError, match=r"control needs concepts.*StableDiffusionControlNetPipeline"):
        latents_of(composer, control=Control(model=net_of(composer), image=image_of()))
    plain = latents_of(composer)
    assert torch.equal(latents_of(composer, control=[]), plain)


def test_a_model_of_another_precision_works(composer):
    control = [Control(model=model, image=image_of()) for model in (net_of(composer), adapter_of(composer))]
    half = copy.deepcopy(composer).to(torch.bfloat16)
    found = latents_of(half, concepts=BOXED, method="lora-composer", control=control)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "expected"), [("SD 1.5", 0.35), ("SDXL", 0.45)])
def test_what_a_row_costs_on_the_whole_architecture_is_what_the_docs_say(family: str, expected: float) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[family])
        net = ControlNetModel.from_unet(unet)
        side, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, 77, width)}
        if family == "SDXL":
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
            inputs["added_cond_kwargs"] = added
        latents, time = torch.empty(1, 4, side, side), torch.tensor(0)
        hint = torch.empty(1, 3, 8 * side, 8 * side)
    counted = []
    for run in (lambda: unet(latents, time, **inputs), lambda: net(latents, time, controlnet_cond=hint, **inputs)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    assert counted[1] / counted[0] == pytest.approx(expected, abs=0.006)
