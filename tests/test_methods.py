"""Methods against independent references: diffusers' own LoRAs, and formulas written out with forward hooks."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from lora_compose.pipelines.engine import masks_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components import EVERYTHING, random_lora, sd_unet, small_pipeline, text_loras
from lora_compose.attention import Gates, Lora, LoraFactors, attention_layers, install, places
from lora_compose.pipelines.families.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.methods import (
    METHODS,
    PRESETS,
    Clora,
    LoraComposer,
    Merge,
    Regional,
    Tara,
    make_method,
    name_of,
)
from lora_compose.pipelines.methods.regional import TokenMask
from lora_compose.pipelines.methods.tara import CfgMask, Scope
from lora_compose.pipelines.scene import Concept

PROMPT = "a sks cat, a zwx dog, a mjq bear"
TRIGGERS = {"cat": "sks", "dog": "zwx", "bear": "mjq"}
# Token positions of the triggers, counted by hand: 0 is the start token and "mjq" has three tokens.
POSITIONS: dict[str, tuple[int, ...]] = {"cat": (2,), "dog": (6,), "bear": (10, 11, 12)}
PHRASES: dict[str, tuple[int, ...]] = {"cat": (2, 3), "dog": (6, 7), "bear": (10, 11, 12, 13)}
OTHER_PROMPT = "mjq sks cat zwx and a sks"
OTHER_POSITIONS: dict[str, tuple[int, ...]] = {"cat": (4, 9), "dog": (6,), "bear": (1, 2, 3)}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
WEIGHTS = (0.8, -0.5, 1.3)
PIPELINES = (ComposeStableDiffusionPipeline, StableDiffusionPipeline)
# Two levels of one layer each, where the structure of the UNet does not matter.
TINY: dict[str, Any] = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def denoise(pipe: Any, prompt: str | list[str] = PROMPT, **arguments: Any) -> Any:
    images = (len(prompt) if isinstance(prompt, list) else 1) * arguments.get("num_images_per_prompt", 1)
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": [seeded(k) for k in range(images)]}
    return pipe(prompt, **given | arguments)


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def far_apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


def loras_of(pipe: Any, names: Sequence[str]) -> list[Lora]:
    """Factors of different ranks and scales for every kind of layer, strongest where text comes in."""
    return [
        {
            **random_lora(pipe.unet, seed, rank=2 + seed, scale=0.5 + seed, targets=EVERYTHING, size=0.08),
            **random_lora(
                pipe.unet, seed, rank=2 + seed, scale=0.5 + seed, targets=("attn2.to_k", "attn2.to_v"), size=0.4
            ),
        }
        for seed, _ in enumerate(names)
    ]


def load(
    pipe: Any, write_lora: Any, names: Sequence[str], loras: Sequence[Lora], method: str = "tara"
) -> list[Concept]:
    """Loads concepts with a weight each and returns them."""
    concepts = []
    for name, lora, weight in zip(names, loras, WEIGHTS, strict=False):
        path = write_lora(f"{name}-file", unet=lora, metadata={"method": method})
        concepts.append(pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name, weight=weight))
    return concepts


# Merge


@pytest.mark.parametrize(("family", "names", "arguments"), [
    ("sd", ["cat"], {"guidance_scale": 1.0}),
    ("sd", ["cat", "dog"], {"prompt": [PROMPT, OTHER_PROMPT], "num_images_per_prompt": 2}),
    ("sd", ["cat", "dog", "bear"], {"negative_prompt": "dark"}),
    ("sdxl", ["cat", "dog"], {"prompt": [PROMPT, OTHER_PROMPT], "negative_prompt": ["dark", "sks"]}),
])  # fmt: skip
def test_merge_equals_the_adapters_of_diffusers_text_encoder_included(pipe, plain_pipe, write_lora, names, arguments):
    weights = WEIGHTS[: len(names)]
    for seed, (name, lora) in enumerate(zip(names, loras_of(pipe, names), strict=True)):
        path = write_lora(name, unet=lora, **text_loras(pipe, 10 + seed, TEXT_LAYERS, size=0.2))
        plain_pipe.load_lora_weights(path, adapter_name=name)
        pipe.load_concept(path, name)
    plain_pipe.set_adapters(names, list(weights))
    expected = denoise(plain_pipe, **arguments).images
    concepts = [Concept(name=name, weight=weight) for name, weight in zip(names, weights, strict=True)]
    assert_close(denoise(pipe, concepts=concepts, method="merge", **arguments).images, expected)


def test_merge_uses_text_encoder_factors_and_leaves_the_text_encoder_as_it_was(pipe, write_lora):
    (lora,) = loras_of(pipe, ["cat"])
    text = random_lora(pipe.text_encoder, 10, targets=TEXT_LAYERS)
    pipe.load_concept(write_lora("with", unet=lora, text_encoder=text))
    pipe.load_concept(write_lora("without", unet=lora))
    pipe.load_concept(write_lora("text only", text_encoder=text))
    bits = {name: tensor.clone() for name, tensor in pipe.text_encoder.state_dict().items()}
    without = denoise(pipe, concepts=["without"], method="merge").images
    assert far_apart(denoise(pipe, concepts=["with"], method="merge").images, without)
    assert far_apart(denoise(pipe, concepts=["text only"], method="merge").images, denoise(pipe).images)
    after = pipe.text_encoder.state_dict()
    assert after.keys() == bits.keys()
    assert all(torch.equal(after[name], bits[name]) for name in bits)


# TARA and regional, written out


def dense(factors: LoraFactors) -> Tensor:
    return factors.scale * torch.einsum("or,r...->o...", factors.up.flatten(1), factors.down)


def written_out(
    unet: UNet2DConditionModel,
    loras: Sequence[Lora],
    tokens: dict[int, Tensor],
    *,
    rows: dict[int, Tensor],
    regions: Sequence[tuple[int, int, int, int] | None] | None = None,
    image_size: tuple[int, int] = (128, 128),
) -> UNet2DConditionModel:
    """Adds to the output of every layer the dense deltas of all concepts, one after the other.

    tokens: for attn2.to_k and to_v, by number of rows: [rows, tokens, concepts], weights included.
    rows: for all other layers, by number of rows: [rows, concepts], weights included.
    """
    height, width = image_size
    grids = [(-(-height // 2**level), -(-width // 2**level)) for level in range(3, 7)]

    def region(concept: int, grid: tuple[int, int]) -> Tensor:
        if regions is None or regions[concept] is None:
            return torch.ones(grid)
        left, top, right, bottom = regions[concept]  # pyright: ignore[reportGeneralTypeIssues]
        pixels = torch.zeros(1, height, width)
        pixels[:, top:bottom, left:right] = 1
        covered = F.avg_pool2d(pixels, (height // grid[0], width // grid[1]))[0]
        return covered / covered.max()

    def hook_of(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            for concept, lora in enumerate(loras):
                if name not in lora:
                    continue
                delta = dense(lora[name])
                if isinstance(module, nn.Conv2d):
                    change = F.conv2d(x, delta, stride=module.stride, padding=module.padding)  # pyright: ignore[reportArgumentType]
                    gate = rows[len(x)][:, concept, None, None, None] * region(
                        concept, (change.shape[2], change.shape[3])
                    )
                else:
                    change = F.linear(x, delta)
                    if name.endswith(("attn2.to_k", "attn2.to_v")):
                        gate = tokens[len(x)][:, :, concept, None]
                    elif x.ndim == 3:
                        (grid,) = [grid for grid in grids if grid[0] * grid[1] == x.shape[1]]
                        gate = rows[len(x)][:, concept, None, None] * region(concept, grid).flatten()[:, None]
                    else:
                        gate = rows[len(x)][:, concept, None]
                output = output + gate * change
            return output

        return hook

    for name, module in unet.named_modules():
        if any(name in lora for lora in loras):
            module.register_forward_hook(hook_of(name))
    return unet


def token_rows(prompts: list[str], names: Sequence[str], images: int, uncond: str | None) -> Tensor:
    """[rows, tokens, concepts], by hand: rows of one prompt are adjacent, those without text come first."""
    mask = torch.zeros(len(prompts), 32, len(names))
    for row, prompt in enumerate(prompts):
        for column, name in enumerate(names):
            mask[row, list((POSITIONS if prompt == PROMPT else OTHER_POSITIONS)[name]), column] = WEIGHTS[column]
    cond = torch.stack([mask[row] for row in range(len(prompts)) for _ in range(images)])
    if uncond is None:
        return cond
    return torch.cat([cond if uncond == "broadcast" else torch.zeros_like(cond), cond])


TARA_CALLS: list[tuple[list[str], list[str], int, dict[str, Any]]] = [
    (["cat"], [PROMPT], 1, {"negative_prompt": "sks, zwx"}),
    (["cat", "dog", "bear"], [PROMPT], 1, {"width": 96, "height": 64, "negative_prompt": "sks, zwx"}),
    (["cat", "bear", "dog"], [PROMPT, OTHER_PROMPT], 2, {}),
    (["cat", "dog", "bear"], [OTHER_PROMPT, PROMPT], 1, {"guidance_scale": 1.0}),
]
TARA_CASES = [
    *(("sd", rows, scope, *call) for call in TARA_CALLS for rows in get_args(CfgMask) for scope in get_args(Scope)),
    ("sdxl", "cond_only", "all", *TARA_CALLS[2]),
    ("sdxl", "broadcast", "cross_kv", *TARA_CALLS[0]),
]


@pytest.mark.parametrize(("family", "cfg_mask", "scope", "names", "prompts", "images", "arguments"), TARA_CASES)
def test_tara_equals_its_formula(pipe, plain_pipe, write_lora, cfg_mask, scope, names, prompts, images, arguments):
    loras = loras_of(pipe, names)
    load(pipe, write_lora, names, loras)
    if "negative_prompt" in arguments:
        arguments = arguments | {"negative_prompt": [arguments["negative_prompt"]] * len(prompts)}
    arguments = {"prompt": prompts, "num_images_per_prompt": images, **arguments}
    guided = arguments.get("guidance_scale", 7.5) > 1
    tokens = token_rows(prompts, names, images, cfg_mask if guided else None)
    constant = torch.tensor(WEIGHTS[: len(names)]) * (scope == "all")
    size = arguments.get("height", 128), arguments.get("width", 128)
    written_out(
        plain_pipe.unet, loras, {len(tokens): tokens}, rows={len(tokens): constant.expand(len(tokens), -1)},
        image_size=size,
    )  # fmt: skip
    expected = denoise(plain_pipe, **arguments).images
    method = Tara(cfg_mask=cfg_mask, scope=scope)
    assert_close(denoise(pipe, concepts=names, method=method, **arguments).images, expected)


def test_every_setting_and_every_region_makes_another_image(pipe, write_lora):
    names = ["cat", "dog"]
    load(pipe, write_lora, names, loras_of(pipe, names))
    left = [Concept(name="cat", region=(0, 0, 64, 128)), "dog"]
    right = [Concept(name="cat", region=(64, 0, 128, 128)), "dog"]
    runs = [(None, None), (names, "merge"), (left, Regional()), (right, Regional())]
    runs += [(left, Regional(rows="all")), (left, Regional(token_mask="none"))]
    runs += [(names, Tara(cfg_mask=rows, scope=scope)) for rows in get_args(CfgMask) for scope in get_args(Scope)]
    images = [denoise(pipe, concepts=concepts, method=method).images for concepts, method in runs]
    assert all(far_apart(one, other) for one, other in combinations(images, 2))


@pytest.mark.parametrize("rows", ["cond_only", "all"])
@pytest.mark.parametrize("token_mask", get_args(TokenMask))
@pytest.mark.parametrize(("width", "height", "regions"), [
    (128, 128, [(0, 0, 64, 128), (64, 0, 128, 128)]),
    (96, 64, [(0, 8, 48, 64), None]),
])  # fmt: skip
def test_regional_equals_its_formula(pipe, plain_pipe, write_lora, rows, token_mask, width, height, regions):
    names = ["cat", "dog"]
    loras = loras_of(pipe, names)
    trained_with = {"cat": "tara", "dog": "dreambooth"}
    for name, lora, weight in zip(names, loras, WEIGHTS, strict=False):
        path = write_lora(f"{name}-file", unet=lora, metadata={"method": trained_with[name]})
        pipe.load_concept(path, name, trigger=TRIGGERS[name], class_word=name, weight=weight)
    tokens = token_rows([PROMPT], names, 1, "cond_only")
    weights = torch.tensor(WEIGHTS[:2])
    acting = torch.tensor([0.0 if rows == "cond_only" else 1.0, 1.0])
    everywhere = (acting[:, None] * weights)[:, None].expand(2, 32, 2)
    masked = {"tara": [True, False], "all": [True, True], "none": [False, False]}[token_mask]
    tokens = torch.where(torch.tensor(masked), tokens, everywhere)
    written_out(
        plain_pipe.unet, loras, {2: tokens}, rows={2: acting[:, None] * weights}, regions=regions,
        image_size=(height, width),
    )  # fmt: skip
    expected = denoise(plain_pipe, width=width, height=height).images
    concepts = [Concept(name=name, region=region) for name, region in zip(names, regions, strict=True)]
    method = Regional(rows=rows, token_mask=token_mask)
    assert_close(denoise(pipe, concepts=concepts, method=method, width=width, height=height).images, expected)


@pytest.mark.parametrize("method", ["merge", "tara"])
def test_guidance_that_a_callback_switches_off_gives_what_a_loop_by_hand_gives(pipe, plain_pipe, write_lora, method):
    names = ["cat", "dog"]
    loras = loras_of(pipe, names)
    load(pipe, write_lora, names, loras)
    weights = torch.tensor(WEIGHTS[:2])
    tokens = token_rows([PROMPT, OTHER_PROMPT], names, 1, "cond_only")
    if method == "merge":
        tokens = weights.expand(4, 32, 2)
    written_out(
        plain_pipe.unet, loras, {4: tokens, 2: tokens[2:]}, rows={n: weights.expand(n, 2) for n in (2, 4)}
    )  # fmt: skip
    cond, uncond = plain_pipe.encode_prompt([PROMPT, OTHER_PROMPT], torch.device("cpu"), 1, True)
    scheduler = plain_pipe.scheduler
    scheduler.set_timesteps(4)
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=seeded(seed)) for seed in range(2)])
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            if step <= 1:
                output = plain_pipe.unet(torch.cat([latents, latents]), t, torch.cat([uncond, cond])).sample
                output = output[:2] + 5.0 * (output[2:] - output[:2])
            else:
                output = plain_pipe.unet(latents, t, cond).sample
            latents = scheduler.step(output, t, latents).prev_sample
    composed = denoise(
        pipe, [PROMPT, OTHER_PROMPT], concepts=names, method=method, num_inference_steps=4, guidance_scale=5.0,
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25),
    )  # fmt: skip
    assert_close(composed.images, latents)
    assert composed.cost.rows_forward == 4 + 4 + 2 + 2


def test_tara_leaves_text_encoder_factors_out_and_says_so_once(pipe, write_lora, caplog):
    (lora,) = loras_of(pipe, ["cat"])
    text = random_lora(pipe.text_encoder, 10, targets=TEXT_LAYERS)
    options = {"trigger": "sks", "class_word": "cat"}
    pipe.load_concept(write_lora("cat that changes text", unet=lora, text_encoder=text), **options)
    pipe.load_concept(write_lora("cat", unet=lora), **options)
    expected = denoise(pipe, concepts=["cat"], method="tara").images
    caplog.clear()
    for _ in range(2):
        assert torch.equal(denoise(pipe, concepts=["cat that changes text"], method="tara").images, expected)
    said = [r.getMessage() for r in caplog.records if "leaves out the text-encoder part" in r.getMessage()]
    assert said == [
        "tara leaves out the text-encoder part of 'cat that changes text': it would change every later token"
    ]


def test_tara_says_so_once_if_a_lora_was_not_trained_for_it(pipe, write_lora, caplog):
    names = ["cat", "dog"]
    load(pipe, write_lora, names[:1], loras_of(pipe, names[:1]), method="tara")
    pipe.load_concept(pipe.concepts["cat"].lora, "trained for tara", trigger="sks")
    lora = random_lora(pipe.unet, 3)
    pipe.load_concept(write_lora("trained otherwise", unet=lora, metadata={"method": "dreambooth"}), trigger="zwx")
    for _ in range(2):
        denoise(pipe, concepts=["trained for tara", "trained otherwise"], method="tara", num_inference_steps=1)
    said = [r.getMessage() for r in caplog.records if "trained with TARA" in r.getMessage()]
    assert said == ["'trained otherwise' does not say that it was trained with TARA: tara is a plain token mask for it"]


def test_tara_refuses_a_lora_for_the_text_encoder_alone(pipe, write_lora):
    text = random_lora(pipe.text_encoder, 10, targets=TEXT_LAYERS)
    pipe.load_concept(write_lora("cat", text_encoder=text), trigger="sks")
    with pytest.raises(
        ValueError, match="'cat' changes only the text encoder, which tara leaves alone; use method='merge'"
    ):
        denoise(pipe, concepts=["cat"], method="tara")


# Settings


def test_methods_are_made_by_name_with_their_settings():
    assert make_method("merge") == Merge()
    assert make_method("tara") == Tara() == Tara(cfg_mask="cond_only", scope="all")
    assert make_method("tara", {"scope": "cross_kv"}) == Tara(scope="cross_kv")
    assert Tara.official() == Tara(cfg_mask="broadcast", scope="all")
    settings = Tara(cfg_mask="broadcast")
    assert make_method(settings) is settings
    assert {type(make_method(name)) for name in METHODS} == set(METHODS.values())


def test_settings_of_the_authors_have_names() -> None:
    assert make_method("clora:official") == Clora.official()
    assert make_method("lora-composer:paper", {"apart": 0.5}) == replace(LoraComposer.paper(), apart=0.5)
    assert PRESETS.keys() == {"tara:official", "lora-composer:official", "lora-composer:paper", "clora:official"}


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_a_method_is_made_again_from_its_name_and_what_differs(name: str) -> None:
    settings = make_method(name)
    method, differing = name_of(settings)
    assert make_method(method, differing) == settings
    assert bool(differing) == (name in PRESETS)


@pytest.mark.parametrize(("method", "settings", "message"), [
    ("blend", None, "unknown method 'blend'; there are .*merge.*tara"),
    ("clora:offical", None, "unknown method 'clora:offical'; there are .*clora:official"),
    ("tara", {"scop": "all"}, r"tara has no settings \['scop'\]; it has cfg_mask, scope"),
    ("tara", {"scope": "some"}, "scope must be one of all, cross_kv, not 'some'"),
    ("tara", {"cfg_mask": None}, "cfg_mask must be one of cond_only, broadcast, not None"),
    ("merge", {"scope": "all"}, r"merge has no settings \['scope'\]; it has none"),
    (Tara, None, "method must be one of .*merge.* or a settings object"),
    (None, None, "method must be one of .*merge.* or a settings object"),
])  # fmt: skip
def test_methods_and_settings_that_there_are_not_are_refused_by_name(method, settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(method, settings)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Tara().scope = "cross_kv"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_method_of_ones_own_can_be_passed(pipe, write_lora):
    class Half:
        def start(self, engine):
            process = Merge().start(engine)
            outer = process.step

            class Process:
                prepare = staticmethod(process.prepare)

                def step(self, latents, t):
                    latents, output = outer(latents, t)
                    return latents, output * 0.5

            return Process()

    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    ours = denoise(pipe, concepts=["cat"], method=Half(), num_inference_steps=1).images
    assert far_apart(ours, denoise(pipe, concepts=["cat"], method="merge", num_inference_steps=1).images)


# Cost


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["merge", "tara"])
def test_a_step_after_the_first_costs_no_more_than_in_diffusers(write_lora, method):
    pipe, plain_pipe = (small_pipeline(kind, sd_unet(**TINY)) for kind in PIPELINES)
    triggers = ["sks", "zwx", "xlo", "ohwx", "qrt", "pll", "vbn", "mjq"]
    for seed, trigger in enumerate(triggers):
        path = write_lora(trigger, unet=random_lora(pipe.unet, seed, rank=2), metadata={"method": "tara"})
        pipe.load_concept(path, trigger=trigger)

    def second_step(pipe: Any, **arguments: Any) -> int:
        totals = []

        def read(pipe, step, timestep, tensors):
            totals.append(counter.get_total_flops())
            return tensors

        with FlopCounterMode(display=False) as counter:
            denoise(pipe, " ".join(triggers), callback_on_step_end=read, **arguments)
        return totals[1] - totals[0]

    plain = second_step(plain_pipe)
    for concepts in (1, 2, 4, 8):
        assert 0.5 * plain < second_step(pipe, concepts=triggers[:concepts], method=method) <= 1.02 * plain


def test_in_the_size_of_stable_diffusion_a_step_after_the_first_costs_no_more_than_in_diffusers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        latents, text = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
        factors: Lora = {
            name: LoraFactors(torch.empty(8, module.in_features), torch.empty(module.out_features, 8))
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
        }
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert len(factors) == 128
    timestep = torch.tensor(1, device="meta")

    def forward() -> Tensor:
        return unet(latents, timestep, text).sample

    plain = flops(forward)
    levels = {place.level for place in places(unet).values()}
    assert len(attention_layers(unet)) == 32
    for concepts in (1, 2, 4, 8):
        ones = torch.ones(1, 1, concepts, device="meta")
        image = dict.fromkeys(levels, ones)
        gates = Gates(torch.ones(2, 77, concepts, device="meta"), image, ones[0], (64, 64))
        with install(unet, [factors] * concepts, device=torch.device("meta"), dtype=torch.float32) as installation:
            assert installation.fold(("image", "row"), [1.0] * concepts) == 96
            installation.use(gates, text)
            forward()
            installation.use(gates, text)
            assert 0.98 * plain < flops(forward) <= plain


# Attention maps


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


@pytest.mark.parametrize(("guidance_scale", "width", "height"), [(5.0, 128, 128), (5.0, 96, 64), (1.0, 64, 96)])
def test_recorded_attention_is_that_of_diffusers(pipe, plain_pipe, write_lora, guidance_scale, width, height):
    names = ["cat", "dog", "bear"]
    loras = loras_of(pipe, names)
    load(pipe, write_lora, names, loras)
    tokens = token_rows([PROMPT], names, 2, "cond_only" if guidance_scale > 1 else None)
    weights = torch.tensor(WEIGHTS).expand(len(tokens), -1)
    written_out(plain_pipe.unet, loras, {len(tokens): tokens}, rows={len(tokens): weights}, image_size=(height, width))
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


def test_attention_to_all_words_of_a_cell_is_at_most_one(pipe, write_lora):
    names = ["cat", "dog", "bear"]
    load(pipe, write_lora, names, loras_of(pipe, names))
    maps = denoise(pipe, concepts=names, method="tara", record_attention=True).attention_maps
    lengths = torch.tensor([len(PHRASES[name]) for name in names])
    assert (maps > 0).all()
    assert ((maps * lengths[:, None, None]).sum(dim=2) < 1).all()


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


@pytest.mark.parametrize(("wanted", "steps"), [([0], (0,)), ([-1], (1,)), ([1, 0, -2], (0, 1)), (range(2), (0, 1))])
def test_single_steps_can_be_recorded(pipe, write_lora, wanted, steps):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    everything = denoise(pipe, concepts=["cat"], method="tara", record_attention=True)
    output = denoise(pipe, concepts=["cat"], method="tara", record_attention=wanted)
    assert output.recorded_steps == steps
    assert torch.equal(output.attention_maps, everything.attention_maps[list(steps)])
    assert torch.equal(output.images, everything.images)


@pytest.mark.parametrize("off", [False, []])
def test_without_recording_there_are_no_maps_and_the_image_is_the_same(pipe, write_lora, off):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    output = denoise(pipe, concepts=["cat"], method="tara", record_attention=off)
    assert output.attention_maps is output.masks is output.recorded_steps is None
    assert torch.equal(output.images, denoise(pipe, concepts=["cat"], method="tara", record_attention=True).images)


def test_maps_of_a_concept_without_a_trigger_are_empty(pipe, write_lora):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    pipe.load_concept(pipe.concepts["cat"].lora, "style")
    output = denoise(pipe, concepts=["cat", "style"], method="merge", record_attention=True)
    assert (output.attention_maps[:, :, 1] == 0).all()
    assert (output.attention_maps[:, :, 0] > 0).all()
    assert not output.masks[:, :, 1].any()


# The same run gives the same image

PLAYGROUND = """
import sys, torch
from hashlib import sha256
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.base import ComposePipeline

