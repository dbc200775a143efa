"""What a method is: settings that start a process, and a process that lives for one call."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention import Gates
from attention.layers import Kind
from pipelines.conditioning import Conditioning
from pipelines.engine import Engine
from pipelines.notes import say_once
from pipelines.scene import Concept

__all__ = [
    "Alone",
    "OnePass",
    "Process",
    "Settings",
    "acting",
    "constant_gates",
    "each_alone",
    "one_text",
    "say_once",
    "say_unread",
]

logger = logging.getLogger(__name__)


class Process(Protocol):
    """A method at work on one call. It installs nothing itself."""

    def prepare(self, latents: Tensor) -> Tensor:
        """Once, before the loop, with the concepts installed; returns the latents to start from."""
        ...

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One step; returns (latents, model output), which both go to the scheduler."""
        ...


@runtime_checkable
class Settings(Protocol):
    """A method with its settings: a frozen dataclass."""

    def start(self, engine: Engine) -> Process:
        """Checks what the method needs, encodes the prompts and returns the process for this call.

        Raises:
            ValueError: If the concepts lack something the method needs.
        """
        ...


@dataclass(frozen=True)
class OnePass:
    """The process of methods that need one UNet pass per step and the same gates throughout.

    Attributes:
        engine: Runs the UNet.
        conditioning: The text.
        gates: How strongly each concept acts where.
        constant: Kinds of layers whose gates are the same on all rows and positions, to be folded into the model.
        constant_weights: Those gates, one per concept.
    """

    engine: Engine
    conditioning: Conditioning
    gates: Gates
    constant: Sequence[Kind] = ()
    constant_weights: Sequence[float] = ()

    def prepare(self, latents: Tensor) -> Tensor:
        """Folds what is constant."""
        self.engine.fold(self.constant, self.constant_weights)
        return latents

    def step(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """One pass with guidance."""
        return latents, self.engine.guide(self.engine.unet(latents, t, self.conditioning, self.gates))


@dataclass(frozen=True)
class Alone:
    """What a UNet pass needs in which one subject's LoRA and those of the styles act, everywhere, and no others.

    Attributes:
        conditioning: The text, encoded with those LoRAs' text-encoder factors, and the subject's own negative prompt.
        gates: The weights of subject and styles, 0 at the others.
    """

    conditioning: Conditioning
    gates: Gates


def each_alone(engine: Engine) -> list[Alone]:
    """What passes with one subject each need, in the order of the subjects; one pass where there are styles only."""
    concepts, styles = engine.concepts, [concept for concept in engine.concepts if concept.is_style]
    say_unread(concepts, styles, "each pass has the scene's prompt, and its subject's negative prompt")
    return [_alone(engine, subject) for subject in engine.subjects or (None,)]


def _alone(engine: Engine, subject: int | None) -> Alone:
    weights = acting(engine, subject)
    negative = None if subject is None else engine.concepts[subject].negative_prompt
    negatives = None if negative is None else [negative] * len(engine.token_masks.trigger)
    return Alone(engine.encode(weights, negative_prompts=negatives), constant_gates(engine, weights))


def acting(engine: Engine, subject: int | None) -> list[float]:
    """The weights of one subject, if any, and of the styles, which act beside all of them; 0 for the others."""
    return [
        weight if concept.is_style or i == subject else 0.0
        for i, (concept, weight) in enumerate(zip(engine.concepts, engine.weights, strict=True))
    ]


def one_text(engine: Engine, weights: Sequence[float] | None = None) -> Conditioning:
    """The scene's prompts, read by all concepts; says whose own ones are not read.

    Args:
        engine: Encodes.
        weights: Of the concepts' text-encoder factors; None leaves them out.
    """
    say_unread(
        engine.concepts,
        engine.concepts,
        "this method has one text for all; method='lora-composer' has one for each region",
    )
    return engine.encode(weights)


def say_unread(prompts: Sequence[Concept], negatives: Sequence[Concept], why: str) -> None:
    """Says whose own prompts a method does not read.

    Args:
        prompts: Concepts whose own prompt is not read.
        negatives: Concepts whose own negative prompt is not read.
        why: What is read instead.
    """
    unread = [c.name for c in prompts if c.prompt is not None]
    unread += [c.name for c in negatives if c.negative_prompt is not None]
    if unread:
        logger.warning("the own prompts of %s are not read: %s", ", ".join(dict.fromkeys(unread)), why)


def constant_gates(engine: Engine, weights: Sequence[float]) -> Gates:
    """Gates that are the same at all tokens, cells and rows: one number per concept."""
    gate = torch.tensor(weights, device=engine.device)
    return Gates(
        text=gate[None, None],
        image=dict.fromkeys(engine.levels, gate[None, None]),
        row=gate[None],
        latent_grid=engine.latent_grid,
    )
