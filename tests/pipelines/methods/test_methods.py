"""Methods against independent references: diffusers' own LoRAs, and formulas written out with forward hooks."""

import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comparisons import assert_close, far_apart
from components import FAMILIES, random_lora, seeded, text_loras, tiny_pipeline
from composing import PLAIN
from lora_compose.pipelines.denoising.process import Needs
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.methods import (
    METHODS,
    PRESETS,
    Clora,
    LoraComposer,
    Merge,
    Regional,
    Settings,
    Tara,
    make_method,
    name_of,
)
from lora_compose.pipelines.methods.tara import CfgMask, Scope
from lora_compose.pipelines.scene.canvas import Step
from lora_compose.pipelines.scene.scene import Concept
from norm_reference import RegionNormHook
from pairs import in_pairs
from reference import add_reference, with_reference
from three_concepts import (
    OTHER_PROMPT,
    PROMPT,
    TEXT_LAYERS,
    TRIGGERS,
    WEIGHTS,
    denoise,
    full_gates,
    load,
    loras_of,
    token_rows,
)


@pytest.fixture
def pipe(family: str) -> Any:
    """A still smaller pipeline than the common one."""
    return FAMILIES[family]()


@pytest.fixture
def plain_pipe(family: str) -> Any:
    """diffusers' own pipeline with the same weights as `pipe`."""
    return FAMILIES[family](PLAIN[family])


# Merge


