"""From a run to a picture, in one way for all: `open_model`, then `make`."""

import inspect
import logging
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers.schedulers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

from lora_compose.compose.files import PLAYGROUND, Machine, Record, is_hub_name
from lora_compose.compose.playground.assets import playground_lora, playground_model
from lora_compose.compose.support.savers import Saver, check_savers, place
from lora_compose.compose.support.version import __version__
from lora_compose.pipelines.base import ComposePipeline
from lora_compose.pipelines.engine import Engine, LoadedConcept
from lora_compose.pipelines.methods import METHODS, Process, Settings, make_method, name_of
from lora_compose.pipelines.output import Cost
from lora_compose.pipelines.scene import Concept, Run, Scene

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers")

OnStep = Callable[[int, int, Tensor], None]
"""Called after every step with the number of steps done, of how many, and the latents; what it raises ends the call."""

_DEVICES = re.compile(r"(cpu|mps|(cuda|xpu)(:\d+)?)")


class ModelError(ValueError):
    """A model that cannot be opened; the message says why and what was expected."""


@dataclass(frozen=True)
class Made:
    """A picture and how it was made."""

    image: Image.Image
    record: Record


@dataclass(frozen=True, eq=False)
class Attention:
    """Where each concept was looked for during a call.

    Attributes:
        steps: The recorded steps.
        maps: Shape: [steps, pictures, concepts, height, width], fp32.
        masks: Shape: as maps, bool.
    """

    steps: tuple[int, ...]
    maps: Tensor
    masks: Tensor


@dataclass(frozen=True)
class MadeBatch:
    """Pictures of one call, one for each seed.

    Attributes:
        pictures: In the order of the seeds.
        cost: What the call cost; None without concepts.
        attention: Attention maps, if they were asked for and there are concepts.
    """

    pictures: tuple[Made, ...]
    cost: Cost | None
    attention: Attention | None = None


def open_model(run: Run, savers: Collection[Saver] = ()) -> Any:
    """Opens the model of a run: weights from safetensors only, in the run's precision, on the run's device.

    Args:
        run: Whose model.
        savers: Ways to need less memory.

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


def make(pipe: Any, run: Run, on_progress: Callable[[float], None] | None = None) -> Made:
    """Turns a run into a picture. The same run on the same machine gives the same bits.

    The concepts stay loaded in the pipeline, so that the next run with them does not read their files again.

    Args:
        pipe: What `open_model` gave for this run, or for one that differs only in scene, method, scheduler, steps,
            guidance or seed.
        run: What to make.
        on_progress: Called after every step with the share that is done, up to 1.

    Returns:
        The picture, and its record with the method, scheduler and device that were used.

    Raises:
        ValueError: For anything that does not fit together, before any work is done.
    """
    return make_batch(pipe, run, (run.seed,), on_progress).pictures[0]


def make_batch(
    pipe: Any,
    run: Run,
    seeds: Sequence[int],
    on_progress: Callable[[float], None] | None = None,
    *,
    on_step: OnStep | None = None,
    record_attention: bool = False,
) -> MadeBatch:
    """Makes pictures of a run that differ in their seed, in one call. Bits depend on how many there are.

    Args:
        pipe: As for `make`.
        run: What to make; its own seed is not used.
        seeds: One for each picture.
        on_progress: As for `make`.
        on_step: Sees every step, and may end the call by raising.
        record_attention: Whether attention maps of all steps are kept; they change nothing in the pictures.

    Raises:
        ValueError: For anything that does not fit together, before any work is done.
    """
    seeds = tuple(seeds)
    with _prepared(pipe, run) as (loaded, settings, arguments):
        record = Record(
            run=_as_used(pipe, run, settings),
            versions=versions(),
            sha256=_hashes(loaded),
            machine=machine(pipe._execution_device),  # where an offloaded model is meanwhile says nothing
        )
        output = pipe(
            **arguments,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=_callback(on_progress, on_step) if on_progress or on_step else None,
            record_attention=record_attention and bool(loaded),
        )
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(seeds)
    for seed, flagged in zip(seeds, flags, strict=True):
        if flagged:
            logger.warning("the safety checker of the model has replaced the picture of seed %d by a black one", seed)
    together = seeds if len(seeds) > 1 else ()
    records = [
        record.model_copy(update={"run": record.run.model_copy(update={"seed": seed}), "batch": together})
        for seed in seeds
    ]
    maps, masks = getattr(output, "attention_maps", None), getattr(output, "masks", None)
    attention = None if maps is None or masks is None else Attention(output.recorded_steps, maps.cpu(), masks.cpu())
    return MadeBatch(tuple(map(Made, output.images, records)), getattr(output, "cost", None), attention)


def rehearse(pipe: Any, run: Run) -> None:
    """Does what `make` does until the first denoising step, without it.

    Raises:
        ValueError: Whatever `make` would raise.
    """
    with _prepared(pipe, run) as (loaded, settings, arguments):
        if not loaded:
            return
        try:
            pipe(**{**arguments, "method": _Rehearsal(settings)})
        except _Rehearsed:
            return


def load(pipe: Any, concept: Concept) -> LoadedConcept:
    """Loads a concept's LoRA into a pipeline, unless it is there already.

    Raises:
        ValueError: If there is no such LoRA, or it does not fit the model.
    """
    if concept.lora is not None:
        concept = concept.model_copy(update={"lora": lora_source(concept.lora)})
        known = pipe.concepts.get(concept.name)
        same = known is not None and (known.lora, known.alpha) == (concept.lora, concept.alpha)
        if known is not None and not same:
            pipe.unload_concept(concept.name)
        if not same:
            pipe.load_concept(concept.lora, name=concept.name, alpha=concept.alpha)
    return pipe.resolve_concepts([concept])[0]


def lora_source(source: str) -> str:
    """What a concept's `lora` names: the file behind `playground:NAME`, everything else as it is."""
    name = source.removeprefix(f"{PLAYGROUND}:")
    return source if name == source else str(playground_lora(name))


