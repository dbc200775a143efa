"""How concepts are fused: one paper, one file. `METHODS` is the registry; nothing else asks for a method by name."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept
from lora_compose.pipelines.methods.clora import Clora
from lora_compose.pipelines.methods.composite import Composite
from lora_compose.pipelines.methods.draft import Draft
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.process import FixedPasses, Process, Settings
from lora_compose.pipelines.methods.regional import Regional
from lora_compose.pipelines.methods.switch import Switch
from lora_compose.pipelines.methods.tara import Tara
from lora_compose.pipelines.scene import Concept
from lora_compose.pipelines.text.tokens import own_nouns

__all__ = [
    "METHODS",
    "PRESETS",
    "Clora",
    "Composite",
    "Draft",
    "FixedPasses",
    "LoraComposer",
    "Merge",
    "Process",
    "Regional",
    "Settings",
    "Switch",
    "Tara",
    "choose_method",
    "make_method",
    "name_of",
]

logger = logging.getLogger(__name__)

METHODS: Mapping[str, type[Settings]] = {
    "merge": Merge,
    "tara": Tara,
    "regional": Regional,
    "switch": Switch,
    "composite": Composite,
    "lora-composer": LoraComposer,
    "clora": Clora,
    "draft": Draft,
}

PRESETS: Mapping[str, Callable[[], Settings]] = {
    "tara:official": Tara.official,
    "lora-composer:official": LoraComposer.official,
    "lora-composer:paper": LoraComposer.paper,
    "clora:official": Clora.official,
}
"""Settings of the authors, by name."""


def make_method(method: "str | Settings", settings: Mapping[str, Any] | None = None) -> Settings:
    """A settings object from a method's name.

    Args:
        method: A name of `METHODS` or `PRESETS`, or settings, which are returned as they are.
        settings: Fields that differ from the defaults, or from the preset.

    Raises:
        ValueError: For unknown methods and settings; the message lists those that exist.
    """
    if not isinstance(method, str):
        if isinstance(method, type) or not callable(getattr(method, "start", None)):
            raise ValueError(f"method must be one of {', '.join(METHODS)} or a settings object, not {method!r}")
        return method
    make = METHODS.get(method) or PRESETS.get(method)
    if make is None:
        raise ValueError(f"unknown method {method!r}; there are {', '.join((*METHODS, *PRESETS))}")
    made = make()
    fields = _fields(made)
    unknown = (settings or {}).keys() - fields.keys()
    if unknown:
        raise ValueError(f"{method} has no settings {sorted(unknown)}; it has {', '.join(fields) or 'none'}")
    return type(made)(**{**fields, **(settings or {})})


def name_of(settings: Settings) -> tuple[str, dict[str, Any]]:
    """A method's name, and the fields that differ from its defaults: what `make_method` makes it of again."""
    name = next(name for name, kind in METHODS.items() if type(settings) is kind)
    defaults = _fields(METHODS[name]())
    return name, {field: value for field, value in _fields(settings).items() if value != defaults[field]}


def _fields(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in getattr(settings, "__dataclass_fields__", {})}


def choose_method(
    concepts: Sequence[LoadedConcept],
    prompts: Sequence[str] | None,
    concept_sets: Sequence[ConceptSet] | None = None,
    *,
    region_attention: bool = True,
) -> Settings:
    """The method for a call that names none; logs the reason.

    With a region for every subject LoRA-Composer works best, and without regions a draft finds them; both need words,
    to write texts of their own. Token masks serve LoRAs that were trained with them; on ordinary ones they lose more
    identities than they separate (`docs/methods` has the figures). Styles do not count beside subjects; alone they get
    token masks if all of them were trained with them.

    Args:
        concepts: Those of the call.
        prompts: Its prompts; None if it was given embeddings.
        concept_sets: The concept set of each prompt; None means all concepts for every prompt.
        region_attention: Whether the model supports region attention, which lora-composer needs, and draft where two
            subjects share a class word.
    """
    given = [loaded for loaded in concepts if not loaded.concept.is_style]
    subjects = [loaded.concept for loaded in given]
    if subjects and all(subject.region for subject in subjects):
        who = "subject" if len(subjects) < len(concepts) else "concept"
        if region_attention and prompts is not None and all(subject.trigger for subject in subjects):
            logger.info("method: lora-composer, because every %s has a region", who)
            return LoraComposer()
        why = "there are embeddings instead of a prompt" if prompts is None else "not every one a trigger"
        why = why if region_attention else "this model does not support region attention yet"
        logger.info("method: regional, because every %s has a region, and %s", who, why)
        return Regional()
    asked = given or (concepts if prompts is not None else ())  # styles alone decide for themselves
    if asked and all(loaded.trained_with == "tara" and loaded.concept.trigger for loaded in asked):
        logger.info("method: tara, because every concept was trained for it")
        return Tara()
    sets = concept_sets or [ConceptSet(tuple(concepts))] * len(prompts or [()])
    subjects_of = [[one.concepts[i] for i in one.subjects] for one in sets]
    unnamed = _unnamed(subjects_of, prompts)
    if max(map(len, subjects_of)) > 1 and not region_attention:
        logger.warning(
            "method: merge, because this model has neither lora-composer nor clora yet; subjects blend, unless each "
            "has a region (regional) or a LoRA trained with TARA (tara)"
        )
        return Merge()
    if max(map(len, subjects_of)) > 1 and not unnamed:
        logger.info("method: draft, because the prompt names every concept by trigger and class word")
        return Draft()
    reason = f"{', '.join(unnamed)} is not named by trigger and class word" if unnamed else _few(subjects)
    logger.info("method: merge, because %s", reason)
    return Merge()


def _few(subjects: Sequence[Concept]) -> str:
    if len(subjects) > 1:
        return "no prompt has several subjects"
    return "there is one subject" if subjects else "styles act everywhere"


def _unnamed(subjects_of: Sequence[Sequence[Concept]], prompts: Sequence[str] | None) -> list[str]:
    """Subjects whose prompt lacks their trigger followed by their class word."""
    texts: Sequence[str | None] = prompts or [None] * len(subjects_of)
    unnamed = [
        subject.name
        for prompt, subjects in zip(texts, subjects_of, strict=True)
        for subject in subjects
        if prompt is None or not own_nouns(subject, prompt, subjects)
    ]
    return list(dict.fromkeys(unnamed))