@pytest.mark.parametrize(("family", "names", "arguments"), [
    ("sd", ["cat"], {"guidance_scale": 1.0, "prompt": [PROMPT, OTHER_PROMPT], "num_images_per_prompt": 2}),
    pytest.param("sd", ["cat", "dog"], {"negative_prompt": "dark"}, marks=pytest.mark.slow),
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


# TARA and regional


TARA_CALLS: list[tuple[list[str], list[str], int, dict[str, Any]]] = [
    (["cat"], [PROMPT], 1, {"negative_prompt": "sks, zwx"}),
    (["cat", "dog", "bear"], [PROMPT], 1, {"width": 96, "height": 64, "negative_prompt": "sks, zwx"}),
    (["cat", "bear", "dog"], [PROMPT, OTHER_PROMPT], 2, {}),
    (["cat", "dog", "bear"], [OTHER_PROMPT, PROMPT], 1, {"guidance_scale": 1.0}),
]
TARA_CASES = [
    *in_pairs([("sd", *call) for call in TARA_CALLS], product(get_args(CfgMask), get_args(Scope))),
    ("sdxl", *TARA_CALLS[2], "cond_only", "all"),
    ("sdxl", *TARA_CALLS[0], "broadcast", "cross_kv"),
]


@pytest.mark.parametrize(("family", "names", "prompts", "images", "arguments", "cfg_mask", "scope"), TARA_CASES)
def test_tara_equals_its_formula(pipe, plain_pipe, write_lora, names, prompts, images, arguments, cfg_mask, scope):
    loras = loras_of(pipe, names)
    load(pipe, write_lora, names, loras)
    if "negative_prompt" in arguments:
        arguments = arguments | {"negative_prompt": [arguments["negative_prompt"]] * len(prompts)}
    arguments = {"prompt": prompts, "num_images_per_prompt": images, **arguments}
    guided = arguments.get("guidance_scale", 7.5) > 1
    tokens = token_rows(prompts, names, images, cfg_mask if guided else None)
    constant = torch.tensor(WEIGHTS[: len(names)]) * (scope == "all")
    size = arguments.get("height", 128), arguments.get("width", 128)
    add_reference(plain_pipe.unet, loras, full_gates(tokens, constant, image_size=size))
    expected = denoise(plain_pipe, **arguments).images
    method = Tara(cfg_mask=cfg_mask, scope=scope)
    assert_close(denoise(pipe, concepts=names, method=method, **arguments).images, expected)


REGIONAL = [("cond_only", "tara", 0.5), ("cond_only", "all", 0.0), ("all", "none", 1.0), ("all", "tara", 0.0)]
PLACES = [(128, 128, [(0, 0, 64, 128), (64, 0, 128, 128)]), (96, 64, [(0, 8, 48, 64), None])]


@pytest.mark.parametrize(("rows", "token_mask", "norm_apart", "width", "height", "regions"), in_pairs(REGIONAL, PLACES))
def test_regional_equals_its_formula(
    pipe, plain_pipe, write_lora, rows, token_mask, norm_apart, width, height, regions
):
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
    gates = full_gates(tokens, acting[:, None] * weights, regions=regions, image_size=(height, width))
    add_reference(plain_pipe.unet, loras, gates)
    placed = [index for index, region in enumerate(regions) if region is not None]
    masks = {grid: (gate[1] / weights).movedim(-1, 0)[None, placed] for grid, gate in gates.image.items()}
    RegionNormHook(plain_pipe.unet, masks, round(2 * norm_apart))
    expected = denoise(plain_pipe, width=width, height=height).images
    concepts = [Concept(name=name, region=region) for name, region in zip(names, regions, strict=True)]
    method = Regional(rows=rows, token_mask=token_mask, norm_apart=norm_apart)
    assert_close(denoise(pipe, concepts=concepts, method=method, width=width, height=height).images, expected)


def test_a_concept_that_only_one_prompt_names_changes_the_other_as_in_a_call_of_its_own(pipe, write_lora):
    load(pipe, write_lora, ["cat", "dog"], loras_of(pipe, ["cat", "dog"]))
    sets = [Concept(name="cat", region=(0, 0, 32, 64)), Concept(name="dog", region=(32, 0, 64, 64), prompt="a zwx dog")]
    prompts = [PROMPT, PROMPT.replace(TRIGGERS["dog"], "small")]
    given = {"method": Regional(token_mask="all"), "concepts": sets, "width": 64, "height": 64}
    together = denoise(pipe, prompt=prompts, generator=[seeded(0), seeded(1)], **given).images
    for i, prompt in enumerate(prompts):
        assert_close(denoise(pipe, prompt=prompt, generator=seeded(i), **given).images, together[i : i + 1])


def test_guidance_that_a_callback_switches_off_gives_what_a_loop_by_hand_gives(pipe, plain_pipe, write_lora):
    names = ["cat", "dog"]
    loras = loras_of(pipe, names)
    load(pipe, write_lora, names, loras)
    weights = torch.tensor(WEIGHTS[:2])
    tokens = token_rows([PROMPT, OTHER_PROMPT], names, 1, "cond_only")
    guided, unguided = (
        with_reference(plain_pipe.unet, loras, full_gates(rows, weights)) for rows in (tokens, tokens[2:])
    )
    cond, uncond = plain_pipe.encode_prompt([PROMPT, OTHER_PROMPT], torch.device("cpu"), 1, True)
    scheduler = plain_pipe.scheduler
    scheduler.set_timesteps(4)
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=seeded(seed)) for seed in range(2)])
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            if step <= 1:
                output = guided(torch.cat([latents, latents]), t, torch.cat([uncond, cond])).sample
                output = output[:2] + 5.0 * (output[2:] - output[:2])
            else:
                output = unguided(latents, t, cond).sample
            latents = scheduler.step(output, t, latents).prev_sample
    composed = denoise(
        pipe, [PROMPT, OTHER_PROMPT], concepts=names, method="tara", num_inference_steps=4, guidance_scale=5.0,
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


NEEDS = {
    "merge": Needs(),
    "tara": Needs(),
    "regional": Needs(),
    "switch": Needs(),
    "composite": Needs(),
    "lora-composer": Needs(region_attention=True, gradients=True),
    "lora-composer:official": Needs(region_attention=True, gradients=True, start_noise=True),
    "clora": Needs(region_attention=True, gradients=True),
    "clora:official": Needs(gradients=True),
    "draft": Needs(),
    "freefuse": Needs(),
}


def test_every_method_declares_what_it_needs():
    assert {**dict.fromkeys(METHODS), **NEEDS} == NEEDS
    assert {name: make_method(name).needs for name in NEEDS} == NEEDS


def test_needs_that_do_not_exist_cannot_be_declared():
    with pytest.raises(TypeError, match="regions_attention"):
        Needs(regions_attention=True)  # pyright: ignore[reportCallIssue]


def test_methods_are_made_by_name_with_their_settings():
    assert make_method("merge") == Merge()
    assert make_method("tara") == Tara() == Tara(cfg_mask="cond_only", scope="all")
    assert make_method("tara", {"scope": "cross_kv"}) == Tara(scope="cross_kv")
    assert Tara.official() == Tara(cfg_mask="broadcast", scope="all")
    settings = Tara(cfg_mask="broadcast")
    assert make_method(settings) is settings
    assert {type(make_method(name)) for name in METHODS} == set(METHODS.values())


@pytest.mark.parametrize(
    ("method", "setting", "value", "error"),
    [
        ("draft", "isolate", "always", "isolate must be a number, not 'always'"),
        ("draft", "isolate", 2, "isolate must lie between 0 and 1, not 2"),
        ("regional", "isolate", 2, "isolate must lie between 0 and 1, not 2"),
        ("regional", "norm_apart", None, "norm_apart must be a number, not None"),
        ("clora", "isolate", 0.5, "isolate must be true or false, not 0.5"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(method: str, setting: str, value: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_method(method, {setting: value})


def test_settings_of_the_authors_have_names() -> None:
    assert make_method("clora:official") == Clora.official()
    assert make_method("lora-composer:paper", {"apart": 0.5}) == replace(LoraComposer.paper(), apart=0.5)
    assert PRESETS.keys() == {
        "tara:official",
        "lora-composer:official",
        "lora-composer:paper",
        "clora:official",
        "freefuse:official",
        "freefuse:official-flux",
    }


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
    ("merge", {"scope": "all"}, r"merge has no settings \['scope'\]; it has limit"),
    (Tara, None, "method must be one of .*merge.* or a settings object"),
    (None, None, "method must be one of .*merge.* or a settings object"),
])  # fmt: skip
def test_unknown_methods_and_settings_are_refused_by_name(method, settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(method, settings)


class Halved(Settings):
    """A method of one's own: half of what merge predicts."""

    def start(self, session: Session) -> "Halved":
        self.merged = Merge().start(session)
        self.text = self.merged.text
        return self

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        return self.merged.prepare(latents, first)

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        latents, output = self.merged.step(latents, step)
        return latents, output / 2


def test_a_method_of_ones_own_can_be_passed(pipe, write_lora):
    load(pipe, write_lora, ["cat"], loras_of(pipe, ["cat"]))
    ours = denoise(pipe, concepts=["cat"], method=Halved(), num_inference_steps=1).images
    assert far_apart(ours, denoise(pipe, concepts=["cat"], method="merge", num_inference_steps=1).images)


# Cost


def test_a_step_after_the_first_costs_no_more_than_in_diffusers(write_lora):
    pipe, plain_pipe = tiny_pipeline(), tiny_pipeline(StableDiffusionPipeline)
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
    for concepts, method in ((1, "merge"), (8, "merge"), (8, "tara")):
        assert 0.5 * plain < second_step(pipe, concepts=triggers[:concepts], method=method) <= 1.02 * plain


# The same run gives the same image

PLAYGROUND = """
import sys, torch
from hashlib import sha256
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.pipelines.families import ComposePipeline

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

    root = Path(__file__).parents[3]
    other = subprocess.run(
        [sys.executable, "-c", PLAYGROUND], cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    here = digests()
    assert here == digests() == other.stdout.split()
    assert here[0] != here[1]


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