def size_of(pipe: Any, scene: Scene) -> tuple[int, int]:
    """Width and height of a scene's pictures in pixels; what the scene leaves open is the model's own."""
    # Both are always said: diffusers alone takes the model's own for both where one is missing.
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    scale = pipe.vae_scale_factor
    return scene.width or width * scale, scene.height or height * scale


def resolve_settings(pipe: Any, run: Run, loaded: Sequence[LoadedConcept]) -> Settings | None:
    """The settings of a run's method; without a method one is chosen, and the log says why. None without concepts.

    Raises:
        ValueError: For unknown methods and settings, and for settings without a method.
    """
    if run.settings and run.method is None:
        raise ValueError(f"the settings {', '.join(run.settings)} need a method; there are {', '.join(METHODS)}")
    if not loaded:
        if run.method is not None:
            raise ValueError(f"the method {run.method} needs concepts, and the scene has none")
        return None
    if run.method is None:
        return pipe.resolve_method(None, loaded, [run.scene.prompt])
    return make_method(run.method, run.settings)


def choose_device(name: str | None) -> str:
    """A device that is there; None chooses an accelerator if there is one.

    Raises:
        ValueError: If the device is unknown or not there.
    """
    there = devices()
    if name is None:
        return there[0]
    if not _DEVICES.fullmatch(name):
        raise ValueError(f"unknown device {name!r}; expected cpu, cuda, cuda:0, mps or xpu")
    if name not in there:
        raise ValueError(f"the device {name!r} is not there; there are {', '.join(there)}")
    return name


