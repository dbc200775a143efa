"""The concepts of a call with the factors of their LoRAs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from lora_compose.attention import BankCache, KeptBanks, Lora
from lora_compose.attention.bank_cache import PASSING, Handle
from lora_compose.attention.device import modules_of
from lora_compose.pipelines.concepts.loading import Factors, LoraFile
from lora_compose.pipelines.formats.keys import Part
from lora_compose.pipelines.formats.rank_schedule import RankSchedule
from lora_compose.pipelines.formats.triggers import Words
from lora_compose.pipelines.scene.scene import Concept
from lora_compose.pipelines.scene.strength import TEXT, WeightSchedule, check_block, in_blocks, is_in
from lora_compose.pipelines.support.notes import warn_once

NO_LORA = Factors({})
"""The factors of a bystander."""


@dataclass(frozen=True)
class LoadedConcept:
    """A concept with the factors of its LoRA.

    Attributes:
        concept: All its fields; weight is set, to 0 for a bystander.
        factors: Its LoRA, matched to the pipeline's models.
        files: Where it came from: a file, or several that were merged; none for an adapter loaded by
            `load_lora_weights`, and for a bystander.
        limits: Factors on layers of the model, which keep a joint change within a limit.
    """

    concept: Concept
    factors: Factors
    files: tuple[LoraFile, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained_with(self) -> str | None:
        """How the LoRA was trained ("tara"), from the file's metadata; None if merged files differ in it."""
        methods = {file.metadata.get("method") for file in self.files}
        return methods.pop() if len(methods) == 1 else None

    @property
    def words(self) -> Words:
        """The words that the LoRA's file names; of several files those of the first."""
        return self.files[0].words if self.files else Words()

    @property
    def lora(self) -> Lora:
        """The LoRA's factors for the model, with the factors on blocks applied."""
        lora = in_blocks(self.factors.model, self.concept.blocks)
        if not self.limits:
            return lora
        return {name: replace(part, scale=part.scale * self.limits.get(name, 1.0)) for name, part in lora.items()}

    def handle(self, part: Part) -> Handle:
        """A key for its LoRA of one model, good for one call, since an adapter may be changed before the next."""
        blocks = self.concept.blocks or {}
        if not self.files and not self.concept.is_bystander:
            return PASSING, self.factors.handle
        if part != self.factors.part:
            return self.factors.handle, part, ()
        return self.factors.handle, part, tuple(sorted(blocks.items())), *sorted(self.limits.items())


def check_blocks(loaded: LoadedConcept, model: nn.Module) -> None:
    """Checks factors on blocks, and warns of unchanged ones. Raises ValueError if the model has no such block."""
    name, factors = loaded.concept.name, loaded.factors
    layers = modules_of(model) if loaded.concept.blocks else ()
    for block in loaded.concept.blocks or {}:
        if block == TEXT:
            changed = bool(factors.text_encoders)
        else:
            check_block(name, block, layers)
            changed = any(is_in(layer, block) for layer in factors.model)
        if not changed:
            warn_once(f"the LoRA of {name!r} changes nothing in {block}, so a factor there has no effect")


class ByConcept(Protocol):
    """Values by concept: gates, or text with its token masks."""

    def scatter_concepts(self, columns: Sequence[int], concepts: int) -> Self:
        """The values as columns of a larger concept set; the other columns are 0."""
        ...


ByConceptT = TypeVar("ByConceptT", bound=ByConcept)


