"""The interface of a method: settings that start a process, which lives for one call."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from types import NoneType
from typing import Literal, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from lora_compose.attention import Gates, SitePart
from lora_compose.pipelines.concepts.concept_set import ConceptSet
from lora_compose.pipelines.denoising.passes import Pass, weighted_mean
from lora_compose.pipelines.denoising.prepared_pass import PreparedPass
from lora_compose.pipelines.denoising.session import Session
from lora_compose.pipelines.denoising.together import Together, each_subject
from lora_compose.pipelines.scene.canvas import Canvas, Step
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.notes import warn
from lora_compose.pipelines.text.conditioning import Conditioning
from lora_compose.pipelines.text.missing import Described


class Process(Protocol):
    """A method at work on one call. It installs nothing itself."""

    @property
    def text(self) -> Conditioning:
        """The text that callbacks see."""
        ...

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Called once, before the loop, with the first step; returns the latents to start from."""
        ...

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One step; returns (latents, model output), which both go to the scheduler."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a method needs of the model and the call, so that calls that lack it are refused before anything changes.

    Attributes:
        region_attention: Cross-attention that reads a text for each region: that of UNets and Anima.
        gradients: Gradients of the latents, which `torch.inference_mode` has not.
        start_noise: Latents that are noise at the start, since the method moves patches of it.
    """

    region_attention: bool = False
    gradients: bool = False
    start_noise: bool = False


@runtime_checkable
class Settings(Protocol):
    """A method with its settings: a frozen dataclass that extends this class."""

    @property
    def needs(self) -> Needs:
        """What the method needs with these settings; by default nothing."""
        return Needs()

    def acting_together(self, concepts: ConceptSet, canvas: Canvas) -> Sequence[Together]:
        """The concepts that act on the same positions; by default each subject with all styles."""
        return each_subject(concepts)

    def check_concepts(self, concepts: Sequence[Described], prompts: Sequence[str] | None) -> None:
        """Raises ValueError for concepts without the words or regions that the method needs; by default it needs none.

        No model is needed for it, so that commands can ask before they open one.

        Args:
            concepts: One concept set.
            prompts: Its prompts, without marks of weights; None with `prompt_embeds`.
        """

    def start(self, session: Session) -> Process:
        """Checks what the method needs, encodes the prompts and returns the process for one concept set.

        Raises:
            ValueError: If the concepts lack something the method needs.
        """
        ...


def check_choices(settings: Settings) -> None:
    """Raises ValueError for settings that are none of the words that their types list, or no number."""
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, not {value!r}")
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        may_lack = get_args(hint) == (float, NoneType)
        if (hint is float or may_lack) and not (isinstance(value, Real) or (may_lack and value is None)):
            raise ValueError(f"{name} must be a number, not {value!r}")


def check_limit(limit: float | None) -> None:
    """Raises ValueError for a limit of the joint change that is none."""
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"limit must be positive, or None for none, not {limit}")


def check_regions(method: str, concepts: Sequence[Described]) -> None:
    """Raises ValueError if there are subjects, and no concept has a region."""
    every = [each.concept for each in concepts]
    if not all(concept.is_style for concept in every) and all(concept.region is None for concept in every):
        raise ValueError(
            f"{method} needs to know where the concepts are: give at least one a region, for example "
            "Concept(name='cat', region=(left, top, right, bottom)) in pixels"
        )


ActingRows = Literal["cond_only", "all"]
"""Where LoRAs act under guidance: on conditional rows, or on all rows."""


def acting_rows(text: Conditioning, which: ActingRows) -> Tensor:
    """1 on the rows on which LoRAs act. Shape: [rows, 1, 1], on the CPU."""
    acting = torch.ones(text.rows, 1, 1)
    if which == "cond_only":
        acting[text.roles.unconditional] = 0
    return acting


WeightedPass = tuple[Pass, float]
"""A pass, and the weight of its prediction in the mean of a step."""


@dataclass(frozen=True)
class FixedPasses:
    """The process of methods whose passes are known before the first step, and that do not update latents.

    The prediction of a step is the weighted mean over the passes of one turn.

    Attributes:
        turns: The passes of every turn; their weights add up to 1.
        interval: Steps per turn, after which the next one begins.
        first: Part of the steps that the first of two turns takes, whose passes have the texts and gates of the second;
            None takes turns by `interval`.
        constant: Layers whose gates are the same on all rows and positions, to be folded into the model.
        constant_weights: The gate of each concept in those layers.
        text_for_callbacks: The text that callbacks see; None means that of the first pass.
    """

    session: Session
    turns: Sequence[Sequence[WeightedPass]]
    interval: int = 1
    first: float | None = None
    constant: Sequence[SitePart] = ()
    constant_weights: Sequence[float] = ()
    text_for_callbacks: Conditioning | None = None

    @property
    def text(self) -> Conditioning:
        """The text of the first pass, or the one that callbacks see instead."""
        return self.turns[0][0][0].text if self.text_for_callbacks is None else self.text_for_callbacks

    def turn(self, step: Step) -> int:
        """Index of the turn that a step belongs to."""
        if self.first is not None:
            return int(not step.within(self.first))
        return step.index // self.interval % len(self.turns)

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Folds layers with constant gates."""
        self.session.denoiser.fold(self.constant, self.constant_weights)
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The passes of this turn, one after the other, so that memory does not grow with their number."""
        prepared = self._prepared[self.turn(step)]
        predictions = [self.session.denoiser.predict(latents, step, handle) for handle, _ in prepared]
        prediction = weighted_mean(predictions, [weight for _, weight in prepared])
        return latents, self.session.guider.combine(prediction, step)

    @cached_property
    def _prepared(self) -> Mapping[int, Sequence[tuple[PreparedPass, float]]]:
        prepare, turns = self.session.denoiser.prepare, {}
        for i, turn in enumerate(self.turns):
            alike = [handle for handle, _ in turns[0]] if i and self.first is not None else [None] * len(turn)
            turns[i] = [(prepare(spec, kept), weight) for (spec, weight), kept in zip(turn, alike, strict=True)]
        return turns


@dataclass(frozen=True)
class ImageByImage:
    """Processes of images that cannot go through the model together, one after the other; callbacks see `text`."""

    processes: Sequence[Process]
    text: Conditioning

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Prepares the process of each image."""
        return torch.cat([process.prepare(latents[i : i + 1], first) for i, process in enumerate(self.processes)])

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """A step of the process of each image."""
        steps = [process.step(latents[i : i + 1], step) for i, process in enumerate(self.processes)]
        moved, outputs = zip(*steps, strict=True)
        return torch.cat(moved), torch.cat(outputs)


