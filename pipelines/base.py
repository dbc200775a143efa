"""What every composing pipeline has in common: opening models, holding concepts, a call with its denoising loop."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor, nn

from attention import check_free
from pipelines.conditioning import Conditioning, TokenMasks, TokenPositions, agreed
from pipelines.engine import Encoder, Engine, LoadedConcept, check_blocks
from pipelines.loading import adapter_factors, find_file, match, read_lora
from pipelines.methods import Process, Settings, choose_method, make_method
from pipelines.output import ComposeOutput
from pipelines.scene import Concept, check_names, check_region
from pipelines.weights import Weight

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What is asked of a call with concepts, whatever the family.

    Attributes:
        concepts: Who takes part.
        method: How they are fused; None chooses.
        texts: The prompts, as each of the tokenizers reads them; None with embeddings.
        prompt_embeds: Instead of prompts.
        token_positions: Where the concepts' words stand in them.
        record_attention: Steps of which attention maps are kept.
        width: Pixels.
        height: Pixels.
        num_inference_steps: Denoising steps.
        timesteps: As in diffusers, likewise all below.
        sigmas: Noise levels.
        denoising_end: The part of the denoising after which the call ends.
        guidance_scale: Classifier-free guidance; 1 or less is none.
        guidance_rescale: How much guidance is rescaled.
        images_per_prompt: How many images each prompt gets.
        eta: Of the DDIM scheduler.
        generator: Where noise comes from.
        latents: The start noise.
        output_type: What images are.
        cross_attention_kwargs: "scale", of the user's own adapters.
        clip_skip: Layers of the text encoders that are skipped.
        callback: Called after every step.
        callback_tensors: What it is given.
        started: When the call began, by `time.perf_counter()`.
    """

    concepts: Sequence[str | Concept]
    method: str | Settings | None
    texts: Sequence[Sequence[str]] | None
    prompt_embeds: Tensor | None
    token_positions: TokenPositions | None
    record_attention: bool | Sequence[int]
    width: int
    height: int
    num_inference_steps: int
    timesteps: list[int] | None
    sigmas: list[float] | None
    denoising_end: float | None = None
    guidance_scale: float
    guidance_rescale: float
    images_per_prompt: int
    eta: float
    generator: Generators
    latents: Tensor | None
    output_type: str
    cross_attention_kwargs: dict[str, Any] | None
    clip_skip: int | None
    callback: Callable | None
    callback_tensors: Sequence[str]
    started: float

    @property
    def prompts(self) -> Sequence[str] | None:
        """The prompts; None with embeddings."""
        return None if self.texts is None else self.texts[0]

    @property
    def lora_scale(self) -> float | None:
        """The scale of the user's own adapters."""
        return (self.cross_attention_kwargs or {}).get("scale")


