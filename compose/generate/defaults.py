"""Precision, steps and guidance of a run that does not name them: for command line, page, server and batches.

Steps and guidance are the model's on every device: diffusers' for the family, or those of few-step models where the
model says that it is one. Precision depends on the device.
"""

import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.generate.model_facts import ModelFacts, facts_of
from lora_compose.pipelines.families import (
    ComposeFluxPipeline,
    ComposeKrea2Pipeline,
    ComposeStableDiffusionXLPipeline,
    ComposeZImagePipeline,
)
from lora_compose.pipelines.scene.scene import Run

HALF = "fp16"
"""The variant of weights in half precision, as repositories name it: `unet/...fp16.safetensors`."""

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_ACCELERATORS = ("cuda", "xpu")
_TURBO = re.compile(r"(?<!de)(?<!de[-_ ])turbo", re.IGNORECASE)


@dataclass(frozen=True)
class Defaults:
    """What a run gets that does not name it.

    Attributes:
        dtype: Precision of the model.
        steps: Denoising steps.
        guidance_scale: As `--guidance`.
        variant: The variant of the weights that is opened; None is the usual files.
        why_precision: Why this precision, a sentence each.
        why_steps: Why these steps and this guidance.
    """

    dtype: str
    steps: int
    guidance_scale: float
    variant: str | None
    why_precision: tuple[str, ...]
    why_steps: str


FIELDS = ("dtype", "steps", "guidance_scale")
"""Fields of a run that have defaults by model and device."""

OF_SHIPPED = Run.model_fields["steps"].default, Run.model_fields["guidance_scale"].default
"""Steps and guidance of the small models that come with lora-compose, with which their images were looked at."""


def defaults_for(device: str, facts: ModelFacts) -> Defaults:
    """The defaults of a model on a device, as torch names it; it need not be there."""
    dtype = precision(device, unet=facts.has_unet)
    reasons = [f"{'UNets' if facts.has_unet else 'transformers'} run in {dtype} on {device}"]
    upcast = facts.family is ComposeStableDiffusionXLPipeline and facts.parts.get("vae", {}).get("force_upcast")
    if upcast and dtype != "float32":
        reasons.append("its VAE decodes in float32, as its configuration asks")
    variant = variant_in(facts, dtype)
    if variant:
        reasons.append(f"the model has weights in half precision (variant {HALF})")
    steps, guidance, why = _of_model(facts)
    return Defaults(dtype, steps, guidance, variant, tuple(reasons), why)


def defaults_of(run: Run) -> Defaults:
    """The defaults of a run's model on its device.

    Raises ModelError if there is no such model of ours, or it is unreadable, and ValueError if the device is missing.
    """
    return defaults_for(choose_device(run.device), facts_of(run.model))


def precision(device: str, *, unet: bool) -> str:
    """The precision on a device: on CUDA and XPU float16 for UNets, bfloat16 for transformers; elsewhere float32."""
    if device.partition(":")[0] not in _ACCELERATORS:
        return Run.model_fields["dtype"].default
    return "float16" if unet else "bfloat16"


def _of_model(facts: ModelFacts) -> tuple[int, float, str]:
    if facts.shipped:
        return *OF_SHIPPED, "steps and guidance are those of the small models that come with lora-compose"
    few = few_steps(facts)
    if few is not None:
        return few
    return *call_defaults(facts.family), f"steps and guidance are those of {facts.family.family}"


def call_defaults(family: Any) -> tuple[int, float]:
    """Steps and guidance of a family in Python, which are diffusers'; guidance as `guided` of the family takes it."""
    given = inspect.signature(family.__call__).parameters
    if "guidance_scale" not in given:  # no model of the family has guidance
        return given["num_inference_steps"].default, 1.0
    scale = given["guidance_scale"].default
    if scale is None and "guidance_schedule" in given:  # a scale for each step
        scale = given["guidance_schedule"].default[0]
    elif scale is None:  # no model of the family has distilled guidance
        scale = given["true_cfg_scale"].default
    return given["num_inference_steps"].default, scale


