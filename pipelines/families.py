"""Which pipeline class a model needs: Stable Diffusion 1.x and 2.x, or SDXL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from safetensors import safe_open

from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.stable_diffusion import ComposeStableDiffusionPipeline
from lora_compose.pipelines.stable_diffusion_xl import ComposeStableDiffusionXLPipeline

_REFINER = (
    "this is SDXL's refiner, which improves finished pictures and does not read prompts as the base model does; open "
    "the base model, such as stabilityai/stable-diffusion-xl-base-1.0"
)
_FILE_OPTIONS = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")


def family_of(config: Mapping[str, Any]) -> type[ComposePipeline]:
    """The pipeline class for a model's configuration (model_index.json).

    Raises:
        ValueError: For model families that are not supported.
    """
    if config.get("requires_aesthetics_score"):
        raise ValueError(_REFINER)
    if "unet" in config and "text_encoder" in config:
        return ComposeStableDiffusionXLPipeline if "text_encoder_2" in config else ComposeStableDiffusionPipeline
    raise ValueError(
        f"this is a model for {config.get('_class_name', 'an unknown pipeline')}; supported are Stable Diffusion 1.x, "
        "2.x and XL"
    )


def family_of_file(link_or_path: str | Path, options: Mapping[str, Any]) -> type[ComposePipeline]:
    """The pipeline class for a checkpoint in one file, by the names of its text encoders.

    Args:
        link_or_path: A file, or a link to one in a hub repository, which is downloaded.
        options: Those of `from_single_file`.

    Raises:
        ValueError: For SDXL's refiner.
    """
    path = Path(link_or_path)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    else:
        given = {name: options[name] for name in _FILE_OPTIONS if name in options}
        keys = list(load_single_file_checkpoint(str(link_or_path), **given))
    if any(key.startswith("conditioner.embedders.1.") for key in keys):
        return ComposeStableDiffusionXLPipeline
    if any(key.startswith("conditioner.embedders.0.model.") for key in keys):
        raise ValueError(_REFINER)
    return ComposeStableDiffusionPipeline