class ComposePipeline:
    """Opens a Stable Diffusion model and composes concept LoRAs with it.

    `ComposePipeline.from_pretrained`, `from_single_file` and `from_pipe` look at the model and return the class for its
    family, which is an ordinary diffusers pipeline as well: without concepts it does exactly what diffusers does.

        pipe = ComposePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        pipe.load_concept("cat.safetensors", trigger="sks", class_word="cat")
        pipe.load_concept("dog.safetensors", trigger="zwx", class_word="dog")
        image = pipe("a sks cat and a zwx dog on grass", concepts=["cat", "dog"], method="tara").images[0]
    """

    _plain_class_name: ClassVar[str]

    # What diffusers' pipelines have.
    unet: Any
    scheduler: Any
    components: Any
    image_processor: Any
    vae_scale_factor: int
    progress_bar: Any
    interrupt: Any
    guidance_scale: Any
    maybe_convert_prompt: Any
    prepare_latents: Any
    prepare_extra_step_kwargs: Any
    get_guidance_scale_embedding: Any
    _execution_device: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Opens a folder or hub repository; all options of diffusers are passed on.

        Raises:
            ValueError: For model families that are not supported.
        """
        if cls is not ComposePipeline:
            return super().from_pretrained(pretrained_model_name_or_path, **options)  # pyright: ignore[reportAttributeAccessIssue]
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        from pipelines.families import family_of

        config = DiffusionPipeline.load_config(str(pretrained_model_name_or_path), **hub)
        return family_of(config).from_pretrained(pretrained_model_name_or_path, **options)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_single_file(cls, link_or_path: str | Path, **options: Any) -> Any:
        """Opens a checkpoint in one file; all options of diffusers are passed on.

        Raises:
            ValueError: For SDXL's refiner.
        """
        if cls is not ComposePipeline:
            return super().from_single_file(str(link_or_path), **options)  # pyright: ignore[reportAttributeAccessIssue]
        from pipelines.families import family_of_file

        return family_of_file(link_or_path, options).from_single_file(link_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> Any:
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
            return super().from_pipe(pipeline, **options)  # pyright: ignore[reportAttributeAccessIssue]
        from pipelines.families import family_of

        return family_of(pipeline.config).from_pipe(pipeline, **options)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """As in diffusers, but under the name of diffusers' own class, so that what is saved opens without us."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)  # pyright: ignore[reportAttributeAccessIssue]
        path = Path(save_directory) / DiffusionPipeline.config_name
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(
            json.dumps({**config, "_class_name": self._plain_class_name}, indent=2) + "\n", encoding="utf-8"
        )

    @property
    def _loaded(self) -> dict[str, LoadedConcept]:
        return self.__dict__.setdefault("_loaded_concepts", {})

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """The loaded concepts by name."""
        return {name: loaded.concept for name, loaded in self._loaded.items()}

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
        **hub: Any,
    ) -> Concept:
        """Loads a concept's LoRA; it acts only in calls that name it.

        Args:
            source: A safetensors file, a folder, or a hub repository.
            name: What the concept is called; the file's name by default.
            trigger: The rare word or words; taken from the file's metadata if it has them.
            class_word: The noun after the trigger; likewise.
            weight: Factor on the whole LoRA, or a schedule of it (`Concept.weight`).
            blocks: Further factors, by block of the UNet (`Concept.blocks`).
            weight_name: The file inside a folder or repository that has several.
            hub: Passed on to `huggingface_hub` (token, revision, ...).

        Raises:
            LoraError: If the file is unusable or does not fit the model.
            ValueError: If the name is taken.
        """
        concept = Concept(
            name=name or Path(source).stem,
            lora=str(source),
            trigger=trigger,
            class_word=class_word,
            weight=weight,
            blocks=blocks if blocks is None else dict(blocks),
        )
        if concept.name in self._loaded or concept.name in _adapters(self):
            raise ValueError(
                f"there is a concept or adapter {concept.name!r} already; unload it or choose another name"
            )
        loaded = self._read(concept, weight_name, **hub)
        logger.info("concept %s: %s", concept.name, loaded.factors.report)
        self._loaded[concept.name] = loaded
        return loaded.concept

    def unload_concept(self, name: str) -> None:
        """Forgets a loaded concept.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self._loaded:
            raise ValueError(f"no concept {name!r} is loaded; there are {', '.join(self._loaded) or 'none'}")
        del self._loaded[name]

    def _read(self, concept: Concept, weight_name: str | None = None, **hub: Any) -> LoadedConcept:
        file = read_lora(find_file(concept.lora or "", weight_name, **hub))
        factors = match(file, self)
        if factors.unmatched:
            logger.warning("%s: %s", file.path.name, factors.report)
        trigger, class_word = (file.metadata.get(key) for key in ("trigger", "class_word"))
        known = Concept(name=concept.name, trigger=trigger, class_word=class_word, weight=1.0)
        return LoadedConcept(_filled(concept, known), factors, file)

    def resolve_concepts(self, concepts: Sequence[str | Concept]) -> tuple[LoadedConcept, ...]:
        """The concepts of a call with their factors; fields that are given win over loaded ones.

        Args:
            concepts: Names of loaded concepts or adapters, or `Concept` objects.

        Raises:
            ValueError: For unknown names and names given twice.
        """
        if isinstance(concepts, str | Concept):
            raise ValueError(f"concepts must be a list of names or Concepts, not {concepts!r}")
        given = tuple(Concept(name=concept) if isinstance(concept, str) else concept for concept in concepts)
        check_names(given)
        return tuple(self._resolve(concept) for concept in given)

    def _resolve(self, concept: Concept) -> LoadedConcept:
        loaded = self._loaded.get(concept.name)
        if concept.lora is not None and (loaded is None or loaded.concept.lora != concept.lora):
            return self._read(concept)
        if loaded is not None:
            return LoadedConcept(_filled(concept, loaded.concept), loaded.factors, loaded.file)
        if concept.name in _adapters(self):
            return LoadedConcept(
                _filled(concept, Concept(name=concept.name, weight=1.0)), adapter_factors(self, concept.name)
            )
        known = ", ".join([*self._loaded, *sorted(_adapters(self))]) or "none"
        raise ValueError(
            f"unknown concept {concept.name!r}; loaded are {known}. Load it with load_concept(file, name=...)"
        )

    def resolve_method(
        self, method: str | Settings | None, concepts: Sequence[LoadedConcept], prompts: Sequence[str] | None
    ) -> Settings:
        """The settings behind a method's name; None chooses and logs why. Without words there are no prompts."""
        return choose_method(concepts, prompts) if method is None else make_method(method)

    def compose(self, call: Call, encode: Encoder) -> tuple[Tensor, Engine]:
        """A call with concepts up to its final latents, the same for every family and method.

        Args:
            call: What is asked.
            encode: Encodes prompts with the text encoders of the family.

        Returns:
            The latents, and the engine that has run the UNet.

        Raises:
            ValueError: For anything that does not fit together, before anything is changed.
        """
        engine, settings = self._prepared(call, encode)
        device = engine.device
        # Refuses a second call on this UNet before the scheduler and the properties of the first are touched.
        with engine.installed():
            self._guidance_scale = call.guidance_scale
            self._guidance_rescale = call.guidance_rescale
            self._clip_skip = call.clip_skip
            self._cross_attention_kwargs = call.cross_attention_kwargs
            self._denoising_end = call.denoising_end
            self._interrupt = False
            schedule: Any = retrieve_timesteps(
                self.scheduler, call.num_inference_steps, device, call.timesteps, call.sigmas
            )
            steps, number = self._shortened(call, *schedule)
            engine.timesteps = steps
            engine.record_steps = steps_to_record(call.record_attention, len(steps))
            process = settings.start(engine)
            start = self.prepare_latents(
                engine.images, self.unet.config.in_channels, call.height, call.width,
                engine.conditioning.prompt_embeds.dtype, device, call.generator, call.latents,
            )  # fmt: skip
            return self._denoise(call, engine, process, start, steps, number), engine

    def _prepared(self, call: Call, encode: Encoder) -> tuple[Engine, Settings]:
        """Checks everything that can be checked before something is changed."""
        loaded = self.resolve_concepts(call.concepts)
        check_call(loaded, call.width, call.height, call.num_inference_steps)
        for found in loaded:
            check_blocks(found, self.unet)
        settings = self.resolve_method(call.method, loaded, call.prompts)
        takers = [found.concept for found in loaded]
        masks = self._token_masks(call, takers)
        device, scale = self._execution_device, self.vae_scale_factor
        engine = Engine(
            self.components,
            loaded,
            encode,
            partial(self._find, takers),
            call.prompts,
            masks,
            latent_grid=(call.height // scale, call.width // scale),
            image_size=(call.height, call.width),
            images_per_prompt=call.images_per_prompt,
            guidance_scale=call.guidance_scale,
            guidance_rescale=call.guidance_rescale,
            device=device,
            unet_kwargs=self._unet_kwargs(call, len(masks.trigger) * call.images_per_prompt, device),
            started=call.started,
        )
        return engine, settings

    def _token_masks(self, call: Call, concepts: Sequence[Concept]) -> TokenMasks:
        if call.prompt_embeds is not None:
            prompts, tokens, _ = call.prompt_embeds.shape
            return TokenMasks.of_positions(call.token_positions or {}, prompts, tokens, concepts)
        if call.token_positions is not None:
            raise ValueError("token_positions go with prompt_embeds; with a prompt, words are found by their triggers")
        elsewhere = {concept.name for concept in concepts if concept.prompt is not None}
        return self._find_in(concepts, call.texts or (), optional=elsewhere)

    def _find(self, concepts: Sequence[Concept], prompts: Sequence[str], names: Any, mentions: Any) -> TokenMasks:
        """A `Finder` for texts that all tokenizers read."""
        return self._find_in(concepts, [prompts] * len(self._tokenizers), names=names, mentions=mentions)

    def _find_in(self, concepts: Sequence[Concept], texts: Sequence[Sequence[str]], **how: Any) -> TokenMasks:
        """Where words stand, which is the same for all tokenizers, since their features are put side by side."""
        found = [
            # Textual inversion puts several tokens in place of one.
            TokenMasks.of_prompts(tokenizer, [self._converted(text, tokenizer) for text in prompts], concepts, **how)
            for tokenizer, prompts in zip(self._tokenizers, texts, strict=True)
        ]
        return agreed(found, concepts)

    def _converted(self, prompt: str, tokenizer: Any) -> str:
        return str(self.maybe_convert_prompt(prompt, tokenizer))

    @property
    def _tokenizers(self) -> list[Any]:
        parts = (getattr(self, name, None) for name in ("tokenizer", "tokenizer_2"))
        return [part for part in parts if part is not None]

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height in pixels; what is None is the model's own."""
        sample: Any = self.unet.config["sample_size"]
        own_height, own_width = (sample, sample) if isinstance(sample, int) else sample
        scale = self.vae_scale_factor
        return own_width * scale if width is None else width, own_height * scale if height is None else height

    def _unet_kwargs(self, call: Call, images: int, device: torch.device) -> Mapping[str, Any]:
        kwargs: dict[str, Any] = {"cross_attention_kwargs": call.cross_attention_kwargs}
        if self.unet.config.time_cond_proj_dim is not None:  # distilled models take the guidance scale as an input
            scale = torch.tensor(call.guidance_scale - 1).repeat(images)
            embedding = self.get_guidance_scale_embedding(scale, embedding_dim=self.unet.config.time_cond_proj_dim)
            kwargs["timestep_cond"] = embedding.to(device=device, dtype=self.unet.dtype)
        return kwargs

    def _shortened(self, call: Call, timesteps: Tensor, number: int) -> tuple[Tensor, int]:
        """The steps until `denoising_end`, and how many these are."""
        if not isinstance(call.denoising_end, float) or not 0 < call.denoising_end < 1:
            return timesteps, number
        trained = self.scheduler.config.num_train_timesteps
        kept = timesteps[timesteps >= round(trained - call.denoising_end * trained)]
        if not len(kept):
            raise ValueError(f"denoising_end={call.denoising_end} leaves none of the {number} steps")
        return kept, len(kept)

    def _denoise(
        self, call: Call, engine: Engine, process: Process, latents: Tensor, timesteps: Tensor, number: int
    ) -> Tensor:
        """The loop, the same for every method: step, scheduler step, callback, progress. Returns the final latents."""
        order, extra = self.scheduler.order, self.prepare_extra_step_kwargs(call.generator, call.eta)
        warmup = len(timesteps) - number * order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=number) as progress_bar:
            latents = process.prepare(latents)
            engine.cost.preparation_seconds = time.perf_counter() - engine.started
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                engine.step = i
                latents, model_output = process.step(latents, t)
                latents = self.scheduler.step(model_output, t, latents, **extra, return_dict=False)[0]
                if call.callback is not None:
                    latents = self._call_back(call.callback, call.callback_tensors, engine, i, t, latents)
                if i == len(timesteps) - 1 or (i + 1 > warmup and (i + 1) % order == 0):
                    progress_bar.update()
        return latents

    def _call_back(
        self, callback: Callable, tensors: Sequence[str], engine: Engine, i: int, t: Tensor, latents: Tensor
    ) -> Tensor:
        offered = {"latents": latents, **self._text_for_callbacks(engine.conditioning)}
        given = {name: offered[name] for name in tensors}
        returned = callback(self, i, t, dict(given))
        was_guided, engine.guidance_scale = engine.guided, self.guidance_scale
        changed = {name for name, value in returned.items() if value is not offered.get(name)} - {"latents"}
        if changed and not (changed <= _CUT_WITH_GUIDANCE and was_guided and not engine.guided):
            raise ValueError(
                f"the callback changed {', '.join(sorted(changed))}; with concepts it may change latents or switch "
                "guidance off, since the places of the concepts' words in other embeddings are unknown"
            )
        return returned.get("latents", latents)

    def _text_for_callbacks(self, text: Conditioning) -> dict[str, Tensor]:
        """What callbacks may see of the text, by diffusers' names."""
        return {"prompt_embeds": text.prompt_embeds}

    def _postprocess(self, image: Tensor, call: Call, **options: Any) -> Any:
        return self.image_processor.postprocess(image, output_type=call.output_type, **options)


