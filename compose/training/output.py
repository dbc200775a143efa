"""The output file: a LoRA in diffusers' format, with metadata for inference."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save

from lora_compose.compose.playground.assets import PLAYGROUNDS, playground_title
from lora_compose.compose.support.version import __version__
from lora_compose.compose.training.bases import Base
from lora_compose.compose.training.model import ADAPTER
from lora_compose.compose.training.settings import Training
from lora_compose.pipelines.support.home import expanded

_PATHS = {"images", "references", "out", "class_images"}  # paths contain the user's name, and mean nothing elsewhere


def lora_bytes(base: Base, config: LoraConfig, settings: Training) -> bytes:
    """The LoRA of a base model's network as diffusers' safetensors file with PEFT's configuration and our metadata."""
    weights = get_peft_model_state_dict(base.network, adapter_name=ADAPTER)
    dtype = getattr(torch, settings.save_dtype)
    layers = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Any] = {f"{base.part}_lora_layers": layers, f"{base.part}_lora_adapter_metadata": plain}
        base.pipe.save_lora_weights(folder, **parts)
        (path,) = Path(folder).iterdir()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return save(tensors, metadata={**metadata, **metadata_of(base, settings)})


def metadata_of(base: Base, settings: Training) -> dict[str, str]:
    """The metadata of a file: our own keys, and those of the ModelSpec standard."""
    tara = settings.tara
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
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": settings.out.stem,
        "modelspec.trigger_phrase": settings.concept.phrase,
        "software": f"lora-compose {__version__}",
    }
    if settings.references:
        words["references"] = str(len(settings.references))
    if prediction := base.prediction:
        words["modelspec.prediction_type"] = prediction
    return words if tara is None else {**words, "keys": tara.keys, "token_mask": tara.token_mask}


def _model_name(model: str) -> str:
    if model in PLAYGROUNDS:
        return playground_title(model)
    return Path(model).name if expanded(model).exists() else model
