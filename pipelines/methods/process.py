"""What a method is: settings that start a process, and a process that lives for one call."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lora_compose.attention import Gates
from lora_compose.attention.layers import Kind
from lora_compose.pipelines.conditioning import Conditioning
from lora_compose.pipelines.engine import Engine
from lora_compose.pipelines.notes import say_once
from lora_compose.pipelines.scene import Concept

__all__ = [
    "Alone",
    "OnePass",
    "Process",
    "Settings",
    "acting",
    "alone",
    "constant_gates",
    "one_text",
    "say_once",
    "say_unread",
    "say_unread_by_passes",
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


def alone(engine: Engine, chosen: Sequence[Sequence[int]]) -> Alone:
    """What a pass needs in which every prompt has one of its subjects, or none, beside its styles.

    Args:
        engine: Encodes the prompts.
        chosen: By prompt, the subject.
    """
    weights = acting(engine, chosen)
    conditioning = engine.encode(weights, negative_prompts=_own_negatives(engine, chosen))
    return Alone(conditioning, constant_gates(engine, weights, conditioning))


def acting(engine: Engine, chosen: Sequence[Sequence[int]]) -> Tensor:
    """The weights of some subjects and of the styles, which act beside all of them; 0 for the others.

    Args:
        engine: Knows the weights.
        chosen: By prompt, the subjects.

    Returns:
        Shape: [prompts or 1, concepts].
    """
    return engine.weights_of([(*mine, *styles) for mine, styles in zip(chosen, engine.styles_of, strict=True)])


def _own_negatives(engine: Engine, chosen: Sequence[Sequence[int]]) -> list[str] | None:
    """The own negative prompt of the subject of a pass; None is the scene's."""
    own = [engine.concepts[i].negative_prompt for one in chosen for i in one]
    given = [negative for negative in own if negative is not None]
    return given if len(given) == len(chosen) and not engine.differ else None


def say_unread_by_passes(engine: Engine) -> None:
    """Says whose own prompts are not read by methods with a pass for each subject."""
    unread = [concept for concept in engine.concepts if concept.is_style or engine.differ]
    why = "each pass has the scene's prompt, and its subject's negative prompt if all prompts have the same concepts"
    say_unread(engine.concepts, unread, why)


def one_text(engine: Engine, weights: Tensor | None = None) -> Conditioning:
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


def constant_gates(engine: Engine, weights: Tensor, conditioning: Conditioning) -> Gates:
    """Gates that are the same at all tokens and cells.

    Args:
        engine: Knows the rows of every prompt.
        weights: One number per concept. Shape: [prompts or 1, concepts].
        conditioning: The text of all rows.
    """
    gate = engine.by_row(weights, conditioning)
    return Gates(
        text=gate[:, None],
        image=dict.fromkeys(engine.levels, gate[:, None]),
        row=gate,
        latent_grid=engine.latent_grid,
    )
