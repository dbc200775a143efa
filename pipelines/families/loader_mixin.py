"""Concepts of a pipeline: load or add them once, then name them in calls."""

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download

from lora_compose.attention import BankCache
from lora_compose.pipelines.concepts.concept_set import LoadedConcept
from lora_compose.pipelines.concepts.finding import find_file, local_path
from lora_compose.pipelines.concepts.library import Addable, ConceptLibrary, adapters_of
from lora_compose.pipelines.concepts.tags import has_tags, take_tags
from lora_compose.pipelines.formats.change import MAX_RANK
from lora_compose.pipelines.scene.given import is_set
from lora_compose.pipelines.scene.scene import Concept, ConceptNames, concepts_of
from lora_compose.pipelines.scene.sources import files_of
from lora_compose.pipelines.scene.strength import Weight
from lora_compose.pipelines.support.notes import warn
from lora_compose.pipelines.support.spelling import did_you_mean
from lora_compose.pipelines.text.missing import tell_words
from lora_compose.pipelines.text.selection import choose_concepts

HUB_OPTIONS = frozenset(signature(hf_hub_download).parameters) - {"repo_id", "filename"}
"""Arguments of `hf_hub_download` besides the names of repository and file."""

logger = logging.getLogger(__name__)

AUTO = "auto"
"""`concepts="auto"`: the concepts that the prompts name."""


