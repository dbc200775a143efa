"""The model that is trained: opened by diffusers, given an adapter by PEFT."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_compose.compose.files.paths import ModelError, model_source
from lora_compose.compose.support.quiet import without_bars
from lora_compose.compose.training.settings import PRESETS, Training
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline
from lora_compose.pipelines.families.opening import checkpoint_keys, configuration, marked_scheduler

ADAPTER = "default"
_XL_KEY = "conditioner.embedders.1."  # SDXL's second text encoder, in a checkpoint in one file
_EXPECTED = "expected a text-to-image model: Stable Diffusion 1.x or 2.x, SDXL, or a family of transformers"
_UNETS: Mapping[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def preset_of(model: str) -> str:
    """The preset for a model, by its configuration. Raises ModelError if there is none that can be trained."""
    return model if model in PRESETS else _kind(model)[0]


def _kind(model: str) -> tuple[str, Any]:
    """The kind of a model ("sd", "sdxl", "transformer"), and the pipeline that opens it."""
    source = model_source(model)
    try:
        if source.is_file():
            keys = checkpoint_keys(source, {})
            family = ComposePipeline.family_of_keys(keys)
            xl = any(key.startswith(_XL_KEY) for key in keys)
        else:
            config = configuration(str(source) if source.is_dir() else model)
            family = ComposePipeline.family_of(config)
            xl = "text_encoder_2" in config
    except Exception as error:  # model files are not trusted, and libraries raise many kinds of errors
        reason = str(error).strip()[:600]
        raise ModelError(f"the model {model!r} cannot be opened: {reason}; {_EXPECTED}") from error
    if issubclass(family, FlowMatchingPipeline):
        return "transformer", family
    kind = "sdxl" if xl else "sd"
    return kind, _UNETS[kind]


def open_base(model: str) -> Any:
    """Opens a base model in float32, from safetensors, all frozen. ModelError if it is of another kind.

    It is diffusers' `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, or a `FlowMatchingPipeline`.
    """
    name, kind = _kind(model)
    source, options = model_source(model), {"dtype": torch.float32}
    try:
        with without_bars():
            if source.is_file():
                pipe = kind.from_single_file(str(source), **options)
                if name in _UNETS:
                    pipe.scheduler = marked_scheduler(pipe.scheduler, checkpoint_keys(source, {}))
            else:
                where = str(source) if source.is_dir() else model
                safe = {"safety_checker": None, "requires_safety_checker": False} if name == "sd" else {}
                pipe = kind.from_pretrained(where, use_safetensors=True, **options, **safe)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"the model {model!r} cannot be opened: {str(error).strip()[:600]}") from error
    if name in _UNETS and {"beta_start", "trained_betas"}.isdisjoint(pipe.scheduler.config):
        raise ModelError(
            f"{model!r} has a noise schedule without betas (EDM?), which training does not know; {_EXPECTED}"
        )
    if name in _UNETS and pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(f"{model!r} takes more than latents (is it for inpainting?); {_EXPECTED}")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


@contextmanager
def on_device(parts: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Puts the models among some parts on a device for as long as the block lasts; then each is where it was."""
    models = {part: next(part.parameters()).device for part in parts if isinstance(part, nn.Module)}
    for model in models:
        model.to(device)
    try:
        yield
    finally:
        for model, before in models.items():
            model.to(before)


def cast(network: Any, dtype: torch.dtype) -> None:
    """Casts a network but for layers that diffusers keeps in float32, such as some norms; its own `to` casts all."""
    apart = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and apart.isdisjoint(name.split(".")):
            tensor.data = tensor.to(dtype)


def add_lora(network: Any, targets: list[str], settings: Training) -> LoraConfig:
    """Gives a network a LoRA in float32 that changes nothing yet; start weights depend on the seed alone."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,  # pyright: ignore[reportArgumentType]
        init_lora_weights="gaussian",
        use_dora=settings.dora,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(network, dtype=torch.float32)
    return config


@contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """Leaves the LoRA out for as long as the block lasts, so that the network is the base model."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would also decide which parameters are trained
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_parameters(network: nn.Module) -> Mapping[str, nn.Parameter]:
    """All parameters of the LoRA by name, whether they are trained or tied."""
    return {name: parameter for name, parameter in network.named_parameters() if f".{ADAPTER}." in name}