@dataclass(frozen=True)
class InTurn:
    """Processes that take turns once: each up to a part of the steps, the last to the end; callbacks see `text`.

    Attributes:
        phases: Each process, and the part of the steps up to which it runs, in ascending order; the last is 1.
    """

    phases: Sequence[tuple[float, Process]]
    text: Conditioning

    def prepare(self, latents: Tensor, first: Step) -> Tensor:
        """Prepares all of them."""
        for _, process in self.phases:
            latents = process.prepare(latents, first)
        return latents

    def step(self, latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """A step of the process whose turn it is."""
        return next(process for until, process in self.phases if step.within(until)).step(latents, step)


def subject_pass(session: Session, chosen: Sequence[int]) -> Pass:
    """A pass in which one subject's LoRA and those of the styles act, everywhere.

    The text is encoded with the text-encoder part of those LoRAs and the subject's own negative prompt.
    """
    weights = session.concepts.with_styles(chosen)
    texts = [session.concepts.concepts[i].negative_prompt for i in chosen]
    negatives = [texts[0]] * len(session.prompts.indices) if texts and texts[0] is not None else None
    text = session.prompts.encode(weights, negative_prompts=negatives)
    return Pass(text, constant_gates(session, weights))


def warn_unread_by_passes(session: Session) -> None:
    """Warns of concepts' own prompts that methods with a pass for each subject do not use."""
    styles = [session.concepts.concepts[i] for i in session.concepts.styles]
    why = "each pass has the scene's prompt and its subject's negative prompt"
    warn_unread(session.concepts.concepts, styles, why)


def one_text(session: Session, weights: Tensor | None = None) -> Conditioning:
    """The scene's prompts, one text for all concepts; warns of concepts' own prompts, which are not used.

    Args:
        weights: Weights of the concepts' text-encoder LoRAs; None leaves them out. Shape: [concepts].
    """
    concepts = session.concepts.concepts
    warn_unread(
        concepts,
        concepts,
        "this method has one text for all; on UNets and Anima method='lora-composer' has one for each region",
    )
    return session.prompts.encode(weights)


def warn_unread(prompts: Sequence[Concept], negatives: Sequence[Concept], why: str) -> None:
    """Warns of concepts' own prompts that a method does not use.

    Args:
        prompts: Concepts whose own prompt is not used.
        negatives: Concepts whose own negative prompt is not used.
        why: The prompt that is used instead.
    """
    unread = [c.name for c in prompts if c.prompt is not None]
    unread += [c.name for c in negatives if c.negative_prompt is not None]
    if unread:
        warn(f"the own prompts of {', '.join(dict.fromkeys(unread))} are not read: {why}")


def constant_gates(session: Session, weights: Tensor) -> Gates:
    """Gates that are the same on all rows, tokens and cells: a weight per concept. Shape: [concepts]."""
    canvas = session.canvas
    gate = weights.to(canvas.device)[None]
    return Gates(
        text=gate[:, None], image=dict.fromkeys(canvas.levels, gate[:, None]), row=gate, latent_grid=canvas.latent_grid
    )
