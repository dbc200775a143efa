"""What every composing pipeline has in common: opening models, holding concepts, a call with its denoising loop."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor, nn

from lora_compose.pipelines.call import Call, check_call, of_prompt, steps_to_record
from lora_compose.pipelines.conditioning import Conditioning, TokenMasks, agreed
from lora_compose.pipelines.control import Canvas, Guide, made_ready
from lora_compose.pipelines.engine import Encoder, Engine, LoadedConcept, check_blocks
from lora_compose.pipelines.formats.deltas import MAX_RANK
from lora_compose.pipelines.formats.files import read_words
from lora_compose.pipelines.loading import LoraError, adapter_factors, find_file, local_path, match, read_lora
from lora_compose.pipelines.methods import Process, Settings, choose_method, make_method
from lora_compose.pipelines.output import ComposeOutput
from lora_compose.pipelines.recent import Read, Recent
from lora_compose.pipelines.scene import Concept, check_names
from lora_compose.pipelines.weights import Weight
from lora_compose.pipelines.words import Expanding, Words

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class ComposePipeline:
    """Opens a Stable Diffusion model and composes concept LoRAs with it.

    `ComposePipeline.from_pretrained`, `from_single_file` and `from_pipe` look at the model and return the class for its
    family, which is an ordinary diffusers pipeline as well: without concepts it does exactly what diffusers does.

        pipe = ComposePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        pipe.load_concept("cat.safetensors", trigger="sks", class_word="cat")
        pipe.load_concept("dog.safetensors", trigger="zwx", class_word="dog")
        image = pipe("a sks cat and a zwx dog on grass", concepts=["cat", "dog"], method="tara").images[0]
    """

    concept_memory: int = 2 * 2**30
    """Bytes of LoRAs that stay in memory between calls, of those that calls have read; `load_concept` comes on top."""

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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Opens a folder or hub repository; all options of diffusers are passed on.

        Raises:
            ValueError: For model families that are not supported.
        """
        if cls is not ComposePipeline:
            return super().from_pretrained(pretrained_model_name_or_path, **options)  # pyright: ignore[reportAttributeAccessIssue]
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        from lora_compose.pipelines.families import family_of

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
        from lora_compose.pipelines.families import family_of_file

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
        from lora_compose.pipelines.families import family_of

        return family_of(pipeline.config).from_pipe(pipeline, **options)

    @property
    def _loaded(self) -> dict[str, LoadedConcept]:
        return self.__dict__.setdefault("_loaded_concepts", {})

    @property
    def _on_disk(self) -> dict[str, "_Added"]:
        return self.__dict__.setdefault("_concepts_on_disk", {})

    @property
    def _recent(self) -> Recent:
        return self.__dict__.setdefault("_recent_files", Recent())

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """The loaded and the added concepts by name."""
        known = {**self._loaded, **self._on_disk}
        return {name: found.concept for name, found in known.items()}

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
            class_word: The noun after the trigger; likewise.
            weight: Factor on the whole LoRA, or a schedule of it (`Concept.weight`).
            blocks: Further factors, by block of the UNet (`Concept.blocks`).
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
        self._check_new(concept.name)
        path = find_file(source, weight_name, **hub)
        read = self._read(path, alpha=alpha, max_rank=max_rank, allow_pickle=allow_pickle)
        logger.info("concept %s: %s", concept.name, read.factors.report)
        self._loaded[concept.name] = _loaded_concept(concept, read)
        return self._loaded[concept.name].concept

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
        added: dict[str, _Added] = {}
        for given in _in_files(source):
            name, before = given.name, self._on_disk.get(given.name)
            if name in added:
                raise ValueError(
                    f"{added[name].given.lora} and {given.lora} would both be called {name!r}; "
                    "name them: Concept(name=..., lora=...)"
                )
            if before is None or before.given.lora != given.lora:
                self._check_new(name)
            added[name] = _Added(given, _filled(given, _by_header(given)))
        self._on_disk.update(added)
        return tuple(found.concept for found in added.values())

    def _check_new(self, name: str) -> None:
        if name in self.concepts or name in _adapters(self):
            raise ValueError(f"there is a concept or adapter {name!r} already; unload it or choose another name")

    def unload_concept(self, name: str) -> None:
        """Forgets a concept that was loaded or added.

        Raises:
            ValueError: If there is none of that name.
        """
        if name not in self.concepts:
            raise ValueError(f"no concept {name!r} is loaded; there are {', '.join(self.concepts) or 'none'}")
        self._loaded.pop(name, None)
        self._on_disk.pop(name, None)

    def _read(self, path: Path, *, alpha: float | None, max_rank: int = MAX_RANK, allow_pickle: bool = False) -> Read:
        file = read_lora(path, allow_pickle=allow_pickle)
        factors = match(file, self, alpha=alpha, max_rank=max_rank)
        if not factors.complete:
            logger.warning("%s: %s", file.path.name, factors.report)
        return Read(file, factors)

    def _from_disk(self, concept: Concept) -> LoadedConcept:
        """A concept whose file is read, unless it is still in memory."""
        path, alpha = find_file(concept.lora or ""), concept.alpha
        return _loaded_concept(concept, self._recent.get(path, alpha, lambda: self._read(path, alpha=alpha)))

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
        found = tuple(self._resolve(concept) for concept in given)
        self._recent.trim(self.concept_memory, keep=len(given))
        return found

    def _resolve(self, concept: Concept) -> LoadedConcept:
        loaded, added = self._loaded.get(concept.name), self._on_disk.get(concept.name)
        if added is not None and concept.lora in (None, added.given.lora):
            concept = _filled(concept, added.given)
        if concept.lora is not None and (loaded is None or not _same_source(concept, loaded.concept)):
            return self._from_disk(concept)
        if loaded is not None:
            if concept.alpha is not None and concept.alpha != loaded.concept.alpha:
                raise ValueError(f"concept {concept.name!r} was loaded with another alpha; give it to load_concept")
            return LoadedConcept(_filled(concept, loaded.concept), loaded.factors, loaded.file)
        if concept.name in _adapters(self):
            return LoadedConcept(
                _filled(concept, Concept(name=concept.name, weight=1.0)), adapter_factors(self, concept.name)
            )
        known = ", ".join([*self.concepts, *sorted(_adapters(self))]) or "none"
        raise ValueError(
            f"unknown concept {concept.name!r}; loaded are {known}. Load it with load_concept(file, name=...)"
        )

    def resolve_method(
        self,
        method: str | Settings | None,
        concepts: Sequence[LoadedConcept],
        prompts: Sequence[str] | None,
        members: Sequence[Sequence[int]] | None = None,
    ) -> Settings:
        """The settings behind a method's name; None chooses and logs why (`choose_method`)."""
        return choose_method(concepts, prompts, members) if method is None else make_method(method)

    def _cast(self, call: Call) -> tuple[tuple[LoadedConcept, ...], list[list[int]]]:
        """Everybody of a call, and by prompt who of them takes part.

        A concept that is the same in several prompts is one; with another weight or region it is another.
        """
        given: Sequence[Any] = [call.concepts] if isinstance(call.concepts, str | Concept) else call.concepts
        if not any(isinstance(entry, list | tuple) for entry in given):
            everybody = self.resolve_concepts(call.concepts)  # pyright: ignore[reportArgumentType]
            return everybody, [list(range(len(everybody)))] * call.prompt_count
        if not all(isinstance(entry, list | tuple) for entry in given):
            raise ValueError("concepts are those of all prompts, or a list for each prompt, but not a mixture of both")
        if len(given) != call.prompt_count:
            raise ValueError(f"there are concepts for {len(given)} prompts, but {call.prompt_count} prompts")
        cast: dict[Concept, LoadedConcept] = {}
        places: dict[Concept, int] = {}
        members = []
        for mine in map(self.resolve_concepts, given):
            for found in mine:
                cast.setdefault(found.concept, found)
                places.setdefault(found.concept, len(places))
            members.append([places[found.concept] for found in mine])
        return tuple(cast.values()), members

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
            steps, number = self._schedule(call, device)
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
        loaded, members = self._cast(call)
        check_call(call, loaded)
        for found in loaded:
            check_blocks(found, self.unet)
        differ = any(mine != members[0] for mine in members)
        settings = self.resolve_method(call.method, loaded, call.prompts, members)
        takers = [found.concept for found in loaded]
        words = Words.of(loaded, self.components)
        tokenizers = self._expanding(words)
        masks = (
            self._masks_by_prompt(call, tokenizers, takers, members)
            if differ
            else self._token_masks(call, tokenizers, takers)
        )
        device, scale = self._execution_device, self.vae_scale_factor
        engine = Engine(
            self.components,
            loaded,
            words.read_by(self, encode),
            partial(self._find, tokenizers),
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
            members=members,
            guides=self._guides(call, takers, members),
        )
        return engine, settings

    def _guides(self, call: Call, concepts: Sequence[Concept], members: Sequence[Sequence[int]]) -> list[Guide]:
        """The controls of a call, without those that say nothing."""
        image_size, scale = (call.height, call.width), self.vae_scale_factor
        canvas = Canvas(
            image_size,
            (call.height // scale, call.width // scale),
            [{concepts[i].name: concepts[i].region for i in mine} for mine in members],
            call.images_per_prompt,
            self._execution_device,
        )
        ready = [made_ready(control, self.unet, canvas) for control in call.controls]
        return [guide for guide in ready if not guide.control.is_off]

    def tokenizers_for(self, concepts: Sequence[LoadedConcept]) -> Sequence[Expanding]:
        """The tokenizers as they read prompts in a call with these concepts, with the words that their files bring.

        Raises:
            ValueError: If two files bring one word.
        """
        return self._expanding(Words.of(concepts, self.components))

    def _expanding(self, words: Words) -> Sequence[Expanding]:
        expand = words.expander(self)
        return [Expanding(tokenizer, expand) for tokenizer in words.tokenizers.values()]

    def _token_masks(self, call: Call, tokenizers: Sequence[Expanding], concepts: Sequence[Concept]) -> TokenMasks:
        if call.prompt_embeds is not None:
            prompts, tokens, _ = call.prompt_embeds.shape
            return TokenMasks.of_positions(call.token_positions or {}, prompts, tokens, concepts)
        if call.token_positions is not None:
            raise ValueError("token_positions go with prompt_embeds; with a prompt, words are found by their triggers")
        elsewhere = {concept.name for concept in concepts if concept.prompt is not None}
        return self._find_in(tokenizers, concepts, call.texts or (), optional=elsewhere)

    def _masks_by_prompt(
        self,
        call: Call,
        tokenizers: Sequence[Expanding],
        concepts: Sequence[Concept],
        members: Sequence[Sequence[int]],
    ) -> TokenMasks:
        """The words of every prompt's own concepts; for the others there are none."""
        parts = []
        for prompt, mine in enumerate(members):
            cast = [concepts[i] for i in mine]
            here = slice(prompt, prompt + 1)
            one = replace(
                call,
                texts=None if call.texts is None else [text[here] for text in call.texts],
                prompt_embeds=None if call.prompt_embeds is None else call.prompt_embeds[here],
                token_positions=of_prompt(call.token_positions, cast, prompt, len(members)),
            )
            parts.append(self._token_masks(one, tokenizers, cast).among(mine, len(concepts)))
        return TokenMasks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("trigger", "phrase")))

    def _find(
        self,
        tokenizers: Sequence[Expanding],
        concepts: Sequence[Concept],
        prompts: Sequence[str],
        names: Any,
        mentions: Any,
    ) -> TokenMasks:
        """A `Finder` for texts that all tokenizers read."""
        return self._find_in(tokenizers, concepts, [prompts] * len(tokenizers), names=names, mentions=mentions)

    def _find_in(
        self,
        tokenizers: Sequence[Expanding],
        concepts: Sequence[Concept],
        texts: Sequence[Sequence[str]],
        **how: Any,
    ) -> TokenMasks:
        """Where words stand, which is the same for all tokenizers, since their features are put side by side."""
        found = [
            TokenMasks.of_prompts(tokenizer, prompts, concepts, **how)
            for tokenizer, prompts in zip(tokenizers, texts, strict=True)
        ]
        return agreed(found, concepts)

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

    def _schedule(self, call: Call, device: torch.device) -> tuple[Tensor, int]:
        """The timesteps of all passes until `denoising_end`, and the number of steps that these make.

        A step of a scheduler of second order (Heun) has two passes, of which the last step lacks one.
        """
        schedule: Any = retrieve_timesteps(
            self.scheduler, call.num_inference_steps, device, call.timesteps, call.sigmas
        )
        timesteps, number = schedule
        ends = isinstance(call.denoising_end, float) and 0 < call.denoising_end < 1
        if ends:
            trained = self.scheduler.config.num_train_timesteps
            kept = timesteps[timesteps >= round(trained - call.denoising_end * trained)]
            if not len(kept):
                raise ValueError(f"denoising_end={call.denoising_end} leaves none of the {number} steps")
            timesteps = kept
        if ends or call.has_schedule:
            number = math.ceil(len(timesteps) / self.scheduler.order)
        return timesteps, number

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