@dataclass(frozen=True)
class ConceptSet:
    """The concepts that act together in an image.

    Attributes:
        columns: Their indices among all concepts of the call, whose LoRAs are installed; None means that they are all.
        whole: All concepts of the call; None means that these are all.
    """

    loaded: tuple[LoadedConcept, ...]
    columns: tuple[int, ...] | None = None
    whole: "ConceptSet | None" = None

    def subset(self, columns: Sequence[int]) -> "ConceptSet":
        """A set of some of the concepts, in this order."""
        if list(columns) == list(range(len(self.loaded))):
            return self
        return ConceptSet(tuple(self.loaded[i] for i in columns), tuple(columns), self)

    @cached_property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts without their factors."""
        return tuple(loaded.concept for loaded in self.loaded)

    @cached_property
    def schedules(self) -> Mapping[int, WeightSchedule]:
        """Weight schedules, by index, of concepts whose weight changes over the steps."""
        every = {i: WeightSchedule.of(0.0 if c.weight is None else c.weight) for i, c in enumerate(self.concepts)}
        return {i: schedule for i, schedule in every.items() if schedule.constant is None}

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """The weights of the concepts; 1 for a schedule, which the denoiser multiplies into the gates in every step."""
        every = [WeightSchedule.of(0.0 if c.weight is None else c.weight).constant for c in self.concepts]
        return tuple(1.0 if fixed is None else fixed for fixed in every)

    @property
    def installed(self) -> int:
        """How many LoRAs are installed."""
        return len((self.whole or self).loaded)

    def kept(self, part: Part, banks: BankCache) -> KeptBanks | None:
        """Where the LoRAs of one model are kept between calls; None if all are adapters, which are read anew."""
        if all(not loaded.files for loaded in self.loaded if not loaded.concept.is_bystander):
            return None
        return KeptBanks(banks, tuple(loaded.handle(part) for loaded in self.loaded))

    @cached_property
    def subjects(self) -> tuple[int, ...]:
        """Indices of subjects."""
        return tuple(i for i, concept in enumerate(self.concepts) if not concept.is_style)

    @cached_property
    def with_loras(self) -> tuple[int, ...]:
        """Indices of subjects that have a LoRA."""
        return tuple(i for i in self.subjects if not self.concepts[i].is_bystander)

    @cached_property
    def styles(self) -> tuple[int, ...]:
        """Indices of styles."""
        return tuple(i for i, concept in enumerate(self.concepts) if concept.is_style)

    def weights_of(self, chosen: Collection[int]) -> Tensor:
        """The weights of some concepts, 0 for the others. On the CPU. Shape: [concepts]."""
        return torch.tensor([weight if i in chosen else 0.0 for i, weight in enumerate(self.weights)])

    def with_styles(self, chosen: Collection[int]) -> Tensor:
        """The weights of some subjects and of all styles, which act beside each of them. Shape: [concepts]."""
        return self.weights_of({*chosen, *self.styles})

    @cached_property
    def rank_schedules(self) -> Mapping[int, RankSchedule]:
        """How many ranks act at which noise, by index, of T-LoRAs."""
        every = {i: loaded.factors.ranks for i, loaded in enumerate(self.loaded)}
        return {i: schedule for i, schedule in every.items() if schedule is not None}

    @property
    def changing(self) -> Collection[int]:
        """Indices of concepts whose LoRA is not the same in all steps."""
        return self.schedules.keys() | self.rank_schedules.keys()

    def step_ranks(self, timestep: float, trained: int) -> tuple[int | None, ...]:
        """How many ranks of each concept act at a timestep; None is all, and nothing all of every concept.

        Args:
            trained: How many timesteps the model was trained with.
        """
        if not self.rank_schedules:
            return ()
        acting = {i: schedule.at(timestep, trained) for i, schedule in self.rank_schedules.items()}
        return tuple(acting.get(i) for i in range(len(self.loaded)))

    def step_weights(self, step: int, steps: int) -> tuple[float, ...]:
        """Factors on the gates in one step: scheduled weights, 1 for the others."""
        return tuple(self.schedules[i].at(step, steps) if i in self.schedules else 1.0 for i in range(len(self.loaded)))

    def text_factors(self, acting: Sequence[bool], steps: int) -> Tensor:
        """Factors on the text encoders' LoRAs. Text is encoded once, so a schedule is replaced by its mean.

        Args:
            acting: True for concepts that take part.

        Returns:
            Shape: [concepts].
        """
        factors = []
        for i, (acts, loaded) in enumerate(zip(acting, self.loaded, strict=True)):
            schedule, blocks = self.schedules.get(i), loaded.concept.blocks or {}
            mean = 1.0 if schedule is None else schedule.mean(max(1, steps))
            if schedule is not None and acts and loaded.factors.text_encoders:
                warn_once(
                    f"the text is encoded once, so the text-encoder part of {loaded.concept.name!r} has the mean "
                    f"weight of its schedule, {mean:.3g}, in all steps"
                )
            factors.append(mean * blocks.get(TEXT, 1.0))
        return torch.tensor(factors)

    def scatter(self, values: ByConceptT) -> ByConceptT:
        """Values of these concepts as values of all installed ones; other concepts get 0."""
        return values if self.columns is None else values.scatter_concepts(self.columns, self.installed)
