"""The scheduler of a call: its steps with what the task puts back, and copies for steps that are taken ahead."""

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler
from torch import Tensor

from lora_compose.pipelines.images.task import Task
from lora_compose.pipelines.scene.canvas import Step, steps_in


def renews_noise(scheduler: Any) -> bool:
    """Whether a scheduler of flow matching replaces the noise in every step: the predicted image gets a new one."""
    return scheduler.config.get("stochastic_sampling", False) or isinstance(scheduler, FlowMatchLCMScheduler)


@dataclass(frozen=True)
class Schedule:
    """The timesteps of a call.

    Attributes:
        timesteps: Timesteps of all passes. A second-order scheduler has two per step, and one in the last step.
        unguided: Indices of the passes without guidance, whatever its scale.
    """

    timesteps: Sequence[Tensor] | Tensor
    steps: int
    order: int
    unguided: Collection[int] = ()

    def step(self, index: int, cfg_scale: float) -> Step:
        """One pass."""
        second_order, unguided = index % self.order > 0, index in self.unguided
        return Step(index, len(self.timesteps), self.timesteps[index], cfg_scale, second_order, unguided)

    def leading(self, length: float, first: Step) -> list[Step]:
        """The first steps, at least one; `length` is a fraction of the steps, or above 1 their number."""
        steps = max(1, min(math.ceil(steps_in(length, first.count)), first.count))
        return [self.step(index, first.cfg_scale) for index in range(steps)]


@dataclass(frozen=True, eq=False)
class Sampler:
    """A scheduler at work.

    Attributes:
        arguments: Further arguments of its steps, such as the generator of their noise.
        task: Where the latents started, and what has to be kept of it after each step; None keeps nothing.
    """

    scheduler: Any
    schedule: Schedule
    arguments: Mapping[str, Any] = field(default_factory=dict)
    task: Task | None = None

    @cached_property
    def _timesteps(self) -> Sequence[float]:
        """All timesteps on the host, which waits for the device once."""
        return torch.stack([*self.schedule.timesteps]).tolist()

    def at(self, step: Step) -> tuple[float, int]:
        """The timestep of a pass, and how many timesteps the model was trained with."""
        return self._timesteps[step.index], self.scheduler.config.num_train_timesteps

    def scaled(self, latents: Tensor, t: Tensor) -> Tensor:
        """Latents as the model gets them; schedulers of flow matching do not scale them."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, t)

    def step(self, model_output: Tensor, step: Step, latents: Tensor) -> Tensor:
        """Makes the next latents of the model's output and the latents of a step."""
        latents = self.scheduler.step(model_output, step.t, latents, **self.arguments, return_dict=False)[0]
        return latents if self.task is None else self.task.after_step(latents, step, self.scheduler)

    def of_images(self, images: Sequence[int]) -> "Sampler":
        """The sampler of some images of the batch, which has the same scheduler."""
        arguments = {
            name: [value[image] for image in images] if isinstance(value, list) else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=arguments, task=None if self.task is None else self.task.of_images(images))

    @contextmanager
    def ahead(self) -> Iterator["Sampler"]:
        """A copy for the steps of a draft: they use the same noise as the real steps, and leave no trace.

        Scheduler and generators stay as they are, and so does PyTorch's own generator, which some schedulers use.
        """
        devices = [self.schedule.timesteps[0].device] if self.schedule.timesteps[0].is_cuda else []
        with torch.random.fork_rng(devices):
            arguments = {name: _copied(value) for name, value in self.arguments.items()}
            yield replace(self, scheduler=copy.deepcopy(self.scheduler), arguments=arguments)


def _copied(argument: Any) -> Any:
    """A generator in the same state, or a list of them; other arguments as they are."""
    if isinstance(argument, list):
        return [_copied(value) for value in argument]
    if not isinstance(argument, torch.Generator):
        return argument
    copied = torch.Generator(argument.device)
    copied.set_state(argument.get_state())
    return copied
