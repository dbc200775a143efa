"""Precision, steps and guidance that a run does not name: by device, family and the model's own configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_compose.compose.batch.settings import BatchSettings
from lora_compose.compose.generate.defaults import ON_CPU, call_defaults, complete, defaults_for, variant_in, words
from lora_compose.compose.generate.demo import GUIDANCE, STEPS
from lora_compose.compose.generate.model_facts import ModelFacts, facts_of
from lora_compose.compose.page.form import Form
from lora_compose.pipelines import families
from lora_compose.pipelines.scene.scene import Run, Scene
from small_world import SCHEDULER, SIZE

ROOT = Path(__file__).resolve().parents[3]
SD, XL = families.ComposeStableDiffusionPipeline, families.ComposeStableDiffusionXLPipeline
FLUX, KLEIN = families.ComposeFluxPipeline, families.ComposeFlux2KleinPipeline
KREA, Z_IMAGE = families.ComposeKrea2Pipeline, families.ComposeZImagePipeline
QWEN = families.ComposeQwenImagePipeline
LEADING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
TRAILING = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
UPCAST = {"force_upcast": True}


def facts(family: Any, index: Mapping[str, Any] | None = None, **parts: Mapping[str, Any]) -> ModelFacts:
    return ModelFacts(family, index or {}, parts)


@pytest.mark.parametrize(
    ("model", "dtype", "steps", "guidance", "reason"),
    [
        (facts(SD, scheduler={"_class_name": "PNDMScheduler"}), "float16", 50, 7.5, "those of Stable Diffusion 1.x"),
        (facts(XL, scheduler=LEADING, vae=UPCAST), "float16", 50, 5.0, "its VAE decodes in float32"),
        (facts(XL, scheduler=TRAILING, vae=UPCAST), "float16", 4, 0.0, "distilled to few steps (its scheduler"),
        (facts(XL, unet={"time_cond_proj_dim": 256}), "float16", 4, 8.5, "latent consistency model"),
        (facts(SD, scheduler={"_class_name": "LCMScheduler"}), "float16", 4, 1.0, "LCMScheduler"),
        (facts(FLUX, transformer={"guidance_embeds": True}), "bfloat16", 28, 3.5, "those of FLUX.1"),
        (facts(FLUX, transformer={"guidance_embeds": False}), "bfloat16", 4, 0.0, "guidance_embeds is false"),
        (facts(KLEIN, {"is_distilled": True}), "bfloat16", 4, 1.0, "is_distilled"),
        (facts(KLEIN, {"is_distilled": False}), "bfloat16", 50, 4.0, "those of FLUX.2-klein"),
        (facts(KREA, {"is_distilled": True}), "bfloat16", 8, 0.0, "is_distilled"),
        (facts(Z_IMAGE), "bfloat16", 50, 5.0, "those of Z-Image"),
        (facts(QWEN), "bfloat16", 50, 4.0, "those of Qwen-Image"),
    ],
)
def test_on_a_gpu_the_model_decides(model: ModelFacts, dtype: str, steps: int, guidance: float, reason: str) -> None:
    chosen = defaults_for("cuda:1", model)
    assert (chosen.dtype, chosen.steps, chosen.guidance_scale) == (dtype, steps, guidance)
    assert reason in words(chosen)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_they_are_the_same_for_all_models(device: str) -> None:
    assert defaults_for(device, facts(XL, scheduler=TRAILING)) == ON_CPU == defaults_for(device, None)
    assert (ON_CPU.dtype, ON_CPU.steps, ON_CPU.guidance_scale) == ("float32", 25, 5.0)


def test_given_values_stay_and_only_missing_ones_are_filled_in() -> None:
    run = Run(scene=Scene(prompt="a"), model="playground", device="cpu", steps=7)
    assert complete(run)[0].model_copy(update={"steps": 7}) == run
    assert complete(run)[0].steps == 7


def test_weights_in_half_precision_are_opened_where_every_component_has_them() -> None:
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    both = ("unet/a.safetensors", "unet/a.fp16.safetensors", "vae/b.safetensors", "vae/b.fp16.safetensors")
    assert variant_in(ModelFacts(XL, index, {}, both), "float16") == "fp16"
    assert variant_in(ModelFacts(XL, index, {}, both), "float32") is None
    assert variant_in(ModelFacts(XL, index, {}, (*both[:3], "other/c.fp16.safetensors")), "float16") is None
    assert variant_in(ModelFacts(XL, index, {}, both[1::2]), "float32") == "fp16", "nothing else is there"
    assert variant_in(ModelFacts(XL, index, {}, ()), "float16") is None


def test_the_size_of_a_family_counts_more_than_that_of_its_vae() -> None:
    vae = {"sample_size": 1024}
    assert facts(families.ComposeIdeogram4Pipeline, vae=vae).own_size == (2048, 2048)
    assert facts(FLUX, vae=vae).own_size == (1024, 1024)


def test_the_facts_of_a_folder_are_read_without_opening_it() -> None:
    unet, transformer = facts_of("playground"), facts_of("playground-flux")
    assert (unet.family, unet.own_size, unet.has_unet) == (SD, (SIZE, SIZE), True)
    assert (transformer.family, transformer.own_size, transformer.has_unet) == (FLUX, (SIZE, SIZE), False)
    assert "unet/diffusion_pytorch_model.safetensors" in unet.files
    assert unet.parts["scheduler"]["_class_name"] == SCHEDULER


def test_a_schedule_down_to_noise_alone_is_not_taken_for_few_steps() -> None:
    found = defaults_for("cuda", facts(XL, scheduler={**TRAILING, "rescale_betas_zero_snr": True}))
    assert found.steps == defaults_for("cuda", facts(XL)).steps


def table() -> list[str]:
    """The table of defaults in the docs, from the code."""
    rows = ["| where | steps | guidance | precision |", "|---|---|---|---|"]
    for family in families.ComposePipeline.families:
        steps, guidance = call_defaults(family)
        rows.append(f"| Python, {family.family} | {steps} | {guidance:g} | as you open the model |")
    rows.append(
        f"| command line, page, server; CPU, any model | {ON_CPU.steps} | {ON_CPU.guidance_scale:g} | {ON_CPU.dtype} |"
    )
    rows.append(
        "| command line, page, server; GPU | as Python | as Python | float16 for UNets, bfloat16 for transformers |"
    )
    few = {
        "FLUX.1 without `guidance_embeds`": facts(FLUX, transformer={"guidance_embeds": False}),
        "FLUX.2-klein with `is_distilled`": facts(KLEIN, {"is_distilled": True}),
        "Krea 2 with `is_distilled`": facts(KREA, {"is_distilled": True}),
        "UNet with `time_cond_proj_dim`": facts(XL, unet={"time_cond_proj_dim": 256}),
        "UNet with `LCMScheduler` or `TCDScheduler`": facts(XL, scheduler={"_class_name": "TCDScheduler"}),
        "UNet with an Euler scheduler and `trailing` steps": facts(XL, scheduler=TRAILING),
    }
    for name, model in few.items():
        chosen = defaults_for("cuda", model)
        rows.append(f"| the same; GPU, {name} | {chosen.steps} | {chosen.guidance_scale:g} | {chosen.dtype} |")
    rows.append(f"| `demo`, and the page's example | {STEPS} | {GUIDANCE:g} | {ON_CPU.dtype} |")
    return rows


def test_the_table_of_defaults_in_the_docs_is_that_of_the_code() -> None:
    text = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    found = text.partition("## Defaults\n")[2].partition("\n## ")[0]
    assert [line for line in found.splitlines() if line.startswith("|")] == table()


def test_command_line_page_server_and_batches_have_one_set_of_defaults() -> None:
    pytest.importorskip("streamlit", reason="the page needs streamlit")
    expected = ON_CPU.steps, ON_CPU.guidance_scale
    form, batch = Form.__dataclass_fields__, BatchSettings.model_fields
    assert (form["steps"].default, form["guidance_scale"].default) == expected
    assert (batch["steps"].default, batch["guidance_scale"].default) == expected
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    from inspect import signature

    from lora_compose.compose.serve.app import make_app
    from lora_compose.compose.serve.requests import ImageRequest

    given = signature(make_app).parameters
    assert (given["steps"].default, given["guidance_scale"].default) == expected
    assert ImageRequest(prompt="a").resolved(1, 1).steps == ON_CPU.steps
    assert json.loads(Run(scene=Scene(prompt="a"), model="a").model_dump_json())["steps"] == ON_CPU.steps
