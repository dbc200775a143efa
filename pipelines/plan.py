"""A call, checked and resolved: everything that can be checked before something is changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lora_compose.attention import backbone_of, install
from lora_compose.pipelines.attention_log import AttentionLog
from lora_compose.pipelines.call import Call, check_call, of_prompt, steps_to_record
from lora_compose.pipelines.canvas import Canvas, images_of
from lora_compose.pipelines.concepts.concept_set import ConceptSet, LoadedConcept, check_blocks
from lora_compose.pipelines.concepts.textual_inversion import Expanding, Words
from lora_compose.pipelines.control import PreparedControl, prepare_control
from lora_compose.pipelines.denoiser import Denoiser
from lora_compose.pipelines.guidance import Guider
from lora_compose.pipelines.methods import Settings
from lora_compose.pipelines.sampler import Sampler
from lora_compose.pipelines.scene import Concept
from lora_compose.pipelines.session import Session
from lora_compose.pipelines.text.conditioning import TokenMasks, agreed
from lora_compose.pipelines.text.encoder import Encoder, Finder, PromptEncoder, Prompts


@dataclass(frozen=True)
class PromptsOfSet:
    """The prompts that have one concept set.

    Attributes:
        concepts: The concept set.
        places: Indices of the prompts.
        token_masks: Where the words of the set's concepts are in them.
    """

    concepts: ConceptSet
    places: tuple[int, ...]
    token_masks: TokenMasks


@dataclass(frozen=True)
class Plan:
    """A call that can be run.

    Attributes:
        call: What was asked.
        method: The method.
        concepts: All concepts.
        sets: The concept sets, each with its prompts.
        canvas: Sizes.
        words: Words that LoRA files bring with them.
        finder: Finds words in prompts.
        controls: Prepared ControlNets and T2I-Adapters.
    """

    call: Call
    method: Settings
    concepts: ConceptSet
    sets: Sequence[PromptsOfSet]
    canvas: Canvas
    words: Words
    finder: Finder
    controls: Sequence[PreparedControl]

    @contextmanager
    def installed(self, pipe: Any) -> Iterator[Callable[[Encoder, Sampler], "Sessions"]]:
        """The LoRAs are in the denoiser inside this block, and nowhere after it.

        Args:
            pipe: The pipeline.

        Yields:
            Opens the sessions of the call, given the pipeline's encoder and the scheduler with its timesteps.
        """
        model: Any = self.canvas.backbone.model
        names = [concept.name for concept in self.concepts.concepts]
        with install(
            self.canvas.backbone,
            [loaded.lora for loaded in self.concepts.loaded],
            device=self.canvas.device,
            dtype=model.dtype,
            silence=names,
        ) as installation:

            def sessions(encode: Encoder, sampler: Sampler) -> Sessions:
                steps = len(sampler.schedule.timesteps)
                log = AttentionLog(self.canvas, steps_to_record(self.call.composition.record_attention, steps))
                denoiser = Denoiser(
                    self.canvas.backbone, installation, sampler, self.canvas, self.concepts, self.controls,
                    self.call.inputs, log,
                )  # fmt: skip
                encoder = PromptEncoder(
                    self.concepts, pipe.components, self.words.read_by(pipe, encode), self.canvas, steps
                )
                return Sessions(denoiser, [self._session(one, denoiser, encoder) for one in self.sets])

            yield sessions

    def _session(self, one: PromptsOfSet, denoiser: Denoiser, encoder: PromptEncoder) -> Session:
        texts = self.call.prompts.first
        prompts = Prompts(
            None if texts is None else tuple(texts[place] for place in one.places),
            one.token_masks, one.concepts, encoder, self.finder, one.places, self.canvas,
        )  # fmt: skip
        if len(self.sets) > 1:
            denoiser = denoiser.of_set(one.concepts, images_of(one.places, self.canvas.images_per_prompt))
        return Session(one.concepts, prompts, denoiser, Guider(self.call.sampling.guidance.rescale))


@dataclass(frozen=True)
class Sessions:
    """The sessions of a call, one for each concept set, and the denoiser of all of them."""

    denoiser: Denoiser
    each: Sequence[Session]


def make_plan(pipe: Any, call: Call) -> Plan:
    """Checks and resolves a call.

    Args:
        pipe: The pipeline.
        call: What is asked.

    Raises:
        ValueError: For anything that does not fit together.
    """
    loaded, columns = resolve_sets(pipe, call)
    check_call(call, loaded)
    for found in loaded:
        check_blocks(found, pipe.denoiser)
    concepts = ConceptSet(loaded)
    _check_positions(call, concepts)
    sets = [concepts.subset(mine) for mine in columns]
    method = pipe.resolve_method(call.composition.method, loaded, call.prompts.first, sets)
    backbone = backbone_of(pipe.denoiser)
    if getattr(method, "needs_region_attention", False) and not backbone.reads_regions:
        raise ValueError(
            "this method needs region attention, which this model does not support yet; use merge, tara or regional"
        )
    words = Words.of(loaded, pipe.components)
    tokenizers = expanding(pipe, words, call.prompts.length)
    places: dict[tuple[int, ...], list[int]] = {}
    for prompt, mine in enumerate(columns):
        places.setdefault(tuple(mine), []).append(prompt)
    of_sets = [
        PromptsOfSet(sets[mine[0]], tuple(mine), _token_masks(call, tokenizers, sets[mine[0]].concepts, mine))
        for mine in places.values()
    ]
    size, scale = call.size, pipe.vae_scale_factor
    canvas = Canvas(
        (size.height, size.width), (size.height // scale, size.width // scale), len(call.prompts),
        size.images_per_prompt, pipe._execution_device, backbone,
    )  # fmt: skip
    regions = [{concept.name: concept.region for concept in one.concepts} for one in sets]
    ready = [prepare_control(control, pipe.denoiser, canvas, regions) for control in call.composition.controls]
    finder = partial(_find, tokenizers)
    controls = [control for control in ready if not control.control.is_off]
    return Plan(call, method, concepts, of_sets, canvas, words, finder, controls)


def _check_positions(call: Call, concepts: ConceptSet) -> None:
    unknown = (call.composition.token_positions or {}).keys() - {concept.name for concept in concepts.concepts}
    if unknown:
        raise ValueError(f"token_positions names {sorted(unknown)}, which are not among the concepts of this call")


def resolve_sets(pipe: Any, call: Call) -> tuple[tuple[LoadedConcept, ...], list[list[int]]]:
    """All concepts of a call, and by prompt the indices of its own.

    A concept that is the same in several prompts is one; with another weight or region it is another.

    Raises:
        ValueError: For mixtures of concepts and lists of them, and another number of lists than prompts.
    """
    given: Any = call.composition.concepts
    given = [given] if isinstance(given, str | Concept) else given
    prompts = len(call.prompts)
    if not any(isinstance(entry, list | tuple) for entry in given):
        every = pipe.resolve_concepts(call.composition.concepts)
        return every, [list(range(len(every)))] * prompts
    if not all(isinstance(entry, list | tuple) for entry in given):
        raise ValueError("concepts are those of all prompts, or a list for each prompt, but not a mixture of both")
    if len(given) != prompts:
        raise ValueError(f"there are concepts for {len(given)} prompts, but {prompts} prompts")
    found: dict[Concept, LoadedConcept] = {}
    columns = []
    for mine in map(pipe.resolve_concepts, given):
        for loaded in mine:
            found.setdefault(loaded.concept, loaded)
        columns.append([list(found).index(loaded.concept) for loaded in mine])
    return tuple(found.values()), columns


def expanding(pipe: Any, words: Words, length: int | None = None) -> Sequence[Expanding]:
    """The tokenizers of the denoiser's text as they read prompts, with the words that LoRA files bring.

    Args:
        pipe: The pipeline.
        words: Those words.
        length: Tokens of an encoded text; None means as many as the tokenizer says.
    """
    expand = words.expander(pipe)
    return [
        Expanding(found, expand, length) for name, found in words.tokenizers.items() if name in pipe.text_tokenizers
    ]


def _token_masks(
    call: Call, tokenizers: Sequence[Expanding], concepts: Sequence[Concept], places: Sequence[int]
) -> TokenMasks:
    """Where the words of a concept set are in its prompts."""
    if len(places) == len(call.prompts):
        return _masks_of(call, tokenizers, concepts)
    parts, prompts = [], call.prompts
    for place in places:
        here = slice(place, place + 1)
        positions = of_prompt(call.composition.token_positions, concepts, place, len(prompts))
        one = replace(
            prompts,
            texts=None if prompts.texts is None else [text[here] for text in prompts.texts],
            embeds=None if prompts.embeds is None else prompts.embeds[here],
        )
        composition = replace(call.composition, token_positions=positions)
        parts.append(_masks_of(replace(call, prompts=one, composition=composition), tokenizers, concepts))
    return TokenMasks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("trigger", "phrase")))


def _masks_of(call: Call, tokenizers: Sequence[Expanding], concepts: Sequence[Concept]) -> TokenMasks:
    positions, embeds = call.composition.token_positions, call.prompts.embeds
    if embeds is not None:
        return TokenMasks.of_positions(positions or {}, embeds.shape[0], embeds.shape[1], concepts)
    if positions is not None:
        raise ValueError("token_positions go with prompt_embeds; with a prompt, words are found by their triggers")
    elsewhere = {concept.name for concept in concepts if concept.prompt is not None}
    return find_in(tokenizers, concepts, call.prompts.texts or (), optional=elsewhere)


def _find(
    tokenizers: Sequence[Expanding], concepts: Sequence[Concept], prompts: Sequence[str], names: Any, mentions: Any
) -> TokenMasks:
    """A `Finder` for texts that all tokenizers read."""
    return find_in(tokenizers, concepts, [prompts] * len(tokenizers), names=names, mentions=mentions)


def find_in(
    tokenizers: Sequence[Expanding], concepts: Sequence[Concept], texts: Sequence[Sequence[str]], **how: Any
) -> TokenMasks:
    """Where words are, which has to be the same for all tokenizers, since their features are put side by side."""
    found = [
        TokenMasks.of_prompts(tokenizer, prompts, concepts, **how)
        for tokenizer, prompts in zip(tokenizers, texts, strict=True)
    ]
    return agreed(found, concepts)
