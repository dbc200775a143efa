"""Opening the model that a run names."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lora_compose.compose.files.paths import is_hub_name
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.generate.schedulers import scheduler_class
from lora_compose.compose.playground.assets import PLAYGROUND, playground_model
from lora_compose.compose.support.savers import Saver, check_savers, place
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene import Run


class ModelError(ValueError):
    """A model that cannot be opened; the message says why and what was expected."""


def open_model(run: Run, savers: Collection[Saver] = ()) -> Any:
    """Opens the model of a run: weights from safetensors only, in the run's precision, on the run's device.

    Args:
        run: Whose model.
        savers: Options that save memory.

    Returns:
        A pipeline for `make`.

    Raises:
        ModelError: If there is no such model, it is of another kind, or it has pickled weights only.
        ValueError: If the device, method, settings or scheduler are unknown, or ways to save memory do not go together,
            before anything is opened.
    """
    if run.method is not None:
        make_method(run.method, run.settings)
    if run.scheduler is not None:
        scheduler_class(run.scheduler)
    device, dtype = choose_device(run.device), getattr(torch, run.dtype)
    check_savers(savers, device)
    source = model_source(run.model)
    try:
        if source.is_file():
            pipe = ComposePipeline.from_single_file(source, dtype=dtype)
        else:
            # A path would turn the slash of a hub name around on Windows.
            name = str(source) if source.is_dir() else run.model
            pipe = ComposePipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # model files come from strangers, and libraries raise whatever they meet
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"the model {run.model!r} cannot be opened: {reason[:600]}") from error
    pipe.set_progress_bar_config(disable=True)
    place(pipe, device, savers)
    return pipe


def model_source(model: str) -> Path:
    """What a run's `model` names: the playground's folder, a folder, a file, or a hub repository as if it were a path.

    Raises:
        ModelError: If there is no such model, or it is no model as diffusers saves it.
    """
    if model == PLAYGROUND:
        return playground_model()
    path = Path(model).expanduser()
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise ModelError(f"{model!r}: a model in one file must be .safetensors; a pickle could run code when opened")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"the folder {model!r} has no model_index.json; expected a model as diffusers saves it")
    if not path.exists() and not is_hub_name(model):
        raise ModelError(
            f"there is no model {model!r}; expected {PLAYGROUND}, a folder as diffusers saves it, a .safetensors file, "
            "or a hub repository such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    return path
