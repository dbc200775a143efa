"""The schedulers that a run may name: those of diffusers that fit the loop."""

import inspect
from difflib import get_close_matches
from typing import Any

import diffusers.schedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from lora_compose.pipelines.families.flow_matching import FlowMatchingPipeline
from lora_compose.pipelines.scene.scene import Run


def scheduler_names() -> list[str]:
    """The schedulers that a run may name."""
    return sorted(name for name in dir(diffusers.schedulers) if _is_scheduler(getattr(diffusers.schedulers, name)))


def scheduler_class(name: str) -> Any:
    """The scheduler of that class name; raises ValueError if there is none; the message names similar ones."""
    names = scheduler_names()
    if name not in names:
        alike = [known for known in names if name.lower().removesuffix("scheduler") in known.lower()]
        near = alike or get_close_matches(name, names, n=5, cutoff=0.4) or names
        raise ValueError(f"unknown scheduler {name!r}; did you mean one of {', '.join(near)}?")
    return getattr(diffusers.schedulers, name)


def scheduler_of(pipe: Any, run: Run) -> Any:
    """A new scheduler for a run. Raises ValueError if there is none of that name, or it is for other models."""
    own: Any = type(pipe.scheduler)
    if run.scheduler in (None, own.__name__):
        return own.from_config(pipe.scheduler.config)
    kind, flow = scheduler_class(run.scheduler), isinstance(pipe, FlowMatchingPipeline)
    if _is_for_flow(kind) != flow:
        fitting = [name for name in scheduler_names() if _is_for_flow(scheduler_class(name)) == flow]
        raise ValueError(f"{run.scheduler} does not fit {pipe.family}; expected one of {', '.join(fitting)}")
    return kind.from_config(pipe.scheduler.config)


def _is_scheduler(kind: Any) -> bool:
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")):
        return False
    # Those for audio, inpainting and the like have another interface than the loop.
    parameters = inspect.signature(getattr(kind, "step")).parameters.values()  # noqa: B009 (not in the mixin's type)
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return needed[1:] == ["model_output", "timestep", "sample"] and (
        _is_for_flow(kind)
        or all(hasattr(kind, name) for name in ("scale_model_input", "set_timesteps", "add_noise", "order"))
    )


def _is_for_flow(kind: Any) -> bool:
    """Whether a scheduler is for models of flow matching, whose timesteps are shifted by the size of the image."""
    if not hasattr(kind, "scale_noise") or hasattr(kind, "scale_model_input"):
        return False
    return {"sigmas", "mu"} <= inspect.signature(kind.set_timesteps).parameters.keys()