@dataclass(frozen=True)
class _Added:
    """A file that is known but need not have been read.

    Attributes:
        given: What was said when it was added.
        concept: The same, and what the file's header says.
    """

    given: Concept
    concept: Concept


def _in_files(source: str | Path | Iterable[str | Path | Concept]) -> Iterable[Concept]:
    """The concepts that are to be added; every one has a file."""
    entries: Iterable[str | Path | Concept]
    if isinstance(source, str) or not isinstance(source, Iterable):
        path = local_path(source)
        entries = sorted(path.glob("*.safetensors")) if path.is_dir() else [source]
        if not entries:
            raise LoraError(f"{path} has no safetensors files")
    else:
        entries = source
    for entry in entries:
        concept = entry if isinstance(entry, Concept) else Concept(name=local_path(entry).stem, lora=str(entry))
        if concept.lora is None or not local_path(concept.lora).is_file():
            raise LoraError(f"concept {concept.name!r} needs a file, and there is none at {concept.lora!r}")
        yield concept


def _by_header(given: Concept) -> Concept:
    """What the header of a concept's file says; nothing if it cannot be read, which the call will say that needs it."""
    path, words = local_path(given.lora or ""), (None, None)
    try:
        words = read_words(path)
    except (LoraError, OSError) as error:
        logger.debug("%s is added without words: %s", path, error)
    return Concept(name=given.name, trigger=words[0], class_word=words[1], weight=1.0)


def _loaded_concept(concept: Concept, read: Read) -> LoadedConcept:
    """A concept with the factors of its file, which says what is not given."""
    known = Concept(name=concept.name, trigger=read.file.trigger, class_word=read.file.class_word, weight=1.0)
    return LoadedConcept(_filled(concept, known), read.factors, read.file)


def _same_source(concept: Concept, loaded: Concept) -> bool:
    """Whether a concept's LoRA is the one that has been loaded, at the same strength."""
    return concept.lora == loaded.lora and concept.alpha in (None, loaded.alpha)


def _filled(concept: Concept, known: Concept) -> Concept:
    """A concept whose missing fields come from what is known."""
    given = {name: value for name, value in concept if value is not None}
    return known.model_copy(update=given)


def _adapters(pipe: Any) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}