_CUT_WITH_GUIDANCE = {"prompt_embeds", "add_text_embeds", "add_time_ids"}
"""What diffusers' own callbacks cut off when they switch guidance off."""


def output_of(engine: Engine, images: Any, nsfw: Any = None) -> ComposeOutput:
    """What a call returns."""
    recorded_steps, maps = engine.attention_maps() or (None, None)
    return ComposeOutput(
        images=images,
        nsfw_content_detected=nsfw,
        cost=engine.cost,
        attention_maps=maps,
        masks=engine.masks(),
        recorded_steps=recorded_steps,
    )


def _filled(concept: Concept, known: Concept) -> Concept:
    """A concept whose missing fields come from what is known."""
    given = {name: value for name, value in concept if value is not None}
    return known.model_copy(update=given)


def _adapters(pipe: Any) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}


def check_plain(unet: nn.Module, method: object, token_positions: object, record_attention: object) -> None:
    """Checks a call without concepts.

    Raises:
        ValueError: If something is given that needs concepts.
        RuntimeError: If concepts are installed in the UNet just now.
    """
    if method is not None or token_positions is not None or record_attention is not False:
        raise ValueError("method, token_positions and record_attention need concepts; name some with concepts=[...]")
    check_free(unet)


def check_arguments(
    unknown: Mapping[str, Any], ip_adapter: Sequence[object], cross_attention_kwargs: Mapping[str, Any] | None
) -> None:
    """Refuses what cannot be combined with concepts.

    Raises:
        TypeError: For unknown arguments.
        ValueError: For IP-Adapter images, and `cross_attention_kwargs` other than "scale".
    """
    if unknown:
        raise TypeError(f"unknown arguments: {', '.join(unknown)}")
    if any(given is not None for given in ip_adapter):
        raise ValueError("IP-Adapter images cannot be combined with concepts yet")
    if others := (cross_attention_kwargs or {}).keys() - {"scale"}:
        raise ValueError(f"cross_attention_kwargs {sorted(others)} cannot be combined with concepts; only 'scale' can")


