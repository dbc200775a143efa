"""Opening the model that a run names."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lora_compose.compose.files.paths import model_source
from lora_compose.compose.generate.defaults import variant_of
from lora_compose.compose.generate.machine import choose_device
from lora_compose.compose.generate.model_facts import model_errors
from lora_compose.compose.generate.schedulers import scheduler_class
from lora_compose.compose.support.quiet import without_bars
from lora_compose.compose.support.savers import Saver, check_savers, place
from lora_compose.compose.support.terminal import bar, echo, err
from lora_compose.pipelines.families import ComposePipeline
from lora_compose.pipelines.methods import make_method
from lora_compose.pipelines.scene.scene import Run
from lora_compose.pipelines.support.quantising import check_quantize


@contextmanager
def opening(model: str) -> Iterator[None]:
    """Shows that a model is being opened; the bars of a download, of which ours would make lines, show themselves."""
    if model_source(model).exists():
        with bar(f"opening {model}"):
            yield
    else:
        echo(f"opening {model}; what is missing in the cache is downloaded", style="dim", to=err)
        yield


def open_model(run: Run, savers: Collection[Saver] = (), variant: str | None = None) -> Any:
    """Opens the model of a run: weights from safetensors only, in the run's precision, on the run's device.

    Args:
        variant: Of the weights of a folder or repository, such as fp16; None is the one that fits the precision.

    Raises:
        ModelError: If the model is missing, not supported, or has pickled weights only.
        ValueError: If the device, method, settings or scheduler are unknown, options that save memory cannot be
            combined, or what fewer bits need is missing, before anything is opened.
    """
    if run.method is not None:
        make_method(run.method, run.settings)
    if run.scheduler is not None:
        scheduler_class(run.scheduler)
    device, dtype = choose_device(run.device), getattr(torch, run.dtype)
    check_savers(savers, device)
    check_quantize(run.quantize)
    source = model_source(run.model)
    with model_errors(run.model), without_bars():
        if source.is_file():
            pipe = ComposePipeline.from_single_file(source, dtype=dtype, quantize=run.quantize)
        else:
            # On Windows a path would change the slash of a hub name.
            name = str(source) if source.is_dir() else run.model
            pipe = ComposePipeline.from_pretrained(
                name, dtype=dtype, quantize=run.quantize, use_safetensors=True, variant=variant or variant_of(run)
            )
    pipe.set_progress_bar_config(disable=True)
    place(pipe, device, savers)
    return pipe
