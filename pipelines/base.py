"""What every composing pipeline has in common: opening models, holding concepts, the denoising loop."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pipelines.engine import Engine, LoadedConcept
from pipelines.formats.deltas import MAX_RANK
from pipelines.loading import adapter_factors, find_file, match, read_lora
from pipelines.methods import Process, Settings, choose_method, make_method
from pipelines.scene import Concept, check_names, check_region

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

    _plain_class_name: ClassVar[str]

    unet: Any
    scheduler: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Opens a folder or hub repository; all options of diffusers are passed on.

        Raises:
            ValueError: For model families that are not supported.
        """
        if cls is not ComposePipeline:
            return super().from_pretrained(pretrained_model_name_or_path, **options)  # pyright: ignore[reportAttributeAccessIssue]
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        config = DiffusionPipeline.load_config(str(pretrained_model_name_or_path), **hub)
        return _family(config).from_pretrained(pretrained_model_name_or_path, **options)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_single_file(cls, link_or_path: str | Path, **options: Any) -> Any:
        """Opens a checkpoint in one file (SD 1.x or 2.x); all options of diffusers are passed on."""
        if cls is not ComposePipeline:
            return super().from_single_file(str(link_or_path), **options)  # pyright: ignore[reportAttributeAccessIssue]
        from pipelines.stable_diffusion import ComposeStableDiffusionPipeline

        return ComposeStableDiffusionPipeline.from_single_file(str(link_or_path), **options)

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
        return _family(pipeline.config).from_pipe(pipeline, **options)

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
        weight: float = 1.0,
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
            weight: Factor on the whole LoRA.
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
            name=name or Path(source).stem, lora=str(source), trigger=trigger, class_word=class_word, weight=weight,
            alpha=alpha,
        )  # fmt: skip
        if concept.name in self._loaded or concept.name in _adapters(self):
            raise ValueError(
                f"there is a concept or adapter {concept.name!r} already; unload it or choose another name"
            )
        loaded = self._read(concept, weight_name, max_rank=max_rank, allow_pickle=allow_pickle, **hub)
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

    def _read(
        self,
        concept: Concept,
        weight_name: str | None = None,
        *,
        max_rank: int = MAX_RANK,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> LoadedConcept:
        file = read_lora(find_file(concept.lora or "", weight_name, **hub), allow_pickle=allow_pickle)
        factors = match(file, self, alpha=concept.alpha, max_rank=max_rank)
        if not factors.complete:
            logger.warning("%s: %s", file.path.name, factors.report)
        known = Concept(name=concept.name, trigger=file.trigger, class_word=file.class_word, weight=1.0)
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
        if concept.lora is not None and (loaded is None or not _same_source(concept, loaded.concept)):
            return self._read(concept)
        if loaded is not None:
            if concept.alpha is not None and concept.alpha != loaded.concept.alpha:
                raise ValueError(f"concept {concept.name!r} was loaded with another alpha; give it to load_concept")
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

    def denoise(
        self,
        engine: Engine,
        process: Process,
        latents: Tensor,
        timesteps: Tensor,
        num_inference_steps: int,
        extra_step_kwargs: Mapping[str, Any],
        callback_on_step_end: Callable | None,
        callback_tensors: Sequence[str],
    ) -> Tensor:
        """The loop, the same for every method: step, scheduler step, callback, progress. Returns the final latents."""
        order = self.scheduler.order
        warmup = len(timesteps) - num_inference_steps * order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:  # pyright: ignore[reportAttributeAccessIssue]
            latents = process.prepare(latents)
            engine.cost.preparation_seconds = time.perf_counter() - engine.started
            for i, t in enumerate(timesteps):
                if self.interrupt:  # pyright: ignore[reportAttributeAccessIssue]
                    continue
                engine.step = i
                latents, model_output = process.step(latents, t)
                latents = self.scheduler.step(model_output, t, latents, **extra_step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = self._call_back(callback_on_step_end, callback_tensors, engine, i, t, latents)
                if i == len(timesteps) - 1 or (i + 1 > warmup and (i + 1) % order == 0):
                    progress_bar.update()
        return latents

    def _call_back(
        self, callback: Callable, tensors: Sequence[str], engine: Engine, i: int, t: Tensor, latents: Tensor
    ) -> Tensor:
        text = engine.conditioning
        uncond = text.prompt_embeds[: text.images] if text.guided else None
        offered = {"latents": latents, "prompt_embeds": text.prompt_embeds, "negative_prompt_embeds": uncond}
        given = {name: offered[name] for name in tensors}
        returned = callback(self, i, t, dict(given))
        was_guided, engine.guidance_scale = engine.guided, self.guidance_scale  # pyright: ignore[reportAttributeAccessIssue]
        changed = {name for name, value in returned.items() if value is not offered.get(name)} - {"latents"}
        if changed and not (changed == {"prompt_embeds"} and was_guided and not engine.guided):
            raise ValueError(
                f"the callback changed {', '.join(sorted(changed))}; with concepts it may change latents or switch "
                "guidance off, since the places of the concepts' words in other embeddings are unknown"
            )
        return returned.get("latents", latents)


def _same_source(concept: Concept, loaded: Concept) -> bool:
    """Whether a concept's LoRA is the one that has been loaded, at the same strength."""
    return concept.lora == loaded.lora and concept.alpha in (None, loaded.alpha)


def _filled(concept: Concept, known: Concept) -> Concept:
    """A concept whose missing fields come from what is known."""
    given = {name: value for name, value in concept if value is not None}
    return known.model_copy(update=given)


def _adapters(pipe: Any) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}


def _family(config: Mapping[str, Any]) -> type[ComposePipeline]:
    """The pipeline class for a model's configuration (model_index.json)."""
    from pipelines.stable_diffusion import ComposeStableDiffusionPipeline

    if "unet" in config and "text_encoder" in config and "text_encoder_2" not in config:
        return ComposeStableDiffusionPipeline
    raise ValueError(
        f"this is a model for {config.get('_class_name', 'an unknown pipeline')}; supported so far: Stable Diffusion "
        "1.x and 2.x"
    )


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
