"""The base class of all composing pipelines: opens models by family, and runs a call up to its final latents."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor, nn

from lora_compose.attention import Backbone, backbone_of
from lora_compose.attention.device import hooked, modules_of, uncompiled
from lora_compose.pipelines.calls.call import Call, Concepts, Sampling, check_changed
from lora_compose.pipelines.calls.call_plan import CallPlan
from lora_compose.pipelines.calls.finite import check_finite, likely_causes
from lora_compose.pipelines.calls.front import request_of
from lora_compose.pipelines.calls.outcome import Outcome
from lora_compose.pipelines.calls.refine import Origin
from lora_compose.pipelines.calls.resolved_call import ResolvedCall, resolve_call
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.control.spec import Control
from lora_compose.pipelines.denoising import concept_sets
from lora_compose.pipelines.denoising.loop import Hooks, denoise
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.denoising.sampler import Sampler, Schedule
from lora_compose.pipelines.families.loader_mixin import ConceptLoaderMixin
from lora_compose.pipelines.families.opening import (
    checkpoint_keys,
    configuration,
    hub_options,
    marked_scheduler,
    shared_dtype,
)
from lora_compose.pipelines.families.quantised import cast, check_of_one_file, quantising_options
from lora_compose.pipelines.families.saved import README, how_to_open
from lora_compose.pipelines.images.from_image import Source
from lora_compose.pipelines.images.output import ComposeOutput
from lora_compose.pipelines.images.task import OF_INPAINTING, ImageToImage, Inpainting, Task, TextToImage
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.support.hub import asking
from lora_compose.pipelines.support.notes import kept
from lora_compose.pipelines.text.conditioning import Conditioning, TokenPositions
from lora_compose.pipelines.text.encoder import FamilyEncoder
from lora_compose.pipelines.text.textual_inversion import ExpandingTokenizer, TextualInversions
from lora_compose.pipelines.text.tokens import Tokenizer

_CACHING = ("KV", "QwenImage21")
"""In the names of diffusers' pipelines that keep keys and values of text or references from pass to pass."""