torch.set_num_threads(1)
pipe = ComposePipeline.from_pretrained(playground_model())
for name in ("cat", "dog"):
    pipe.load_concept(playground_lora(f"{name}-tara"), name)
for method in ("merge", "tara"):
    generator = torch.Generator().manual_seed(7)
    latents = pipe("sks cat and zwx dog on grass", concepts=["cat", "dog"], method=method, num_inference_steps=3,
                   generator=generator, output_type="latent").images
    print(sha256(latents.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_run_gives_the_same_bits_in_this_process_and_in_another(playground):
    def digests() -> list[str]:
        found = []
        for method in ("merge", "tara"):
            latents = playground(
                "sks cat and zwx dog on grass", concepts=["cat", "dog"], method=method, num_inference_steps=3,
                generator=seeded(7), output_type="latent",
            ).images  # fmt: skip
            found.append(sha256(latents.numpy().tobytes()).hexdigest())
        return found

    root = Path(__file__).parents[1]
    other = subprocess.run(
        [sys.executable, "-c", PLAYGROUND], cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    here = digests()
    assert here == digests() == other.stdout.split()
    assert here[0] != here[1]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' DPM with numpy 2
def test_noise_comes_from_the_generator_alone(pipe, write_lora):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    images = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        images.append(denoise(pipe, concepts=["cat"], method="tara").images)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*images)
    assert far_apart(images[0], denoise(pipe, concepts=["cat"], method="tara", generator=seeded(5)).images)
