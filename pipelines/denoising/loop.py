"""The denoising loop, the same for every method, task and model family."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.denoising.sampler import Sampler
from lora_compose.pipelines.images.output import Cost
from lora_compose.pipelines.images.task import Task
from lora_compose.pipelines.scene.canvas import Step


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop.

    Attributes:
        after_step: Called with step and latents; returns the latents and guidance scale to continue with.
        interrupted: Whether the user has stopped the call.
        progress_bar: A context manager of diffusers for so many steps.
    """

    before_step: Callable[[Step], None]
    after_step: Callable[[Step, Tensor], tuple[Tensor, float]]
    interrupted: Callable[[], bool]
    progress_bar: Callable[..., Any]


def denoise(
    process: Process, task: Task, sampler: Sampler, cfg_scale: float, hooks: Hooks, *, cost: Cost, started: float
) -> Tensor:
    """Runs all steps: method, scheduler with its task, callback, progress.

    Args:
        cost: Receives the seconds of preparation.
        started: When the call began, by `time.perf_counter()`.

    Returns:
        The final latents.
    """
    schedule = sampler.schedule
    number = len(schedule.timesteps)
    warmup = number - schedule.steps * schedule.order
    latents = task.start()
    with hooks.progress_bar(total=schedule.steps) as progress_bar:
        first = schedule.step(0, cfg_scale)
        hooks.before_step(first)  # a method may run the model to prepare, and caches ask for the timestep
        latents = process.prepare(latents, first)
        cost.preparation_seconds = time.perf_counter() - started
        for index in range(number):
            if hooks.interrupted():
                continue
            step = schedule.step(index, cfg_scale)
            hooks.before_step(step)
            latents, model_output = process.step(latents, step)
            latents = sampler.step(model_output, step, latents)
            latents, cfg_scale = hooks.after_step(step, latents)
            if index == number - 1 or (index + 1 > warmup and (index + 1) % schedule.order == 0):
                progress_bar.update()
    return latents