def devices() -> list[str]:
    """The devices of this machine, the fastest first."""
    there = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            there += [kind, *(f"{kind}:{number}" for number in range(module.device_count()))]
    return [*there, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def scheduler_names() -> list[str]:
    """The schedulers that a run may name."""
    return sorted(name for name in dir(diffusers.schedulers) if _is_scheduler(getattr(diffusers.schedulers, name)))


def scheduler_class(name: str) -> Any:
    """The scheduler of that class name.

    Raises:
        ValueError: If there is none; the message names those that are spelled alike.
    """
    names = scheduler_names()
    if name not in names:
        near = get_close_matches(name, names, n=5, cutoff=0.4) or names
        raise ValueError(f"unknown scheduler {name!r}; did you mean one of {', '.join(near)}?")
    return getattr(diffusers.schedulers, name)


def scheduler_of(pipe: Any, run: Run) -> Any:
    """A run's scheduler; a new one, so that nothing of another run is left in it.

    Raises:
        ValueError: If there is none of that name.
    """
    kind = type(pipe.scheduler) if run.scheduler is None else scheduler_class(run.scheduler)
    return kind.from_config(pipe.scheduler.config)


def versions() -> dict[str, str]:
    """The versions that a picture may depend on, by package."""
    ours = {"lora-compose": __version__, "python": platform.python_version()}
    return {**ours, **{name: version(name) for name in PACKAGES}}


def machine(device: torch.device | str) -> Machine:
    """The facts about a device that a picture may depend on."""
    device = torch.device(device)
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Machine(device=str(device), name=name, threads=torch.get_num_threads())


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads on the CPU inside this block, if there are as many processors; bits depend on their number."""
    before = torch.get_num_threads()
    if number <= (os.cpu_count() or 1):
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Rehearsal:
    """A method that starts, and then goes no further."""

    settings: Settings | None

    def start(self, engine: Engine) -> Process:
        if self.settings is not None:
            self.settings.start(engine)
        raise _Rehearsed


class _Rehearsed(Exception):  # noqa: N818 (nothing has gone wrong)
    pass


@contextmanager
def _prepared(pipe: Any, run: Run) -> Iterator[tuple[list[LoadedConcept], Settings | None, dict[str, Any]]]:
    """Concepts, method and the arguments of the call, with the run's scheduler in the pipeline inside this block."""
    if pipe.unet.dtype != getattr(torch, run.dtype):
        raise ValueError(f"the run asks for {run.dtype}, but the model was opened in {pipe.unet.dtype}; open it again")
    loaded = [load(pipe, concept) for concept in run.scene.concepts]
    settings = resolve_settings(pipe, run, loaded)
    before, scheduler = pipe.scheduler, scheduler_of(pipe, run)
    arguments = {
        "prompt": run.scene.prompt,
        # Where there is no text, SDXL gets zeros, which are not what an empty text gives.
        "negative_prompt": run.scene.negative_prompt or None,
        **dict(zip(("width", "height"), size_of(pipe, run.scene), strict=True)),
        "num_inference_steps": run.steps,
        "guidance_scale": run.guidance_scale,
        "concepts": [concept.concept for concept in loaded],
        "method": settings,
    }
    pipe.scheduler = scheduler
    try:
        yield loaded, settings, arguments
    finally:
        pipe.scheduler = before


def _as_used(pipe: Any, run: Run, settings: Settings | None) -> Run:
    used: dict[str, Any] = {"scheduler": type(pipe.scheduler).__name__, "device": str(pipe._execution_device)}
    if settings is not None:
        used["method"], used["settings"] = name_of(settings)
    return run.model_copy(update=used)


def _hashes(loaded: Sequence[LoadedConcept]) -> dict[str, str]:
    return {found.concept.name: found.file.sha256 for found in loaded if found.file is not None}


def _callback(on_progress: Callable[[float], None] | None, on_step: OnStep | None) -> Callable[..., dict]:
    def tell(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if on_progress is not None:
            on_progress((step + 1) / pipe.num_timesteps)
        if on_step is not None:
            on_step(step + 1, pipe.num_timesteps, tensors["latents"])
        return {}

    return tell


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


def _is_scheduler(kind: Any) -> bool:
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")):
        return False
    # Those for flows, audio, inpainting and the like have another interface than Stable Diffusion's loop.
    parameters = inspect.signature(getattr(kind, "step")).parameters.values()  # noqa: B009 (not in the mixin's type)
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return needed[1:] == ["model_output", "timestep", "sample"] and all(
        hasattr(kind, name) for name in ("scale_model_input", "set_timesteps", "add_noise", "order")
    )
