"""The file: a LoRA as diffusers writes it, with what inference needs in its metadata."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save

from lora_compose.compose.playground.assets import PLAYGROUND, PLAYGROUND_TITLE
from lora_compose.compose.support.version import __version__
from lora_compose.compose.training.model import ADAPTER
from lora_compose.compose.training.settings import Training

_SD2_TEXT = 1024  # channels of the text that Stable Diffusion 2.x reads
_PATHS = {"images", "out", "class_images"}  # they would tell the user's name, and mean nothing elsewhere


def lora_bytes(pipe: Any, config: LoraConfig, settings: Training) -> bytes:
    """The LoRA of a pipeline's UNet as a safetensors file.

    diffusers writes it, with PEFT's configuration; the strings of `metadata_of` are added.
    """
    weights = get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER)
    dtype = getattr(torch, settings.save_dtype)
    layers = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=plain)
        (path,) = Path(folder).iterdir()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return save(tensors, metadata={**metadata, **metadata_of(pipe, settings)})


def metadata_of(pipe: Any, settings: Training) -> dict[str, str]:
    """What a file says about itself, in words that other tools ignore or know from the ModelSpec standard."""
    tara = settings.tara
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    words = {
        "trigger": settings.trigger,
        "class_word": settings.class_word,
        "method": settings.method,
        "base_model": _model_name(settings.model),
        "scope": settings.scope,
        "rank": str(settings.rank),
        "alpha": f"{settings.rank if settings.alpha is None else settings.alpha:g}",
        "training": json.dumps(settings.model_dump(mode="json", exclude=_PATHS | {"model"}), sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_architecture(pipe, velocity)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": settings.out.stem,
        "modelspec.trigger_phrase": settings.concept.phrase,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "software": f"lora-compose {__version__}",
    }
    return words if tara is None else {**words, "keys": tara.keys, "token_mask": tara.token_mask}


def _architecture(pipe: Any, velocity: bool) -> str:
    """The base model's kind in the words of the ModelSpec standard."""
    if hasattr(pipe, "text_encoder_2"):
        return "stable-diffusion-xl-v1-base"
    if pipe.unet.config.cross_attention_dim != _SD2_TEXT:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"


def _model_name(model: str) -> str:
    if model == PLAYGROUND:
        return PLAYGROUND_TITLE
    return Path(model).name if Path(model).expanduser().exists() else model
