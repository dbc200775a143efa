"""Precision, steps and guidance of a run that does not name them, by device, family and the model's own configuration.

On a CPU, where a step takes seconds, they are the same for all models. On an accelerator they are diffusers' for the
family, or those of few-step models where a configuration says that the model is one.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.generate.model_facts import ModelFacts, facts_of
from lora_compose.pipelines.families import ComposeFluxPipeline, ComposeKrea2Pipeline, ComposeStableDiffusionXLPipeline
from lora_compose.pipelines.scene.scene import Run

logger = logging.getLogger(__name__)

HALF = "fp16"
"""The variant of weights in half precision, as repositories name it: `unet/...fp16.safetensors`."""

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_ACCELERATORS = ("cuda", "xpu")


@dataclass(frozen=True)
class Defaults:
    """What a run gets that does not name it.

    Attributes:
        dtype: Precision of the model.
        steps: Denoising steps.
        guidance_scale: As `--guidance`.
        variant: The variant of the weights that is opened; None is the usual files.
        reasons: Why, a sentence each.
    """

    dtype: str
    steps: int
    guidance_scale: float
    variant: str | None
    reasons: tuple[str, ...]


ON_CPU = Defaults(
    Run.model_fields["dtype"].default, Run.model_fields["steps"].default, Run.model_fields["guidance_scale"].default,
    None, ("the same for every model on this device",),
)  # fmt: skip


def defaults_for(device: str, facts: ModelFacts | None) -> Defaults:
    """The defaults of a model on a device.

    Args:
        device: As torch names it.
        facts: Of the model; not read on a CPU and on mps.
    """
    if device.partition(":")[0] not in _ACCELERATORS:
        return ON_CPU
    if facts is None:
        raise ValueError(f"the defaults on {device} depend on the model")
    dtype, precision = ("float16", "UNets run") if facts.has_unet else ("bfloat16", "transformers run")
    reasons = [f"{precision} in {dtype} on {device}"]
    if facts.family is ComposeStableDiffusionXLPipeline and facts.parts.get("vae", {}).get("force_upcast"):
        reasons.append("its VAE decodes in float32, as its configuration asks")
    variant = variant_in(facts, dtype)
    if variant:
        reasons.append(f"the model has weights in half precision (variant {HALF})")
    few = few_steps(facts)
    if few is not None:
        steps, guidance, why = few
        return Defaults(dtype, steps, guidance, variant, (*reasons, why))
    steps, guidance = call_defaults(facts.family)
    return Defaults(
        dtype, steps, guidance, variant, (*reasons, f"steps and guidance are those of {facts.family.family}")
    )


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

    The numbers are those of diffusers' examples and of the model cards.
    """
    scheduler = facts.parts.get("scheduler", {})
    kind = scheduler.get("_class_name")
    if facts.index.get("is_distilled"):
        steps, guidance = (8, 0.0) if facts.family is ComposeKrea2Pipeline else (4, 1.0)
        return steps, guidance, "it is distilled to few steps (is_distilled in model_index.json)"
    if facts.family is ComposeFluxPipeline and not facts.parts.get("transformer", {}).get("guidance_embeds", True):
        return 4, 0.0, "it is distilled to few steps, without guidance (guidance_embeds is false)"
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


def complete(run: Run) -> tuple[Run, Defaults]:
    """Fills in the defaults of a run, and returns them too. Given fields stay; choices and reasons are logged.

    Raises:
        ValueError: If the device is not there, or there is no such model.
    """
    device = choose_device(run.device)
    accelerated = device.partition(":")[0] in _ACCELERATORS
    chosen = defaults_for(device, facts_of(run.model) if accelerated else None)
    missing = [name for name in ("dtype", "steps", "guidance_scale") if name not in run.model_fields_set]
    if accelerated and missing:
        logger.info("by default %s", words(chosen))
    return run.model_copy(update={name: getattr(chosen, name) for name in missing}), chosen


def words(chosen: Defaults) -> str:
    """What is chosen where nothing is given, and why, in a line."""
    return f"{chosen.dtype}, {chosen.steps} steps, guidance {chosen.guidance_scale:g}: {'; '.join(chosen.reasons)}"


def variant_of(run: Run) -> str | None:
    """The variant of the weights that a run opens; repositories on the hub are asked for half precision alone."""
    source = model_source(run.model)
    if source.is_file() or (not source.is_dir() and run.dtype == "float32"):
        return None
    return variant_in(facts_of(run.model), run.dtype)