class ConceptLoaderMixin:
    """Loads concepts' LoRAs into a pipeline."""

    # What diffusers' pipelines have.
    get_list_adapters: Any
    __call__: Any

    concept_memory: int = 2 * 2**30
    """Bytes of added LoRAs that stay in memory between calls. Those of `load_concept` always stay and do not count."""

    @property
    def library(self) -> ConceptLibrary:
        """The loaded and the added concepts, and the files read recently."""
        return self.__dict__.setdefault("_concept_library", ConceptLibrary())

    @property
    def banks(self) -> BankCache:
        """LoRAs that calls have brought to where the model runs, kept for the next calls."""
        return self.__dict__.setdefault("_banks", BankCache(limit=2**29))

    @property
    def bank_memory(self) -> int:
        """Bytes of LoRAs that stay on the device between calls, so that the same concepts need not be copied again."""
        return self.banks.limit

    @bank_memory.setter
    def bank_memory(self, limit: int) -> None:
        self.banks.limit = limit
        self.banks.trim()

    @property
    def concepts(self) -> Mapping[str, Concept]:
        """The loaded and the added concepts by name."""
        return self.library.concepts

    def load_concept(
        self,
        source: str | Path | Sequence[str | Path],
        name: str | None = None,
        *,
        merge: str | None = None,
        trigger: str | None = None,
        class_word: str | None = None,
        weight: Weight = 1.0,
        blocks: Mapping[str, float] | None = None,
        any_weight: bool = False,
        region: Any = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        role: Literal["subject", "style"] | None = None,
        references: bool | None = None,
        alpha: float | None = None,
        weight_name: str | None = None,
        max_rank: int = MAX_RANK,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Concept:
        """Loads a concept's LoRA; it acts only in calls that name it.

        Args:
            source: A safetensors file, a folder, or a hub repository; or several that are merged, each with its weight
                if that is not 1: ["cat.safetensors", "style.safetensors:0.7"].
            name: What the concept is called; the file's name by default.
            merge: How several files are merged (`Concept.merge`); `ssr`, `iteris` and `soups` make images with each.
            trigger: The rare word or words; taken from the file if it names them. Otherwise a warning lists candidates
                from its captions.
            class_word: The noun after the trigger; taken from the file if it names it.
            weight: Factor on the whole LoRA, or a schedule of it (`Concept.weight`).
            blocks: Further factors, by block of the model (`Concept.blocks`).
            any_weight: Whether weights may be beyond 10 and -10.
            region: Where it may appear, unless a call gives another region (`Concept.region`).
            prompt: The text of its region (`Concept.prompt`).
            negative_prompt: What to avoid there (`Concept.negative_prompt`).
            role: "subject", or "style" for a concept that acts everywhere.
            references: Whether it acts on reference images, too (`Concept.references`); taken from the file if it says
                that it was trained with some.
            alpha: Alpha for a file without one; the LoRA is scaled by alpha / rank.
            weight_name: The file inside a folder or repository that has several.
            max_rank: LoHa, LoKr and full weight differences are exact up to this rank, and cut to it beyond.
            allow_pickle: Also opens files of `torch.save`: their tensors are read, no code is run.
            hub: Passed on to `huggingface_hub` (token, revision, cache_dir, ...).

        Raises:
            LoraError: If the file is unusable or does not fit the model.
            ValueError: If the name is taken, or a field does not fit.
            TypeError: For unknown arguments.
        """
        if unknown := hub.keys() - HUB_OPTIONS:
            own = signature(ConceptLoaderMixin.load_concept).parameters.keys() - {"self", "hub"}
            name = sorted(unknown)[0]
            raise TypeError(f"load_concept has no argument {name!r}{did_you_mean(name, sorted(own | HUB_OPTIONS))}")
        given: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
        for file in given:
            local_path(file)  # refuses what names no file
        lora = tuple(map(str, given)) if isinstance(source, list | tuple) else str(source)
        concept = Concept(
            name=name or _stems(lora), lora=lora, merge=merge, trigger=trigger, class_word=class_word,
            weight=weight, blocks=blocks if blocks is None else dict(blocks), any_weight=any_weight or None,
            region=region, prompt=prompt,
            negative_prompt=negative_prompt, role=role, references=references, alpha=alpha,
        )  # fmt: skip
        self.library.check_new(self, concept.name)
        paths = [find_file(source, weight_name, **hub) for source in files_of(lora)]
        loaded = self.library.load(self, concept, paths, max_rank=max_rank, allow_pickle=allow_pickle)
        tell_words(self.library.loaded[loaded.name], concept)
        return loaded

    def add_concepts(self, source: Addable) -> tuple[Concept, ...]:
        """Adds LoRA files as concepts without reading their weights; the first call that names one reads and checks it.

        Only headers are read, for triggers and class words; a damaged file is reported by the call that needs it. Files
        stay in memory up to `concept_memory` bytes, and the least recently used are dropped first. A file that changed
        on disk is read again. Adding a folder again adds its new files.

        Args:
            source: A folder, whose safetensors files are added under their own names; or files; or `Concept` objects
                or their fields, also by name, {"cat": {"lora": "cat.safetensors", "trigger": "sks"}}. What is in a hub
                repository is downloaded now.

        Returns:
            The added concepts.

        Raises:
            LoraError: If there is no such file or folder, or none in it; or if the model hub does not give it.
            ValueError: If a name is taken by another concept; nothing is added then.
        """
        return self.library.add(self, source)

    def unload_concept(self, name: str) -> None:
        """Removes a concept that was loaded or added; raises ValueError if there is none of that name."""
        loaded = self.library.loaded.get(name)
        self.library.unload(name)
        if loaded is not None:
            self.banks.forget(loaded.factors.handle)

    def resolve_concepts(self, concepts: ConceptNames) -> tuple[LoadedConcept, ...]:
        """The concepts of a call with their factors; given fields override loaded ones.

        Args:
            concepts: Names of loaded concepts or adapters, `Concept` objects or their fields; or by name (`fields_of`).

        Raises:
            ValueError: For unknown names and names given twice.
        """
        return self.library.resolve(self, concepts, self.concept_memory)

    def named_concepts(self, prompt: Any, concepts: Any) -> tuple[Any, Any]:
        """Prompts and concepts of a call: "auto" becomes the loaded and added concepts that the prompts name.

        If a prompt names one only by its class word, its trigger is inserted before that (`choose_concepts`).

        Args:
            concepts: As given to the call; they stay what they are, but for "auto" and for what tags of a prompt add.

        Raises:
            ValueError: If there is no prompt, a trigger means several concepts, or a prompt names none.
        """
        if concepts != AUTO:
            return self._with_tagged(prompt, concepts)
        if not prompt:
            raise ValueError(f"concepts={AUTO!r} reads the prompt, and there is none; name the concepts")
        choices = [choose_concepts(text, self.concepts) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        for choice in choices:
            logger.info("concepts: %s", "; ".join(choice.reasons))
            for note in choice.notes:
                warn(note)
        prompts = [choice.prompt for choice in choices]
        if isinstance(prompt, str):
            return prompts[0], choices[0].concepts
        return prompts, [choice.concepts for choice in choices]

    def _with_tagged(self, prompt: Any, concepts: Any) -> tuple[Any, Any]:
        """Prompts without tags such as `<lora:cat:0.8>`, and the concepts with those that they name."""
        texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list | tuple) else []
        if not any(map(has_tags, texts)):
            return prompt, concepts
        taken = [take_tags(text, {*self.concepts, *adapters_of(self)}) for text in texts]
        given: Any = [concepts] if isinstance(concepts, str | Concept) else concepts or []
        each = given if any(map(is_set, given)) else [given] * len(texts)
        if len(each) != len(texts):
            raise ValueError(f"there are concepts for {len(each)} prompts, but {len(texts)} prompts")
        sets = []
        for (_, weights), concept_set in zip(taken, each, strict=True):
            named = concepts_of(concept_set)
            if twice := weights.keys() & {concept.name for concept in named}:
                raise ValueError(f"{sorted(twice)[0]!r} is in concepts and has a tag in the prompt; leave out one")
            sets.append([*named, *(Concept(name=name, weight=weight) for name, weight in weights.items())])
        plain = [text for text, _ in taken]
        return (plain[0], sets[0]) if isinstance(prompt, str) else (plain, sets)


def _stems(lora: str | tuple[str, ...]) -> str:
    """The default name of a concept: the names of its files."""
    return "+".join(local_path(source).stem for source in files_of(lora))
