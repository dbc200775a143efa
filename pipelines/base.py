"""What every composing pipeline has in common: opening models, holding concepts, a call with its denoising loop."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from safetensors import safe_open
from torch import Tensor, nn

from lora_compose.attention import backbone_of
from lora_compose.pipelines import concept_sets
from lora_compose.pipelines.call import Call, Concepts, Sampling
from lora_compose.pipelines.canvas import Step
from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept
from lora_compose.pipelines.concepts.library import ConceptLibrary
from lora_compose.pipelines.concepts.loading import find_file, local_path
from lora_compose.pipelines.concepts.strength import Weight
from lora_compose.pipelines.concepts.textual_inversion import Expanding, Words
from lora_compose.pipelines.control import Control
from lora_compose.pipelines.denoiser import Denoiser
from lora_compose.pipelines.formats.deltas import MAX_RANK
from lora_compose.pipelines.loop import Hooks, denoise
from lora_compose.pipelines.methods import Settings, choose_method, make_method
from lora_compose.pipelines.methods.process import Process
from lora_compose.pipelines.output import ComposeOutput
from lora_compose.pipelines.plan import Plan, expanding, make_plan
from lora_compose.pipelines.sampler import Sampler, Schedule
from lora_compose.pipelines.scene import Concept
from lora_compose.pipelines.task import TextToImage
from lora_compose.pipelines.text.conditioning import Conditioning, TokenPositions
from lora_compose.pipelines.text.encoder import Encoder

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class ComposePipeline(DiffusionPipeline):
    """Opens a model and composes concept LoRAs with it.

    `ComposePipeline.from_pretrained`, `from_single_file` and `from_pipe` look at the model and return the class for its
    family, which is an ordinary diffusers pipeline as well: without concepts it does exactly what diffusers does.

        pipe = ComposePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        pipe.load_concept("cat.safetensors", trigger="sks", class_word="cat")
        pipe.load_concept("dog.safetensors", trigger="zwx", class_word="dog")
        image = pipe("a sks cat and a zwx dog on grass", concepts=["cat", "dog"], method="tara").images[0]
    """

    concept_memory: int = 2 * 2**30
    """Bytes of LoRAs that stay in memory between calls, of those that calls have read; `load_concept` comes on top."""

    text_tokenizers: tuple[str, ...] = ("tokenizer", "tokenizer_2")
    """The tokenizers whose tokens the denoiser reads, by component name."""

    families: ClassVar[list["type[ComposePipeline]"]] = []
    """The classes of all model families, as their modules register them."""

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

        diffusers goes by that name: a saved pipeline opens in plain diffusers, and `AutoPipelineFor...from_pipe` finds
        the pipelines for other tasks. `__qualname__` stays our own.
        """
        super().__init_subclass__(**options)
        cls.__name__ = next(
            base.__name__
            for base in cls.__mro__
            if issubclass(base, DiffusionPipeline) and not issubclass(base, ComposePipeline)
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> "ComposePipeline":
        """Opens a folder or hub repository; all options of diffusers are passed on.

        Raises:
            ValueError: For model families that are not supported.
        """
        if cls is not ComposePipeline:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        config: Any = DiffusionPipeline.load_config(str(pretrained_model_name_or_path), **hub)
        family: Any = cls.family_of(config)
        return family.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_single_file(cls, link_or_path: str | Path, **options: Any) -> Self:
        """Opens a checkpoint in one file; all options of diffusers are passed on.

        Raises:
            ValueError: For SDXL's refiner.
        """
        if cls is not ComposePipeline:
            return super().from_single_file(str(link_or_path), **options)  # pyright: ignore[reportAttributeAccessIssue]
        family: Any = cls.family_of_keys(checkpoint_keys(link_or_path, options))
        return family.from_single_file(link_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Self:
        """A composing pipeline that shares all components with another pipeline.

        The precision stays what it is; diffusers alone would turn the shared models to float32.

        Raises:
            ValueError: If the components differ in precision and no `dtype` is given, which would change some of them.
        """
        if not options.keys() & {"dtype", "torch_dtype"}:
            found = {name: part.dtype for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
            if len(set(found.values())) > 1:
                raise ValueError(
                    f"the components differ in precision ({found}); build the pipeline with its class and "
                    "`**pipe.components` to keep them so, or give from_pipe a dtype to change the shared models"
                )
            options["dtype"] = pipeline.dtype
        if cls is not ComposePipeline:
            return super().from_pipe(pipeline, **options)  # pyright: ignore[reportReturnType]
        family: Any = cls.family_of(pipeline.config)
        return family.from_pipe(pipeline, **options)

    @classmethod
    def family_of(cls, config: Mapping[str, Any]) -> "type[ComposePipeline]":
        """The class for a model's configuration (model_index.json).

        Raises:
            ValueError: For model families that are not supported.
        """
        for family in cls.families:
            if family.opens(config):
                return family
        raise ValueError(
            f"this is a model for {config.get('_class_name', 'an unknown pipeline')}; supported are "
            f"{', '.join(family.family for family in cls.families)}"
        )

    @classmethod
    def family_of_keys(cls, keys: Iterable[str]) -> "type[ComposePipeline]":
        """The class for a checkpoint in one file, by the names of its tensors.

        Raises:
            ValueError: For model families that are not supported.
        """
        found = list(keys)
        for family in cls.families:
            if family.opens_keys(found):
                return family
        raise ValueError(f"this checkpoint is for no supported model: its first tensors are {', '.join(found[:3])}")

    family: str = ""
    """The model family, in words."""

    @classmethod
    def opens(cls, config: Mapping[str, Any]) -> bool:
        """Whether a model's configuration is of this family."""
        raise NotImplementedError

    @classmethod
    def opens_keys(cls, keys: Sequence[str]) -> bool:
        """Whether a checkpoint with tensors of these names is of this family."""
        raise NotImplementedError

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
            concepts: Names of loaded concepts or adapters, or `Concept` objects, whose given fields override loaded
                ones. None or empty: exactly what diffusers does. A list of such lists is a concept set per prompt.
            method: How they are fused: a name or a settings object such as `Tara(scope="cross_kv")`; None chooses.
            control: Control images for ControlNets and T2I-Adapters; only with concepts.
            token_positions: With `prompt_embeds`: where each concept's trigger is, by concept name.
            record_attention: True, or the steps of which attention maps are returned.
            options: Arguments of diffusers' pipeline for the model family.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        raise TypeError("open a model first: ComposePipeline.from_pretrained(...)")

    @property
    def library(self) -> ConceptLibrary:
        """The loaded and the added concepts, and the files read recently."""
        return self.__dict__.setdefault("_concept_library", ConceptLibrary())

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """The loaded and the added concepts by name."""
        return self.library.concepts

    def load_concept(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        trigger: str | None = None,
        class_word: str | None = None,
        weight: Weight = 1.0,
        blocks: Mapping[str, float] | None = None,
        weight_name: str | None = None,
        alpha: float | None = None,
        max_rank: int = MAX_RANK,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Concept:
        """Loads a concept's LoRA; it acts only in calls that name it.

        Args:
            source: A safetensors file, a folder, or a hub repository.
            name: What the concept is called; the file's name by default.
            trigger: The rare word or words; taken from the file's metadata if it has them.
            class_word: The noun after the trigger; taken from the file's metadata if it has it.
            weight: Factor on the whole LoRA, or a schedule of it (`Concept.weight`).
            blocks: Further factors, by block of the denoiser (`Concept.blocks`).
            weight_name: The file inside a folder or repository that has several.
            alpha: The alpha of a file that does not say its own; the LoRA is scaled by alpha / rank.
            max_rank: LoHa, LoKr and whole differences are kept exactly up to this rank, and cut to it beyond.
            allow_pickle: Opens files of `torch.save` as well: their tensors are read, no code is run.
            hub: Passed on to `huggingface_hub` (token, revision, ...).

        Raises:
            LoraError: If the file is unusable or does not fit the model.
            ValueError: If the name is taken.
        """
        concept = Concept(
            name=name or local_path(source).stem,
            lora=str(source),
            trigger=trigger,
            class_word=class_word,
            weight=weight,
            alpha=alpha,
            blocks=blocks if blocks is None else dict(blocks),
        )
        self.library.check_new(self, concept.name)
        path = find_file(source, weight_name, **hub)
        return self.library.load(self, concept, path, max_rank=max_rank, allow_pickle=allow_pickle)

    def add_concepts(self, source: str | Path | Iterable[str | Path | Concept]) -> tuple[Concept, ...]:
        """Makes LoRA files known as concepts without reading them: a call that names one reads and checks it then.

        Only headers are read, for triggers and class words. What is wrong with a file is said by the call that needs
        it. Files that calls have read stay in memory up to `concept_memory` bytes; those not used for longest go first.
        A file that has changed on disk is read again. A folder may be added again for the files that are new.

        Args:
            source: A folder, of which every safetensors file is added under its own name; or files, or `Concept`
                objects with a file and whatever else is known.

        Returns:
            What has been added.

        Raises:
            LoraError: If there is no such file or folder, or none in it.
            ValueError: If a name is taken by another concept; nothing is added then.
        """
        return self.library.add(self, source)

    def unload_concept(self, name: str) -> None:
        """Removes a concept that was loaded or added.

        Raises:
            ValueError: If there is none of that name.
        """
        self.library.unload(name)

    def resolve_concepts(self, concepts: Sequence[str | Concept]) -> tuple[LoadedConcept, ...]:
        """The concepts of a call with their factors; given fields override loaded ones.

        Args:
            concepts: Names of loaded concepts or adapters, or `Concept` objects.

        Raises:
            ValueError: For unknown names and names given twice.
        """
        return self.library.resolve(self, concepts, self.concept_memory)

    def resolve_method(
        self,
        method: str | Settings | None,
        concepts: Sequence[LoadedConcept],
        prompts: Sequence[str] | None,
        concept_sets: Sequence[ConceptSet] | None = None,
    ) -> Settings:
        """The settings behind a method's name; None chooses and logs why (`choose_method`)."""
        if method is not None:
            return make_method(method)
        reads_regions = backbone_of(self.denoiser).reads_regions
        return choose_method(concepts, prompts, concept_sets, region_attention=reads_regions)

    def tokenizers_for(self, concepts: Sequence[LoadedConcept]) -> Sequence[Expanding]:
        """The tokenizers as they read prompts in a call with these concepts, with the words that their files bring.

        Raises:
            ValueError: If two files bring one word.
        """
        return expanding(self, Words.of(concepts, self.components))

    def compose(self, call: Call, encode: Encoder) -> "tuple[Tensor, Process, Denoiser]":
        """A call with concepts up to its final latents, the same for every family and method.

        Args:
            call: What is asked.
            encode: Encodes prompts with the text encoders of the family.

        Returns:
            The final latents, the method's process, and the denoiser that it has run.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        plan = make_plan(self, call)
        # Refuses a second call on this denoiser before the scheduler and the properties of the first are touched.
        with plan.installed(self) as sessions:
            self.__dict__.update(call.properties, _interrupt=False)
            schedule = self._schedule(call.sampling, plan)
            sampler = Sampler(self.scheduler, schedule, self._step_arguments(call.sampling))
            opened = sessions(encode, sampler)
            process = concept_sets.start(plan.method.start, opened.each, opened.denoiser)
            self._num_timesteps = len(schedule.timesteps)
            hooks = Hooks(
                lambda step, latents: self._after_step(call, process, step, latents),
                lambda: self.interrupt,
                self.progress_bar,
            )
            latents = denoise(
                process,
                TextToImage(lambda: self._noise(call, plan, process.text.prompt_embeds.dtype)),
                sampler,
                1.0 if plan.canvas.backbone.embeds_guidance else call.sampling.guidance.scale,
                hooks,
                cost=opened.denoiser.cost,
                started=call.started,
            )
            return latents, process, opened.denoiser

    # What differs between families.

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return self.components.get("unet") or self.components["transformer"]

    def _noise(self, call: Call, plan: Plan, dtype: torch.dtype) -> Tensor:
        """The start noise. Shape: [images, channels, height, width]."""
        raise NotImplementedError

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Tensor]:
        """Tensors of the text that callbacks are offered, by diffusers' names."""
        return {"prompt_embeds": text.prompt_embeds}

    def _schedule(self, sampling: Sampling, plan: Plan) -> Schedule:
        """The timesteps until `denoising_end`."""
        timesteps, steps = self._timesteps(sampling, plan)
        ends = isinstance(sampling.denoising_end, float) and 0 < sampling.denoising_end < 1
        if ends:
            trained = self.scheduler.config.num_train_timesteps
            kept = timesteps[timesteps >= round(trained - sampling.denoising_end * trained)]
            if not len(kept):
                raise ValueError(f"denoising_end={sampling.denoising_end} leaves none of the {steps} steps")
            timesteps = kept
        if ends or sampling.has_schedule:
            steps = math.ceil(len(timesteps) / self.scheduler.order)
        return Schedule(timesteps, steps, self.scheduler.order)

    def _timesteps(self, sampling: Sampling, plan: Plan) -> tuple[Tensor, int]:
        """The timesteps of all passes, and the number of steps, as diffusers' pipeline sets them."""
        found: Any = retrieve_timesteps(
            self.scheduler, sampling.num_inference_steps, plan.canvas.device, sampling.timesteps, sampling.sigmas
        )
        return found

    def _step_arguments(self, sampling: Sampling) -> Mapping[str, Any]:
        """Further arguments of the scheduler's step."""
        return {}

    def _after_step(self, call: Call, process: Process, step: Step, latents: Tensor) -> tuple[Tensor, float]:
        """Calls the callback; it may change latents or switch guidance off."""
        function = call.callback.function
        if function is None:
            return latents, step.cfg_scale
        offered = {"latents": latents, **self._text_for_callbacks(process.text)}
        given = {name: offered[name] for name in call.callback.tensors}
        returned = function(self, step.index, step.t, dict(given))
        scale = self._cfg_scale(step)
        changed = {name for name, value in returned.items() if value is not offered.get(name)} - {"latents"}
        if changed and not (changed <= _CUT_WITH_GUIDANCE and step.guided and scale <= 1):
            raise ValueError(
                f"the callback changed {', '.join(sorted(changed))}; with concepts it may change latents or switch "
                "guidance off, since the places of the concepts' words in other embeddings are unknown"
            )
        return returned.get("latents", latents), scale

    def _cfg_scale(self, step: Step) -> float:
        """The scale of guidance from now on, which a callback may have changed."""
        return step.cfg_scale if step.cfg_scale <= 1 else self.guidance_scale

    def _postprocess(self, image: Tensor, output_type: str, **options: Any) -> Any:
        return self.image_processor.postprocess(image, output_type=output_type, **options)


_CUT_WITH_GUIDANCE = {"prompt_embeds", "add_text_embeds", "add_time_ids"}
"""What diffusers' own callbacks cut off when they switch guidance off."""


def output_of(denoiser: Denoiser, images: Any, nsfw: Any = None) -> ComposeOutput:
    """What a call returns."""
    recorded_steps, maps = denoiser.log.attention_maps() or (None, None)
    return ComposeOutput(
        images=images,
        nsfw_content_detected=nsfw,
        cost=denoiser.cost,
        attention_maps=maps,
        masks=denoiser.log.masks(),
        recorded_steps=recorded_steps,
    )


_FILE_OPTIONS = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")


def checkpoint_keys(link_or_path: str | Path, options: Mapping[str, Any]) -> list[str]:
    """The names of the tensors in a checkpoint.

    Args:
        link_or_path: A file, or a link to one in a hub repository, which is downloaded.
        options: Those of `from_single_file`.
    """
    path = Path(link_or_path)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    given = {name: options[name] for name in _FILE_OPTIONS if name in options}
    return list(load_single_file_checkpoint(str(link_or_path), **given))
