"""The model that is trained: opened by diffusers, given an adapter by PEFT."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_compose.compose.generate.models import ModelError, model_source
from lora_compose.compose.playground.assets import PLAYGROUND
from lora_compose.compose.support.quiet import without_bars
from lora_compose.compose.training.settings import SCOPES, Training

logger = logging.getLogger(__name__)

ADAPTER = "default"
_XL_KEY = "conditioner.embedders.1."  # SDXL's second text encoder, in a checkpoint in one file
_EXPECTED = "expected a text-to-image model: Stable Diffusion 1.x or 2.x, or SDXL"
_KINDS = (StableDiffusionPipeline, StableDiffusionXLPipeline)


def preset_of(model: str) -> str:
    """The preset for a model: "playground", "sdxl" or "sd". Looks at its configuration, not at its weights.

    Raises:
        ModelError: If there is no such model.
    """
    return PLAYGROUND if model == PLAYGROUND else "sdxl" if _is_xl(model) else "sd"


def _is_xl(model: str) -> bool:
    source = model_source(model)
    try:
        if source.is_file():
            with safe_open(source, framework="pt") as file:
                return any(key.startswith(_XL_KEY) for key in file.keys())  # noqa: SIM118 (not a dict)
        config: Any = DiffusionPipeline.load_config(str(source) if source.is_dir() else model)
    except Exception as error:  # model files come from strangers, and libraries raise whatever they meet
        raise ModelError(f"the model {model!r} cannot be opened: {str(error).strip()[:600]}") from error
    if "unet" not in config:
        raise ModelError(f"{model!r} is a model for {config.get('_class_name', 'an unknown pipeline')}; {_EXPECTED}")
    return "text_encoder_2" in config


def open_base(model: str) -> Any:
    """Opens a base model in float32, from safetensors only.

    Returns:
        A `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; all of it is frozen.

    Raises:
        ModelError: If there is no such model, or it is of another kind.
    """
    kind = _KINDS[_is_xl(model)]
    source, options = model_source(model), {"dtype": torch.float32}
    try:
        with without_bars():
            if source.is_file():
                pipe = kind.from_single_file(str(source), **options)
            else:
                name = str(source) if source.is_dir() else model
                safe = {"safety_checker": None, "requires_safety_checker": False} if kind is _KINDS[0] else {}
                pipe = kind.from_pretrained(name, use_safetensors=True, **options, **safe)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"the model {model!r} cannot be opened: {str(error).strip()[:600]}") from error
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(f"{model!r} takes more than latents (is it for inpainting?); {_EXPECTED}")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def noise_schedule(pipe: Any) -> DDPMScheduler:
    """How the model was noised in its own training."""
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    assert isinstance(schedule, DDPMScheduler)
    return schedule


def tokenizers_of(pipe: Any) -> list[PreTrainedTokenizerBase]:
    """One, or SDXL's two."""
    found = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def encode_text(pipe: Any, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Text features as the pipeline makes them.

    Returns:
        Features, shape [captions, tokens, channels], and SDXL's pooled ones, shape [captions, channels]; on the CPU.
    """
    features, pooled = [], []
    with torch.no_grad():
        for caption in captions:
            encoded = pipe.encode_prompt(
                caption, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            features.append(encoded[0].cpu())
            if len(encoded) == 4:  # SDXL's, with negative and pooled ones
                pooled.append(encoded[2].cpu())
    return torch.cat(features), torch.cat(pooled) if pooled else None


def add_lora(unet: Any, settings: Training) -> LoraConfig:
    """Gives the UNet a LoRA that changes nothing yet, in float32 whatever the UNet's precision is.

    Its start is decided by the settings' seed alone, and the global random state stays what it is.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,  # pyright: ignore[reportArgumentType]
        init_lora_weights="gaussian",
        target_modules=list(SCOPES[settings.scope]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        unet.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(unet, dtype=torch.float32)
    return config


def lora_parameters(unet: nn.Module) -> Mapping[str, nn.Parameter]:
    """All parameters of the LoRA by name, whether they are trained or tied."""
    return {name: parameter for name, parameter in unet.named_parameters() if f".{ADAPTER}." in name}
