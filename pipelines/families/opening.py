"""Looks into a checkpoint before the model is opened."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.modular_pipelines import ModularPipeline
from safetensors import safe_open
from torch import nn

from lora_compose.pipelines.support.hub import is_hub_name, reachable

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
_FILE_OPTIONS = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")


def checkpoint_keys(link_or_path: str | Path, options: Mapping[str, Any]) -> list[str]:
    """The names of the tensors in a checkpoint: a file, or a link to one in a hub repository, which is downloaded."""
    path = Path(link_or_path)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    given = {name: options[name] for name in _FILE_OPTIONS if name in options}
    return list(load_single_file_checkpoint(str(link_or_path), **given))


def marked_scheduler(scheduler: Any, keys: Collection[str]) -> Any:
    """The scheduler of a UNet whose file says by empty tensors what it predicts.

    "v_pred" stands for v-prediction and "ztsnr" for a schedule that ends in pure noise, as ComfyUI and its trainers
    write them. diffusers does not read them, and would take such a UNet of SDXL for one that predicts noise.
    """
    if V_PREDICTION not in keys:
        return scheduler
    config: dict[str, Any] = {"prediction_type": "v_prediction"}
    if ZERO_SNR in keys:
        config["rescale_betas_zero_snr"] = True
    return type(scheduler).from_config(scheduler.config, **config)


def hub_options(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Given options for a folder or repository; from the cache if the hub is away, or ConnectionError without."""
    given = {name: options[name] for name in HUB_OPTIONS if name in options}
    if not is_hub_name(source):
        return given
    return reachable(source, DiffusionPipeline.config_name, ModularPipeline.config_name, **given)


def configuration(source: str, **options: Any) -> Mapping[str, Any]:
    """`model_index.json` of a folder or repository, or else `modular_model_index.json`; OSError if it has neither."""
    try:
        return DiffusionPipeline.load_config(source, **options)  # pyright: ignore[reportReturnType]
    except OSError:
        try:
            return ModularPipeline.load_config(source, **options)  # pyright: ignore[reportReturnType]
        except OSError:
            pass
        raise


def shared_dtype(pipeline: DiffusionPipeline | ModularPipeline) -> torch.dtype:
    """The precision of all models of a pipeline; raises ValueError if they differ."""
    dtypes = {name: part.dtype for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if len(set(dtypes.values())) > 1:
        raise ValueError(
            f"the components differ in precision ({dtypes}); build the pipeline with its class and `**pipe.components` "
            "to keep them so, or give from_pipe a dtype to change the shared models"
        )
    return pipeline.dtype