def tensors_for(callback: object, tensors: Sequence[str]) -> list[str]:
    """The tensors that a callback is given: diffusers' own callbacks name them themselves."""
    return list(callback.tensor_inputs if isinstance(callback, PipelineCallback | MultiPipelineCallbacks) else tensors)


def listed(prompt: str | list[str] | None) -> list[str]:
    """One prompt or several as a list."""
    return [prompt] if isinstance(prompt, str) else prompt or []


def check_call(concepts: Sequence[LoadedConcept], width: int, height: int, num_inference_steps: int) -> None:
    """Checks what diffusers does not.

    Raises:
        ValueError: For sizes and step numbers below 1 and for regions outside the canvas.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be positive, not {width} x {height}")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    for loaded in concepts:
        check_region(loaded.concept, width, height)


def steps_to_record(record_attention: bool | Sequence[int], steps: int) -> frozenset[int]:
    """The steps of which attention maps are kept: True is all, a list names some, negative ones count from the end.

    Raises:
        ValueError: For steps that there are not.
    """
    if isinstance(record_attention, bool):
        return frozenset(range(steps)) if record_attention else frozenset()
    wrong = [step for step in record_attention if not -steps <= step < steps]
    if wrong:
        raise ValueError(f"record_attention names steps {wrong}, but there are {steps}")
    return frozenset(step % steps for step in record_attention)