def few_steps(facts: ModelFacts) -> tuple[int, float, str] | None:
    """Steps and guidance of a distilled model, and where it says that it is one; None for others.

    The numbers are those of diffusers' examples and of the model cards. Z-Image-Turbo has the configuration of Z-Image
    but for the scheduler's shift, which anyone may change, so its name is read.
    """
    scheduler = facts.parts.get("scheduler", {})
    kind = scheduler.get("_class_name")
    if facts.index.get("is_distilled"):
        steps, guidance = (8, 0.0) if facts.family is ComposeKrea2Pipeline else (4, 1.0)
        return steps, guidance, "it is distilled to few steps (is_distilled in model_index.json)"
    if facts.family is ComposeFluxPipeline and not facts.parts.get("transformer", {}).get("guidance_embeds", True):
        return 4, 0.0, "it is distilled to few steps, without guidance (guidance_embeds is false)"
    names = (facts.name, str(facts.index.get("_name_or_path")))
    if facts.family is ComposeZImagePipeline and any(map(_TURBO.search, names)):
        return 8, 0.0, "it is distilled to few steps (Turbo in its name)"
    if not facts.has_unet:
        return None
    if facts.parts.get("unet", {}).get("time_cond_proj_dim"):
        return 4, 8.5, "it is a latent consistency model (time_cond_proj_dim of its UNet)"
    if kind in _FEW_STEP_SCHEDULERS:
        return 4, 1.0, f"its scheduler is for few steps ({kind})"
    # Schedules down to noise alone begin at the last timestep as well (Lin et al. 2024), whatever the steps.
    from_noise = scheduler.get("rescale_betas_zero_snr", False)
    if kind in _EULER and scheduler.get("timestep_spacing") == "trailing" and not from_noise:
        return 4, 0.0, "it is distilled to few steps (its scheduler begins at the last timestep)"
    return None


def variant_in(facts: ModelFacts, dtype: str) -> str | None:
    """The variant in half precision, if every component has it, and the model has nothing else or is used in half."""
    components = tuple(f"{name}/" for name in facts.index)
    weights = [file for file in facts.files if file.endswith(".safetensors") and file.startswith(components)]
    halves = [file for file in weights if f".{HALF}" in file.rpartition("/")[2]]
    complete = {file.partition("/")[0] for file in weights} == {file.partition("/")[0] for file in halves}
    return HALF if halves and complete and (dtype != "float32" or halves == weights) else None


def complete(run: Run) -> tuple[Run, str]:
    """Fills in the defaults of a run, and says in a line what was chosen and why, if anything. As `defaults_of`."""
    chosen = defaults_of(run)
    missing = [name for name in FIELDS if name not in run.model_fields_set]
    told = f"by default {words(chosen, missing)}" if missing else ""
    return run.model_copy(update={name: getattr(chosen, name) for name in missing}), told


def words(chosen: Defaults, named: Collection[str] = FIELDS) -> str:
    """What is chosen for some of the fields, and why, in a line."""
    values = {
        "dtype": chosen.dtype, "steps": f"{chosen.steps} steps", "guidance_scale": f"guidance {chosen.guidance_scale:g}"
    }  # fmt: skip
    why = [*chosen.why_precision] if "dtype" in named else []
    why += [chosen.why_steps] if {"steps", "guidance_scale"} & set(named) else []
    return f"{', '.join(text for name, text in values.items() if name in named)}: {'; '.join(why)}"


def variant_of(run: Run) -> str | None:
    """The variant of the weights that a run opens; repositories on the hub are asked for half precision alone."""
    source = model_source(run.model)
    if source.is_file() or (not source.is_dir() and run.dtype == "float32"):
        return None
    return variant_in(facts_of(run.model), run.dtype)