class ComposePipeline(ConceptLoaderMixin, DiffusionPipeline):
    """Opens a model and composes concept LoRAs with it.

    `ComposePipeline.from_pretrained`, `from_single_file` and `from_pipe` look at the model and return the class for its
    family, which is an ordinary diffusers pipeline as well: without concepts it does exactly what diffusers does.

        pipe = ComposePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        pipe.load_concept("cat.safetensors", trigger="sks", class_word="cat")
        pipe.load_concept("dog.safetensors", trigger="zwx", class_word="dog")
        image = pipe("a sks cat and a zwx dog on grass", concepts=["cat", "dog"]).images[0]
    """

    text_tokenizers: tuple[str, ...] = ("tokenizer", "tokenizer_2")
    """The tokenizers whose tokens the model reads, by component name."""

    families: ClassVar[list["type[ComposePipeline]"]] = []
    """The classes of all model families, as `pipelines/families/__init__.py` names them."""

    reads_weights: ClassVar[bool] = False
    """Whether prompts may have weights."""

    reads_in_chunks: ClassVar[bool] = False
    """Whether prompts may be longer than a text encoder reads at once."""

    tells_steps: ClassVar[bool] = True
    """Whether calls without concepts, which are diffusers' own, take a callback."""

    needs_references: ClassVar[bool] = False
    """Whether the family reads no text without a reference image."""

    # Components, and what the pipelines of all families have.
    unet: Any
    transformer: Any
    vae: Any
    scheduler: Any
    image_processor: Any
    vae_scale_factor: int
    interrupt: Any
    guidance_scale: Any
    maybe_convert_prompt: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives a family's class the name of the class of diffusers that it extends.

        diffusers looks classes up by that name: a saved pipeline opens in plain diffusers, and
        `AutoPipelineFor...from_pipe` finds the pipelines for other tasks. `__qualname__` stays our own.
        """
        super().__init_subclass__(**options)
        cls.__name__ = cls._plain_class().__name__

    @classmethod
    def check_has_references(cls, given: bool, advice: str) -> None:
        """Raises ValueError with this advice if no reference image is given, and the family reads no text without."""
        if cls.needs_references and not given:
            raise ValueError(f"{cls.family} needs a reference image{advice}")

    @classmethod
    def _plain_class(cls) -> Any:
        """Diffusers' pipeline for the family."""
        pipelines = [parent for parent in cls.__mro__ if issubclass(parent, DiffusionPipeline)]
        return next(parent for parent in pipelines if not issubclass(parent, ComposePipeline))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, quantize: str | None = None, **options: Any
    ) -> "ComposePipeline":
        """Opens a folder or hub repository; all options of diffusers are passed on.

        Args:
            quantize: nf4, int8, fp8, or a file of the denoiser in fewer bits: GGUF, or safetensors in fp8.

        Raises:
            ValueError: For model families that are not supported, and what `quantising_options` refuses.
            OSError: If the model hub is out of reach and its cache has no copy, or if it does not give the model.
        """
        source = str(pretrained_model_name_or_path)
        hub = hub_options(source, options)
        with asking(source, **hub):
            if cls is ComposePipeline:
                family = cls.family_of(configuration(source, **hub))
                return family.from_pretrained(source, quantize=quantize, **options | hub)
            more = hub | quantising_options(quantize, source, options, **hub)
            return cast(super().from_pretrained(pretrained_model_name_or_path, **options | more), quantize)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, *, quantize: str | None = None, **options: Any
    ) -> Self:
        """Opens a checkpoint in one file; all options of diffusers are passed on.

        Raises:
            ValueError: For SDXL's refiner, and if `quantize` is another than fp8.
        """
        check_of_one_file(quantize)
        if cls is ComposePipeline:
            family: Any = cls.family_of_keys(checkpoint_keys(pretrained_model_link_or_path, options))
            return family.from_single_file(pretrained_model_link_or_path, quantize=quantize, **options)
        where = str(pretrained_model_link_or_path)
        opened = cast(super().from_single_file(where, **options), quantize)  # pyright: ignore[reportAttributeAccessIssue]
        if hasattr(opened, "unet") and "scheduler" not in options and where.endswith(".safetensors"):
            scheduler = marked_scheduler(opened.scheduler, checkpoint_keys(where, options))
            opened.register_modules(scheduler=scheduler)
        return opened

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline | ModularPipeline, **options: Any) -> Self:
        """A composing pipeline that shares all components with another pipeline.

        The precision is kept; diffusers alone would convert the shared models to float32.

        Raises:
            ValueError: If the components differ in precision and no `dtype` is given, which would change some of them.
        """
        if not options.keys() & {"dtype", "torch_dtype"}:
            options["dtype"] = shared_dtype(pipeline)
        if cls is not ComposePipeline:
            return super().from_pipe(pipeline, **options)  # pyright: ignore[reportReturnType]
        family: Any = cls.family_of({"_class_name": type(pipeline).__name__, **pipeline.config})
        return family.from_pipe(pipeline, **options)

    def to(self, *args: Any, **options: Any) -> Self:
        """Moves or converts all models, as in diffusers; the LoRAs of earlier calls that were kept are dropped."""
        self.banks.clear()
        return super().to(*args, **options)

    @wraps(DiffusionPipeline.save_pretrained, assigned=())  # its signature
    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | os.PathLike[str], *args: Any, **options: Any
    ) -> None:
        """Saves the model as diffusers does; plain diffusers opens it as well.

        Concepts are not saved: they stay in their LoRA files. If there are any, a README.md in the folder shows how to
        load them again; one that is there already is kept.
        """
        self._save(save_directory, *args, **options)
        readme = Path(save_directory) / README
        if self.concepts and not readme.exists():
            readme.write_text(how_to_open(self.concepts.values()), encoding="utf-8")

    def _save(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        super().save_pretrained(save_directory, *args, **options)

    @classmethod
    def family_of(cls, config: Mapping[str, Any]) -> "type[ComposePipeline]":
        """The class for a model's configuration (model_index.json).

        Raises:
            ValueError: For model families that are not supported.
        """
        for family in cls.families:
            if family.opens(config):
                return family
        name = str(config.get("_class_name", "an unknown pipeline"))
        caches = any(part in name for part in _CACHING)
        why = (
            ", which keeps keys and values from pass to pass, so that no LoRA acts on them by region" if caches else ""
        )
        raise ValueError(
            f"this is a model for {name}{why}; supported are {', '.join(family.family for family in cls.families)}"
        )

    @classmethod
    def family_of_keys(cls, keys: Iterable[str]) -> "type[ComposePipeline]":
        """The class for a checkpoint in one file, by the names of its tensors.

        Raises:
            ValueError: For model families that are not supported, and for LoRAs.
        """
        names = list(keys)
        if any("lora_" in name for name in names):
            raise ValueError("it is a LoRA; name the model that it was made for, and give this file as a LoRA")
        for family in cls.families:
            if family.opens_keys(names):
                return family
        raise ValueError(f"this checkpoint is not of a supported model: its first tensors are {', '.join(names[:3])}")

    family: str = ""
    """The model family, in words."""

    @property
    def own_size(self) -> tuple[int, int]:
        """Width and height of the images that the model was made for, in pixels."""
        raise NotImplementedError

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        raise NotImplementedError

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint with tensors of these names is of this family; never, if diffusers opens none."""
        return False

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        concepts: Concepts | None = None,
        method: str | Settings | None = None,
        control: Control | Sequence[Control] | None = None,
        token_positions: TokenPositions | None = None,
        record_attention: bool | Sequence[int] = False,
        **options: Any,
    ) -> ComposeOutput:
        """Generates images; all arguments of diffusers' pipeline keep their meaning.

        Args:
            prompt: Names each concept by its trigger.
            concepts: Names of loaded concepts or adapters, boxes by name, {"cat": (0, 0, 64, 128)}, `Concept` objects
                or their fields as in JSON, {"name": "cat", "lora": "cat.safetensors"}, a list of these per prompt,
                "auto": those that the prompt names; None: as in diffusers.
            method: draft, lora-composer, regional, clora, tara, merge, switch, composite, freefuse, or settings such as
                `Tara(scope="cross_kv")`; None chooses.
            control: Control images for ControlNets and T2I-Adapters; only with concepts.
            token_positions: With `prompt_embeds`: where each concept's trigger is, by concept name.
            record_attention: True, or the steps of which attention maps are returned.
            options: Arguments of diffusers' pipeline for the model family, and those of calls that start from an image,
                as in `ComposeStableDiffusionPipeline.__call__`: image, mask_image, strength, padding_mask_crop and
                paste_original.

        Returns:
            A `ComposeOutput`, or a tuple that begins with the images if `return_dict` is False.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        raise TypeError("open a model first: ComposePipeline.from_pretrained(...)")

    def tokenizers_for(self, concepts: Sequence[LoadedConcept]) -> Sequence[Tokenizer]:
        """The tokenizers of a call with these concepts, including the words bundled with their files.

        Raises:
            ValueError: If two files have the same word.
        """
        return self.prompt_tokenizers(TextualInversions.of(concepts, self.components), None)

    def compose(self, call: Call, encode: FamilyEncoder) -> "tuple[Tensor, Process, Outcome]":
        """A call with concepts up to its final latents, the same for every family and method.

        Returns:
            The final latents, the method's process, and the outcome of the call.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
            NotFiniteError: If the final latents are NaN or infinite.
        """
        resolved = resolve_call(self, call)
        # Refuses a second call on this model before the scheduler and the properties of the first are touched.
        with resolved.installed(self) as installed:
            self.__dict__.update(call.properties, _interrupt=False)
            schedule = self.schedule(self.scheduler, call.sampling, resolved.canvas, call.source)
            task = None if call.source is None else self._from_image(call, call.source, resolved, schedule)
            sampler = Sampler(self.scheduler, schedule, self._step_arguments(call.sampling), task)
            inputs = self._further_inputs(call, schedule) if task is None else task.inputs
            denoiser, sessions = installed.sessions(encode, sampler, inputs)
            process = concept_sets.start(resolved.choice.method.start, sessions, denoiser)
            self._num_timesteps = len(schedule.timesteps)
            hooks = Hooks(
                self._before_step, lambda step, latents: self._after_step(call, process, step, latents, task),
                lambda: self.interrupt, self.progress_bar,
            )  # fmt: skip
            start = task or TextToImage(lambda: self._noise(call, resolved, process.text.prompt_embeds.dtype))
            latents = denoise(
                process, start, sampler, resolved.cfg_scale, hooks, cost=denoiser.cost, started=call.started
            )
            check_finite(latents, likely_causes(resolved))
            return latents, process, Outcome(denoiser, resolved.choice, self._origin(call, resolved))

    def plan(self, *args: Any, **kwargs: Any) -> CallPlan:
        """The plan of a call with these arguments; changes nothing, and claims no model. LoRA files may be read.

        Raises:
            ValueError: As the call, for anything that does not fit together; and for calls without concepts.
        """
        with kept() as warnings, torch.no_grad():
            return CallPlan.of(resolve_call(self, request_of(self, args, kwargs).call), warnings)

    @property
    def model(self) -> Any:
        """The UNet or transformer."""
        unet = getattr(self, "unet", None)
        return self.transformer if unet is None else unet  # a compiled model cannot be asked whether it is true

    @property
    def runs_on(self) -> torch.device:
        """The device of the model, also where it is offloaded between calls."""
        return self._execution_device

    @property
    def _execution_device(self) -> torch.device:
        """The device of the weights, or of the hooks that bring them; diffusers asks every module several times."""
        models = [uncompiled(model) for model in self.components.values() if isinstance(model, nn.Module)]
        if not any("_hf_hook" in model.__dict__ or hooked(modules_of(model).values()) for model in models):
            weights = (next(chain(model.parameters(), model.buffers()), None) for model in models)
            places = {tensor.device for tensor in weights if tensor is not None}
            if len(places) == 1:
                return places.pop()
        return super()._execution_device

    def backbone_of(self, call: Call) -> Backbone:
        """The backbone of a call."""
        return backbone_of(self.model)

    def _origin(self, call: Call, resolved: ResolvedCall) -> Origin | None:
        """The inputs of `refine`; None where the images of the call cannot be repainted."""
        return None

    def prompt_tokenizers(self, textual_inversions: TextualInversions, length: int | None) -> Sequence[Tokenizer]:
        """The tokenizers of the prompt, for texts of so many tokens; None means as many as the tokenizer says."""
        expand = textual_inversions.expander(self.maybe_convert_prompt)
        tokenizers = textual_inversions.tokenizers.items()
        named = [tokenizer for name, tokenizer in tokenizers if name in self.text_tokenizers]
        return [ExpandingTokenizer(tokenizer, expand, length) for tokenizer in named]

    def check_start(self, call: Call, canvas: Canvas) -> None:
        """Raises ValueError if the latents that a call is to start from have a shape that `_noise` cannot use."""

    def _noise(self, call: Call, resolved: ResolvedCall, dtype: torch.dtype) -> Tensor:
        """The start noise. Shape: [images, channels, height, width]."""
        raise NotImplementedError

    def _from_image(self, call: Call, source: Source, resolved: ResolvedCall, schedule: Schedule) -> ImageToImage:
        """The task of a call that starts from an image."""
        raise NotImplementedError

    def _further_inputs(self, call: Call, schedule: Schedule) -> Mapping[str, Any]:
        """Further arguments of every forward pass, from the reference images of a call and its timesteps."""
        return {}

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Any]:
        """Text tensors for callbacks, by diffusers' names."""
        return {"prompt_embeds": text.prompt_embeds}

    def schedule(self, scheduler: Any, sampling: Sampling, canvas: Canvas, source: Source | None) -> Schedule:
        """Sets the timesteps of a scheduler, until `denoising_end`; see `Host.schedule`."""
        timesteps, steps = self._timesteps(scheduler, sampling, canvas)
        if source is not None:
            timesteps, steps = source.timesteps(scheduler, steps, canvas.device)
        ends = isinstance(sampling.denoising_end, float) and 0 < sampling.denoising_end < 1
        if ends:
            trained = scheduler.config.num_train_timesteps
            timesteps = timesteps[timesteps >= round(trained - sampling.denoising_end * trained)]
            if not len(timesteps):
                raise ValueError(f"denoising_end={sampling.denoising_end} leaves none of the {steps} steps")
        if ends or sampling.has_schedule:
            steps = math.ceil(len(timesteps) / scheduler.order)
        return Schedule(timesteps, steps, scheduler.order, sampling.guider.unguided(timesteps))

    def _timesteps(self, scheduler: Any, sampling: Sampling, canvas: Canvas) -> tuple[Tensor, int]:
        """The timesteps of all passes, and the number of steps, as diffusers' pipeline sets them."""
        timesteps_and_steps: Any = retrieve_timesteps(
            scheduler, num_inference_steps=sampling.num_inference_steps, device=canvas.device,
            timesteps=sampling.timesteps, sigmas=sampling.sigmas,
        )  # fmt: skip
        return timesteps_and_steps

    def _step_arguments(self, sampling: Sampling) -> Mapping[str, Any]:
        """Further arguments of the scheduler's step."""
        return {}

    def _before_step(self, step: Step) -> None:
        """Sets the properties that diffusers' pipelines have during a call, such as the timestep of transformers."""
        if hasattr(self, "_current_timestep"):
            self._current_timestep = step.t

    def _after_step(
        self, call: Call, process: Process, step: Step, latents: Tensor, task: Task | None
    ) -> tuple[Tensor, float]:
        """Calls the callback; it may change latents or switch guidance off."""
        function, guidance_scale, cfg_scale = call.callback.function, self.guidance_scale, step.cfg_scale
        if function is None:
            return latents, cfg_scale
        offered = {"latents": latents, **self._text_for_callbacks(process.text)}
        if isinstance(task, Inpainting):
            offered |= dict(zip(OF_INPAINTING, (task.mask, task.masked), strict=True))
        returned = function(self, step.index, step.t, {name: offered[name] for name in call.callback.tensors})
        if step.cfg_scale > 1 and self.guidance_scale != guidance_scale:
            cfg_scale = self._cfg_scale(step)
        check_changed(offered, returned, cut=step.cfg_scale > 1 >= cfg_scale)
        return returned.get("latents", latents), cfg_scale

    def _cfg_scale(self, step: Step) -> float:
        """The scale of guidance from now on, after a callback has changed `_guidance_scale`."""
        return self.guidance_scale
