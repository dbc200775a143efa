"""The methods that fuse concepts: one paper, one file. `METHODS` lists them, `choose_method` chooses one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.process import Settings
from lora_compose.pipelines.methods.clora import Clora
from lora_compose.pipelines.methods.composite import Composite
from lora_compose.pipelines.methods.draft import Draft
from lora_compose.pipelines.methods.freefuse import FreeFuse
from lora_compose.pipelines.methods.lora_composer import LoraComposer
from lora_compose.pipelines.methods.merge import Merge
from lora_compose.pipelines.methods.regional import Regional
from lora_compose.pipelines.methods.switch import Switch
from lora_compose.pipelines.methods.tara import Tara
from lora_compose.pipelines.scene.method_choice import method_for
from lora_compose.pipelines.support.notes import warn
from lora_compose.pipelines.support.spelling import did_you_mean
from lora_compose.pipelines.text.missing import Described, missing_words
from lora_compose.pipelines.text.tokens import own_nouns

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
    "freefuse": FreeFuse,
}

PRESETS: Mapping[str, Callable[[], Settings]] = {
    "tara:official": Tara.official,
    "lora-composer:official": LoraComposer.official,
    "lora-composer:paper": LoraComposer.paper,
    "clora:official": Clora.official,
    "freefuse:official": FreeFuse.official,
    "freefuse:official-flux": FreeFuse.official_flux,
}
"""The authors' settings, by preset name."""


def make_method(method: "str | Settings", settings: Mapping[str, Any] | None = None) -> Settings:
    """A settings object from a method's name.

    Args:
        method: A name of `METHODS` or `PRESETS`, or settings, which are returned as they are.
        settings: Fields that differ from the defaults, or from the preset.

    Raises:
        ValueError: For unknown methods and settings; the message lists those that exist.
    """
    if not isinstance(method, str):
        if isinstance(method, type) or not isinstance(method, Settings):
            raise ValueError(
                f"method must be one of {', '.join(METHODS)} or a settings object, whose class extends Settings, not "
                f"{method!r}"
            )
        return method
    make = METHODS.get(method) or PRESETS.get(method)
    if make is None:
        known = (*METHODS, *PRESETS)
        raise ValueError(f"unknown method {method!r}; there are {', '.join(known)}{did_you_mean(method, known)}")
    defaults = make()
    fields = _fields(defaults)
    unknown = (settings or {}).keys() - fields.keys()
    if unknown:
        near = did_you_mean(sorted(unknown)[0], fields)
        raise ValueError(f"{method} has no settings {sorted(unknown)}; it has {', '.join(fields) or 'none'}{near}")
    return type(defaults)(**{**fields, **(settings or {})})


def name_of(settings: Settings) -> tuple[str, dict[str, Any]]:
    """A method's name and the fields that differ from its defaults; `make_method` reverses it.

    For a class that is not in `METHODS`: its class name and all fields.
    """
    name = next((name for name, kind in METHODS.items() if type(settings) is kind), type(settings).__name__)
    if name not in METHODS:
        return name, _fields(settings)
    defaults = _fields(METHODS[name]())
    return name, {field: value for field, value in _fields(settings).items() if value != defaults[field]}


def _fields(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in getattr(settings, "__dataclass_fields__", {})}


ASKED_FOR = "it was asked for"
"""The reason for a method that was not chosen."""


@dataclass(frozen=True)
class Choice:
    """The method of a call, and the reason for the choice."""

    method: Settings
    reason: str


def choose_method(
    concepts: Sequence[Described],
    prompts: Sequence[str] | None,
    concept_sets: Sequence[ConceptSet] | None = None,
) -> Choice:
    """Chooses the method of a call that names none. Logs the reason, as a warning if subjects will blend.

    Several subjects that the prompt names by trigger and class word get Draft, with regions or without. Otherwise
    regions get Regional, and without regions LoRAs that were trained with token masks (TARA) get them; ordinary ones
    lose more identities by them than they keep apart (figures in `docs/methods`). Styles do not count beside subjects;
    styles alone get token masks if all were trained with them.

    Args:
        prompts: Prompts of the call; None with `prompt_embeds`.
        concept_sets: The concept set of each prompt; None means all concepts for every prompt.
    """
    loaded_subjects = [loaded for loaded in concepts if not loaded.concept.is_style]
    subjects = [loaded.concept for loaded in loaded_subjects]
    subjects_of: Sequence[Sequence[Described]] = [loaded_subjects] * len(prompts or [()])
    if concept_sets:
        subjects_of = [[concept_set.loaded[i] for i in concept_set.subjects] for concept_set in concept_sets]
    several, lacks = max(map(len, subjects_of)) > 1, _lacking(prompts, subjects_of)
    trained = [loaded for loaded in loaded_subjects if not loaded.concept.is_bystander]
    relevant = trained or (concepts if prompts is not None else ())  # with styles alone, they decide
    name, reason = method_for(
        [(subject.name, bool(subject.region)) for subject in subjects],
        styles=len(subjects) < len(concepts), several=several, lacks=lacks,
        trained=bool(relevant) and all(loaded.trained_with == "tara" and loaded.concept.trigger for loaded in relevant),
    )  # fmt: skip
    choice = Choice(METHODS[name](), reason)
    if name == "merge" and several:
        region = f", such as Concept(name={subjects[0].name!r}, region=(0, 0, 0.5, 1))"
        unless = "unless each has a region" if prompts is None else f"unless that is done, or each has a region{region}"
        warn(f"method: merge, because {reason}. Its subjects blend, {unless}")
        return choice
    if name == "regional" and (others := ", ".join(subject.name for subject in subjects if not subject.region)):
        warn(f"without a region, {others} acts on the whole image, also inside the regions of others")
    logger.info("method: %s, because %s", name, reason)
    return choice


def _lacking(prompts: Sequence[str] | None, subjects_of: Sequence[Sequence[Described]]) -> str:
    """What Draft lacks to find the subjects of each prompt; empty if nothing."""
    if prompts is None:
        return "prompt_embeds are given instead of a prompt"
    lacking = [
        missing_words(subject, prompt)
        for prompt, subjects in zip(prompts, subjects_of, strict=True)
        for subject in subjects
        if not own_nouns(subject.concept, prompt, [other.concept for other in subjects])
    ]
    return "; ".join(dict.fromkeys(lacking))
