"""What a call would do, for people and programs that ask before they make an image (`pipe.plan`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lora_compose.pipelines.calls.counting import CountingRunner
from lora_compose.pipelines.calls.resolved_call import ResolvedCall
from lora_compose.pipelines.denoising import concept_sets
from lora_compose.pipelines.denoising.process import Process
from lora_compose.pipelines.images.output import Cost
from lora_compose.pipelines.methods import Choice, name_of
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.support.notes import kept


@dataclass(frozen=True)
class PlannedConcept:
    """A concept of a call, with everything that is known of it.

    Attributes:
        concept: The concept; its region is in pixels of what is worked on.
        trigger: Positions of its trigger's tokens, by index of the prompt; prompts that do not have it are left out.
        phrase: Positions of trigger and class word, or of the words that name it; by prompt, as `trigger`.
    """

    concept: Concept
    trigger: Mapping[int, tuple[int, ...]]
    phrase: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class CallPlan:
    """The method, regions, steps, cost and warnings of a call, known before it runs; making it has changed nothing.

    Attributes:
        choice: The method with its settings, and the reason for the choice.
        concepts: The concepts with their words.
        image_size: Height and width in pixels of what is worked on.
        latent_grid: Height and width of the latents.
        images: Images in the batch.
        steps: Denoising steps.
        passes: Timesteps: a scheduler of second order has two for most steps.
        warnings: What is allowed but may surprise.
        resolved: The call with everything that it was resolved to, for programs that price its passes.
        started: The method, started on texts without values, and what counts its passes.
    """

    choice: Choice
    concepts: tuple[PlannedConcept, ...]
    image_size: tuple[int, int]
    latent_grid: tuple[int, int]
    images: int
    steps: int
    passes: int
    warnings: tuple[str, ...]
    resolved: ResolvedCall = field(repr=False)
    started: tuple[Process, CountingRunner] = field(repr=False, compare=False)

    @classmethod
    def of(cls, resolved: ResolvedCall, warnings: list[str]) -> "CallPlan":
        """From a resolved call, on which the method is started without models.

        Args:
            warnings: Warnings so far; those of the method are added.

        Raises:
            ValueError: If the concepts lack something the method needs.
        """
        started = _started(resolved)
        canvas, schedule = resolved.canvas, resolved.sampler.schedule
        concepts = tuple(_planned(resolved, column) for column in range(len(resolved.concepts.loaded)))
        return cls(
            resolved.choice, concepts, canvas.image_size, canvas.latent_grid, canvas.images, schedule.steps,
            len(schedule.timesteps), tuple(warnings), resolved, started,
        )  # fmt: skip

    @property
    def method(self) -> str:
        """The name of the method."""
        return name_of(self.choice.method)[0]

    @property
    def guided(self) -> bool:
        """Whether rows are for guidance: it is on, and neither an input of the model nor distilled into it."""
        return self.resolved.cfg_scale > 1

    @property
    def regions(self) -> Mapping[str, tuple[float, float, float, float] | str]:
        """The regions by concept: boxes in pixels, or mask images."""
        regions = {planned.concept.name: planned.concept.region for planned in self.concepts}
        return {name: region for name, region in regions.items() if region is not None}

    @cached_property
    def cost(self) -> Cost:
        """The rows that the call will run, counted without running the model.

        Where the number depends on values, as with updates that end when a loss is small, it is the most.
        """
        resolved, (process, runner) = self.resolved, self.started
        schedule, latents = resolved.sampler.schedule, torch.zeros(self.images, 1, *self.latent_grid)
        with kept(), torch.no_grad(), torch.random.fork_rng(devices=[]):  # the call itself warns
            latents = process.prepare(latents, schedule.step(0, resolved.cfg_scale))
            for index in range(len(schedule.timesteps)):
                latents, _ = process.step(latents, schedule.step(index, resolved.cfg_scale))
        return runner.cost


def _started(resolved: ResolvedCall) -> tuple[Process, CountingRunner]:
    """The method, started on texts without values."""
    runner = CountingRunner.of(resolved)
    with torch.no_grad():
        sessions = [resolved.session(part, runner, runner.encode) for part in resolved.sets]
        return concept_sets.start(resolved.choice.method.start, sessions, runner), runner


def _planned(resolved: ResolvedCall, column: int) -> PlannedConcept:
    trigger: dict[int, tuple[int, ...]] = {}
    phrase: dict[int, tuple[int, ...]] = {}
    for part in resolved.sets:
        columns = part.concepts.columns or tuple(range(len(part.concepts.loaded)))
        if column not in columns:
            continue
        for positions, masks in ((trigger, part.token_masks.trigger), (phrase, part.token_masks.phrase)):
            positions.update(_positions(masks[..., columns.index(column)], part.indices))
    concept = resolved.concepts.concepts[column]
    return PlannedConcept(concept, dict(sorted(trigger.items())), dict(sorted(phrase.items())))


def _positions(masks: Tensor, prompts: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """By prompt, the positions of the tokens in a mask, if there are any. Shape: [prompts, tokens]."""
    positions = {prompt: tuple(mask.nonzero().flatten().tolist()) for prompt, mask in zip(prompts, masks, strict=True)}
    return {prompt: indices for prompt, indices in positions.items() if indices}
